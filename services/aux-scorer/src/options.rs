//! What a scorer can be told from outside.

use cacheclip_service::ConnectOptions;
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
    /// Random weights of a named shape instead of the directory's, to measure time and bytes: as a worker's.
    pub random_shape: Option<String>,
    /// Cache stores to fetch auxiliary chunk KV from and publish it to, each `http://host:port`, or
    /// `dns+http://host:port` for every address of a name; stores that these name are used, too. Empty: what is not
    /// in RAM is computed from text.
    pub stores: Vec<String>,
    /// How stores are dialled.
    pub connect: ConnectOptions,
    /// Longest wait of one request for the stores; what has not come by then is computed from text.
    pub load_timeout_seconds: f64,
    /// Chunks that may wait to be written to the stores; one more is not stored.
    pub write_queue: usize,
    /// Bytes of auxiliary chunk KV kept in RAM for later requests. Besides, in bytes of the auxiliary model's KV for its
    /// whole context: at most one such for each of `concurrency` (pages, committed as far as a request uses them), and
    /// for each request that waits or runs what was evicted of its own chunks meanwhile. The last 64 prompt heads are
    /// kept, too.
    pub cache_bytes: u64,
    /// How long auxiliary KV is served from RAM before the stores are asked for it again: what has expired there is used
    /// no longer than that. 0: for ever.
    pub cache_seconds: u64,
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
            random_shape: None,
            stores: Vec::new(),
            connect: ConnectOptions::default(),
            load_timeout_seconds: 1.0,
            write_queue: 64,
            cache_bytes: 256 << 20,
            cache_seconds: 3600,
            concurrency: 1,
            queue: 64,
            max_question_tokens: 512,
        }
    }
}
