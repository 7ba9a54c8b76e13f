//! Making a container.

use super::codec::{Codec, Compressor, StoredAs};
use super::error::FormatError;
use super::head::{
    ALIGN, CHECK_AT, ENTRY_LEN, HEADER_LEN, MAGIC, OPTIONAL, SegmentKind, VERSION, align, check, check_shape,
    dtype_code, element_size, raw_len,
};
use crate::ByteSpan;
use crate::ids::{ChunkKey, LayoutId};
use crate::keys::KEY_SPEC;
use crate::layout::{Dtype, KvShape};
use std::borrow::Cow;

/// What a container is made of.
#[derive(Clone, Debug)]
pub struct Parts<'a> {
    /// Layout of the KV.
    pub layout: LayoutId,
    /// The chunk's key.
    pub key: ChunkKey,
    /// Shape of one token's KV.
    pub shape: KvShape,
    /// Tokens of the chunk.
    pub tokens: u32,
    /// Element type.
    pub dtype: Dtype,
    /// Per layer: K `[kv_heads, tokens, head_dim]` before RoPE, then V of the same shape, little-endian.
    pub layers: Vec<&'a [u8]>,
    /// Where each token lies in the chunk's text.
    pub spans: Option<&'a [ByteSpan]>,
    /// How much each token matters to whatever is asked.
    pub rank: Option<Rank<'a>>,
}

/// Static rank of each token, from ingest.
#[derive(Clone, Copy, Debug)]
pub struct Rank<'a> {
    /// Version of the algorithm that made it: ranks of two versions cannot be compared.
    pub version: u16,
    /// One per token; higher matters more.
    pub ranks: &'a [u8],
}

/// Makes a container of `parts`. Fails where parts contradict each other or are beyond the format's limits.
pub fn encode(parts: &Parts<'_>, codec: Codec) -> Result<Vec<u8>, FormatError> {
    write(parts, None, codec)
}

/// Makes a container that also holds the token ids, one per token: for readers that need them and do not have the
/// text. Primary KV does without, because whoever asks for it brings the ids.
pub fn encode_with_ids(parts: &Parts<'_>, ids: &[u32], codec: Codec) -> Result<Vec<u8>, FormatError> {
    write(parts, Some(ids), codec)
}

fn write(parts: &Parts<'_>, ids: Option<&[u32]>, codec: Codec) -> Result<Vec<u8>, FormatError> {
    let segments = segments(parts, ids)?;
    let mut compressor = Compressor::new(codec).ok_or(match codec {
        Codec::BytePlaneZstd { level } => FormatError::Compressor { level },
        Codec::Raw => FormatError::Compressor { level: 0 },
    })?;

    let head_len = HEADER_LEN + segments.len() * ENTRY_LEN;
    let raw_total: usize = segments.iter().map(|(_, raw)| raw.len() + ALIGN as usize).sum();
    let mut out = Vec::with_capacity(head_len + raw_total);
    out.resize(head_len, 0);
    for (index, (kind, raw)) in segments.iter().enumerate() {
        let offset = align(out.len() as u64);
        out.resize(offset as usize, 0);
        let packed = compressor.shrink(raw, element_size(*kind, parts.dtype));
        let (stored_as, stored) = match &packed {
            Some(packed) => (StoredAs::BytePlaneZstd, &packed[..]),
            None => (StoredAs::Raw, &raw[..]),
        };
        out.extend_from_slice(stored);
        let layer = if *kind == SegmentKind::Layer { index as u32 } else { 0 };
        let entry = &mut out[HEADER_LEN + index * ENTRY_LEN..][..ENTRY_LEN];
        entry[0..2].copy_from_slice(&(*kind as u16).to_le_bytes());
        entry[2..4].copy_from_slice(&(stored_as as u16).to_le_bytes());
        entry[4..8].copy_from_slice(&layer.to_le_bytes());
        entry[8..16].copy_from_slice(&offset.to_le_bytes());
        entry[16..24].copy_from_slice(&(stored.len() as u64).to_le_bytes());
        entry[24..32].copy_from_slice(&(raw.len() as u64).to_le_bytes());
        entry[32..64].copy_from_slice(blake3::hash(stored).as_bytes());
    }

    let container_len = out.len() as u64;
    let header = &mut out[..HEADER_LEN];
    header[0..8].copy_from_slice(&MAGIC);
    header[8..10].copy_from_slice(&VERSION.to_le_bytes());
    header[10..12].copy_from_slice(&(HEADER_LEN as u16).to_le_bytes());
    header[12..14].copy_from_slice(&(ENTRY_LEN as u16).to_le_bytes());
    header[14..16].copy_from_slice(&dtype_code(parts.dtype).to_le_bytes());
    let KvShape { layers, kv_heads, head_dim } = parts.shape;
    let words = [KEY_SPEC, segments.len() as u32, layers, kv_heads, head_dim, parts.tokens];
    for (field, word) in header[16..40].chunks_exact_mut(4).zip(words) {
        field.copy_from_slice(&word.to_le_bytes());
    }
    header[40..48].copy_from_slice(&container_len.to_le_bytes());
    header[48..80].copy_from_slice(parts.layout.as_bytes());
    header[80..112].copy_from_slice(parts.key.as_bytes());
    let check = check(&out[..head_len]);
    out[CHECK_AT..HEADER_LEN].copy_from_slice(&check);
    Ok(out)
}

/// The raw segments in the container's order, of the lengths that shape and tokens ask for.
fn segments<'a>(
    parts: &'a Parts<'a>,
    ids: Option<&[u32]>,
) -> Result<Vec<(SegmentKind, Cow<'a, [u8]>)>, FormatError> {
    let Parts { shape, tokens, dtype, layers, spans, rank, .. } = parts;
    check_shape(*shape, *tokens, *dtype)?;
    let expect = |field, found: usize, expected: u64| match found as u64 == expected {
        true => Ok(()),
        false => Err(FormatError::Parts { field, found: found as u64, expected }),
    };
    expect("layers", layers.len(), shape.layers.into())?;
    let mut segments = Vec::with_capacity(layers.len() + OPTIONAL);
    for layer in layers {
        expect("layer", layer.len(), raw_len(SegmentKind::Layer, *shape, *tokens, *dtype))?;
        segments.push((SegmentKind::Layer, Cow::Borrowed(*layer)));
    }
    if let Some(spans) = spans {
        expect("spans", spans.len(), (*tokens).into())?;
        if let Some(index) = spans.iter().position(|span| span.start > span.end) {
            return Err(FormatError::Content { index, what: "a span that ends before it starts" });
        }
        let raw = spans.iter().flat_map(|span| [span.start, span.end]).flat_map(u32::to_le_bytes).collect();
        segments.push((SegmentKind::Spans, Cow::Owned(raw)));
    }
    if let Some(rank) = rank {
        expect("rank", rank.ranks.len(), (*tokens).into())?;
        let raw = [&rank.version.to_le_bytes()[..], rank.ranks].concat();
        segments.push((SegmentKind::Rank, Cow::Owned(raw)));
    }
    if let Some(ids) = ids {
        expect("ids", ids.len(), (*tokens).into())?;
        segments.push((SegmentKind::Ids, Cow::Owned(ids.iter().flat_map(|id| id.to_le_bytes()).collect())));
    }
    Ok(segments)
}
