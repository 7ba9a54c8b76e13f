//! What a scorer can be told from outside.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A scorer's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Listening addresses and limits.
    pub service: cacheclip_service::Options,
    /// Directory of the auxiliary model: `config.json`, `*.safetensors`, `tokenizer.json`, `prompt.json`.
    pub model_dir: PathBuf,
    /// Bytes of auxiliary chunk KV kept in RAM.
    pub cache_bytes: u64,
    /// Questions scored at the same time; each holds pages for the auxiliary model's whole context.
    pub concurrency: usize,
    /// Requests that may wait for their turn; one more is refused with a hint.
    pub queue: usize,
    /// Longest question in auxiliary tokens.
    pub max_question_tokens: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            service: cacheclip_service::Options::default(),
            model_dir: "models/tiny/aux".into(),
            cache_bytes: 256 << 20,
            concurrency: 1,
            queue: 64,
            max_question_tokens: 512,
        }
    }
}
