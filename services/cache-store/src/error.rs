//! Why a store does not start.

use std::io;
use std::path::PathBuf;

/// Why a store does not start; one line that says what to change.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The data directory cannot be made, read or written.
    #[error("data_dir {}: {reason}; choose a directory this process may write", .path.display())]
    DataDir {
        /// The directory, or what in it.
        path: PathBuf,
        /// What the system said; part of the line already, and therefore no source to be told again.
        reason: io::Error,
    },
    /// An option that cannot work.
    #[error("{field}: {reason}")]
    Option {
        /// Its dotted name.
        field: &'static str,
        /// What is wrong with it, and what to write instead.
        reason: String,
    },
    /// Another store has the directory.
    #[error("data_dir {}: in use by another cache-store; give each its own", .path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The index can neither be opened nor made anew.
    #[error("index {}: {reason}; remove the file, it is rebuilt", .path.display())]
    Index {
        /// Its file.
        path: PathBuf,
        /// What the database said.
        reason: String,
    },
    /// The journal can be neither opened nor begun.
    #[error(
        "{}: {reason}; restore the file from a copy, or remove it: claims, pins and what deletions refuse are lost \
         with it, objects are not",
        .path.display()
    )]
    Journal {
        /// Its file.
        path: PathBuf,
        /// What the database said; part of the line already.
        reason: io::Error,
    },
}
