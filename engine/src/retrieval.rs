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

/// Most documents of one test: all are planted before the first is asked about.
pub const MOST_DOCUMENTS: usize = 10_000;

/// Documents with planted pairs, and the questions about them.
pub struct Questions {
    context: usize,
    documents: Vec<(Document, Vec<Piece>)>,
}

impl Questions {
    /// Plants `documents` documents of up to `context` tokens, each with its own keys and values.
    ///
    /// # Errors
    /// A context that holds no question, no documents, or more than [`MOST_DOCUMENTS`].
    pub fn plant(tokenizer: &Tokenizer, context: usize, documents: usize, seed: u64) -> Result<Self, Error> {
        if !(1..=MOST_DOCUMENTS).contains(&documents) {
            return Err(Error::argument("documents", format!("1 to {MOST_DOCUMENTS}"), documents));
        }
        let documents = (0..documents)
            .map(|number| Document::fitting(context, tokenizer, seed.wrapping_add(number as u64)))
            .collect::<Result<_, _>>()?;
        Ok(Questions { context, documents })
    }
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

    /// The first token of the questions.
    fn first_asked(&self, pieces: &[Piece]) -> usize {
        pieces.iter().position(|piece| piece.bytes.end > self.questions).unwrap_or(pieces.len())
    }

    /// Whether each answer is right, given the greedy choice in place of each token of the questions.
    fn grade(&self, asked: &[Piece], greedy: &[u32]) -> Vec<bool> {
        let right = |answer: &Range<usize>| {
            // A token of an answer is one that has a digit of it, even if it starts with the space before.
            let touches = |piece: &Piece| piece.bytes.start < answer.end && answer.start < piece.bytes.end;
            asked
                .iter()
                .zip(greedy)
                .filter(|(piece, _)| touches(piece))
                .all(|(piece, &token)| piece.token == token)
        };
        self.answers.iter().map(right).collect()
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
        // Doubling, then halving the gap. 17,250 keys exist; a document stays well below.
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
/// A context over the model's maximum.
pub fn retrieve(
    session: &mut Session<'_>,
    kv_name: &str,
    questions: &Questions,
    mut progress: impl FnMut(usize, usize),
) -> Result<Report, Error> {
    session.model().config().check_context(questions.context)?;
    let (mut asked, mut right) = (0, 0);
    for (number, (document, pieces)) in questions.documents.iter().enumerate() {
        let answers = ask(session, document, pieces)?;
        asked += answers.len();
        right += answers.iter().filter(|&&answer| answer).count();
        progress(number + 1, questions.documents.len());
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
    let first = document.first_asked(pieces);
    let tokens: Vec<u32> = pieces.iter().map(|piece| piece.token).collect();
    session.clear();
    let mut logits = session.prefill(&tokens[..first])?;
    let mut greedy = Vec::with_capacity(tokens.len() - first);
    for &token in &tokens[first..] {
        greedy.push(argmax(logits.view()));
        logits = session.decode(token)?;
    }
    Ok(document.grade(&pieces[first..], &greedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(document: &Document) -> Vec<Piece> {
        let piece = |(at, byte): (usize, u8)| Piece { token: byte.into(), bytes: at..at + 1 };
        document.text.bytes().enumerate().map(piece).collect()
    }

    #[test]
    fn documents_ask_for_what_was_set() {
        for (pairs, seed) in [(1, 0), (2, 1), (7, 2), (200, 3)] {
            let document = Document::new(pairs, &mut fastrand::Rng::with_seed(seed));
            let (sets, gets) = document.text.split_at(document.questions);
            let set: Vec<_> =
                sets.lines().map(|l| l.strip_prefix("set ").unwrap().split_once(" = ").unwrap()).collect();
            let asked: Vec<_> =
                gets.lines().map(|l| l.strip_prefix("get ").unwrap().split_once(" -> ").unwrap()).collect();
            assert_eq!((set.len(), asked.len()), (pairs, pairs.div_ceil(2)), "{pairs} pairs");
            assert!(asked.iter().all(|pair| set.contains(pair)), "{pairs} pairs:\n{}", document.text);
            let answers: Vec<_> =
                document.answers.iter().map(|answer| &document.text[answer.clone()]).collect();
            assert_eq!(answers, asked.iter().map(|(_, value)| *value).collect::<Vec<_>>(), "{pairs} pairs");
            assert!(
                answers.iter().all(|value| value.len() == 5 && value.bytes().all(|b| b.is_ascii_digit()))
            );
        }
    }

    #[test]
    fn one_wrong_digit_spoils_one_answer() {
        let document = Document::new(6, &mut fastrand::Rng::with_seed(9));
        let pieces = bytes(&document);
        let first = document.first_asked(&pieces);
        assert_eq!(first, document.questions);
        let asked = &pieces[first..];
        let truth: Vec<u32> = asked.iter().map(|piece| piece.token).collect();
        for (i, piece) in asked.iter().enumerate() {
            let mut greedy = truth.clone();
            greedy[i] ^= 1;
            let expected: Vec<bool> =
                document.answers.iter().map(|answer| !answer.contains(&piece.bytes.start)).collect();
            assert_eq!(document.grade(asked, &greedy), expected, "token {i} of {:?}", &document.text);
        }
        assert_eq!(document.grade(asked, &truth), [true; 3]);
    }

    #[test]
    fn tokens_may_cross_an_answers_edges() {
        let answer = 9..14;
        let document =
            Document { text: "get a -> 12345\n".into(), questions: 0, answers: Vec::from([answer]) };
        let piece = |token, bytes| Piece { token, bytes };
        // " 123" and "45\n", after "get a ->".
        let asked = [piece(1, 0..8), piece(2, 8..12), piece(3, 12..15)];
        for (case, greedy, right) in [
            ("all", [1, 2, 3], true),
            ("before", [7, 2, 3], true),
            ("first", [1, 7, 3], false),
            ("last", [1, 2, 7], false),
        ] {
            assert_eq!(document.grade(&asked, &greedy), [right], "{case}");
        }
    }
}
