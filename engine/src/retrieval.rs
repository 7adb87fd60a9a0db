//! Retrieval from the context: planted key-value pairs, asked for later.
//!
//! A document of `context` tokens or less has lines `set KEY = VALUE`, each with a short key and five digits, and then
//! lines `get KEY -> VALUE` that ask for values set earlier, in random order. What stands before the first question is
//! prefilled, the questions are decoded one by one through the KV mode's own path. A question is answered right when the
//! model's greedy continuation after `-> ` is the five digits. Answers are teacher-forced: greedy continuation gives the
//! five digits exactly when, fed with the right digits, the likeliest next token is right each time.

use std::ops::Range;

use serde::Serialize;

use crate::generate::argmax;
use crate::tokenizer::{Piece, Tokenizer};
use crate::{Error, Session};

/// How much is asked.
#[derive(Debug, Clone, Copy)]
pub struct Questions {
    /// Longest document, in tokens.
    pub context: usize,
    /// Documents, each with its own keys and values.
    pub documents: usize,
    /// Seed of the documents.
    pub seed: u64,
}

/// Result of a retrieval test.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The checkpoint.
    pub model: String,
    /// The KV mode.
    pub kv: String,
    /// Longest document, in tokens.
    pub context: usize,
    /// Values asked for, in all documents.
    pub questions: usize,
    /// Of these, answered right.
    pub right: usize,
    /// `right / questions`
    pub accuracy: f64,
}

/// A text and its questions.
struct Document {
    text: String,
    /// Where the questions start, in bytes.
    questions: usize,
    /// The digits of each answer, in bytes.
    answers: Vec<Range<usize>>,
}

impl Document {
    /// `pairs` values to remember, and a question for about every second one.
    fn new(pairs: usize, rng: &mut fastrand::Rng) -> Self {
        let mut keys: Vec<String> = Vec::new();
        while keys.len() < pairs {
            let mut letter = |from: &str| from.as_bytes()[rng.usize(..from.len())] as char;
            // The bundled model was trained on keys of this form.
            let (a, b, c) = (letter("abcdefghjkmnpqrstuvwxyz"), letter("aeiou"), letter("bcdfgklmnprstvz"));
            let key = format!("{a}{b}{c}{}", rng.u32(..10));
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        let mut pairs: Vec<_> =
            keys.into_iter().map(|key| (key, format!("{:05}", rng.u32(..100_000)))).collect();
        let mut text: String = pairs.iter().map(|(key, value)| format!("set {key} = {value}\n")).collect();
        let questions = text.len();
        rng.shuffle(&mut pairs);
        let mut answers = Vec::new();
        for (key, value) in pairs.iter().take(pairs.len().div_ceil(2)) {
            text.push_str(&format!("get {key} -> "));
            answers.push(text.len()..text.len() + value.len());
            text.push_str(&format!("{value}\n"));
        }
        Document { text, questions, answers }
    }

    /// The longest document of this seed that has at most `context` tokens.
    fn fitting(context: usize, tokenizer: &Tokenizer, seed: u64) -> Result<(Self, Vec<Piece>), Error> {
        let draw = |pairs| {
            let document = Document::new(pairs, &mut fastrand::Rng::with_seed(seed));
            let pieces = tokenizer.pieces(document.text.as_bytes())?;
            Ok::<_, Error>((document, pieces))
        };
        let (mut fits, mut too_long) = (1, 2);
        let mut best = draw(fits)?;
        if best.1.len() > context {
            return Err(Error::argument("context", format!("at least {} tokens", best.1.len()), context));
        }
        // Doubling, then halving the gap. 11,500 keys exist; a document stays well below.
        loop {
            let next = draw(too_long)?;
            if next.1.len() > context {
                break;
            }
            (fits, best) = (too_long, next);
            if fits >= 4096 {
                break;
            }
            too_long *= 2;
        }
        while too_long - fits > 1 {
            let pairs = fits + (too_long - fits) / 2;
            let next = draw(pairs)?;
            if next.1.len() > context {
                too_long = pairs;
            } else {
                (fits, best) = (pairs, next);
            }
        }
        Ok(best)
    }
}

/// Asks the questions. `progress` hears of documents done and documents in all.
///
/// # Errors
/// A context that holds no question or is over the model's maximum.
pub fn retrieve(
    session: &mut Session<'_>,
    kv_name: &str,
    tokenizer: &Tokenizer,
    questions: Questions,
    mut progress: impl FnMut(usize, usize),
) -> Result<Report, Error> {
    session.model().config().check_context(questions.context)?;
    if questions.documents == 0 {
        return Err(Error::argument("documents", "at least 1", 0));
    }
    let (mut asked, mut right) = (0, 0);
    for number in 0..questions.documents {
        let seed = questions.seed.wrapping_add(number as u64);
        let (document, pieces) = Document::fitting(questions.context, tokenizer, seed)?;
        let answers = ask(session, &document, &pieces)?;
        asked += answers.len();
        right += answers.iter().filter(|&&answer| answer).count();
        progress(number + 1, questions.documents);
    }
    Ok(Report {
        model: session.model().path().display().to_string(),
        kv: kv_name.to_string(),
        context: questions.context,
        questions: asked,
        right,
        accuracy: right as f64 / asked as f64,
    })
}

/// Whether each answer of a document was right.
fn ask(session: &mut Session<'_>, document: &Document, pieces: &[Piece]) -> Result<Vec<bool>, Error> {
    let first = pieces.iter().position(|piece| piece.bytes.end > document.questions).unwrap_or(pieces.len());
    let tokens: Vec<u32> = pieces.iter().map(|piece| piece.token).collect();
    session.clear();
    let mut logits = session.prefill(&tokens[..first])?;
    let mut right = vec![true; document.answers.len()];
    for piece in &pieces[first..] {
        // A token of an answer is one that has a digit of it, even if it starts with the space before.
        let answer = document
            .answers
            .iter()
            .position(|answer| piece.bytes.start < answer.end && answer.start < piece.bytes.end);
        if let Some(answer) = answer {
            right[answer] &= argmax(logits.view()) == piece.token;
        }
        logits = session.decode(piece.token)?;
    }
    Ok(right)
}
