//! The demo: some text from the model, then every mode side by side.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use longkv_engine::eval::{self, Windows};
use longkv_engine::generate::{self, Sampler};
use longkv_engine::retrieval::{self, Questions};
use longkv_engine::tokenizer::Tokenizer;
use longkv_engine::{Error, Model, kv};

use super::Failure;
use super::args::Args;
use super::commands::{BUNDLED, CONTEXT, DOCUMENTS, Modes, RETRIEVAL_CONTEXT, read_text};
use super::output;
use super::progress::Progress;

const PROMPT: &str = "def merge(first, second):\n    \"\"\"Merge two sorted lists.\"\"\"\n";
const GENERATED: usize = 200;
const TEMPERATURE: f32 = 0.6;
const WINDOWS: usize = 2;
/// Share of answers that the model must get right with a dense cache for other modes to be asked: below, an answer says
/// nothing about the cache.
const KNOWS_RETRIEVAL: f64 = 0.5;

/// A line of the table.
struct Row {
    report: eval::Report,
    retrieval: Option<f64>,
}

/// `engine demo`
pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let modes =
        kv::DEMO.iter().map(|mode| Modes::new(args, mode.parse()?)).collect::<Result<Vec<_>, Failure>>()?;
    let [dense, ..] = modes.as_slice() else { return Ok(()) };
    let context = args.count("context")?;
    let text = read_text(&args.path("text").unwrap_or_else(|| Path::new(BUNDLED).join("heldout.txt")))?;
    let model = dense.load(args)?;
    let tokenizer = Tokenizer::read(model.path(), model.config())?;
    let prompt = args.text("prompt")?.unwrap_or(PROMPT);
    let prompt_tokens = tokenizer.encode(prompt.as_bytes())?;
    let capacity = prompt_tokens.len() + GENERATED;
    if prompt_tokens.is_empty() {
        return Err(Error::argument("prompt", "some text", "nothing").into());
    }
    model.config().check_context(capacity)?;
    let text = tokenizer.encode(&text)?;
    let context = context.unwrap_or(CONTEXT.min(model.config().max_positions));
    let windows = Windows::new(context, Windows::default_prefill(context), WINDOWS)?;
    windows.check(model.config(), text.len())?;

    output::print(&format!("Model: {}\n\n{prompt}", describe(&model)))?;
    let mut session = dense.session(&model, capacity)?;
    let mut stream = tokenizer.stream();
    let mut sampler = Sampler::new(TEMPERATURE, 1)?;
    generate::generate(&mut session, &prompt_tokens, GENERATED, &mut sampler, |token| {
        output::print_bytes(&stream.push(token)?)
    })?;
    output::print("\n\n")?;

    let mut rows: Vec<Row> = Vec::new();
    for mode in &modes {
        let name = mode.kv.to_string();
        let mut session = mode.session(&model, context)?;
        let report = {
            let progress = Progress::new(&format!("{name}: perplexity"));
            eval::evaluate(&mut session, &name, &text, windows, |done, all| progress.update(done, all))?
        };
        // The first row is dense: where it fails, the others need not be asked.
        let asked = rows.first().is_none_or(|dense| dense.retrieval.is_some());
        let retrieval = match asked {
            true => Some(retrieval_accuracy(mode, &model, &tokenizer)?)
                .filter(|&share| !rows.is_empty() || share >= KNOWS_RETRIEVAL),
            false => None,
        };
        rows.push(Row { report, retrieval });
    }
    output::print(&table(&rows))
}

fn retrieval_accuracy(mode: &Modes, model: &Model, tokenizer: &Tokenizer) -> Result<f64, Failure> {
    let context = RETRIEVAL_CONTEXT.min(model.config().max_positions);
    let mut session = mode.session(model, context)?;
    let name = mode.kv.to_string();
    let progress = Progress::new(&format!("{name}: retrieval"));
    let questions = Questions { context, documents: DOCUMENTS, seed: 0 };
    let update = |done, all| progress.update(done, all);
    Ok(retrieval::retrieve(&mut session, &name, tokenizer, questions, update)?.accuracy)
}

fn describe(model: &Model) -> String {
    let config = model.config();
    let path = PathBuf::from(model.path());
    let name = match path.file_name() {
        _ if path == Path::new(BUNDLED) => "the bundled one".into(),
        Some(name) => name.to_string_lossy(),
        None => path.to_string_lossy(),
    };
    format!(
        "{name}, {:?}, {} layers, hidden {}, {}, contexts up to {}",
        config.architecture, config.layers, config.hidden_size, config.heads, config.max_positions
    )
}

fn table(rows: &[Row]) -> String {
    let Some(dense) = rows.first().map(|row| &row.report) else { return String::new() };
    let header = [
        "mode",
        "nll/token",
        "perplexity",
        "Δ nll",
        "KV bytes/token",
        "ratio",
        "retrieval",
        "prefill",
        "decode",
    ];
    let mut cells = vec![header.map(String::from)];
    for Row { report, retrieval } in rows {
        cells.push([
            report.kv.clone(),
            format!("{:.4}", report.nll_per_token),
            format!("{:.4}", report.perplexity),
            format!("{:+.4}", report.nll_per_token - dense.nll_per_token),
            format!("{:.1}", report.kv_bytes_per_token),
            format!("{:.2}×", dense.kv_bytes_per_token / report.kv_bytes_per_token),
            retrieval.map_or("–".into(), |share| format!("{:.1} %", 100.0 * share)),
            format!("{:.0}/s", report.prefill_tokens_per_s),
            format!("{:.0}/s", report.decode_tokens_per_s),
        ]);
    }
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    for row in &cells {
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // Names to the left, numbers to the right.
            let _ = match column {
                0 => write!(text, "{cell:<width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    let _ = write!(
        text,
        "\n\
         {} windows of {} held-out tokens: the first {} of each prefilled, the others decoded one by one and scored, in nats.\n\
         Δ and ratio are to dense, whose cache is stored in f16. KV bytes are what the device holds, metadata included.\n\
         Retrieval: planted values found again; – where the model itself, with a dense cache, finds less than half.\n\
         Speeds are tokens per second of the CPU reference, not kernel speed.\n",
        WINDOWS, dense.context, dense.prefill,
    );
    text
}
