//! What a gateway can be told from outside.

use crate::Error;
use cacheclip_chunk::ScopeSecret;
use cacheclip_service::ConnectOptions;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The scope secret of a development set-up: text that anyone can read, so tenants are not kept apart.
pub const DEVELOPMENT_SECRET: &str = "6f6e6c7920666f7220646576656c6f706d656e743a206e6f7420736563726574";

/// A gateway's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Listening addresses and limits.
    pub service: cacheclip_service::Options,
    /// Directory with the primary model's `tokenizer.json`, `config.json` and `prompt.json`; no weights.
    pub model_dir: PathBuf,
    /// The workers: `http://host:port` each, or `dns+http://host:port` for every address of a name. They share
    /// one model; requests go where most of their chunks are, less the queue.
    pub workers: Vec<String>,
    /// The scorers, written alike; none: policies that need scores go down the ladder.
    pub scorers: Vec<String>,
    /// How all of them are dialled.
    pub connect: ConnectOptions,
    /// Secret that scopes are derived with: 64 hexadecimal digits. All gateways of a fleet share it.
    pub scope_secret: String,
    /// Tells the secret from its predecessor during rotation.
    pub scope_key_id: u32,
    /// Request metadata that names the tenant. It is believed as it stands: until callers authenticate, run
    /// the gateway where only trusted callers reach it.
    pub tenant_header: String,
    /// Longest wait for importance sets, asking for text included.
    pub score_timeout_seconds: f64,
    /// Longest silence of a worker within one request.
    pub worker_timeout_seconds: f64,
    /// Longest wait for a worker to describe itself at start.
    pub describe_timeout_seconds: f64,
    /// Longest wait for an ingest stream's next document.
    pub ingest_idle_seconds: f64,
    /// Chunks per call to worker and scorer during ingest; a progress message follows each.
    pub ingest_batch: usize,
    /// Tokens generated when a request names no limit.
    pub default_answer_tokens: u32,
    /// Bytes of chunk tokenisations kept.
    pub token_cache_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            service: cacheclip_service::Options::default(),
            model_dir: "models/tiny/primary".into(),
            workers: vec!["http://127.0.0.1:7072".into()],
            scorers: vec!["http://127.0.0.1:7074".into()],
            connect: ConnectOptions::default(),
            scope_secret: DEVELOPMENT_SECRET.into(),
            scope_key_id: 0,
            tenant_header: "x-tenant".into(),
            score_timeout_seconds: 2.0,
            worker_timeout_seconds: 120.0,
            describe_timeout_seconds: 60.0,
            ingest_idle_seconds: 60.0,
            ingest_batch: 16,
            default_answer_tokens: 64,
            token_cache_bytes: 64 << 20,
        }
    }
}

impl Options {
    /// The secret, parsed.
    ///
    /// # Errors
    /// Text that is not 64 hexadecimal digits. It is not repeated in the error.
    pub(crate) fn secret(&self) -> Result<ScopeSecret, Error> {
        let wrong = Error::Option { field: "scope_secret", reason: "it must be 64 hexadecimal digits" };
        // Ids are parsed from the same form.
        let parsed = self.scope_secret.parse::<cacheclip_chunk::ScopeId>();
        parsed.map(|id| ScopeSecret::new(self.scope_key_id, *id.as_bytes())).map_err(|_| wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_secret_is_refused_and_not_repeated() {
        assert!(Options::default().secret().is_ok());
        let options = Options { scope_secret: "hunter2".into(), ..Default::default() };
        let error = options.secret().expect_err("too short").to_string();
        assert!(error.contains("scope_secret") && !error.contains("hunter2"), "{error}");
    }
}
