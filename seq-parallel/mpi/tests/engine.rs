//! The engine on processes: the logits of one rank, and the command line.

mod support;

use std::time::Duration;

use longkv_engine::mode::Mode;
use longkv_engine::ranks::{Sharing, Single, prefill_shared};
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
        for sharing in ["auto,ranks=4", "ring,ranks=4", "ulysses,ranks=4", "hybrid,ranks=4,ulysses=2"] {
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
    let output = support::finish(command, Duration::from_secs(120));
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
    for (ranks, sharing) in [(2, "ring"), (3, "ring"), (4, "auto")] {
        let arguments = [&arguments[..], &["--sp", sharing]].concat();
        let (success, stdout, stderr) = engine(ranks, &[], &arguments, &[]).unwrap();
        assert!(success, "{ranks} ranks: {stderr}");
        assert!(stdout.starts_with(alone.trim_end()), "{ranks} ranks: {stdout}");
        let why = stdout.contains("Sharing") && stdout.contains("chosen");
        assert_eq!(why, sharing == "auto", "{ranks} ranks: {stdout}");
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
    let (success, stdout, stderr) = engine(4, &[], &["demo", "--context", "64"], &[]).unwrap();
    assert!(success, "{stderr}");
    assert!(stdout.matches("Model: ").count() == 1 && stdout.contains("hack4"), "{stdout}");
}

#[test]
fn what_processes_refuse() {
    for (arguments, named) in [
        (&["generate", "--prompt", "x", "--ranks", "3"][..], "this job has 2 processes, not 3"),
        (&["generate", "--prompt", "x", "--sp", "single"][..], "single is one rank"),
        (&["generate"][..], "needs --prompt"),
    ] {
        let Some((success, _, stderr)) = engine(2, &[], arguments, &[]) else { return };
        assert!(!success && stderr.matches(named).count() == 1, "{arguments:?}: {stderr}");
    }
}
