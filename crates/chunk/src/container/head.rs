//! Header and segment table: everything about a container that is known before its payload.

use super::codec::{StoredAs, expand};
use super::error::FormatError;
use crate::ids::{ChunkKey, ContainerHash, LayoutId};
use crate::layout::{Dtype, KvShape};
use bytes::Bytes;

pub(super) const MAGIC: [u8; 8] = *b"\x89CCKV\r\n\x1a";
pub(super) const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_LEN: usize = 128;
/// Bytes of one entry of the segment table.
pub const ENTRY_LEN: usize = 64;
/// Segments start at multiples of this.
pub const ALIGN: u64 = 4096;
pub(super) const CHECK_AT: usize = 112;
/// Kinds of segments that a container may have once, behind its layers.
pub(super) const OPTIONAL: usize = 3;

/// Most layers a container may have.
pub const MAX_LAYERS: u32 = 1024;
/// Most KV heads per layer.
pub const MAX_KV_HEADS: u32 = 1024;
/// Most elements per head.
pub const MAX_HEAD_DIM: u32 = 1024;
/// Most tokens of one chunk.
pub const MAX_TOKENS: u32 = 1 << 20;
/// Most raw bytes of one segment: what decoding one segment may allocate.
pub const MAX_SEGMENT_BYTES: u64 = 1 << 30;
/// Most bytes of a head that passes the limits above.
pub const MAX_HEAD_LEN: usize = HEADER_LEN + (MAX_LAYERS as usize + OPTIONAL) * ENTRY_LEN;

/// What a segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum SegmentKind {
    /// K and V of one layer.
    Layer = 1,
    /// The byte span of each token.
    Spans = 2,
    /// The static rank of each token.
    Rank = 3,
    /// The id of each token.
    Ids = 4,
}

impl SegmentKind {
    fn from_code(code: u16) -> Option<Self> {
        [Self::Layer, Self::Spans, Self::Rank, Self::Ids].into_iter().find(|kind| *kind as u16 == code)
    }
}

/// One entry of the segment table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentEntry {
    /// What it holds.
    pub kind: SegmentKind,
    /// Which layer; 0 for other kinds.
    pub layer: u32,
    /// How it is stored.
    pub codec: StoredAs,
    /// Where its stored bytes start, in bytes from the container's start; a multiple of 4096.
    pub offset: u64,
    /// Bytes stored.
    pub stored_len: u64,
    /// Bytes after decoding.
    pub raw_len: u64,
    /// blake3 of the stored bytes.
    pub digest: [u8; 32],
}

/// A parsed, checked header and segment table.
#[derive(Clone, PartialEq, Eq)]
pub struct Head {
    layout: LayoutId,
    key: ChunkKey,
    key_spec: u32,
    shape: KvShape,
    tokens: u32,
    dtype: Dtype,
    container_len: u64,
    hash: ContainerHash,
    segments: Vec<SegmentEntry>,
    bytes: Bytes,
}

pub(super) fn align(offset: u64) -> u64 {
    offset.next_multiple_of(ALIGN)
}

/// The first 16 bytes of the digest of all of a head but its check.
pub(super) fn check(head: &[u8]) -> [u8; HEADER_LEN - CHECK_AT] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head[..CHECK_AT]);
    hasher.update(&head[HEADER_LEN..]);
    let digest = hasher.finalize();
    std::array::from_fn(|i| digest.as_bytes()[i])
}

pub(super) const fn dtype_code(dtype: Dtype) -> u16 {
    match dtype {
        Dtype::F32 => 1,
        Dtype::F16 => 2,
        Dtype::Bf16 => 3,
    }
}

/// Refuses `value` unless `good`.
pub(super) fn require(
    good: bool,
    field: &'static str,
    value: u64,
    expected: &'static str,
) -> Result<(), FormatError> {
    if good { Ok(()) } else { Err(FormatError::Field { field, value, expected }) }
}

/// The limits that a shape and a token count must keep, for readers and writers alike.
pub(super) fn check_shape(shape: KvShape, tokens: u32, dtype: Dtype) -> Result<(), FormatError> {
    let KvShape { layers, kv_heads, head_dim } = shape;
    require((1..=MAX_LAYERS).contains(&layers), "layers", layers.into(), "1 to 1024")?;
    require((1..=MAX_KV_HEADS).contains(&kv_heads), "KV heads", kv_heads.into(), "1 to 1024")?;
    require((1..=MAX_HEAD_DIM).contains(&head_dim), "head dimension", head_dim.into(), "1 to 1024")?;
    require((1..=MAX_TOKENS).contains(&tokens), "token count", tokens.into(), "1 to 1048576")?;
    let layer = shape.layer_bytes(tokens, dtype);
    require(layer <= MAX_SEGMENT_BYTES, "layer size", layer, "at most 1 GiB")
}

/// Little-endian fields of a slice whose length has been checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.0[at + i])
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }
}

impl Head {
    /// Bytes of the head, told by the container's first [`HEADER_LEN`] bytes; what a streaming reader has to
    /// buffer before it can [`Head::parse`]. At most [`MAX_HEAD_LEN`].
    pub fn len_from_prefix(prefix: &[u8]) -> Result<usize, FormatError> {
        let have = prefix.len() as u64;
        if prefix.len() < HEADER_LEN {
            return Err(FormatError::Truncated { need: HEADER_LEN as u64, have });
        }
        let header = Fields(prefix);
        if header.array(0) != MAGIC {
            return Err(FormatError::Magic);
        }
        if header.u16(8) != VERSION {
            return Err(FormatError::Version { found: header.u16(8) });
        }
        require(usize::from(header.u16(10)) == HEADER_LEN, "header length", header.u16(10).into(), "128")?;
        require(usize::from(header.u16(12)) == ENTRY_LEN, "entry length", header.u16(12).into(), "64")?;
        let (segments, layers) = (header.u32(20), header.u32(24));
        require((1..=MAX_LAYERS).contains(&layers), "layers", layers.into(), "1 to 1024")?;
        let good = (layers..=layers + OPTIONAL as u32).contains(&segments);
        require(good, "segment count", segments.into(), "the layers and up to three more")?;
        Ok(HEADER_LEN + segments as usize * ENTRY_LEN)
    }

    /// Parses and checks the head at the start of `bytes` (what follows it is not looked at): limits, the exact
    /// place of every segment, and the head's own check.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let len = Self::len_from_prefix(bytes)?;
        let have = bytes.len() as u64;
        let bytes = bytes.get(..len).ok_or(FormatError::Truncated { need: len as u64, have })?;
        let header = Fields(bytes);
        if header.array(CHECK_AT) != check(bytes) {
            return Err(FormatError::Head);
        }
        let code = header.u16(14);
        let dtype =
            [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().find(|dtype| dtype_code(*dtype) == code);
        let dtype =
            dtype.ok_or(FormatError::Field { field: "dtype", value: code.into(), expected: "1 to 3" })?;
        let shape = KvShape { layers: header.u32(24), kv_heads: header.u32(28), head_dim: header.u32(32) };
        let tokens = header.u32(36);
        check_shape(shape, tokens, dtype)?;
        let container_len = header.u64(40);

        let mut segments = Vec::with_capacity((len - HEADER_LEN) / ENTRY_LEN);
        let mut end = len as u64;
        for (index, entry) in bytes[HEADER_LEN..].chunks_exact(ENTRY_LEN).enumerate() {
            let entry = parse_entry(&Fields(entry), index, segments.last(), shape, tokens, dtype)?;
            require(entry.offset == align(end), "segment offset", entry.offset, "the next multiple of 4096")?;
            // Cannot overflow: at most 1027 segments of at most 1 GiB.
            end = entry.offset + entry.stored_len;
            segments.push(entry);
        }
        require(container_len == end, "container length", container_len, "the end of the last segment")?;
        Ok(Self {
            layout: LayoutId::from_bytes(header.array(48)),
            key: ChunkKey::from_bytes(header.array(80)),
            key_spec: header.u32(16),
            shape,
            tokens,
            dtype,
            container_len,
            hash: ContainerHash::from_bytes(*blake3::hash(bytes).as_bytes()),
            segments,
            bytes: Bytes::copy_from_slice(bytes),
        })
    }

    /// Layout of the KV.
    pub fn layout(&self) -> LayoutId {
        self.layout
    }

    /// The chunk's key.
    pub fn key(&self) -> ChunkKey {
        self.key
    }

    /// Version of the key specification that the key was made under.
    pub fn key_spec(&self) -> u32 {
        self.key_spec
    }

    /// Shape of one token's KV.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Tokens of the chunk.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// blake3 of header and table.
    pub fn hash(&self) -> ContainerHash {
        self.hash
    }

    /// The segment table: all layers in order, then spans, rank and ids where there are any.
    pub fn segments(&self) -> &[SegmentEntry] {
        &self.segments
    }

    /// Bytes of the whole container.
    pub fn container_len(&self) -> u64 {
        self.container_len
    }

    /// Index of a layer's segment.
    pub fn layer_segment(&self, layer: u32) -> Result<usize, FormatError> {
        let layers = self.shape.layers;
        if layer < layers { Ok(layer as usize) } else { Err(FormatError::NoLayer { layer, layers }) }
    }

    /// Index of the first segment of a kind: the way to the spans and the rank.
    pub fn segment_of(&self, kind: SegmentKind) -> Option<usize> {
        self.segments.iter().position(|entry| entry.kind == kind)
    }

    /// The head's own bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Whether these are the stored bytes of a segment.
    pub fn verify_segment(&self, index: usize, stored: &[u8]) -> Result<(), FormatError> {
        let entry = self.segments.get(index).ok_or(FormatError::NoSegment { index })?;
        let good =
            stored.len() as u64 == entry.stored_len && blake3::hash(stored).as_bytes() == &entry.digest;
        if good { Ok(()) } else { Err(FormatError::Segment { index }) }
    }

    /// Verifies a segment's stored bytes and decodes them into `raw_len` bytes.
    pub fn decode_segment(&self, index: usize, stored: &[u8]) -> Result<Vec<u8>, FormatError> {
        self.verify_segment(index, stored)?;
        let entry = &self.segments[index];
        expand(entry.codec, stored, entry.raw_len as usize, element_size(entry.kind, self.dtype))
            .ok_or(FormatError::Content { index, what: "it is not a zstd frame of its raw length" })
    }

    /// The same of bytes that may be kept: a segment that is stored as it is costs no copy.
    pub fn decode_shared(&self, index: usize, stored: Bytes) -> Result<Bytes, FormatError> {
        match self.segments.get(index).map(|entry| entry.codec) {
            // Verified, it has the stored length, which is the raw length.
            Some(StoredAs::Raw) => self.verify_segment(index, &stored).map(|()| stored),
            _ => self.decode_segment(index, &stored).map(Bytes::from),
        }
    }
}

/// Verifies a segment's stored bytes while they come.
#[derive(Clone, Debug, Default)]
pub struct SegmentDigest {
    hasher: blake3::Hasher,
    length: u64,
}

impl SegmentDigest {
    /// More of them, in order.
    pub fn update(&mut self, stored: &[u8]) {
        self.hasher.update(stored);
        self.length += stored.len() as u64;
    }

    /// Whether all that came are the stored bytes of a segment.
    pub fn check(self, head: &Head, index: usize) -> Result<(), FormatError> {
        let entry = head.segments.get(index).ok_or(FormatError::NoSegment { index })?;
        let good = self.length == entry.stored_len && self.hasher.finalize().as_bytes() == &entry.digest;
        if good { Ok(()) } else { Err(FormatError::Segment { index }) }
    }
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { layout, key, shape, tokens, dtype, hash, container_len, .. } = self;
        write!(f, "Head({key:?} {layout:?} {hash:?} {shape:?} {tokens} tokens {dtype} {container_len} bytes)")
    }
}

/// Size of what the byte-plane codec takes apart.
pub(super) fn element_size(kind: SegmentKind, dtype: Dtype) -> usize {
    match kind {
        SegmentKind::Layer => dtype.size(),
        SegmentKind::Spans | SegmentKind::Ids => 4,
        SegmentKind::Rank => 1,
    }
}

/// Raw bytes of a segment: never free to choose.
pub(super) fn raw_len(kind: SegmentKind, shape: KvShape, tokens: u32, dtype: Dtype) -> u64 {
    match kind {
        SegmentKind::Layer => shape.layer_bytes(tokens, dtype),
        SegmentKind::Spans => 8 * u64::from(tokens),
        SegmentKind::Rank => 2 + u64::from(tokens),
        SegmentKind::Ids => 4 * u64::from(tokens),
    }
}

fn parse_entry(
    entry: &Fields<'_>,
    index: usize,
    previous: Option<&SegmentEntry>,
    shape: KvShape,
    tokens: u32,
    dtype: Dtype,
) -> Result<SegmentEntry, FormatError> {
    let code = entry.u16(0);
    let expected = "layers, then spans, then rank, then ids";
    let wrong = FormatError::Field { field: "segment kind", value: code.into(), expected };
    let kind = SegmentKind::from_code(code).ok_or(wrong)?;
    // Optional kinds come once each, in the order of their codes.
    let behind = previous.is_none_or(|it| it.kind == SegmentKind::Layer || (it.kind as u16) < code);
    let good = (kind == SegmentKind::Layer) == (index < shape.layers as usize) && behind;
    require(good, "segment kind", code.into(), expected)?;
    let layer = entry.u32(4);
    let expected = if kind == SegmentKind::Layer { index } else { 0 };
    require(layer as usize == expected, "segment layer", layer.into(), "the layers in order, else 0")?;
    let code = entry.u16(2);
    let codec = StoredAs::from_code(code);
    let codec = codec.ok_or(FormatError::Field { field: "codec", value: code.into(), expected: "0 or 1" })?;
    let (stored_len, raw) = (entry.u64(16), entry.u64(24));
    require(raw == raw_len(kind, shape, tokens, dtype), "raw length", raw, "what shape and tokens ask for")?;
    let good = match codec {
        StoredAs::Raw => stored_len == raw,
        StoredAs::BytePlaneZstd => (1..raw).contains(&stored_len),
    };
    require(good, "stored length", stored_len, "the raw length, or less where compressed")?;
    Ok(SegmentEntry {
        kind,
        layer,
        codec,
        offset: entry.u64(8),
        stored_len,
        raw_len: raw,
        digest: entry.array(32),
    })
}
