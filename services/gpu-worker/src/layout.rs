//! The identity of this worker's KV.

use cacheclip_chunk::{AnchorId, LayoutId, LayoutSpec};
use std::sync::Arc;

/// A layout with its id.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// What the id is made of.
    pub spec: LayoutSpec,
    /// The id.
    pub id: LayoutId,
}

/// What this worker encodes chunks behind.
#[derive(Clone, Debug)]
pub(crate) struct Anchor {
    /// `[bos] + anchor`.
    pub ids: Arc<[u32]>,
    /// What chunk keys have of it.
    pub id: AnchorId,
}

impl Anchor {
    /// The anchor of these token ids under a layout.
    pub(crate) fn new(layout: &Layout, ids: Vec<u32>) -> Self {
        Self { id: AnchorId::new(&layout.id, &ids), ids: ids.into() }
    }
}

impl Layout {
    /// Derives the id.
    pub(crate) fn new(spec: LayoutSpec) -> Self {
        Self { id: spec.id(), spec }
    }

    /// As the protocol says it.
    pub(crate) fn to_proto(&self) -> cacheclip_rpc::v1::Layout {
        let shape = self.spec.shape;
        cacheclip_rpc::v1::Layout {
            id: cacheclip_rpc::convert::id_bytes(self.id.as_bytes()),
            key_spec: cacheclip_chunk::KEY_SPEC,
            layers: shape.layers,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            dtype: self.spec.dtype.name().to_owned(),
        }
    }
}
