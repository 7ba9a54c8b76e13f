//! Channels to other services, tuned alike on both ends.

use crate::Error;
use crate::options::seconds;
use serde::{Deserialize, Serialize};
use tonic::transport::{Channel, Endpoint};

/// KV travels in pieces of up to 1 MiB, in messages a little longer: with hyper's frames of 16 KiB each would be cut in
/// 64, and with frames of just 1 MiB each would leave a crumb behind.
pub(crate) const FRAME_BYTES: u32 = (1 << 20) + (16 << 10);
/// Windows must cover bandwidth times delay, or a bulk stream waits for window updates.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// Several bulk streams share one connection.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// How to reach another service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConnectOptions {
    /// Longest time one attempt to connect may take.
    pub connect_timeout_seconds: f64,
    /// A silent connection is pinged this often.
    pub keepalive_seconds: f64,
    /// A connection whose ping is not answered for this long is given up.
    pub keepalive_timeout_seconds: f64,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self { connect_timeout_seconds: 2.0, keepalive_seconds: 10.0, keepalive_timeout_seconds: 5.0 }
    }
}

/// A channel to `endpoint` (`http://host:port` or `host:port`). It connects with its first call and again
/// after a loss, so that the order in which services start does not matter. Needs a tokio runtime.
///
/// A channel is one TCP connection: give bulk reads their own. It sets no deadline on calls; every call
/// brings its own.
///
/// # Errors
/// An endpoint that is not a URI with a host.
pub fn connect(endpoint: &str, options: &ConnectOptions) -> Result<Channel, Error> {
    Ok(self::endpoint(endpoint, options)?.connect_lazy())
}

/// What [`connect`] dials, for a caller that brings its own connector.
///
/// # Errors
/// As [`connect`].
pub fn endpoint(endpoint: &str, options: &ConnectOptions) -> Result<Endpoint, Error> {
    let wrong = |reason: String| Error::Endpoint { endpoint: endpoint.into(), reason };
    let uri = if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") };
    let parsed = Endpoint::from_shared(uri).map_err(|error| wrong(error.to_string()))?;
    if parsed.uri().host().is_none_or(str::is_empty) {
        return Err(wrong("it has no host".into()));
    }
    if parsed.uri().scheme_str() != Some("http") {
        return Err(wrong("only http:// is supported".into()));
    }
    Ok(parsed
        .connect_timeout(seconds(options.connect_timeout_seconds))
        .http2_keep_alive_interval(seconds(options.keepalive_seconds))
        .keep_alive_timeout(seconds(options.keepalive_timeout_seconds))
        .keep_alive_while_idle(true)
        .tcp_nodelay(true)
        .max_frame_size(FRAME_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_may_leave_its_scheme_out_but_not_its_host() {
        let options = ConnectOptions::default();
        for good in ["http://127.0.0.1:7070", "127.0.0.1:7070", "store-0.store:7070"] {
            assert!(endpoint(good, &options).is_ok(), "{good}");
        }
        for bad in ["", "http://", "ftp://host:1", "two words"] {
            let error = endpoint(bad, &options).expect_err(bad).to_string();
            assert!(error.contains("http://host:port"), "{error}");
        }
    }
}
