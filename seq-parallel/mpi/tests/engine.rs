//! The engine on processes: the logits of one rank, and the command line.

mod support;

use std::path::Path;
use std::process::Command;

use longkv_engine::kv::ShardedKv;
use longkv_engine::mode::Mode;
use longkv_engine::ranks::{Sharing, Single, extend_sharded, prefill_shared};
use longkv_engine::{Model, Session};
use seq_parallel::transport::Transport;
use seq_parallel_mpi::Mpi;

fn mode(text: &str) -> Mode {
    text.parse().unwrap()
}

fn model() -> Model {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../engine/model");
    Model::load(path.as_ref(), &mode("dense")).unwrap()
}

/// Every scheme on four processes gives every one of them the logits of one rank.
#[test]
fn four_processes_give_the_logits_of_one_rank() {
    support::on_ranks("four_processes_give_the_logits_of_one_rank", 4, |_| {
        let mut end = Mpi::start().unwrap();
        let model = model();
        let tokens: Vec<u32> = (0..61).map(|i| 32 + i * 7 % 90).collect();
        let mut single = Session::new(&model, &mode("dense,dtype=f32"), Box::new(Single), 62).unwrap();
        let expected = [single.prefill(&tokens).unwrap(), single.decode(65).unwrap()];
        for sharing in [
            "auto,ranks=4",
            "ring,ranks=4",
            "ulysses,ranks=4",
            "hybrid,ranks=4,ulysses=2",
            "megatron,ranks=4,region=2",
            "fast,ranks=4,region=2,mlp=megatron",
        ] {
            let mut kv = longkv_engine::kv::open(&mode("dense,dtype=f32"), &model, 62).unwrap();
            let sharing_mode = Sharing::new(&mode(sharing)).unwrap();
            let prompt = prefill_shared(&model, &sharing_mode, &tokens, kv.stored(), &mut end).unwrap();
            let hidden = prompt.append_to(&model, &mut *kv).unwrap();
            let logits =
                |hidden: ndarray::ArrayView2<'_, f32>| model.logits(hidden).unwrap().row(0).to_owned();
            let found = [
                logits(hidden.view().insert_axis(ndarray::Axis(0))),
                logits(model.forward(&[65], 61, &mut *kv).unwrap().view()),
            ];
            for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let off = (found - expected).mapv(f32::abs).fold(0.0, |a: f32, b| a.max(*b));
                // A ring sums in another order.
                let tolerance = if sharing.starts_with("ulysses") { 0.0 } else { 2e-5 };
                assert!(off <= tolerance, "{sharing}, rank {}, step {step}: off by {off}", end.rank());
            }
        }
        end.close().unwrap();
    });
}

/// Every process keeps its shard: the logits of one rank, shards that stay balanced, and bytes to the byte.
#[test]
fn four_processes_decode_over_their_shards() {
    support::on_ranks("four_processes_decode_over_their_shards", 4, |_| {
        let mut end = Mpi::start().unwrap();
        let (model, rank) = (model(), end.rank());
        let (config, heads) = (model.config(), &model.config().heads);
        let tokens: Vec<u32> = (0..70).map(|i| 32 + i * 7 % 90).collect();
        let mut single = Session::new(&model, &mode("dense,dtype=f32"), Box::new(Single), 70).unwrap();
        let mut expected = vec![single.prefill(&tokens[..61]).unwrap()];
        expected.extend(tokens[61..].iter().map(|&token| single.decode(token).unwrap()));
        for sharing in ["ring,ranks=4,kv=sharded", "ulysses,ranks=4,kv=sharded"] {
            let sharing_mode = Sharing::new(&mode(sharing)).unwrap();
            let mut kv = ShardedKv::new(&mode("dense,dtype=f32"), &model, 70, 4, [rank]).unwrap();
            let mut step = |tokens: &[u32], kv: &mut ShardedKv| {
                let hidden = extend_sharded(&model, &sharing_mode, tokens, kv, &mut end).unwrap();
                model.logits(hidden.view().insert_axis(ndarray::Axis(0))).unwrap().row(0).to_owned()
            };
            let mut found = vec![step(&tokens[..61], &mut kv)];
            let prefilled = kv.held().to_vec();
            found.extend(tokens[61..].iter().map(|&token| step(&[token], &mut kv)));
            for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let off = (found - expected).mapv(f32::abs).fold(0.0, |a: f32, b| a.max(*b));
                assert!(off <= 2e-5, "{sharing}, rank {rank}, step {step}: off by {off}");
            }
            let (least, most) = (kv.held().iter().min().unwrap(), kv.held().iter().max().unwrap());
            assert!(most - least <= 1 && kv.held().iter().sum::<usize>() == 70, "{:?}", kv.held());
            assert_eq!(kv.bytes(rank), Some(kv.held()[rank] * 4 * config.kv_elements_per_token()));
            let elsewhere: usize = (1..4).map(|rank| kv.held()[rank] - prefilled[rank]).sum();
            let layers = match rank {
                0 => {
                    let query = 4 * heads.q_heads() * heads.qk_dim();
                    9 * config.layers * 3 * query + elsewhere * 4 * config.kv_elements_per_token()
                }
                _ => 9 * config.layers * 4 * heads.q_heads() * (heads.v_dim() + 1),
            };
            let round = if rank == 3 { 0 } else { 9 * 4 * config.hidden_size };
            // What ranks compare first: three words, to all others round the ring.
            let words = 9 * 8 * 3 * 3;
            assert_eq!(kv.sent(rank), Some((layers + round + words) as u64), "{sharing}, rank {rank}");
        }
        end.close().unwrap();
    });
}

/// Runs `engine-mpi`; gives standard output and standard error.
fn engine(
    ranks: usize,
    options: &[&str],
    arguments: &[&str],
    environment: &[(&str, &str)],
) -> Option<(bool, String, String)> {
    let mut command = support::mpirun(ranks)?;
    command.args(options).arg(env!("CARGO_BIN_EXE_engine-mpi")).args(arguments);
    command.envs(environment.iter().copied());
    let output = support::finish(command);
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Some((output.status.success(), stdout, stderr))
}

const HELDOUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../engine/model/heldout.txt");

/// What is printed is printed once, and is what one process prints.
#[test]
fn processes_generate_what_one_generates() {
    let arguments = ["generate", "--prompt", "def merge(first, second):", "--max-tokens", "40"];
    let Some((_, alone, _)) = engine(1, &[], &arguments, &[]) else { return };
    assert!(alone.starts_with("def merge(first, second):") && alone.len() > 50, "{alone}");
    for (ranks, sharing) in
        [(2, "ring"), (3, "ring,kv=sharded"), (4, "auto"), (4, "megatron,region=2,kv=sharded")]
    {
        let arguments = [&arguments[..], &["--sp", sharing]].concat();
        let (success, stdout, stderr) = engine(ranks, &[], &arguments, &[]).unwrap();
        assert!(success, "{ranks} ranks: {stderr}");
        assert!(stdout.starts_with(alone.trim_end()), "{ranks} ranks: {stdout}");
        let why = stdout.contains("Sharing") && stdout.contains("chosen");
        assert_eq!(why, sharing == "auto", "{ranks} ranks: {stdout}");
        let how = if sharing.contains("sharded") { "sharded over" } else { "computed by" };
        assert!(stdout.contains(&format!("Keys and values, {how} {ranks} ranks:")), "{stdout}");
        assert_eq!(stdout.matches(" holds ").count(), ranks, "{stdout}");
    }
}

/// Perplexity of a text to its fourth decimal; the demo's table.
#[test]
fn eval_and_demo_run_on_processes() {
    let eval = ["eval", "--text", HELDOUT, "--context", "96", "--windows", "1"];
    let line =
        |text: &str, start: &str| text.lines().find(|line| line.starts_with(start)).map(str::to_string);
    let Some((_, alone, _)) = engine(1, &[], &eval, &[]) else { return };
    let (success, stdout, stderr) = engine(4, &[], &eval, &[]).unwrap();
    assert!(success, "{stderr}");
    assert_eq!(line(&stdout, "nll per token"), line(&alone, "nll per token"), "{stdout}");
    assert!(line(&alone, "nll per token").is_some(), "{alone}");
    let sharded = [&eval[..], &["--sp", "ring,kv=sharded"]].concat();
    let (success, stdout, stderr) = engine(3, &[], &sharded, &[]).unwrap();
    assert!(success, "{stderr}");
    assert_eq!(line(&stdout, "nll per token"), line(&alone, "nll per token"), "{stdout}");
    assert!(stdout.contains("for 72 decoded tokens"), "{stdout}");
    let (success, stdout, stderr) = engine(4, &[], &["demo", "--context", "64"], &[]).unwrap();
    assert!(success, "{stderr}");
    assert!(stdout.matches("Model: ").count() == 1 && stdout.contains("hack4"), "{stdout}");
}

/// Runs `engine-mpi demo` in three processes, whose waits have this deadline, and does something to rank 1 when they have the model.
/// Gives standard error and the exit statuses.
fn demo_of_three(
    deadline_ms: &str,
    to_rank_1: impl FnOnce(&Path, &str),
) -> Option<(String, [Option<i32>; 3])> {
    three(deadline_ms, &["demo", "--context", "64"], "Model: ", to_rank_1)
}

/// The same of another command, once it has printed some text.
fn three(
    deadline_ms: &str,
    arguments: &[&str],
    printed: &'static str,
    to_rank_1: impl FnOnce(&Path, &str),
) -> Option<(String, [Option<i32>; 3])> {
    let folder = tempfile::tempdir().unwrap();
    let mut command = support::mpirun(3)?;
    support::record(&mut command, folder.path());
    command.arg(env!("CARGO_BIN_EXE_engine-mpi")).args(arguments);
    command.env("LONGKV_DEADLINE_MS", deadline_ms);
    let output = support::finish_while(command, printed, || {
        to_rank_1(folder.path(), &support::pid(folder.path(), 1));
    });
    let statuses = [0, 1, 2].map(|rank| support::status(folder.path(), rank));
    Some((String::from_utf8_lossy(&output.stderr).into_owned(), statuses))
}

fn kill(signal: &str, pid: &str) {
    assert!(Command::new("kill").args([signal, pid]).status().unwrap().success(), "kill {signal} {pid}");
}

/// A process of the engine that is killed: the others say whom they have lost, and where, and end.
#[test]
fn processes_whose_peer_is_killed_say_so_and_end() {
    let Some((stderr, statuses)) = demo_of_three("600000", |_, pid| kill("-KILL", pid)) else { return };
    assert_eq!(statuses, [Some(2), Some(137), Some(2)], "{stderr}");
    for rank in [0, 2] {
        assert!(stderr.contains(&format!("rank {rank}: rank 1 is gone at ")), "rank {rank}: {stderr}");
    }
}

/// One that is killed while it answers queries with its shard: its part of the keys and values is lost, and the others say so.
#[test]
fn processes_that_decode_over_shards_name_the_one_that_is_killed() {
    let arguments = ["generate", "--prompt", "import o", "--max-tokens", "1000", "--sp", "ring,kv=sharded"];
    // What is printed behind the prompt was decoded.
    let killed = three("600000", &arguments, "import op", |_, pid| kill("-KILL", pid));
    let Some((stderr, statuses)) = killed else { return };
    assert_eq!(statuses, [Some(2), Some(137), Some(2)], "{stderr}");
    for rank in [0, 2] {
        assert!(stderr.contains(&format!("rank {rank}: rank 1 is gone at ")), "rank {rank}: {stderr}");
    }
}

/// One that is stopped is given up at the deadline that the environment gives, and hears of it when it goes on.
#[test]
fn processes_have_the_deadline_of_the_environment() {
    let deadline_ms = 4000;
    let result = demo_of_three(&deadline_ms.to_string(), |folder, pid| {
        kill("-STOP", pid);
        support::wait_for(folder, [0, 2].map(|rank| format!("{rank}.status")));
        kill("-CONT", pid);
    });
    let Some((stderr, statuses)) = result else { return };
    assert_eq!(statuses, [Some(2); 3], "{stderr}");
    for rank in 0..3 {
        let start = format!("rank {rank}: rank 1 was silent for ");
        let line = stderr.split(&start).nth(1).unwrap_or_else(|| panic!("rank {rank}: {stderr}"));
        let waited: u64 = line.split(' ').next().unwrap().parse().unwrap();
        assert!((deadline_ms..60_000).contains(&waited), "rank {rank}: the default is longer: {stderr}");
    }
    for wrong in ["0", "1.5", "soon"] {
        let arguments = ["generate", "--prompt", "x"];
        let (success, _, stderr) = engine(1, &[], &arguments, &[("LONGKV_DEADLINE_MS", wrong)]).unwrap();
        let words = format!("LONGKV_DEADLINE_MS: expected milliseconds, found {wrong:?}");
        assert!(!success && stderr.contains(&words), "{wrong}: {stderr}");
    }
}

#[test]
fn what_processes_refuse() {
    for (arguments, named) in [
        (&["generate", "--prompt", "x", "--ranks", "3"][..], "this job has 2 processes, not 3"),
        (&["generate", "--prompt", "x", "--sp", "single"][..], "single is one rank"),
        (&["generate"][..], "needs --prompt"),
        (
            &["generate", "--prompt", "x", "--sp", "ring,kv=sharded", "--kv", "hack4"],
            "hack4 cannot be sharded",
        ),
        (&["generate", "--prompt", "x", "--model", "/nonexistent"], "/nonexistent"),
    ] {
        let Some((success, _, stderr)) = engine(2, &[], arguments, &[]) else { return };
        assert!(!success && stderr.matches(named).count() == 1, "{arguments:?}: {stderr}");
    }
}

/// What one process alone refuses it says itself, by its rank, and the others hear why they cannot go on.
#[test]
fn a_process_that_refuses_alone_says_so() {
    let Some(mut command) = support::mpirun(3) else { return };
    let script = r#"
        model=; [ "$OMPI_COMM_WORLD_RANK" = 1 ] && model="--model /nonexistent"
        exec "$0" generate --prompt x --max-tokens 2 --sp ring $model"#;
    // Or the others are killed before they can say anything.
    command.args(["--enable-recovery", "sh", "-c", script, env!("CARGO_BIN_EXE_engine-mpi")]);
    let output = support::finish(command);
    // What mpirun itself makes of it, where jobs may recover, is its own affair.
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr.matches("rank 1: cannot read /nonexistent").count(), 1, "{stderr}");
    assert!(stderr.contains("rank 0: rank 1 gave up (cannot read /nonexistent"), "{stderr}");
}
