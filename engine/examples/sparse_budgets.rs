//! Perplexity against budget, for every scorer, on the bundled model: what the training-free selections cost in quality.
//!
//! `cargo run --release -p longkv-engine --example sparse_budgets`

use std::path::Path;

use longkv_engine::eval::{Windows, evaluate};
use longkv_engine::tokenizer::Tokenizer;
use longkv_engine::{Model, Session, ranks};

const BUDGETS: [usize; 4] = [64, 128, 256, 512];
const MODES: [&str; 7] = [
    "sparse-quest",
    "sparse-quest,scorer=cuboid",
    "sparse-quest,scorer=meanstd",
    "sparse-quest,scorer=mean",
    "sparse-shadowkv",
    "sparse-retro,recent=16,reindex=8",
    "sparse-retro,recent=16,reindex=8,estimate=0",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
    let model = Model::load(&folder, &"dense".parse()?)?;
    let text =
        Tokenizer::read(&folder, model.config())?.encode(&std::fs::read(folder.join("heldout.txt"))?)?;
    let windows = Windows::new(1024, 512, 1)?;
    let perplexity = |kv: &str| {
        let mut session = Session::new(&model, &kv.parse()?, Box::new(ranks::Single), windows.context)?;
        evaluate(&mut session, kv, &text, windows, |_, _| {})
    };
    println!(
        "perplexity of {} tokens after a prompt of {}; dense: {:.4}\n",
        windows.context - windows.prefill,
        windows.prefill,
        perplexity("dense")?.perplexity
    );
    print!("{:<44}", "tokens read at a step");
    BUDGETS.iter().for_each(|budget| print!("{budget:>18}"));
    println!();
    for mode in MODES {
        print!("{mode:<44}");
        for budget in BUDGETS {
            let report = perplexity(&format!("{mode},budget={budget}"))?;
            let hits = 100.0 * report.kv_hit_rate.unwrap_or(1.0);
            print!("{:>10.4} {hits:>5.1} %", report.perplexity);
        }
        println!();
    }
    println!(
        "\nbeside it: the share of the pages read that were on the device, with twice the budget in slots"
    );
    Ok(())
}
