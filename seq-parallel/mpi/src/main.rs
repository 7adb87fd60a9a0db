//! `mpirun -n P engine-mpi …`: the engine's command line, with every prompt shared by P processes. The first of them speaks.
//!
//! A rank that waits longer than 60 s for another gives up, and one whose start takes longer; `LONGKV_DEADLINE_MS` sets another deadline.

use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longkv_engine::cli::{self, Host};
use longkv_engine::kv::{self, KvCache, ShardedKv};
use longkv_engine::mode::Mode;
use longkv_engine::ranks::{self, Choice, Holdings, Ranks, Sharing, Single, extend_sharded, prefill_shared};
use longkv_engine::{Error, Model};
use seq_parallel::PeerFault;
use seq_parallel::transport::{DEADLINE, Operation, Tag, Transport};
use seq_parallel_mpi::Mpi;

/// This process's end: the ranks of every session use it in turn.
static END: Mutex<Option<Mpi>> = Mutex::new(None);

fn end() -> MutexGuard<'static, Option<Mpi>> {
    END.lock().unwrap_or_else(PoisonError::into_inner)
}

fn main() -> ExitCode {
    let mut deadline = DEADLINE;
    if let Some(text) = std::env::var_os("LONGKV_DEADLINE_MS") {
        match text.to_str().and_then(|text| text.parse().ok()).filter(|ms| *ms > 0) {
            Some(ms) => deadline = Duration::from_millis(ms),
            None => {
                eprintln!("error: LONGKV_DEADLINE_MS: expected milliseconds, found {text:?}");
                return ExitCode::from(2);
            }
        }
    }
    let mpi = match Mpi::start_within(deadline) {
        Ok(mpi) => mpi,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let host = Host { name: "engine-mpi", open, ranks: mpi.ranks(), speaks: mpi.rank() == 0, refused };
    *end() = Some(mpi);
    let code = cli::main(host);
    let Some(mpi) = end().take() else { return code };
    if code != ExitCode::SUCCESS {
        return code;
    }
    match mpi.close() {
        Ok(()) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Tells the other processes why this one stops. The first says it; another only says what the first does not: it waits until the first
/// stops, too, or waits for others, for it goes on then.
fn refused(message: &str) -> Option<String> {
    let mut end = end();
    let Some(end) = end.as_mut() else { return Some(message.to_string()) };
    let (rank, at) = (end.rank(), Tag::new(Operation::Barrier, 0));
    let (start, deadline) = (Instant::now(), end.deadline());
    while rank != 0 && start.elapsed() < deadline {
        match end.check() {
            // Notices are short, and may cut a reason off.
            Err(seq_parallel::Error::Peer { peer: 0, fault: PeerFault::Aborted(reason), .. })
                if message.starts_with(&reason) =>
            {
                // mpirun ends the first with whoever leaves before it.
                while !end.is_gone(0) && start.elapsed() < deadline {
                    std::thread::sleep(Duration::from_millis(5));
                }
                return None;
            }
            Err(_) => break,
            Ok(()) if end.is_waiting(0) => break,
            Ok(()) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    end.abort(at, message);
    match rank {
        0 => Some(message.to_string()),
        rank => Some(format!("rank {rank}: {message}")),
    }
}

/// The processes of the job as the ranks of a mode.
fn open(mode: &Mode) -> Result<Box<dyn Ranks>, Error> {
    ranks::check(mode)?;
    let count = end().as_ref().map_or(1, Mpi::ranks);
    let sharing = Sharing::new(mode)?;
    if sharing.ranks() != count {
        let reason = format!("ranks: this job has {count} processes, not {}", sharing.ranks());
        return Err(Error::Mode { mode: mode.to_string(), reason });
    }
    if count == 1 && !sharing.is_sharded() {
        return Ok(Box::new(Single));
    }
    Ok(Box::new(Processes { sharing, choice: None }))
}

/// Processes that share a prompt; each has the model, and afterwards all keys and values, or its shard of them.
struct Processes {
    sharing: Sharing,
    choice: Option<Choice>,
}

impl Ranks for Processes {
    fn count(&self) -> usize {
        self.sharing.ranks()
    }

    fn cache(&self, mode: &Mode, model: &Model, capacity: usize) -> Result<Box<dyn KvCache>, Error> {
        self.sharing.check(model.config())?;
        match (self.sharing.is_sharded(), end().as_ref()) {
            (true, Some(end)) => {
                Ok(Box::new(ShardedKv::new(mode, model, capacity, end.ranks(), [end.rank()])?))
            }
            _ => kv::open(mode, model, capacity),
        }
    }

    /// A prompt that continues a cache which is not sharded is computed by every process for itself: only the cache's own method can read
    /// what it holds.
    fn prefill(
        &mut self,
        model: &Model,
        tokens: &[u32],
        kv: &mut dyn KvCache,
    ) -> Result<ndarray::Array1<f32>, Error> {
        if kv.is_empty() {
            let choice = self.sharing.choose(model.config(), tokens.len(), kv.stored())?;
            ranks::remember(&mut self.choice, choice);
        }
        let mut end = end();
        match (end.as_mut(), kv.is_empty()) {
            (Some(end), empty) => match kv.sharded_mut() {
                Some(kv) => extend_sharded(model, &self.sharing, tokens, kv, end),
                None if empty => {
                    prefill_shared(model, &self.sharing, tokens, kv.stored(), end)?.append_to(model, kv)
                }
                None => Single.prefill(model, tokens, kv),
            },
            _ => Single.prefill(model, tokens, kv),
        }
    }

    fn decode(
        &mut self,
        model: &Model,
        token: u32,
        kv: &mut dyn KvCache,
    ) -> Result<ndarray::Array1<f32>, Error> {
        let mut end = end();
        match (end.as_mut(), kv.sharded_mut()) {
            (Some(end), Some(kv)) => extend_sharded(model, &self.sharing, &[token], kv, end),
            _ => Single.decode(model, token, kv),
        }
    }

    fn choice(&self) -> Option<&Choice> {
        self.choice.as_ref()
    }

    fn holdings(&self, kv: &dyn KvCache) -> Option<Holdings> {
        let all = 0..self.count();
        Some(kv.sharded().map_or_else(|| Holdings::gathered(kv, self.count(), all), Holdings::sharded))
    }
}
