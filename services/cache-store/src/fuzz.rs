//! For fuzzing: decoders of bytes that others wrote and that cannot be reached from outside.

use crate::index;
use crate::upload::{Announced, takes};
use cacheclip_chunk::{ChunkKey, LayoutId};

/// Whether a store takes these frames for the container that was announced.
pub fn put<'a>(layout: LayoutId, key: ChunkKey, bytes: u64, frames: impl Iterator<Item = &'a [u8]>) -> bool {
    takes(Announced { layout, key, bytes }, frames)
}

/// Reads what is found in an index.
pub fn records(bytes: &[u8]) {
    index::decodes(bytes);
}
