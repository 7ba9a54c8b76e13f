//! The sections of a prompt.

use crate::{Encoded, Error, Format, Tokenizer};
use cacheclip_chunk::ByteSpan;

/// Token ids of one section, and the bytes of the caller's text that each stands for. Ids that stand for none of
/// them (BOS, the joiner) have empty spans.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Section {
    /// Token ids.
    pub ids: Vec<u32>,
    /// One span per id.
    pub spans: Vec<ByteSpan>,
}

/// Lays prompts out for one model: its tokenizer and its format. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Composer {
    tokenizer: Tokenizer,
    format: Format,
}

impl Composer {
    /// Lays out prompts with `tokenizer` in `format`.
    pub fn new(tokenizer: Tokenizer, format: Format) -> Self {
        Self { tokenizer, format }
    }

    /// Both from a model directory.
    ///
    /// # Errors
    /// As [`Tokenizer::from_dir`] and [`Format::from_dir`].
    pub fn from_dir(dir: &std::path::Path) -> Result<Self, Error> {
        Ok(Self::new(Tokenizer::from_dir(dir)?, Format::from_dir(dir)?))
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The format.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// Ids that every chunk is encoded behind: `[bos] + anchor`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`]; so for all sections.
    pub fn anchor(&self) -> Result<Vec<u32>, Error> {
        Ok(self.prefix(&self.format.anchor)?.ids)
    }

    /// The head of a prompt: `[bos] + text`. Special tokens in it are recognised.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn prefix(&self, text: &str) -> Result<Section, Error> {
        let Encoded { mut ids, mut spans } = self.tokenizer.encode_template(text)?;
        ids.insert(0, self.tokenizer.bos());
        spans.insert(0, ByteSpan { start: 0, end: 0 });
        Ok(Section { ids, spans })
    }

    /// A chunk: `joiner + text`, with spans in `text`. Special tokens in it are plain text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn chunk(&self, text: &str) -> Result<Section, Error> {
        let joiner = &self.format.joiner;
        let Encoded { ids, mut spans } = self.tokenizer.encode(&format!("{joiner}{text}"))?;
        // The joined text fits in a u32, so does the joiner.
        let shift = u32::try_from(joiner.len()).unwrap_or(u32::MAX);
        for span in &mut spans {
            // A token may cover the joiner's end and the text's start: it keeps the text's part.
            span.start = span.start.saturating_sub(shift);
            span.end = span.end.saturating_sub(shift);
        }
        Ok(Section { ids, spans })
    }

    /// What follows the last chunk. Special tokens in it are recognised.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn question(&self, text: &str) -> Result<Section, Error> {
        let Encoded { ids, spans } = self.tokenizer.encode_template(text)?;
        Ok(Section { ids, spans })
    }
}
