//! The fixed texts around a model's sections.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// `prompt.json` of a model directory: what every chunk is encoded behind, what opens it, what ends an answer.
///
/// The anchor and the joiner are part of what chunks' KV is made from: changing them makes all stored KV
/// unreachable (under new keys), never wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Format {
    /// Text, behind the model's BOS, that chunks are encoded behind, so that attention sinks fall on it and not
    /// on the chunk. Also the head of prompts that bring none.
    pub anchor: String,
    /// Opens every chunk, as plain text: a special token's name in it is not that token.
    pub joiner: String,
    /// An answer ends before the first of these texts, beside the model's own EOS.
    pub stop: Vec<String>,
}

impl Default for Format {
    fn default() -> Self {
        Self { anchor: "The sources follow.".into(), joiner: "\n\n".into(), stop: Vec::new() }
    }
}

impl Format {
    /// Reads `prompt.json`; the defaults when there is none.
    ///
    /// # Errors
    /// A file that is there and cannot be read or has unknown fields.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let path = dir.join("prompt.json");
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| Error::Malformed { path, reason: error.to_string() }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(Error::Read { path, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_means_the_defaults_and_a_typo_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(Format::from_dir(dir.path()).expect("defaults"), Format::default());
        std::fs::write(dir.path().join("prompt.json"), r#"{"anchor": "A", "joinr": "\n"}"#).expect("a file");
        let error = Format::from_dir(dir.path()).expect_err("a typo").to_string();
        assert!(error.contains("joinr") && error.contains("prompt.json"), "{error}");
        std::fs::write(dir.path().join("prompt.json"), r#"{"anchor": "A", "stop": ["\n"]}"#).expect("a file");
        let format = Format::from_dir(dir.path()).expect("a format");
        assert_eq!((format.anchor.as_str(), format.joiner), ("A", Format::default().joiner));
    }
}
