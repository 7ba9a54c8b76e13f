//! The KV container: one chunk's KV as one self-describing sequence of bytes, the same on disk and on the wire.
//!
//! All integers are little-endian. A container is a *head* (header and segment table), then the segments, each
//! at the next multiple of 4096, with zeros between; it ends with its last segment's last byte.
//!
//! | header offset | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | magic `89 43 43 4b 56 0d 0a 1a` |
//! | 8 | 2 | format version, 1 |
//! | 10 | 2 | length of the header, 128 |
//! | 12 | 2 | length of a table entry, 64 |
//! | 14 | 2 | dtype: 1 = f32, 2 = f16, 3 = bf16 |
//! | 16 | 4 | key spec the key was made under |
//! | 20 | 4 | number of segments |
//! | 24 | 4 | layers |
//! | 28 | 4 | KV heads |
//! | 32 | 4 | head dimension |
//! | 36 | 4 | tokens |
//! | 40 | 8 | length of the container |
//! | 48 | 32 | layout id |
//! | 80 | 32 | chunk key |
//! | 112 | 16 | check: the first 16 bytes of blake3(header bytes 0..112 ‖ table) |
//!
//! | entry offset | bytes | field |
//! | --- | --- | --- |
//! | 0 | 2 | kind: 1 = layer, 2 = spans, 3 = rank, 4 = ids |
//! | 2 | 2 | codec: 0 = raw, 1 = byte planes + zstd |
//! | 4 | 4 | layer (0 for other kinds) |
//! | 8 | 8 | offset in the container |
//! | 16 | 8 | stored length, never more than the raw length |
//! | 24 | 8 | raw length |
//! | 32 | 32 | blake3 of the stored bytes |
//!
//! Segments come in one order: layer 0, 1, …, then spans, then rank, then ids (each optional). Raw contents: a
//! *layer* is K `[kv_heads, tokens, head_dim]`, before RoPE, then V of the same shape; *spans* are the start and
//! end of each token in the chunk's text, `u32` each; *rank* is its algorithm's version `u16`, then one byte per
//! token; *ids* are the token ids, `u32` each, for readers that do not have the text.
//!
//! The byte-plane codec writes byte 0 of all elements, then byte 1 of all, … (elements of a layer have its
//! dtype's size, of spans and ids 4 bytes, of rank 1) and compresses that as one zstd frame.
//!
//! **Container hash = blake3(header ‖ table).** Through the digests it covers the payload, yet it is known before
//! it: an index can keep it, and a reader can verify layers one by one as they come. What is not covered, the
//! zeros between segments, is checked by [`Container::verify_all`].
//!
//! A reader never allocates or computes offsets from a field that has not passed its limit ([`head`]).

pub mod codec;
pub mod encode;
mod error;
pub mod head;
pub mod planes;

pub use error::FormatError;

use crate::ByteSpan;
use crate::ids::ContainerHash;
use bytes::Bytes;
use head::{Head, SegmentKind};

/// A whole container in memory.
#[derive(Clone)]
pub struct Container {
    head: Head,
    bytes: Bytes,
}

impl Container {
    /// Takes bytes that should be exactly one container. Verifies the head and the length; segments are
    /// verified when they are read, or all at once by [`Container::verify_all`].
    pub fn parse(bytes: Bytes) -> Result<Self, FormatError> {
        let head = Head::parse(&bytes)?;
        let found = bytes.len() as u64;
        if found != head.container_len() {
            return Err(FormatError::Length { expected: head.container_len(), found });
        }
        Ok(Self { head, bytes })
    }

    /// Verifies every byte: digests, decodability, and that padding is zero. After this, reads cannot fail.
    pub fn verify_all(&self) -> Result<(), FormatError> {
        let mut end = self.head.bytes().len();
        for (index, entry) in self.head.segments().iter().enumerate() {
            let start = entry.offset as usize;
            if let Some(at) = self.bytes[end..start].iter().position(|&byte| byte != 0) {
                return Err(FormatError::Padding { offset: (end + at) as u64 });
            }
            end = start + entry.stored_len as usize;
            let raw = self.head.decode_segment(index, self.stored(index)?)?;
            match entry.kind {
                SegmentKind::Spans => drop(parse_spans(index, &raw)?),
                SegmentKind::Layer | SegmentKind::Rank | SegmentKind::Ids => {}
            }
        }
        Ok(())
    }

    /// Header and segment table.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The container's hash.
    pub fn hash(&self) -> ContainerHash {
        self.head.hash()
    }

    /// All bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The stored bytes of a segment, as they are: not verified, not decoded. Costs no copy.
    pub fn stored_segment(&self, index: usize) -> Result<Bytes, FormatError> {
        Ok(self.bytes.slice_ref(self.stored(index)?))
    }

    /// Verified and decoded K, then V, of a layer, each `[kv_heads, tokens, head_dim]`.
    pub fn layer(&self, layer: u32) -> Result<Vec<u8>, FormatError> {
        let index = self.head.layer_segment(layer)?;
        self.head.decode_segment(index, self.stored(index)?)
    }

    /// Where each token lies in the chunk's text, if the writer told.
    pub fn spans(&self) -> Result<Option<Vec<ByteSpan>>, FormatError> {
        self.optional(SegmentKind::Spans)?.map(|(index, raw)| parse_spans(index, &raw)).transpose()
    }

    /// Version of the static rank's algorithm and the rank of each token, if the writer told.
    pub fn rank(&self) -> Result<Option<(u16, Vec<u8>)>, FormatError> {
        self.optional(SegmentKind::Rank)?.map(|(index, raw)| parse_rank(index, raw)).transpose()
    }

    /// The token ids, if the writer told.
    pub fn ids(&self) -> Result<Option<Vec<u32>>, FormatError> {
        Ok(self.optional(SegmentKind::Ids)?.map(|(_, raw)| parse_ids(&raw)))
    }

    fn optional(&self, kind: SegmentKind) -> Result<Option<(usize, Vec<u8>)>, FormatError> {
        let Some(index) = self.head.segment_of(kind) else { return Ok(None) };
        Ok(Some((index, self.head.decode_segment(index, self.stored(index)?)?)))
    }

    fn stored(&self, index: usize) -> Result<&[u8], FormatError> {
        let entry = self.head.segments().get(index).ok_or(FormatError::NoSegment { index })?;
        let start = entry.offset as usize;
        // In bounds: `parse` compared the length, and the head's offsets end with it.
        Ok(&self.bytes[start..start + entry.stored_len as usize])
    }
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Container").field("head", &self.head).field("bytes", &self.bytes.len()).finish()
    }
}

/// Reads the decoded bytes of a spans segment; `index` is for the error.
pub fn parse_spans(index: usize, raw: &[u8]) -> Result<Vec<ByteSpan>, FormatError> {
    let spans: Vec<ByteSpan> = raw
        .chunks_exact(8)
        .map(|pair| {
            let word = |at: usize| u32::from_le_bytes([pair[at], pair[at + 1], pair[at + 2], pair[at + 3]]);
            ByteSpan { start: word(0), end: word(4) }
        })
        .collect();
    if spans.iter().any(|span| span.start > span.end) {
        return Err(FormatError::Content { index, what: "a span that ends before it starts" });
    }
    Ok(spans)
}

/// Reads the decoded bytes of a rank segment: version, then one byte per token; `index` is for the error.
pub fn parse_rank(index: usize, mut raw: Vec<u8>) -> Result<(u16, Vec<u8>), FormatError> {
    let Some(&[low, high]) = raw.first_chunk() else {
        return Err(FormatError::Content { index, what: "a rank without its version" });
    };
    raw.drain(..2);
    Ok((u16::from_le_bytes([low, high]), raw))
}

/// Reads the decoded bytes of an ids segment.
pub fn parse_ids(raw: &[u8]) -> Vec<u32> {
    let (words, _) = raw.as_chunks::<4>();
    words.iter().map(|word| u32::from_le_bytes(*word)).collect()
}
