//! What a KV encoding consists of, and its identity.

use crate::ids::LayoutId;
use crate::keys::{Framed, KEY_SPEC};
use std::fmt;
use std::str::FromStr;

/// Element type of K and V, in memory and in a container (always little-endian there).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    Bf16,
}

/// A dtype name other than `f32`, `f16` and `bf16`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown dtype {0:?}: use f32, f16 or bf16")]
pub struct UnknownDtype(pub String);

impl Dtype {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name in keys, on the wire and in configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(name: &str) -> Result<Self, UnknownDtype> {
        [Self::F32, Self::F16, Self::Bf16]
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| UnknownDtype(name.to_owned()))
    }
}

/// Shape of the KV of one token: `layers` times K and V of `kv_heads * head_dim` elements each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: u32,
    /// Key-value heads per layer (fewer than query heads under grouped-query attention).
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
}

impl KvShape {
    /// Bytes of K and V of `tokens` tokens in one layer; saturates instead of overflowing.
    pub fn layer_bytes(&self, tokens: u32, dtype: Dtype) -> u64 {
        [self.kv_heads, self.head_dim, tokens]
            .into_iter()
            .fold(2 * dtype.size() as u64, |bytes, factor| bytes.saturating_mul(u64::from(factor)))
    }

    /// Bytes of K and V of `tokens` tokens in all layers; saturates instead of overflowing.
    pub fn bytes(&self, tokens: u32, dtype: Dtype) -> u64 {
        self.layer_bytes(tokens, dtype).saturating_mul(u64::from(self.layers))
    }
}

/// Llama 3's stretch of the rotary frequencies (`rope_type: "llama3"`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// How much the lowest frequencies are slowed down.
    pub factor: f64,
    /// Wavelengths above `original_max_position / low_freq_factor` are slowed down fully.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position / high_freq_factor` are left alone.
    pub high_freq_factor: f64,
    /// Positions the model was first trained for.
    pub original_max_position: u32,
}

/// Rotary position embedding. Stored keys are not rotated, yet a model with another RoPE makes other values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling of the frequencies, if the model has one.
    pub scaling: Option<Llama3Scaling>,
}

/// All that KV depends on besides the tokens. Two processes with equal specs may exchange KV.
#[derive(Clone, Debug, PartialEq)]
pub struct LayoutSpec {
    /// Digest of the model's weights.
    pub weights: [u8; 32],
    /// Digest of the adapter's weights, if there is one.
    pub adapter: Option<[u8; 32]>,
    /// Digest of the tokenizer.
    pub tokenizer: [u8; 32],
    /// Rotary position embedding.
    pub rope: RopeSpec,
    /// Shape of the KV of one token.
    pub shape: KvShape,
    /// Element type of the KV.
    pub dtype: Dtype,
}

impl LayoutSpec {
    /// The layout's identity; see [`crate::keys`] for its bytes.
    pub fn id(&self) -> LayoutId {
        let mut framed = Framed::derive("cacheclip.v1 layout id");
        framed.field(&KEY_SPEC.to_le_bytes());
        framed.field(&self.weights);
        framed.field(self.adapter.as_ref().map_or(&[], |adapter| &adapter[..]));
        framed.field(&self.tokenizer);
        framed.field(&self.rope.theta.to_le_bytes());
        let mut scaling = Vec::new();
        if let Some(llama3) = &self.rope.scaling {
            scaling.extend_from_slice(b"llama3");
            for factor in [llama3.factor, llama3.low_freq_factor, llama3.high_freq_factor] {
                scaling.extend_from_slice(&factor.to_le_bytes());
            }
            scaling.extend_from_slice(&llama3.original_max_position.to_le_bytes());
        }
        framed.field(&scaling);
        for size in [self.shape.layers, self.shape.kv_heads, self.shape.head_dim] {
            framed.field(&size.to_le_bytes());
        }
        framed.field(self.dtype.name().as_bytes());
        LayoutId::from_bytes(framed.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> LayoutSpec {
        LayoutSpec {
            weights: [1; 32],
            adapter: None,
            tokenizer: [2; 32],
            rope: RopeSpec { theta: 10_000.0, scaling: None },
            shape: KvShape { layers: 4, kv_heads: 2, head_dim: 16 },
            dtype: Dtype::F32,
        }
    }

    #[test]
    fn whatever_kv_depends_on_changes_the_layout() {
        let llama3 = |factor| Llama3Scaling {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        };
        let specs = [
            spec(),
            LayoutSpec { weights: [3; 32], ..spec() },
            LayoutSpec { adapter: Some([1; 32]), ..spec() },
            LayoutSpec { tokenizer: [3; 32], ..spec() },
            LayoutSpec { rope: RopeSpec { theta: 500_000.0, scaling: None }, ..spec() },
            LayoutSpec { rope: RopeSpec { theta: 10_000.0, scaling: Some(llama3(8.0)) }, ..spec() },
            LayoutSpec { rope: RopeSpec { theta: 10_000.0, scaling: Some(llama3(32.0)) }, ..spec() },
            LayoutSpec { shape: KvShape { layers: 5, ..spec().shape }, ..spec() },
            LayoutSpec { shape: KvShape { kv_heads: 16, head_dim: 2, ..spec().shape }, ..spec() },
            LayoutSpec { dtype: Dtype::F16, ..spec() },
            LayoutSpec { dtype: Dtype::Bf16, ..spec() },
        ];
        let ids: std::collections::HashSet<_> = specs.iter().map(LayoutSpec::id).collect();
        assert_eq!(ids.len(), specs.len());
        assert_eq!(spec().id(), spec().id());
    }

    #[test]
    fn dtypes_are_known_by_name() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert!("int8".parse::<Dtype>().unwrap_err().to_string().contains("int8"));
    }

    #[test]
    fn sizes_count_both_k_and_v() {
        assert_eq!(spec().shape.layer_bytes(10, Dtype::F16), 2 * 2 * 16 * 10 * 2);
        assert_eq!(spec().shape.bytes(10, Dtype::F32), 4 * 2 * 2 * 16 * 10 * 4);
        let huge = KvShape { layers: u32::MAX, kv_heads: u32::MAX, head_dim: u32::MAX };
        assert_eq!(huge.bytes(u32::MAX, Dtype::F32), u64::MAX);
    }
}
