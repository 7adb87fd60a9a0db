//! The suite that every transport passes, on 2, 3 and 4 processes: collectives, counters, every scheme against the oracle, pauses.

mod support;

use seq_parallel::testing::conform;
use seq_parallel_mpi::Mpi;

fn suite(test: &str, ranks: usize) {
    support::on_ranks(test, ranks, |_| {
        let mut end = Mpi::start().unwrap();
        conform(&mut end);
        end.close().unwrap();
    });
}

#[test]
fn one_process_conforms() {
    suite("one_process_conforms", 1);
}

#[test]
fn two_processes_conform() {
    suite("two_processes_conform", 2);
}

#[test]
fn three_processes_conform() {
    suite("three_processes_conform", 3);
}

#[test]
fn four_processes_conform() {
    suite("four_processes_conform", 4);
}

/// MPI is initialised once in a process.
#[test]
fn a_process_has_one_end() {
    support::on_ranks("a_process_has_one_end", 1, |_| {
        let end = Mpi::start().unwrap();
        let error = Mpi::start().map(drop).unwrap_err().to_string();
        assert!(error.contains("initialised already"), "{error}");
        end.close().unwrap();
    });
}
