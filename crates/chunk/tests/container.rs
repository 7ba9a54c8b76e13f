//! What the container promises whatever the bytes: what was encoded comes back, and damage is an error.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use bytes::Bytes;
use cacheclip_chunk::container::head::{HEADER_LEN, MAX_HEAD_LEN};
use cacheclip_chunk::{
    ByteSpan, ChunkKey, Codec, Container, Dtype, FormatError, Head, KvShape, LayoutId, Parts, Rank, encode,
    encode_with_ids,
};
use proptest::prelude::*;

/// Owned parts of any small container.
#[derive(Clone, Debug)]
struct Sample {
    shape: KvShape,
    tokens: u32,
    dtype: Dtype,
    layers: Vec<Vec<u8>>,
    spans: Option<Vec<ByteSpan>>,
    rank: Option<(u16, Vec<u8>)>,
    ids: Option<Vec<u32>>,
    codec: Codec,
}

impl Sample {
    fn parts(&self) -> Parts<'_> {
        Parts {
            layout: LayoutId::from_bytes([1; 32]),
            key: ChunkKey::from_bytes([2; 32]),
            shape: self.shape,
            tokens: self.tokens,
            dtype: self.dtype,
            layers: self.layers.iter().map(Vec::as_slice).collect(),
            spans: self.spans.as_deref(),
            rank: self.rank.as_ref().map(|(version, ranks)| Rank { version: *version, ranks }),
        }
    }

    fn encoded(&self) -> Result<Vec<u8>, FormatError> {
        match &self.ids {
            Some(ids) => encode_with_ids(&self.parts(), ids, self.codec),
            None => encode(&self.parts(), self.codec),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.encoded().unwrap()
    }
}

prop_compose! {
    fn sample()(
        shape in (1u32..4, 1u32..3, 1u32..9).prop_map(|(layers, kv_heads, head_dim)| KvShape { layers, kv_heads, head_dim }),
        tokens in 1u32..40,
        dtype in prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)],
        codec in prop_oneof![Just(Codec::Raw), (1..4).prop_map(|level| Codec::BytePlaneZstd { level })],
        // Few bits set compress, all bits set do not: both ways of storing occur.
        mask in prop_oneof![Just(0xffu8), Just(0x0f), Just(0)],
        (with_spans, with_rank, with_ids) in any::<(bool, bool, bool)>(),
    )(
        layers in prop::collection::vec(
            prop::collection::vec(any::<u8>().prop_map(move |byte| byte & mask), shape.layer_bytes(tokens, dtype) as usize),
            shape.layers as usize,
        ),
        spans in prop::collection::vec((0u32..1000, 0u32..9).prop_map(|(start, len)| ByteSpan { start, end: start + len }), tokens as usize),
        rank in (any::<u16>(), prop::collection::vec(any::<u8>(), tokens as usize)),
        ids in prop::collection::vec(any::<u32>(), tokens as usize),
        (shape, tokens, dtype, codec, with_spans, with_rank, with_ids) in
            Just((shape, tokens, dtype, codec, with_spans, with_rank, with_ids)),
    ) -> Sample {
        Sample {
            shape, tokens, dtype, layers, codec,
            spans: with_spans.then_some(spans),
            rank: with_rank.then_some(rank),
            ids: with_ids.then_some(ids),
        }
    }
}

fn verified(bytes: Vec<u8>) -> Result<Container, FormatError> {
    let container = Container::parse(Bytes::from(bytes))?;
    container.verify_all()?;
    Ok(container)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn decoding_gives_back_what_was_encoded(sample in sample()) {
        let container = verified(sample.bytes()).unwrap();
        let head = container.head();
        prop_assert_eq!((head.shape(), head.tokens(), head.dtype()), (sample.shape, sample.tokens, sample.dtype));
        prop_assert_eq!((head.layout(), head.key()), (LayoutId::from_bytes([1; 32]), ChunkKey::from_bytes([2; 32])));
        prop_assert_eq!(*head.hash().as_bytes(), *blake3::hash(head.bytes()).as_bytes());
        prop_assert_eq!(Head::len_from_prefix(&container.bytes()[..HEADER_LEN]).unwrap(), head.bytes().len());
        for (layer, raw) in sample.layers.iter().enumerate() {
            prop_assert_eq!(&container.layer(layer as u32).unwrap(), raw);
        }
        prop_assert_eq!(container.spans().unwrap(), sample.spans);
        prop_assert_eq!(container.rank().unwrap(), sample.rank);
        prop_assert_eq!(container.ids().unwrap(), sample.ids);
        prop_assert!(container.layer(sample.shape.layers).is_err());
    }

    #[test]
    fn a_flipped_bit_anywhere_is_an_error(sample in sample(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = sample.bytes();
        let at = at.index(bytes.len());
        bytes[at] ^= 1u8 << bit;
        prop_assert!(verified(bytes).is_err());
    }

    #[test]
    fn a_flipped_bit_in_the_head_is_an_error_before_any_payload(sample in sample(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = sample.bytes();
        let head_len = Head::len_from_prefix(&bytes).unwrap();
        let at = at.index(head_len);
        bytes[at] ^= 1u8 << bit;
        prop_assert!(Head::parse(&bytes).is_err());
    }

    #[test]
    fn other_lengths_are_errors(sample in sample(), at in any::<prop::sample::Index>()) {
        let bytes = sample.bytes();
        let mut longer = bytes.clone();
        longer.push(0);
        prop_assert!(verified(longer).is_err());
        let at = at.index(bytes.len());
        prop_assert!(verified(bytes[..at].to_vec()).is_err());
    }

    #[test]
    fn any_bytes_are_an_error_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert!(Head::parse(&bytes).is_err());
        prop_assert!(Container::parse(Bytes::from(bytes)).is_err());
    }

    /// Fields beyond their limits are refused even where the head's check is right.
    #[test]
    fn any_header_with_a_right_check_is_read_or_refused(
        sample in sample(),
        edits in prop::collection::vec((8usize..48, any::<u8>()), 1..4),
        table_edits in prop::collection::vec((0usize..32, any::<u8>()), 0..3),
    ) {
        let mut bytes = sample.bytes();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        for (at, byte) in table_edits {
            bytes[HEADER_LEN + at] = byte;
        }
        let Ok(len) = Head::len_from_prefix(&bytes) else { return Ok(()) };
        prop_assert!(len <= MAX_HEAD_LEN);
        bytes.resize(bytes.len().max(len), 0);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes[..112]).update(&bytes[HEADER_LEN..len]);
        bytes[112..128].copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        if let Ok(container) = Container::parse(Bytes::from(bytes)) {
            let _ = container.verify_all();
        }
    }
}

fn plain() -> Sample {
    let shape = KvShape { layers: 2, kv_heads: 1, head_dim: 4 };
    Sample {
        shape,
        tokens: 3,
        dtype: Dtype::F16,
        layers: vec![vec![0; 48]; 2],
        spans: None,
        rank: None,
        ids: None,
        codec: Codec::COMPRESSED,
    }
}

#[test]
fn parts_that_contradict_each_other_are_refused() {
    let encode = |sample: &Sample| sample.encoded();
    let short_layer = Sample { layers: vec![vec![0; 48], vec![0; 47]], ..plain() };
    assert!(matches!(
        encode(&short_layer),
        Err(FormatError::Parts { field: "layer", found: 47, expected: 48 })
    ));
    let few_layers = Sample { layers: vec![vec![0; 48]], ..plain() };
    assert!(matches!(
        encode(&few_layers),
        Err(FormatError::Parts { field: "layers", found: 1, expected: 2 })
    ));
    let spans = Sample { spans: Some(vec![ByteSpan { start: 2, end: 1 }; 3]), ..plain() };
    assert!(matches!(encode(&spans), Err(FormatError::Content { index: 0, .. })));
    let ranks = Sample { rank: Some((1, vec![0; 4])), ..plain() };
    assert!(matches!(encode(&ranks), Err(FormatError::Parts { field: "rank", .. })));
    let ids = Sample { ids: Some(vec![7; 2]), ..plain() };
    assert!(matches!(encode(&ids), Err(FormatError::Parts { field: "ids", found: 2, expected: 3 })));
    let empty = Sample { tokens: 0, layers: vec![vec![]; 2], ..plain() };
    assert!(matches!(encode(&empty), Err(FormatError::Field { field: "token count", .. })));
    let level = Sample { codec: Codec::BytePlaneZstd { level: 99 }, ..plain() };
    assert!(matches!(encode(&level), Err(FormatError::Compressor { level: 99 })));
}

#[test]
fn what_does_not_shrink_is_stored_raw_and_costs_no_more() {
    let container = Container::parse(Bytes::from(plain().bytes())).unwrap();
    assert!(container.head().segments().iter().all(|entry| entry.stored_len < entry.raw_len));
    let raw = Sample { codec: Codec::Raw, ..plain() };
    let container = Container::parse(Bytes::from(raw.bytes())).unwrap();
    assert!(container.head().segments().iter().all(|entry| entry.stored_len == entry.raw_len));
    assert_eq!(container.stored_segment(1).unwrap(), vec![0; 48]);
}

#[test]
fn a_newer_version_is_told_from_damage() {
    let mut bytes = plain().bytes();
    bytes[8] = 2;
    assert_eq!(Head::parse(&bytes), Err(FormatError::Version { found: 2 }));
}

/// Writes the check anew over a head whose table was changed.
fn rechecked(mut bytes: Vec<u8>) -> Vec<u8> {
    let len = Head::len_from_prefix(&bytes).unwrap();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..112]).update(&bytes[HEADER_LEN..len]);
    bytes[112..128].copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    bytes
}

#[test]
fn optional_segments_come_once_each_and_in_their_order() {
    let all = Sample {
        spans: Some(vec![ByteSpan { start: 0, end: 1 }; 3]),
        rank: Some((1, vec![0; 3])),
        ids: Some(vec![7, 8, 9]),
        ..plain()
    };
    let container = verified(all.bytes()).unwrap();
    assert_eq!(container.ids().unwrap().unwrap(), [7, 8, 9]);
    let kinds: Vec<u16> = container.head().segments().iter().map(|entry| entry.kind as u16).collect();
    assert_eq!(kinds, [1, 1, 2, 3, 4]);
    // The kind of entry 2, 3 or 4 becomes another one: a repetition, a wrong order, an unknown kind.
    for (entry, kind) in [(3, 2), (3, 4), (4, 3), (2, 4), (2, 1), (4, 5), (4, 0)] {
        let mut bytes = all.bytes();
        bytes[HEADER_LEN + entry * 64] = kind;
        let error = Head::parse(&rechecked(bytes)).unwrap_err();
        assert!(
            matches!(error, FormatError::Field { field: "segment kind" | "raw length", .. }),
            "entry {entry} of kind {kind}: {error}"
        );
    }
    assert!(Head::parse(&rechecked(all.bytes())).is_ok(), "the control: nothing changed");
}
