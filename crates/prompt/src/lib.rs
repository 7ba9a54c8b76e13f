//! Tokenizer and prompt layout: text to sections of token ids with byte spans.
//!
//! A prompt is `prefix + chunks + question`, and **every section is tokenised on its own**: a chunk's ids must not
//! depend on what stands beside it, or its KV could not be found again in another order. The price is that
//! no merge crosses a section's edge; the joiner, which opens every chunk, keeps that edge where merges rarely are.
//!
//! Spans are ranges of *bytes* of the caller's text. They are monotone, lie inside the text and cover it without
//! holes. Byte-level vocabularies may cut inside a character; such spans end inside one too, so slice bytes and not
//! `str` with them.

mod composer;
mod detokenizer;
mod error;
mod format;
mod spans;
mod tokenizer;

pub use composer::{Composer, Section};
pub use detokenizer::Detokenizer;
pub use error::Error;
pub use format::Format;
pub use tokenizer::{Encoded, Tokenizer};
