//! Auxiliary KV as containers hold it: its layout, its keys, and the way there and back.

use crate::auxiliary::Chunk;
use bytes::Bytes;
use cacheclip_chunk::{
    AnchorId, ChunkKey, Codec, Container, FormatError, LayoutId, LayoutSpec, Parts, encode_with_ids,
};
use cacheclip_model::kv::ChunkKv;
use cacheclip_model::layout::{layer, to_bytes};

/// A chunk's name to the scorer: see [`cacheclip_chunk::text_digest`].
pub(crate) type Digest = [u8; 32];

/// What all auxiliary KV of one model has in common.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    spec: LayoutSpec,
    layout: LayoutId,
    anchor: AnchorId,
    vocab: usize,
}

impl Identity {
    /// The identity of KV under this layout, encoded behind these ids, by a model with `vocab` tokens.
    pub(crate) fn new(spec: LayoutSpec, anchor: &[u32], vocab: usize) -> Self {
        let layout = spec.id();
        Self { anchor: AnchorId::new(&layout, anchor), layout, spec, vocab }
    }

    pub(crate) fn layout(&self) -> LayoutId {
        self.layout
    }

    pub(crate) fn key(&self, digest: &Digest) -> ChunkKey {
        ChunkKey::auxiliary(&self.layout, &self.anchor, digest)
    }

    /// The container of a chunk.
    pub(crate) fn encode(&self, digest: &Digest, chunk: &Chunk) -> Result<Bytes, FormatError> {
        let layers = to_bytes(&chunk.kv);
        let parts = Parts {
            layout: self.layout,
            key: self.key(digest),
            shape: self.spec.shape,
            tokens: chunk.kv.tokens() as u32,
            dtype: self.spec.dtype,
            layers: layers.iter().map(Vec::as_slice).collect(),
            spans: Some(&chunk.spans),
            rank: None,
        };
        Ok(encode_with_ids(&parts, &chunk.ids, Codec::default())?.into())
    }

    /// The chunk of a container, verified; None where it lacks what scoring needs, or is not of this model although
    /// it claims to be.
    pub(crate) fn decode(&self, container: &Container) -> Result<Option<Chunk>, FormatError> {
        let head = container.head();
        if (head.layout(), head.shape(), head.dtype()) != (self.layout, self.spec.shape, self.spec.dtype) {
            return Ok(None);
        }
        let (Some(spans), Some(ids)) = (container.spans()?, container.ids()?) else { return Ok(None) };
        if ids.iter().any(|&id| id as usize >= self.vocab) {
            return Ok(None);
        }
        let tokens = head.tokens() as usize;
        let read = |index| Ok(layer(&container.layer(index)?, tokens));
        let layers = (0..self.spec.shape.layers).map(read).collect::<Result<_, FormatError>>()?;
        Ok(Some(Chunk { kv: ChunkKv::new(layers), spans: spans.into(), ids: ids.into() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cacheclip_chunk::{ByteSpan, Dtype, KvShape, RopeSpec, encode};
    use cacheclip_model::kv::LayerKv;

    const VOCAB: usize = 50;
    const TEXT: Digest = [9; 32];

    fn identity() -> Identity {
        let spec = LayoutSpec {
            weights: [1; 32],
            adapter: None,
            tokenizer: [2; 32],
            rope: RopeSpec { theta: 10_000.0, scaling: None },
            shape: KvShape { layers: 2, kv_heads: 1, head_dim: 2 },
            dtype: Dtype::F32,
        };
        Identity::new(spec, &[1], VOCAB)
    }

    fn chunk(ids: [u32; 3]) -> Chunk {
        let layer = |n: u32| LayerKv::new((0..12).map(|i| (i * n) as f32 / 7.0).collect(), 3);
        let spans = [0, 2, 5].map(|start| ByteSpan { start, end: start + 2 });
        Chunk { kv: ChunkKv::new(vec![layer(1), layer(2)]), spans: spans.into(), ids: ids.into() }
    }

    #[test]
    fn a_chunk_comes_back_as_it_was() {
        let (identity, chunk) = (identity(), chunk([3, 49, 0]));
        let container =
            Container::parse(identity.encode(&TEXT, &chunk).expect("a container")).expect("sound");
        assert_eq!(
            (container.head().layout(), container.head().key()),
            (identity.layout(), identity.key(&TEXT))
        );
        let back = identity.decode(&container).expect("sound").expect("complete");
        assert!(back.kv.layers().eq(chunk.kv.layers()));
        assert_eq!((back.spans, back.ids), (chunk.spans, chunk.ids));
    }

    #[test]
    fn what_scoring_cannot_use_counts_as_missing() {
        let identity = identity();
        let layers = to_bytes(&chunk([1, 2, 3]).kv);
        let parts = Parts {
            layout: identity.layout,
            key: identity.key(&TEXT),
            shape: identity.spec.shape,
            tokens: 3,
            dtype: Dtype::F32,
            layers: layers.iter().map(Vec::as_slice).collect(),
            spans: Some(&[ByteSpan::default(); 3]),
            rank: None,
        };
        let decode = |bytes: Vec<u8>| identity.decode(&Container::parse(bytes.into()).expect("sound"));
        let with = |ids: &[u32]| encode_with_ids(&parts, ids, Codec::Raw).expect("a container");
        assert!(decode(with(&[1, 2, 3])).expect("sound").is_some(), "the control");
        assert!(decode(encode(&parts, Codec::Raw).expect("a container")).expect("sound").is_none(), "no ids");
        assert!(decode(with(&[1, 2, VOCAB as u32])).expect("sound").is_none(), "an id beyond the vocabulary");
        let shape = KvShape { layers: 2, kv_heads: 2, head_dim: 1 };
        let other = Parts { shape, ..parts.clone() };
        let other = encode_with_ids(&other, &[1, 2, 3], Codec::Raw).expect("a container");
        assert!(decode(other).expect("sound").is_none(), "another shape under the same layout");
        let mut damaged = with(&[1, 2, 3]);
        let at = damaged.len() - 1;
        damaged[at] ^= 1;
        assert!(decode(damaged).is_err());
    }
}
