//! `engine compress` and `engine inspect`: plans for `--kv fdc:FILE`.

use std::fmt::Write;
use std::path::Path;

use crate::compress::{Allocation, Compressor, Target};
use crate::kv::read_plan;
use crate::tokenizer::Tokenizer;
use kv_compress::CompressionPlan;
use kv_compress::projection::Projection;
use kv_compress::rank_plan::{RankPlan, Side};

use super::Failure;
use super::args::{Args, FILE};
use super::commands::{CONTEXT, Modes, read_text};
use super::output::{self, OutFile};
use super::progress::Progress;

/// `engine compress`
pub(super) fn compress(args: &Args) -> Result<(), Failure> {
    let modes = Modes::new(args, "dense".parse()?)?;
    let number = |flag| args.number::<f64>(flag, "a number");
    let target = match (number("ratio")?, number("keep-accuracy")?) {
        (Some(ratio), None) => Target::Ratio(ratio),
        (None, Some(part)) => Target::KeepAccuracy(part),
        _ => return Err(Failure::Usage("compress needs one of --ratio and --keep-accuracy".into())),
    };
    target.check()?;
    let projection = match args.text("projection")?.unwrap_or("optimal") {
        "optimal" => Projection::Optimal,
        "joint" => Projection::JointSvd,
        "key-only" => Projection::KeyOnly,
        other => {
            let expected = "expected optimal, joint or key-only";
            return Err(Failure::Usage(format!("--projection: {expected}, found {other:?}")));
        }
    };
    let context = args.count("context")?;
    let out = OutFile::open(Some(args.path("out").ok_or_else(|| args.missing("out"))?))?;
    let text = read_text(&args.path("text").ok_or_else(|| args.missing("text"))?)?;
    let model = modes.load(args)?;
    let text = Tokenizer::read(model.path(), model.config())?.encode(&text)?;
    let context =
        context.unwrap_or_else(|| CONTEXT.min(model.config().max_positions).min(text.len() / 4).max(1));

    let compressor = {
        let progress = Progress::new("calibrating");
        Compressor::new(&model, &text, context, |done, all| progress.update(done, all))?
    };
    let plan = {
        let _progress = Progress::new("choosing ranks");
        compressor.plan(projection, Allocation::Adaptive, target)?
    };
    let (dense, nll) = (compressor.dense_nll(), compressor.plan_nll(&plan)?);
    if let Some(out) = out {
        out.write_bytes(&plan.to_bytes().map_err(crate::Error::from)?)?;
    }
    output::print(&format!(
        "{}\nnll per token, on the windows of the text that ranks were chosen by, none of them calibrated on: {nll:.4}, dense {dense:.4} ({:+.2} %)\n",
        described(&plan),
        100.0 * (nll / dense - 1.0)
    ))
}

/// `engine inspect`
pub(super) fn inspect(args: &Args) -> Result<(), Failure> {
    let path =
        args.path(FILE).ok_or_else(|| Failure::Usage("inspect needs a FILE (see engine --help)".into()))?;
    let (json, svg) = (OutFile::open(args.path("json"))?, OutFile::open(args.path("svg"))?);
    let plan = read_plan(Path::new(&path))?;
    if let Some(json) = json {
        json.write(&plan.reasons())?;
    }
    if let Some(svg) = svg {
        svg.write_bytes(drawn(&plan).as_bytes())?;
    }
    let mut text = described(&plan);
    let ranks = RankPlan::new(plan.layers().iter().map(|layer| layer.ranks().clone()).collect());
    let ranks = ranks.map_err(crate::Error::from)?;
    match plan.reasons() {
        [] => {
            let _ = write!(text, "\n{ranks}");
        }
        reasons => {
            let _ = write!(text, "\n{}", RankPlan::table(reasons));
        }
    }
    output::print(&text)
}

/// What a plan is, and its rank map: layers down, KV heads across.
fn described(plan: &CompressionPlan) -> String {
    let (bytes, dense) = (plan.bytes_per_token(), plan.dense_bytes_per_token());
    let rule = serde_json::to_value(plan.rule()).ok();
    let mut text = format!(
        "{bytes} bytes per token of {dense} ({:.1} %), projection {}, ranks by {}, calibrated on {} tokens\n\n",
        100.0 * bytes as f64 / dense as f64,
        plan.projection(),
        rule.as_ref().and_then(|rule| rule.as_str()).unwrap_or("an unknown rule"),
        plan.calibration_tokens(),
    );
    let _ =
        writeln!(text, "r_k r_v of every KV head; a bar is the part of the head's dimensions that is kept\n");
    for (l, layer) in plan.layers().iter().enumerate() {
        let shape = layer.shape();
        let _ = write!(text, "layer {l:>3} ");
        for ranks in layer.ranks().heads() {
            let (k, v) = (bar(ranks.k, shape.qk_dim()), bar(ranks.v, shape.v_dim()));
            let _ = write!(text, " │ {k} {:>3}  {v} {:>3}", ranks.k, ranks.v);
        }
        text.push('\n');
    }
    text
}

/// A bar of four cells, in eighths.
fn bar(rank: usize, dim: usize) -> String {
    const EIGHTHS: [char; 9] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'];
    let filled = 32 * rank / dim.max(1);
    (0..4).map(|cell| EIGHTHS[filled.saturating_sub(8 * cell).min(8)]).collect()
}

/// The rank map as a picture: a cell per KV head, its left half keys and its right half values, darker for more.
fn drawn(plan: &CompressionPlan) -> String {
    const CELL: usize = 48;
    let heads = plan.layers().iter().map(|layer| layer.shape().kv_heads()).max().unwrap_or(0);
    let (width, height) = (heads * CELL + 2 * CELL, plan.layers().len() * CELL / 2 + CELL);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<text x=\"4\" y=\"14\">ranks r_k | r_v, layers down, KV heads across</text>\n"
    );
    for (l, layer) in plan.layers().iter().enumerate() {
        let y = CELL / 2 + l * CELL / 2;
        let _ = writeln!(svg, "<text x=\"4\" y=\"{}\">layer {l}</text>", y + 16);
        for (h, ranks) in layer.ranks().heads().iter().enumerate() {
            for (side, rank, dim) in [
                (Side::Keys, ranks.k, layer.shape().qk_dim()),
                (Side::Values, ranks.v, layer.shape().v_dim()),
            ] {
                let half = if side == Side::Keys { 0 } else { CELL / 2 };
                let x = CELL + CELL / 2 + h * CELL + half;
                let shade = 255 - 200 * rank / dim.max(1);
                let ink = if shade < 140 { "white" } else { "black" };
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"rgb({shade},{shade},255)\"/>\
                     <text x=\"{}\" y=\"{}\" fill=\"{ink}\">{rank}</text>",
                    CELL / 2 - 1,
                    CELL / 2 - 2,
                    x + 2,
                    y + 16
                );
            }
        }
    }
    svg.push_str("</svg>\n");
    svg
}
