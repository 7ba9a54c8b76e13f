//! Errors of a server's bootstrap.

use std::path::PathBuf;

/// Why a server could not be configured, started or reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration cannot be read or names a field that does not exist.
    #[error("configuration{}: {reason}", in_file(.file))]
    Config {
        /// The file that was given, if any.
        file: Option<PathBuf>,
        /// Field, value and where it came from.
        reason: String,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}; choose a free address of this machine")]
    Bind {
        /// The address as configured.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// An endpoint is not a URI that a client can dial.
    #[error("endpoint {endpoint:?} is not usable: {reason}; write http://host:port")]
    Endpoint {
        /// The endpoint as configured.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Logging or metrics cannot be set up.
    #[error("telemetry: {0}")]
    Telemetry(String),
    /// The reflection service refused the descriptors; the build is broken.
    #[error("reflection: {0}")]
    Reflection(String),
}

fn in_file(file: &Option<PathBuf>) -> String {
    file.as_ref().map(|path| format!(" {}", path.display())).unwrap_or_default()
}
