//! The identity of this worker's KV.

use cacheclip_chunk::{Dtype, KvShape, LayoutId, LayoutSpec, Llama3Scaling, RopeSpec};
use cacheclip_model::config::Config;

/// The layout of KV computed with these weights and this tokenizer.
pub(crate) fn spec(config: &Config, weights: [u8; 32], tokenizer: [u8; 32]) -> LayoutSpec {
    let scaling = config.rope_scaling.map(|s| Llama3Scaling {
        factor: s.factor,
        low_freq_factor: s.low_freq_factor,
        high_freq_factor: s.high_freq_factor,
        original_max_position: s.original_max_position as u32,
    });
    LayoutSpec {
        weights,
        adapter: None,
        tokenizer,
        rope: RopeSpec { theta: config.rope_theta, scaling },
        shape: KvShape {
            layers: config.layers as u32,
            kv_heads: config.kv_heads as u32,
            head_dim: config.head_dim as u32,
        },
        dtype: Dtype::F32,
    }
}

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
