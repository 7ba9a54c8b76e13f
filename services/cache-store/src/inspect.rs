//! What a file is, by its name and its head: the start and `cacheclip verify` see it the same way.

use crate::disk;
use cacheclip_chunk::container::head::HEADER_LEN;
use cacheclip_chunk::{ChunkKey, FormatError, Head};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// What is read of a file at once: the head of a container of up to 61 layers.
const FIRST_READ: usize = 4 << 10;

/// Why a file among the objects is none that can be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    /// Nothing that a store named.
    #[error("not an object's name")]
    Name,
    /// Another object's bytes.
    #[error("it holds another key, {0}")]
    Key(ChunkKey),
    /// Not the head of a container of this release, or more or fewer bytes than it says.
    #[error("{0}")]
    Format(#[from] FormatError),
}

impl Unusable {
    /// Whether this release did not write it: it is left alone.
    pub(crate) fn is_foreign(&self) -> bool {
        matches!(self, Self::Name | Self::Format(FormatError::Version { .. }))
    }
}

/// The key that an object's file is named after.
pub(crate) fn name(path: &Path) -> Option<ChunkKey> {
    (path.extension()? == "kv").then(|| disk::name(path)).flatten()
}

/// The head of an object's file that has so many bytes, compared with its name and its length. What cannot be read
/// is missing.
pub(crate) fn head(path: &Path, mut file: &File, bytes: u64) -> Result<Head, Unusable> {
    let key = name(path).ok_or(Unusable::Name)?;
    let mut read = Vec::with_capacity(FIRST_READ);
    let _ = file.take(FIRST_READ as u64).read_to_end(&mut read);
    let len = Head::len_from_prefix(&read[..read.len().min(HEADER_LEN)])?;
    let more = len.saturating_sub(read.len()) as u64;
    let _ = (&mut file).take(more).read_to_end(&mut read);
    let head = Head::parse(&read)?;
    if head.key() != key {
        return Err(Unusable::Key(head.key()));
    }
    let expected = head.container_len();
    if expected == bytes { Ok(head) } else { Err(FormatError::Length { expected, found: bytes }.into()) }
}
