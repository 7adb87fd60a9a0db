//! `mpirun -n P engine-mpi …`: the engine's command line, with every prompt shared by P processes. The first of them speaks.
//!
//! A rank that waits longer than 60 s for another gives up, and one whose start takes longer; `LONGKV_DEADLINE_MS` sets another deadline.

use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use longkv_engine::cli::{self, Host};
use longkv_engine::kv::KvCache;
use longkv_engine::mode::Mode;
use longkv_engine::ranks::{self, Choice, Ranks, Sharing, Single, prefill_shared};
use longkv_engine::{Error, Model};
use seq_parallel::transport::{DEADLINE, Transport};
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
    let host = Host { name: "engine-mpi", open, ranks: mpi.ranks(), speaks: mpi.rank() == 0 };
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

/// The processes of the job as the ranks of a mode.
fn open(mode: &Mode) -> Result<Box<dyn Ranks>, Error> {
    ranks::check(mode)?;
    let count = end().as_ref().map_or(1, Mpi::ranks);
    let sharing = Sharing::new(mode)?;
    if sharing.ranks() != count {
        let reason = format!("ranks: this job has {count} processes, not {}", sharing.ranks());
        return Err(Error::Mode { mode: mode.to_string(), reason });
    }
    if count == 1 {
        return Ok(Box::new(Single));
    }
    Ok(Box::new(Processes { sharing, choice: None }))
}

/// Processes that share a prompt; each has the model, and all keys and values afterwards.
struct Processes {
    sharing: Sharing,
    choice: Option<Choice>,
}

impl Ranks for Processes {
    fn count(&self) -> usize {
        self.sharing.ranks()
    }

    /// A prompt that continues a cache is computed by every process for itself: only the cache's own method can read what it holds.
    fn prefill(
        &mut self,
        model: &Model,
        tokens: &[u32],
        kv: &mut dyn KvCache,
    ) -> Result<ndarray::Array1<f32>, Error> {
        let mut end = end();
        match end.as_mut() {
            Some(end) if kv.is_empty() => {
                ranks::remember(&mut self.choice, self.sharing.choose(model.config(), tokens.len())?);
                prefill_shared(model, &self.sharing, tokens, kv.stored(), end)?.append_to(model, kv)
            }
            _ => Single.prefill(model, tokens, kv),
        }
    }

    fn choice(&self) -> Option<&Choice> {
        self.choice.as_ref()
    }
}
