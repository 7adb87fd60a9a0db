//! The wire: what a prefill node sends to a decode node.
//!
//! A stream is a header, then segments in any order, then an end frame. A segment is everything that a sequence holds
//! in one (layer, KV head): its closed blocks in one page layout, its sinks, its open block. Since segments are
//! addressed by the model's own layer and head numbers, nodes with different shards can talk: a receiver takes what
//! it holds and skips the rest. A layer can leave while the next one computes ([`Sender::layer`]).
//!
//! A receiver knows what it expects before it reads: its own configuration. Another one is refused before any
//! payload, every length follows from the header, nothing is allocated on the word of a stream beyond the pages of
//! the receiver's own pools, and every byte is under a checksum. What arrives is the sender's state bit for bit. A
//! connection that is cut loses the segment it was in; the receiver [asks](Request) for what it still misses, and
//! goes on.
//!
//! # Bytes
//!
//! Little-endian throughout. CRC is CRC-32 (IEEE 802.3), over everything since the last one.
//!
//! | header | type | |
//! |---|---|---|
//! | magic | 8 bytes | `longkvHQ` |
//! | version | u16 | 1 |
//! | status | u16 | 0: a cache follows; 1: the sender does not know the tag, and nothing follows the fixed part |
//! | page layout | u16 | [`PageLayout::id`](crate::page::PageLayout::id) |
//! | axes | u8 | 1: keys per channel; 2: keys per token |
//! | dtype | u8 | 1: f16; 2: bf16 |
//! | Π | u16 | |
//! | S | u16 | sink tokens |
//! | sums | u8 | 1: pages hold code sums |
//! | open block | u8 | 0: 16 bits; 1: requantized |
//! | rounding | u8 | 0: nearest; 1: stochastic |
//! | reserved | u8 | 0 |
//! | seed | u64 | of stochastic rounding, else 0 |
//! | tag | u64 | names the sequence |
//! | tokens | u64 | |
//! | layers, KV heads, key dim, value dim | 4 × u32 | of the whole model |
//! | CRC | u32 | |
//! | widths | `[layers, kv_heads]` u8 | `16 · bits of K + bits of V` |
//! | CRC | u32 | |
//!
//! | frame | type | |
//! |---|---|---|
//! | kind | u32 | 1: segment; 2: end |
//! | layer, KV head | 2 × u32 | 0 in an end frame |
//! | reserved | u32 | 0 |
//! | bytes | u64 | of the payload; in an end frame, segments in this stream |
//! | CRC | u32 | |
//!
//! A segment's frame is followed by its payload and the payload's CRC (u32). The payload is `closed[blocks]` (see
//! [`page`](crate::page)), `sink_k[s, D] · sink_v[s, E]`, `open_k[o, D] · open_v[o, E]`, for the `s` sinks and `o`
//! open tokens that the sequence has.

mod frame;
mod header;
mod receive;
mod request;
mod send;

pub use header::{Header, Model};
pub use receive::Receiver;
pub use request::Request;
pub use send::{Sender, refuse};

pub use crate::wire::frame::VERSION;
