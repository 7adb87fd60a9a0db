//! Text to tokens and back: `tokenizer.json`, or plain bytes.

use std::ops::Range;
use std::path::Path;

use crate::{Config, Error};

/// How a model reads text.
pub struct Tokenizer(Kind);

enum Kind {
    /// Token = byte: a model with 256 tokens and no `tokenizer.json`.
    Bytes,
    HuggingFace(Box<tokenizers::Tokenizer>),
}

/// A token, and the bytes of the text that it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The token.
    pub token: u32,
    /// Its bytes in the text; empty for special tokens.
    pub bytes: Range<usize>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a checkpoint's folder. A model with a vocabulary of 256 and no such file reads bytes.
    ///
    /// # Errors
    /// A file that is damaged, or missing where the vocabulary is no bytes.
    pub fn read(checkpoint: &Path, config: &Config) -> Result<Self, Error> {
        let path = checkpoint.join("tokenizer.json");
        match std::fs::read_to_string(&path) {
            // `from_bytes` does the same, but is generic and would be compiled here a second time, for half a minute.
            Ok(text) => match text.parse::<tokenizers::Tokenizer>() {
                Ok(mut tokenizer) => {
                    // What a file says about lengths was meant for batches in training: here every text is read as it is.
                    let plain = tokenizer.with_truncation(None).map(|tokenizer| tokenizer.with_padding(None));
                    plain.map_err(|error| Error::malformed(&path, error))?;
                    Ok(Tokenizer(Kind::HuggingFace(Box::new(tokenizer))))
                }
                Err(error) => Err(Error::malformed(&path, error)),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && config.vocab_size == 256 => {
                Ok(Tokenizer(Kind::Bytes))
            }
            Err(error) => Err(Error::reading(&path)(error)),
        }
    }

    /// Tokens of a text, with the special tokens that the tokenizer puts around one (such as a leading BOS).
    ///
    /// # Errors
    /// Text that is not UTF-8, unless tokens are bytes; whatever the tokenizer refuses.
    pub fn encode(&self, text: &[u8]) -> Result<Vec<u32>, Error> {
        Ok(self.pieces(text)?.into_iter().map(|piece| piece.token).collect())
    }

    /// As [`encode`](Self::encode), with each token's place in the text.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn pieces(&self, text: &[u8]) -> Result<Vec<Piece>, Error> {
        match &self.0 {
            Kind::Bytes => {
                let piece = |(at, &byte): (usize, &u8)| Piece { token: byte.into(), bytes: at..at + 1 };
                Ok(text.iter().enumerate().map(piece).collect())
            }
            Kind::HuggingFace(tokenizer) => {
                let text = std::str::from_utf8(text)
                    .map_err(|error| Error::Tokenizer(format!("the text is not UTF-8: {error}")))?;
                let encoding =
                    tokenizer.encode(text, true).map_err(|error| Error::Tokenizer(error.to_string()))?;
                let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end);
                let tokens = encoding.get_ids().iter();
                Ok(tokens.zip(offsets).map(|(&token, bytes)| Piece { token, bytes }).collect())
            }
        }
    }

    /// Bytes of a sequence of tokens, without special tokens.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn decode(&self, tokens: &[u32]) -> Result<Vec<u8>, Error> {
        match &self.0 {
            Kind::Bytes => Ok(tokens.iter().map(|&token| token as u8).collect()),
            Kind::HuggingFace(tokenizer) => Ok(decode(tokenizer, tokens)?.into_bytes()),
        }
    }

    /// A stream that turns tokens into text one by one.
    pub fn stream(&self) -> Stream<'_> {
        Stream { tokenizer: self, tokens: Vec::new(), written: String::new() }
    }
}

/// The text of a sequence of tokens, without special tokens.
fn decode(tokenizer: &tokenizers::Tokenizer, tokens: &[u32]) -> Result<String, Error> {
    tokenizer.decode(tokens, true).map_err(|error| Error::Tokenizer(error.to_string()))
}

/// Turns tokens into text as they come: a token may end in the middle of a character, and its text may depend on the
/// tokens before and after it. From a `tokenizer.json`, all bytes together are UTF-8.
pub struct Stream<'t> {
    tokenizer: &'t Tokenizer,
    /// Tokens since the last line break that was written out.
    tokens: Vec<u32>,
    /// Their text as far as it was given out.
    written: String,
}

impl Stream<'_> {
    /// Adds a token and gives the bytes that are certain now, as far as a decoder can tell; [`finish`](Self::finish) gives
    /// the others.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn push(&mut self, token: u32) -> Result<Vec<u8>, Error> {
        let whole: &Tokenizer = self.tokenizer;
        let Kind::HuggingFace(tokenizer) = &whole.0 else { return Ok(vec![token as u8]) };
        self.tokens.push(token);
        let text = decode(tokenizer, &self.tokens)?;
        // U+FFFD at the end is a character whose last bytes are still to come.
        if text.ends_with('\u{fffd}') {
            return Ok(Vec::new());
        }
        let new = self.advance(text);
        // Decoding all again and again would take quadratic time. The last token stays: it decides, for instance,
        // whether the next one's leading space shows.
        if new.ends_with(b"\n") {
            self.tokens = vec![token];
            self.written = decode(tokenizer, &self.tokens)?;
        }
        Ok(new)
    }

    /// The bytes that were held back: a character that never got its last bytes.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn finish(mut self) -> Result<Vec<u8>, Error> {
        let Kind::HuggingFace(tokenizer) = &self.tokenizer.0 else { return Ok(Vec::new()) };
        let text = decode(tokenizer, &self.tokens)?;
        Ok(self.advance(text))
    }

    /// What `text` has past what was given out. A decoder may take characters back: "é" as two bytes, with a third that fits
    /// neither, becomes three times U+FFFD. What went out stays then, and the next whole character follows.
    fn advance(&mut self, text: String) -> Vec<u8> {
        let start = text.ceil_char_boundary(self.written.len());
        let new = text.as_bytes()[start..].to_vec();
        self.written = text;
        new
    }
}
