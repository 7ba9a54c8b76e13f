//! Between KV as a decoder computes it and KV as containers hold it: its layout, and its bytes.

use crate::config::Config;
use crate::kv::{ChunkKv, Elements, HostPool, LayerKv};
use cacheclip_chunk::{Dtype, KvShape, LayoutSpec, Llama3Scaling, RopeSpec};
use half::f16;

/// The layout of KV computed in f32 with these weights and this tokenizer.
pub fn spec(config: &Config, weights: [u8; 32], tokenizer: [u8; 32]) -> LayoutSpec {
    let scaling = config.rope_scaling.map(|s| Llama3Scaling {
        factor: s.factor,
        low_freq_factor: s.low_freq_factor,
        high_freq_factor: s.high_freq_factor,
        original_max_position: s.original_max_position as u32,
    });
    LayoutSpec {
        weights: computed_with(weights, config),
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

/// The weights' digest with the one thing that changes KV and stands in `config.json` alone: the norms' epsilon.
/// Two directories with the same tensors and another epsilon are two encodings.
fn computed_with(weights: [u8; 32], config: &Config) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("cacheclip 2026-11 weights and norm epsilon");
    hasher.update(&weights).update(&config.norm_eps.to_le_bytes());
    *hasher.finalize().as_bytes()
}

/// Every layer's little-endian bytes, as [`cacheclip_chunk::Parts`] takes them.
pub fn to_bytes(kv: &ChunkKv) -> Vec<Vec<u8>> {
    let layer = |layer: &LayerKv| match layer.elements() {
        Elements::F32(values) => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Elements::Bf16(bytes) => bytes.to_vec(),
    };
    kv.layers().map(layer).collect()
}

/// A layer of f32 from its little-endian bytes. Bytes of a network buffer need not be aligned for `f32`.
pub fn layer(bytes: &[u8], tokens: usize) -> LayerKv {
    let (words, _) = bytes.as_chunks::<4>();
    LayerKv::new(words.iter().map(|word| f32::from_le_bytes(*word)).collect(), tokens)
}

/// A layer of a type from its little-endian bytes, in `pool` where a device will copy it from there.
pub fn layer_of(dtype: Dtype, bytes: &[u8], tokens: usize, pool: &HostPool) -> LayerKv {
    match dtype {
        Dtype::F32 => layer(bytes, tokens),
        Dtype::Bf16 => LayerKv::bf16(pool.copy(bytes), tokens),
        Dtype::F16 => {
            let (pairs, _) = bytes.as_chunks::<2>();
            LayerKv::new(pairs.iter().map(|pair| f16::from_le_bytes(*pair).to_f32()).collect(), tokens)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_back_give_the_same_values() {
        let kv = LayerKv::new(vec![1.5, -0.0, f32::MIN_POSITIVE, -3e30], 2);
        let bytes = to_bytes(&ChunkKv::new(vec![kv.clone()]));
        assert_eq!(layer(&bytes[0], 2), kv);
        let pool = HostPool::default();
        let narrow = layer_of(Dtype::Bf16, &[0xc0, 0x3f, 0, 0x80], 1, &pool);
        assert_eq!(*narrow.values(), [1.5, -0.0]);
        assert_eq!(to_bytes(&ChunkKv::new(vec![narrow]))[0], [0xc0, 0x3f, 0, 0x80]);
        assert_eq!(bytes[0][..4], 1.5f32.to_le_bytes());
    }

    #[test]
    fn the_layout_follows_the_models_shape() {
        let config = Config::shape("smollm2-135m").expect("a known shape");
        let spec = spec(&config, [1; 32], [2; 32]);
        assert_eq!(spec.shape, KvShape { layers: 30, kv_heads: 3, head_dim: 64 });
        assert_ne!(spec.id(), LayoutSpec { tokenizer: [3; 32], ..spec.clone() }.id());
        let other = Config { norm_eps: config.norm_eps * 2.0, ..config.clone() };
        assert_ne!(spec.id(), super::spec(&other, [1; 32], [2; 32]).id(), "KV depends on the epsilon");
    }
}
