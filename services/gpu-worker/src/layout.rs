//! The identity of this worker's KV.

use cacheclip_chunk::{LayoutId, LayoutSpec};

/// A layout with its id.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// What the id is made of.
    pub spec: LayoutSpec,
    /// The id.
    pub id: LayoutId,
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
