//! How patient a client is.

use serde::{Deserialize, Serialize};

/// Deadlines and retries of a store client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Longest time a lookup or a delete may take.
    pub call_timeout_seconds: f64,
    /// Longest silence within a stream of layers; the clock runs only while the client waits for the store, not
    /// while the caller works.
    pub silence_seconds: f64,
    /// Longest time a put may take.
    pub put_timeout_seconds: f64,
    /// How often a read that broke off is tried again, for what it had not brought yet.
    pub retries: u32,
    /// Pause before the first retry; doubled for each further one.
    pub backoff_seconds: f64,
    /// Layers that may be decoded ahead of the caller; bounds the memory of a read.
    pub decode_ahead: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            call_timeout_seconds: 2.0,
            silence_seconds: 5.0,
            put_timeout_seconds: 60.0,
            retries: 2,
            backoff_seconds: 0.02,
            decode_ahead: 4,
        }
    }
}
