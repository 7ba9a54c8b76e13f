//! Errors of tokenizers and prompt formats.

use std::path::PathBuf;

/// Why a tokenizer cannot be loaded or a text cannot be tokenised.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the model directory cannot be read.
    #[error("cannot read {} (a model directory holds tokenizer.json and config.json)", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the model directory does not say what it must.
    #[error("{}: {reason}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A text is larger than spans can address.
    #[error("the text has {bytes} bytes, more than the {} that a span can address", u32::MAX)]
    TooLong {
        /// Size of the text.
        bytes: usize,
    },
    /// The tokenizer refused a text.
    #[error("the text cannot be tokenised: {0}")]
    Encode(String),
}
