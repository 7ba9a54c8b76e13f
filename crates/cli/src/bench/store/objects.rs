//! Containers that are moved: the shape of a model of 8B parameters, 128 KiB per token.
//!
//! Their bytes are noise, stored as they are: what is compared is the moving of as many bytes.

use anyhow::Context as _;
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, Codec, Dtype, KvShape, LayoutId, Parts, encode};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use std::path::{Path, PathBuf};

pub(crate) const LAYOUT: LayoutId = LayoutId::from_bytes([0x5b; 32]);
/// Layers of [`SHAPE`].
pub(crate) const LAYERS: u32 = 32;
const SHAPE: KvShape = KvShape { layers: LAYERS, kv_heads: 8, head_dim: 128 };
const DTYPE: Dtype = Dtype::Bf16;
/// Tokens that fill a MiB.
const TOKENS_PER_MIB: u32 = 8;
/// By so many bytes the noise of a layer is ahead of that of the layer before it: no two are alike.
const STEP: usize = 64;

/// A key; numbers that follow each other have keys far apart, as digests have.
pub(crate) fn key(number: u64) -> ChunkKey {
    ChunkKey::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

/// Where a store that has `data` for its directory keeps an object.
pub(crate) fn file(data: &Path, key: &ChunkKey) -> PathBuf {
    let name = key.to_string();
    data.join("objects").join(&name[..2]).join(format!("{name}.kv"))
}

/// Makes containers of one size.
#[derive(Debug)]
pub(crate) struct Maker {
    noise: Vec<u8>,
    tokens: u32,
}

impl Maker {
    pub(crate) fn new(mib: usize) -> Self {
        let tokens = mib as u32 * TOKENS_PER_MIB;
        let layer = SHAPE.layer_bytes(tokens, DTYPE) as usize;
        let mut noise = vec![0; layer + LAYERS as usize * STEP];
        StdRng::seed_from_u64(1).fill_bytes(&mut noise);
        Self { noise, tokens }
    }

    /// The container with this number's key.
    pub(crate) fn container(&self, number: u64) -> anyhow::Result<Bytes> {
        let layer = SHAPE.layer_bytes(self.tokens, DTYPE) as usize;
        let layers = (0..LAYERS as usize).map(|index| &self.noise[index * STEP..][..layer]).collect();
        container(SHAPE, self.tokens, DTYPE, layers, key(number))
    }
}

/// A container of one token's KV of the smallest shape, a page of a disk and a little: what a start-up reads most of.
pub(crate) fn smallest(number: u64) -> anyhow::Result<Bytes> {
    let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 8 };
    let layer = [number.to_le_bytes(); 4].concat();
    container(shape, 1, Dtype::Bf16, vec![&layer], key(number))
}

fn container(
    shape: KvShape,
    tokens: u32,
    dtype: Dtype,
    layers: Vec<&[u8]>,
    key: ChunkKey,
) -> anyhow::Result<Bytes> {
    let parts = Parts { layout: LAYOUT, key, shape, tokens, dtype, layers, spans: None, rank: None };
    Ok(encode(&parts, Codec::Raw).context("a container")?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use cacheclip_chunk::Container;

    #[test]
    fn containers_are_as_large_as_they_are_called_and_stored_as_they_are() {
        let bytes = Maker::new(4).container(7).expect("a container");
        let container = Container::parse(bytes).expect("its head");
        container.verify_all().expect("its segments");
        let stored: u64 = container.head().segments().iter().map(|entry| entry.stored_len).sum();
        assert_eq!((stored, container.head().key()), (4 << 20, key(7)));
        let small = Container::parse(smallest(3).expect("a container")).expect("its head");
        small.verify_all().expect("its segments");
        assert!(small.bytes().len() < 5000);
    }
}
