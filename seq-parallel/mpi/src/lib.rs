//! Ranks as processes of an MPI job: the transport of [`seq_parallel`] over a real MPI, and the engine on it.
//!
//! A package of its own, outside the workspace, because it needs an MPI with its headers (Debian: `libopenmpi-dev openmpi-bin`) and
//! libclang to build; the repository's README has the commands. `mpirun -n 4 engine-mpi demo` is the engine's demo with every prompt shared by four processes.
//!
//! # Example
//!
//! ```no_run
//! use seq_parallel::transport::Transport;
//! use seq_parallel_mpi::Mpi;
//! # fn main() -> Result<(), seq_parallel::Error> {
//! let mut end = Mpi::start()?; // MPI_Init; once in a process
//! let sum = end.reduce_scatter(&vec![1.0; end.ranks()], &vec![1; end.ranks()])?;
//! assert_eq!(sum, [end.ranks() as f32]);
//! end.close() // MPI_Finalize
//! # }
//! ```
//!
//! # Faults
//!
//! As every transport, this one makes every surviving rank return an error that names the rank that failed, and the step, within the
//! deadline. Plain `mpirun` kills all processes as soon as one dies, before they can say anything; `mpirun --enable-recovery` lets them.
//! A process that is gone is noticed at once on its own host, by the process table, elsewhere at the deadline. After a fault the job is
//! over: a process should exit, which it can do without `MPI_Finalize`, that would wait for the dead. A call of MPI that hangs cannot be
//! broken off: a thread watches over `MPI_Init` and the first meeting, the tests of requests inside of waits, and `MPI_Finalize`, and ends the
//! process, exit handlers aside, with a line on standard error. Calls that start a send or a receive, and those that read and send notices
//! between waits, are not watched: they return at once in an MPI that keeps its word.

mod alive;
mod calls;
mod notice;
mod number;
mod transport;
mod watchdog;

pub use transport::Mpi;
