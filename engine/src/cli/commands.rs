//! The commands: each checks all of its input, then works, then writes.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use crate::eval::{self, Windows};
use crate::generate::{self, Sampler, argmax};
use crate::mode::Mode;
use crate::retrieval::{self, Questions};
use crate::tokenizer::Tokenizer;
use crate::{Error, Model, Session, kv, linear, ranks};
use serde::Serialize;

use super::Failure;
use super::Host;
use super::args::Args;
use super::output::{self, OutFile};
use super::progress::Progress;
use super::traffic;

/// The model and texts that come with the engine.
pub(super) const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/model");
/// Window of an evaluation, in tokens, where the model and the text are long enough.
pub(super) const CONTEXT: usize = 1024;
/// Windows of an evaluation, where the text has so many.
pub(super) const WINDOWS: usize = 4;
/// Length of a retrieval document, in tokens, where the model allows it.
pub(super) const RETRIEVAL_CONTEXT: usize = 512;
/// Retrieval documents.
pub(super) const DOCUMENTS: usize = 8;

/// The modes of the three seams. Making one checks names and options, before anything is loaded.
pub(super) struct Modes {
    pub(super) kv: Mode,
    linear: Mode,
    ranks: Mode,
    host: Host,
}

impl Modes {
    pub(super) fn new(args: &Args, kv: Mode) -> Result<Self, Failure> {
        let linear = args.mode("weights", "dense")?;
        let ranks = match args.count("ranks")?.unwrap_or(args.host.ranks) {
            1 if args.text("sp")?.is_none() => "single".parse()?,
            count => format!("{},ranks={count}", args.text("sp")?.unwrap_or("auto")).parse()?,
        };
        kv::check(&kv)?;
        linear::check(&linear)?;
        ranks::check(&ranks)?;
        ranks::check_weights(&ranks, &linear)?;
        Ok(Modes { kv, linear, ranks, host: args.host })
    }

    /// As [`new`](Self::new), of the flag `--kv`: its ranks must be able to hold what it says.
    pub(super) fn of_flags(args: &Args) -> Result<Self, Failure> {
        let modes = Modes::new(args, args.mode("kv", "dense")?)?;
        ranks::check_kv(&modes.ranks, &modes.kv)?;
        Ok(modes)
    }

    /// Why these modes cannot be compared on a model; `None` where they can.
    pub(super) fn unavailable(&self, model: &Path) -> Option<String> {
        let sharded = ranks::check_kv(&self.ranks, &self.kv).err().map(|error| error.to_string());
        sharded.or_else(|| kv::unavailable(&self.kv, model))
    }

    /// Loads the model.
    pub(super) fn load(&self, args: &Args) -> Result<Model, Failure> {
        let path = args.path("model").unwrap_or_else(|| PathBuf::from(BUNDLED));
        Ok(Model::load(&path, &self.linear)?)
    }

    /// An empty sequence of up to `capacity` tokens.
    pub(super) fn session<'m>(&self, model: &'m Model, capacity: usize) -> Result<Session<'m>, Failure> {
        Ok(Session::new(model, &self.kv, (self.host.open)(&self.ranks)?, capacity)?)
    }
}

/// How prompts were shared and why, where somebody had to choose, and what each of several ranks holds; each after an empty line.
pub(super) fn sharing(session: &Session<'_>) -> String {
    let choice = session.choice().map_or_else(String::new, |choice| format!("\n{choice}"));
    choice + &session.holdings().map_or_else(String::new, |holdings| format!("\n{holdings}"))
}

/// Reads a text that is not empty.
pub(super) fn read_text(path: &Path) -> Result<Vec<u8>, Failure> {
    let text = std::fs::read(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    if text.is_empty() {
        return Err(
            Error::argument("text", "some text", format_args!("nothing in {}", path.display())).into()
        );
    }
    Ok(text)
}

/// A line on a cache in two memories; nothing for another.
fn two_memories(report: &eval::Report) -> String {
    let Some(budget) = report.kv_budget else { return String::new() };
    let hits =
        report.kv_hit_rate.map_or("nothing chosen".into(), |rate| format!("{:.1} % hits", 100.0 * rate));
    let share = 100.0 * report.device_kv_share;
    format!(
        "two memories        at most {budget} tokens read at a step, {hits}, {share:.1} % of the tokens on the device\n"
    )
}

/// `engine eval`
pub(super) fn eval(args: &Args) -> Result<(), Failure> {
    let modes = Modes::of_flags(args)?;
    let (context, prefill, count) = (args.count("context")?, args.count("prefill")?, args.count("windows")?);
    let json = OutFile::open(args.path("json"))?;
    let text = read_text(&args.path("text").ok_or_else(|| args.missing("text"))?)?;
    let model = modes.load(args)?;
    let text = Tokenizer::read(model.path(), model.config())?.encode(&text)?;
    let windows = Windows::fitting(model.config(), text.len(), [context, prefill, count], CONTEXT, WINDOWS)?;
    let Windows { context, count, .. } = windows;

    let mut session = modes.session(&model, context)?;
    let kv = modes.kv.to_string();
    let report = {
        let progress = Progress::new(&format!("{kv}: {count} × {context} tokens"));
        eval::evaluate(&mut session, &kv, &text, windows, |done, all| progress.update(done, all))?
    };
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::print(&format!(
        "mode                {kv}\n\
         nll per token       {:.4} nats over {} tokens\n\
         perplexity          {:.4}\n\
         KV bytes per token  {:.1} on the device, {:.1} on the host (dense in 16 bits: {:.0})\n\
         {}speed (CPU reference, not kernel speed)  prefill {:.1} tokens/s, decode {:.1} tokens/s\n",
        report.nll_per_token,
        report.tokens,
        report.perplexity,
        report.kv_bytes_per_token,
        report.host_kv_bytes_per_token,
        report.dense_kv_bytes_per_token,
        two_memories(&report),
        report.prefill_tokens_per_s,
        report.decode_tokens_per_s,
    ))?;
    output::print(&sharing(&session))?;
    output::print(&traffic::report(&model))
}

/// `engine generate`
pub(super) fn generate(args: &Args) -> Result<(), Failure> {
    let modes = Modes::of_flags(args)?;
    let max_tokens = args.count("max-tokens")?;
    let temperature = args.number("temperature", "a number")?.unwrap_or(0.0);
    let mut sampler = Sampler::new(temperature, args.number("seed", "a whole number")?.unwrap_or(0))?;
    let prompt = args.text("prompt")?.ok_or_else(|| args.missing("prompt"))?;
    let model = modes.load(args)?;
    let tokenizer = Tokenizer::read(model.path(), model.config())?;
    let tokens = tokenizer.encode(prompt.as_bytes())?;
    if tokens.is_empty() {
        return Err(Error::argument("prompt", "some text", "nothing").into());
    }
    // What is asked for must fit; the default is what fits.
    let maximum = model.config().max_positions;
    let max_tokens = max_tokens.unwrap_or_else(|| maximum.saturating_sub(tokens.len()).min(128));
    let capacity = tokens.len().saturating_add(max_tokens);
    model.config().check_context(capacity)?;
    let mut session = modes.session(&model, capacity)?;

    output::print(prompt)?;
    let mut stream = tokenizer.stream();
    generate::generate(&mut session, &tokens, max_tokens, &mut sampler, |token| {
        output::print_bytes(&stream.push(token)?)
    })?;
    output::print_bytes(&stream.finish()?)?;
    output::print("\n")?;
    output::print(&sharing(&session))?;
    output::print(&traffic::report(&model))
}

/// `engine retrieval`
pub(super) fn retrieval(args: &Args) -> Result<(), Failure> {
    let modes = Modes::of_flags(args)?;
    let (context, documents) = (args.count("context")?, args.count("documents")?.unwrap_or(DOCUMENTS));
    let seed = args.number("seed", "a whole number")?.unwrap_or(0);
    let json = OutFile::open(args.path("json"))?;
    let model = modes.load(args)?;
    let tokenizer = Tokenizer::read(model.path(), model.config())?;
    let context = context.unwrap_or(RETRIEVAL_CONTEXT.min(model.config().max_positions));
    model.config().check_context(context)?;
    let questions = Questions::plant(&tokenizer, context, documents, seed)?;
    let mut session = modes.session(&model, context)?;

    let kv = modes.kv.to_string();
    let report = {
        let progress = Progress::new(&format!("{kv}: {documents} documents of {context} tokens"));
        retrieval::retrieve(&mut session, &kv, &questions, |done, all| progress.update(done, all))?
    };
    if let Some(json) = json {
        json.write(&report)?;
    }
    output::print(&format!(
        "{kv}: {} of {} answered right ({:.1} %)\n",
        report.right,
        report.questions,
        100.0 * report.accuracy
    ))
}

#[derive(Serialize)]
struct LogitsReport {
    tokens: Vec<u32>,
    vocab_size: usize,
    /// `[tokens][vocab_size]`
    logits: Vec<Vec<f32>>,
}

/// `engine logits`: through a dense cache in f32, which rounds nothing.
pub(super) fn logits(args: &Args) -> Result<(), Failure> {
    let modes = Modes::new(args, "dense,dtype=f32".parse()?)?;
    let list = args.text("tokens")?.ok_or_else(|| args.missing("tokens"))?;
    let tokens =
        list.split(',').map(|token| token.trim().parse()).collect::<Result<Vec<u32>, _>>().map_err(|_| {
            Failure::Usage(format!("--tokens: expected whole numbers and commas, found {list:?}"))
        })?;
    let json = OutFile::open(args.path("json"))?;
    let model = modes.load(args)?;
    model.config().check_tokens(&tokens)?;
    model.config().check_context(tokens.len())?;

    let mut cache = kv::open(&modes.kv, &model, tokens.len())?;
    let hidden = model.forward(&tokens, 0, &mut *cache)?;
    let logits = model.logits(hidden.view())?;
    Model::check_logits(logits.view(), 0)?;
    let mut text = String::from("position  token  likeliest next  its logit\n");
    for (position, (token, row)) in tokens.iter().zip(logits.rows()).enumerate() {
        let best = argmax(row);
        let _ = writeln!(text, "{position:>8}  {token:>5}  {best:>14}  {:>9.4}", row[best as usize]);
    }
    if let Some(json) = json {
        let logits = logits.rows().into_iter().map(|row| row.to_vec()).collect();
        json.write(&LogitsReport { tokens, vocab_size: model.config().vocab_size, logits })?;
    }
    output::print(&text)
}
