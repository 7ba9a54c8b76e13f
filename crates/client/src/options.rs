//! How patient a client is.

use serde::{Deserialize, Serialize};

/// Deadlines, retries and bounds of a client of the stores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Longest time a lookup or a delete may take, and longest wait of a first call for the first word from the
    /// stores.
    pub call_timeout_seconds: f64,
    /// Longest silence within a stream of layers; the clock runs only while the client waits for the store, not
    /// while the caller works.
    pub silence_seconds: f64,
    /// Longest time a put may take.
    pub put_timeout_seconds: f64,
    /// Longest time one store may take to delete a document.
    pub delete_timeout_seconds: f64,
    /// How often a read that broke off is tried again, for what it had not brought yet.
    pub retries: u32,
    /// Pause before the first retry; doubled for each further one.
    pub backoff_seconds: f64,
    /// Layers that may be decoded ahead of the caller; bounds the memory of a read.
    pub decode_ahead: usize,
    /// Pause between two rounds of asking the stores whether they are there; a failed call starts one sooner.
    pub refresh_seconds: f64,
    /// Longest time a store may take to say that it is there. One that was live is asked a second time before it
    /// is given up, because a busy machine may swallow one answer.
    pub members_timeout_seconds: f64,
    /// Chunks that may wait to be copied to the store that placement names; one more is not copied.
    pub move_queue: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            call_timeout_seconds: 2.0,
            silence_seconds: 5.0,
            put_timeout_seconds: 60.0,
            delete_timeout_seconds: 20.0,
            retries: 2,
            backoff_seconds: 0.02,
            decode_ahead: 4,
            refresh_seconds: 2.0,
            members_timeout_seconds: 1.0,
            move_queue: 64,
        }
    }
}
