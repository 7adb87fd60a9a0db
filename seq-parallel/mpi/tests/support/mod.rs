//! Runs a test as the ranks of an MPI job: the test starts `mpirun` on its own executable, and what its children find wrong is its failure.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Set in the ranks: where they may leave files.
const FOLDER: &str = "SEQ_PARALLEL_MPI_TEST";
/// For what ends by itself, on machines whose cores are busy: a test that hangs fails after this.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);

/// Prints why a test does not run; fails it if the environment says that it must.
fn skip(reason: &str) {
    assert!(std::env::var_os("REQUIRE_MPI").is_none_or(|value| value != "1"), "{reason}, and REQUIRE_MPI=1");
    eprintln!("skipped: {reason}");
}

/// Runs a program and leaves its process id and its exit status in a folder, by rank.
const RECORDED: &str = r#"
    "$@" & child=$!
    echo $child > "$SEQ_PARALLEL_MPI_TEST/$OMPI_COMM_WORLD_RANK.pid"
    wait $child; status=$?
    echo $status > "$SEQ_PARALLEL_MPI_TEST/$OMPI_COMM_WORLD_RANK.status"
    exit $status
"#;

/// Makes `mpirun` run a program in every rank, which is given next, and record its process and its exit status in `folder`. The others
/// of a rank that dies go on, which plain mpirun does not let them.
pub(crate) fn record(command: &mut Command, folder: &Path) {
    command.env(FOLDER, folder).args(["--enable-recovery", "sh", "-c", RECORDED, "sh"]);
}

/// The process id of a rank, once it is there.
pub(crate) fn pid(folder: &Path, rank: usize) -> String {
    let start = Instant::now();
    loop {
        match std::fs::read_to_string(folder.join(format!("{rank}.pid"))) {
            Ok(pid) if pid.ends_with('\n') => return pid.trim().to_string(),
            _ => assert!(start.elapsed() < LIMIT, "rank {rank} has not started"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// In a rank: waits until all of `ranks` have come here, by files, so that a rank which fails next finds nobody in what came before.
pub(crate) fn meet(rank: usize, ranks: usize) {
    let folder = std::path::PathBuf::from(std::env::var_os(FOLDER).expect("the parent names it"));
    std::fs::write(folder.join(format!("met.{rank}")), "").unwrap();
    wait_for(&folder, (0..ranks).map(|rank| format!("met.{rank}")));
}

/// Waits until files are there: for what other ranks do meanwhile, however long it takes them.
pub(crate) fn wait_for(folder: &Path, files: impl IntoIterator<Item = String>) {
    let start = Instant::now();
    for file in files {
        while !folder.join(&file).exists() {
            assert!(start.elapsed() < LIMIT, "{file} is not there");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The exit status of a rank that has ended, as a shell gives it: 128 and the signal for one that was killed.
pub(crate) fn status(folder: &Path, rank: usize) -> Option<i32> {
    std::fs::read_to_string(folder.join(format!("{rank}.status"))).ok()?.trim().parse().ok()
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

/// Waits for a command, and kills it when it takes longer than [`LIMIT`].
pub(crate) fn finish(command: Command) -> Output {
    finish_while(command, "", || {})
}

/// As [`finish`]; `when` is called when standard output says `words`, which it must.
pub(crate) fn finish_while(mut command: Command, words: &'static str, when: impl FnOnce()) -> Output {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    let (said, heard) = mpsc::channel();
    let readers = [
        read(child.stdout.take(), move |text| {
            if text.contains(words) {
                // Nobody listens after the first time.
                let _ = said.send(());
            }
        }),
        read(child.stderr.take(), |_| {}),
    ];
    let said = words.is_empty() || heard.recv_timeout(LIMIT).is_ok();
    if said {
        when();
    }
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > LIMIT {
            stop(&mut child);
            let [stdout, stderr] = readers.map(|reader| reader.join().unwrap());
            let words = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            panic!("not done after {LIMIT:?}:\n{}{}", words[0], words[1]);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let [stdout, stderr] = readers.map(|reader| reader.join().unwrap());
    assert!(
        said,
        "nobody has said {words}: {}{}",
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr)
    );
    Output { status: child.wait().unwrap(), stdout, stderr }
}

/// Reads to the end; `hear` is given all that came so far whenever there is more.
fn read(
    pipe: Option<impl std::io::Read + Send + 'static>,
    hear: impl Fn(&str) + Send + 'static,
) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
        let Some(mut pipe) = pipe else { return bytes };
        while let Ok(count) = pipe.read(&mut part)
            && count > 0
        {
            bytes.extend_from_slice(&part[..count]);
            hear(&String::from_utf8_lossy(&bytes));
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

/// What became of a job.
pub(crate) struct Job {
    /// Standard output, then standard error.
    pub(crate) words: [String; 2],
    /// Whether mpirun found all well.
    pub(crate) success: bool,
    /// What its ranks were given to leave files in.
    pub(crate) folder: tempfile::TempDir,
}

/// Runs `body` in each of `ranks` processes, whose command `prepare` may change before the program is named. In the parent, gives what
/// became of the job; in the ranks, and where there is no MPI, nothing. `test` is the name of the calling test.
pub(crate) fn with_ranks(
    test: &str,
    ranks: usize,
    prepare: impl FnOnce(&mut Command, &Path),
    body: impl FnOnce(&Path),
) -> Option<Job> {
    if let Some(folder) = std::env::var_os(FOLDER) {
        body(Path::new(&folder));
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = mpirun(ranks)?;
    prepare(&mut command, folder.path());
    command
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder.path());
    let output = finish(command);
    let words = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(words[0].contains("running 1 test"), "{test} is not the name of one test:\n{}", words[0]);
    Some(Job { words, success: output.status.success(), folder })
}

/// As [`with_ranks`]; every rank must come to a good end.
pub(crate) fn on_ranks(test: &str, ranks: usize, body: impl FnOnce(&Path)) {
    if let Some(Job { words, success, .. }) = with_ranks(test, ranks, |_, _| {}, body) {
        assert!(success, "{test}, {ranks} ranks:\n{}{}", words[0], words[1]);
        assert_eq!(words[0].matches("1 passed").count(), ranks, "{test}, {ranks} ranks:\n{}", words[0]);
    }
}
