//! Text of an answer while it grows.

use crate::Tokenizer;

/// What a decoder puts for bytes that are no complete character (yet).
const INCOMPLETE: char = '\u{FFFD}';

/// Turns tokens into text one by one, holding back what is not a complete character yet.
///
/// The text of a token may depend on the tokens before it (spaces, characters cut in pieces), so a window of
/// tokens since the last emitted text is decoded with and without its newest part, and the difference is
/// the new text. The window stays short, so the cost per token does not grow with the answer.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    window: Vec<u32>,
    /// Ids of the window whose text was emitted.
    emitted: usize,
}

impl Detokenizer {
    /// A detokenizer at the start of an answer.
    pub fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), emitted: 0 }
    }

    /// Takes the next token; returns the text that is complete now, which may be empty.
    pub fn push(&mut self, id: u32) -> String {
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window);
        if text.ends_with(INCOMPLETE) {
            return String::new();
        }
        self.emit(&text)
    }

    /// Ends the answer; returns what was held back, with replacement characters for what stayed incomplete.
    pub fn finish(mut self) -> String {
        let text = self.tokenizer.decode(&self.window);
        self.emit(&text)
    }

    fn emit(&mut self, text: &str) -> String {
        let before = self.tokenizer.decode(&self.window[..self.emitted]);
        // Text that was emitted cannot be taken back: should a decoder change it, only what is longer follows.
        let new = text.get(before.len()..).unwrap_or_default().to_owned();
        self.window.drain(..self.emitted);
        self.emitted = self.window.len();
        new
    }
}
