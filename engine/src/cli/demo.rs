//! The demo: some text from the model, then every mode side by side.

use std::path::{Path, PathBuf};

use crate::eval::{self, Windows};
use crate::generate::{self, Sampler};
use crate::retrieval::{self, Questions};
use crate::tokenizer::Tokenizer;
use crate::{Error, Model, kv};

use super::Failure;
use super::args::Args;
use super::commands::{self, BUNDLED, DOCUMENTS, Modes, RETRIEVAL_CONTEXT, WINDOWS, read_text};
use super::output;
use super::progress::Progress;
use super::table::{Row, table};
use super::traffic;

const PROMPT: &str = "def merge(first, second):\n    \"\"\"Merge two sorted lists.\"\"\"\n";
const GENERATED: usize = 200;
const TEMPERATURE: f32 = 0.6;
/// Shorter windows than eval's, in the time of two of those: the order of the modes settles with the number of texts.
const CONTEXT: usize = 512;
/// Share of answers that the model must get right with a dense cache for other modes to be asked: below, an answer says
/// nothing about the cache.
const KNOWS_RETRIEVAL: f64 = 0.5;

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
    if prompt_tokens.is_empty() {
        return Err(Error::argument("prompt", "some text", "nothing").into());
    }
    // At least one token; less than GENERATED where the model has no room for more.
    let room = model.config().max_positions.saturating_sub(prompt_tokens.len());
    let generated = GENERATED.min(room).max(1);
    let capacity = prompt_tokens.len() + generated;
    model.config().check_context(capacity)?;
    let text = tokenizer.encode(&text)?;
    let windows = Windows::fitting(model.config(), text.len(), [context, None, None], CONTEXT, WINDOWS)?;

    output::print(&format!("Model: {}\n\n{prompt}", describe(&model)))?;
    let mut session = dense.session(&model, capacity)?;
    let mut stream = tokenizer.stream();
    let mut sampler = Sampler::new(TEMPERATURE, 1)?;
    generate::generate(&mut session, &prompt_tokens, generated, &mut sampler, |token| {
        output::print_bytes(&stream.push(token)?)
    })?;
    output::print_bytes(&stream.finish()?)?;
    output::print("\n\n")?;

    let (modes, left_out): (Vec<_>, Vec<_>) = modes
        .iter()
        .map(|mode| (mode, mode.unavailable(model.path())))
        .partition(|(_, reason)| reason.is_none());
    for (mode, reason) in left_out {
        output::print(&format!("{} is left out: {}\n\n", mode.kv, reason.unwrap_or_default()))?;
    }
    let retrieval_context = RETRIEVAL_CONTEXT.min(model.config().max_positions);
    let questions = Questions::plant(&tokenizer, retrieval_context, DOCUMENTS, 0)?;
    let mut rows: Vec<Row> = Vec::new();
    let mut shared = commands::sharing(&session);
    for (mode, _) in modes {
        let name = mode.kv.to_string();
        let report = {
            let mut session = mode.session(&model, windows.context)?;
            let progress = Progress::new(&format!("{name}: perplexity"));
            let report =
                eval::evaluate(&mut session, &name, &text, windows, |done, all| progress.update(done, all))?;
            // The first mode's stands for all: how prompts are shared depends on little else.
            if rows.is_empty() {
                shared = commands::sharing(&session);
            }
            report
        };
        // Where the first mode, dense, fails, the others are not asked.
        let retrieval = match rows.first() {
            Some(Row { retrieval: None, .. }) => None,
            first => {
                let mut session = mode.session(&model, retrieval_context)?;
                let progress = Progress::new(&format!("{name}: retrieval"));
                let update = |done, all| progress.update(done, all);
                let share = retrieval::retrieve(&mut session, &name, &questions, update)?.accuracy;
                Some(share).filter(|share| first.is_some() || *share >= KNOWS_RETRIEVAL)
            }
        };
        rows.push(Row { report, retrieval });
    }
    output::print(&table(&rows, windows.count)?)?;
    output::print(&shared)?;
    output::print(&traffic::report(&model))
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
