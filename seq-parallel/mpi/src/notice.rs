//! What ranks tell each other beside the messages: that one waits, has stopped waiting, has left, or has found a fault.
//!
//! Exchanges have numbers that are the same on all ranks ([`Numbers`](crate::number::Numbers)) and say which of two things came first.

use seq_parallel::PeerFault;
use seq_parallel::transport::Tag;

/// Words of a notice: short enough for every MPI to copy it aside.
pub(crate) const WORDS: usize = 32;
/// Words before the text.
const HEAD: usize = 9;
/// Bytes of text that fit.
const TEXT: usize = 8 * (WORDS - HEAD);

/// A notice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Notice {
    /// `from` waits for `for_rank` in its exchange `exchange`. If it asks, its deadline is near: whoever waits, or begins to, until
    /// it goes on, says for whom.
    Waits { from: usize, for_rank: usize, at: Tag, exchange: u64, asks: bool },
    /// `from` waits no more.
    GoesOn { from: usize },
    /// `from` has left in order: it sends nothing any more.
    Leaves { from: usize },
    /// `from` knows, from `finder`, that `peer` has failed exchange `exchange`.
    Fault { from: usize, finder: usize, peer: usize, at: Tag, exchange: u64, fault: PeerFault },
}

impl Notice {
    /// As words.
    pub(crate) fn words(&self) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        let text = match self {
            Notice::Waits { from, for_rank, at, exchange, asks } => {
                words[..6].copy_from_slice(&[
                    0,
                    *from as u64,
                    *for_rank as u64,
                    at.word(),
                    *exchange,
                    u64::from(*asks),
                ]);
                ""
            }
            Notice::GoesOn { from } => {
                words[..2].copy_from_slice(&[1, *from as u64]);
                ""
            }
            Notice::Leaves { from } => {
                words[..2].copy_from_slice(&[2, *from as u64]);
                ""
            }
            Notice::Fault { from, finder, peer, at, exchange, fault } => {
                words[..5].copy_from_slice(&[3, *from as u64, *peer as u64, at.word(), *exchange]);
                words[8] = *finder as u64;
                let (kind, waited_ms, text) = match fault {
                    PeerFault::Stalled { waited_ms } => (0, *waited_ms, ""),
                    PeerFault::Gone => (1, 0, ""),
                    PeerFault::Garbage(text) => (2, 0, text.as_str()),
                    PeerFault::Unreachable(text) => (3, 0, text.as_str()),
                    PeerFault::Aborted(text) => (4, 0, text.as_str()),
                    // A fault that is new to this package keeps its words.
                    other => {
                        let fault = PeerFault::Aborted(other.to_string());
                        let (from, finder, peer, at, exchange) = (*from, *finder, *peer, *at, *exchange);
                        return Notice::Fault { from, finder, peer, at, exchange, fault }.words();
                    }
                };
                words[5..7].copy_from_slice(&[kind, waited_ms]);
                text
            }
        };
        let mut len = text.len().min(TEXT);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        words[7] = len as u64;
        for (i, byte) in text.bytes().take(len).enumerate() {
            words[HEAD + i / 8] |= u64::from(byte) << (8 * (i % 8));
        }
        words
    }

    /// What [`words`](Self::words) were made of, among `ranks` ranks; `None` for what is no notice.
    pub(crate) fn of_words(words: &[u64; WORDS], ranks: usize) -> Option<Self> {
        let rank = |word: u64| usize::try_from(word).ok().filter(|rank| *rank < ranks);
        let from = rank(words[1])?;
        let len = usize::try_from(words[7]).ok().filter(|len| *len <= TEXT)?;
        let byte = |i: usize| (words[HEAD + i / 8] >> (8 * (i % 8))) as u8;
        let text = || String::from_utf8_lossy(&(0..len).map(byte).collect::<Vec<_>>()).into_owned();
        Some(match words[0] {
            0 => {
                let (for_rank, at) = (rank(words[2])?, Tag::of_word(words[3])?);
                Notice::Waits { from, for_rank, at, exchange: words[4], asks: words[5] != 0 }
            }
            1 => Notice::GoesOn { from },
            2 => Notice::Leaves { from },
            3 => {
                let fault = match words[5] {
                    0 => PeerFault::Stalled { waited_ms: words[6] },
                    1 => PeerFault::Gone,
                    2 => PeerFault::Garbage(text()),
                    3 => PeerFault::Unreachable(text()),
                    4 => PeerFault::Aborted(text()),
                    _ => return None,
                };
                let (finder, peer, at) = (rank(words[8])?, rank(words[2])?, Tag::of_word(words[3])?);
                Notice::Fault { from, finder, peer, at, exchange: words[4], fault }
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use seq_parallel::transport::Operation;

    #[test]
    fn notices_come_through() {
        let at = Tag::new(Operation::AllGather, 1 << 20);
        let fault = |fault| Notice::Fault { from: 2, finder: 3, peer: 1, at, exchange: 1 << 33, fault };
        let notices = [
            Notice::Waits { from: 0, for_rank: 3, at, exchange: 1 << 33, asks: true },
            Notice::Waits { from: 0, for_rank: 3, at, exchange: 2, asks: false },
            Notice::GoesOn { from: 3 },
            Notice::Leaves { from: 1 },
            fault(PeerFault::Stalled { waited_ms: 1 << 40 }),
            fault(PeerFault::Gone),
            fault(PeerFault::Garbage("CRC-32 0x1 instead of 0x2".into())),
            fault(PeerFault::Unreachable("no route".into())),
            fault(PeerFault::Aborted(String::new())),
        ];
        for notice in notices {
            assert_eq!(Notice::of_words(&notice.words(), 4), Some(notice.clone()));
        }
        // Long words are cut, between characters.
        let long = fault(PeerFault::Aborted("ä".repeat(150)));
        let Some(Notice::Fault { fault: PeerFault::Aborted(text), .. }) = Notice::of_words(&long.words(), 4)
        else {
            panic!("a fault");
        };
        assert_eq!(text, "ä".repeat(TEXT / 2));
    }

    #[test]
    fn garbage_is_no_notice() {
        let good = Notice::Leaves { from: 3 }.words();
        for (word, value) in [(0, 9), (1, 4), (7, 1 + TEXT as u64)] {
            let mut words = good;
            words[word] = value;
            assert_eq!(Notice::of_words(&words, 4), None, "word {word} = {value}");
        }
        assert!(Notice::of_words(&good, 4).is_some());
    }
}
