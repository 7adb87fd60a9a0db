//! Runs a test as the ranks of an MPI job: the test starts `mpirun` on its own executable, and what its children find wrong is its failure.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Set in the ranks: where they may leave files.
const FOLDER: &str = "SEQ_PARALLEL_MPI_TEST";

/// Prints why a test does not run; fails it if the environment says that it must.
fn skip(reason: &str) {
    assert!(std::env::var_os("REQUIRE_MPI").is_none_or(|value| value != "1"), "{reason}, and REQUIRE_MPI=1");
    eprintln!("skipped: {reason}");
}

/// `mpirun` as any user, on any number of cores, on this host.
pub(crate) fn mpirun(ranks: usize) -> Option<Command> {
    if let Err(error) = Command::new("mpirun").arg("--version").output() {
        skip(&format!("mpirun does not start ({error})"));
        return None;
    }
    let mut command = Command::new("mpirun");
    command
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMPI_MCA_btl", "self,vader")
        // Copies through shared memory: the other way needs rights that containers do not give.
        .env("OMPI_MCA_btl_vader_single_copy_mechanism", "none")
        .args(["--oversubscribe", "-n", &ranks.to_string()]);
    Some(command)
}

/// Waits for a command, and kills it when it takes longer than `limit`.
pub(crate) fn finish(mut command: Command, limit: Duration) -> Output {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    let readers = [read(child.stdout.take()), read(child.stderr.take())];
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > limit {
            stop(&mut child);
            let [stdout, stderr] = readers.map(|reader| reader.join().unwrap());
            let words = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            panic!("not done after {limit:?}:\n{}{}", words[0], words[1]);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let [stdout, stderr] = readers.map(|reader| reader.join().unwrap());
    Output { status: child.wait().unwrap(), stdout, stderr }
}

fn read(pipe: Option<impl std::io::Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// mpirun passes TERM on to its ranks.
fn stop(child: &mut Child) {
    let _ = Command::new("kill").arg(child.id().to_string()).status();
    std::thread::sleep(Duration::from_secs(1));
    let _ = child.kill();
    let _ = child.wait();
}

/// Runs `body` in each of `ranks` processes; `options` are mpirun's. In the parent, gives what the job wrote and the folder that the
/// ranks were given; in the ranks, and where there is no MPI, nothing. `test` is the name of the calling test.
pub(crate) fn with_ranks(
    test: &str,
    ranks: usize,
    options: &[&str],
    body: impl FnOnce(&Path),
) -> Option<(Output, tempfile::TempDir)> {
    if let Some(folder) = std::env::var_os(FOLDER) {
        body(Path::new(&folder));
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = mpirun(ranks)?;
    command
        .args(options)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder.path());
    let output = finish(command, Duration::from_secs(60));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("running 1 test"), "{test} is not the name of one test:\n{text}");
    Some((output, folder))
}

/// As [`with_ranks`]; every rank must come to a good end.
pub(crate) fn on_ranks(test: &str, ranks: usize, body: impl FnOnce(&Path)) {
    if let Some((output, _)) = with_ranks(test, ranks, &[], body) {
        let words = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        assert!(output.status.success(), "{test}, {ranks} ranks:\n{}{}", words[0], words[1]);
        assert_eq!(words[0].matches("1 passed").count(), ranks, "{test}, {ranks} ranks:\n{}", words[0]);
    }
}
