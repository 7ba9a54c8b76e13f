//! What a file is, by its name and its head: the start and `cacheclip verify` see it the same way.

use crate::disk;
use bytes::Bytes;
use cacheclip_chunk::container::head::HEADER_LEN;
use cacheclip_chunk::{ChunkKey, FormatError, Head};
use std::fs::File;
use std::io;
use std::path::Path;

/// What is read of a file at once: the head of a container of up to 61 layers.
const FIRST_READ: usize = 4 << 10;

/// Where a container's bytes are.
pub(crate) trait Source {
    /// Some of them. [`io::ErrorKind::UnexpectedEof`] where it ends before.
    fn part(&self, offset: u64, len: usize) -> io::Result<Bytes>;
}

impl Source for File {
    fn part(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        disk::read_part(self, offset, len)
    }
}

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
    /// What the medium said instead.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
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

/// The head of an object that has so many bytes, compared with its name and its length.
pub(crate) fn head(path: &Path, source: &dyn Source, bytes: u64) -> Result<Head, Unusable> {
    let key = name(path).ok_or(Unusable::Name)?;
    let mut read = source.part(0, bytes.min(FIRST_READ as u64) as usize)?;
    let len = Head::len_from_prefix(&read[..read.len().min(HEADER_LEN)])?;
    if len > read.len() && len as u64 <= bytes {
        read = source.part(0, len)?;
    }
    let head = Head::parse(&read)?;
    if head.key() != key {
        return Err(Unusable::Key(head.key()));
    }
    let expected = head.container_len();
    if expected == bytes { Ok(head) } else { Err(FormatError::Length { expected, found: bytes }.into()) }
}
