//! What a server can be told from outside.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Listening addresses and limits of one server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Address of the gRPC port; port 0 takes a free one.
    pub listen: String,
    /// Address of the admin port (`/metrics`, `/live`, `/ready`); absent: no admin port.
    pub admin_listen: Option<String>,
    /// Largest message a service accepts. A decoder reserves a message's stated length at once, so this
    /// is also the bound on what one message can cost in memory.
    pub max_message_bytes: usize,
    /// Requests in flight over all connections; one more is refused with a hint when to retry.
    pub max_concurrent_requests: usize,
    /// Longest life of one request, its streamed answer included.
    pub request_timeout_seconds: f64,
    /// How long a drain waits for requests in flight.
    pub drain_seconds: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:0".into(),
            admin_listen: None,
            max_message_bytes: 16 << 20,
            max_concurrent_requests: 256,
            request_timeout_seconds: 600.0,
            drain_seconds: 30.0,
        }
    }
}

impl Options {
    pub(crate) fn request_timeout(&self) -> Duration {
        seconds(self.request_timeout_seconds)
    }

    pub(crate) fn drain(&self) -> Duration {
        seconds(self.drain_seconds)
    }
}

/// A duration from a configured number of seconds; nonsense (negative, NaN, huge) becomes the nearest
/// sensible value, because a timeout that panics is worse than one that is off.
pub fn seconds(value: f64) -> Duration {
    const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
    if value.is_nan() {
        return Duration::ZERO;
    }
    Duration::try_from_secs_f64(value.max(0.0)).unwrap_or(LONGEST).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonsense_number_of_seconds_never_panics() {
        assert_eq!(seconds(1.5), Duration::from_millis(1500));
        assert_eq!(seconds(-1.0), Duration::ZERO);
        assert_eq!(seconds(f64::NAN), Duration::ZERO);
        assert!(seconds(f64::INFINITY) >= Duration::from_secs(1 << 20));
    }
}
