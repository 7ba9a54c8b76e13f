//! A bucket's objects, to be checked as files are.

use super::{Finding, Found, Listing, Place};
use crate::bucket::{Failure, Objects};
use crate::inspect;
use std::io;
use std::path::Path;
use std::time::Duration;

/// Objects that are read side by side.
pub(super) const READERS: usize = 16;

impl Listing {
    /// Lists what is below a bucket's URL: a node's part of it, or that of a whole fleet. Stores may be using it.
    ///
    /// # Errors
    /// The URL means no bucket, or it cannot be listed; an answer is waited for as long as `timeout`.
    pub async fn bucket(url: &str, timeout: Duration) -> io::Result<Self> {
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let objects = Objects::open(url, timeout).map_err(invalid)?;
        let files = objects.files().await.map_err(|failure| match failure {
            Failure::Missing => io::Error::new(io::ErrorKind::NotFound, failure),
            failure => io::Error::other(failure),
        })?;
        if files.is_empty() {
            return Err(invalid("has no objects: name the `bucket` of a store, and its node".into()));
        }
        let mut listing = Self { place: Place::Bucket(objects), objects: Vec::new(), findings: Vec::new() };
        for (path, bytes) in files {
            match is_shelved(&path) {
                true => listing.objects.push((path, bytes)),
                false => listing.findings.push(Found { path, bytes, finding: Finding::ForeignName }),
            }
        }
        Ok(listing)
    }
}

/// Whether it has the name of an object.
fn is_shelved(path: &Path) -> bool {
    inspect::name(path).is_some()
}
