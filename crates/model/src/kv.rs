//! KV on the host, as it is stored: position-free keys.

pub use cacheclip_kernels::cuda::pinned::{HostBytes, HostPool};

use half::bf16;
use std::borrow::Cow;
use std::sync::Arc;

/// One layer's keys and values: K `[kv_heads, tokens, head_dim]` before rotation, then V of the same shape.
#[derive(Clone, Debug)]
pub struct LayerKv {
    elements: Elements,
    /// Tokens in both.
    pub tokens: usize,
}

/// K, then V.
#[derive(Clone, Debug)]
pub enum Elements {
    /// As the CPU computes them.
    F32(Vec<f32>),
    /// As CUDA devices compute them, little-endian, where a device can copy them from.
    Bf16(Arc<HostBytes>),
}

impl PartialEq for LayerKv {
    fn eq(&self, other: &Self) -> bool {
        self.tokens == other.tokens
            && match (&self.elements, &other.elements) {
                (Elements::F32(a), Elements::F32(b)) => a == b,
                (Elements::Bf16(a), Elements::Bf16(b)) => a[..] == b[..],
                _ => false,
            }
    }
}

/// Of each of `heads` rows of `before` tokens, those of `kept`; a token is `width` elements.
fn tokens_of<T: Copy>(data: &[T], before: usize, kept: std::ops::Range<usize>, width: usize) -> Vec<T> {
    let heads = data.chunks_exact((before * width).max(1));
    // Heads are copied whole: element by element it is what takes longest when a chunk is encoded.
    let mut all = Vec::with_capacity(heads.len() * kept.len() * width);
    heads.for_each(|head| all.extend_from_slice(&head[kept.start * width..kept.end * width]));
    all
}

impl LayerKv {
    /// Of f32 values, K then V.
    pub fn new(data: Vec<f32>, tokens: usize) -> Self {
        Self { elements: Elements::F32(data), tokens }
    }

    /// Of bf16 values, little-endian, K then V.
    pub fn bf16(bytes: HostBytes, tokens: usize) -> Self {
        Self { elements: Elements::Bf16(Arc::new(bytes)), tokens }
    }

    /// What it is made of.
    pub fn elements(&self) -> &Elements {
        &self.elements
    }

    /// All values: K, then V.
    pub fn values(&self) -> Cow<'_, [f32]> {
        match &self.elements {
            Elements::F32(values) => Cow::Borrowed(values),
            Elements::Bf16(bytes) => {
                let (pairs, _) = bytes.as_chunks::<2>();
                Cow::Owned(pairs.iter().map(|pair| bf16::from_le_bytes(*pair).to_f32()).collect())
            }
        }
    }

    fn half(&self, upper: bool) -> Cow<'_, [f32]> {
        let of = |values: &[f32]| {
            let middle = values.len() / 2;
            if upper { middle..values.len() } else { 0..middle }
        };
        match self.values() {
            Cow::Borrowed(values) => Cow::Borrowed(&values[of(values)]),
            Cow::Owned(values) => Cow::Owned(values[of(&values)].to_vec()),
        }
    }

    /// Position-free keys, `[kv_heads, tokens, head_dim]`.
    pub fn k(&self) -> Cow<'_, [f32]> {
        self.half(false)
    }

    /// Values, `[kv_heads, tokens, head_dim]`.
    pub fn v(&self) -> Cow<'_, [f32]> {
        self.half(true)
    }

    /// Bytes held in memory.
    pub fn bytes(&self) -> usize {
        match &self.elements {
            Elements::F32(values) => size_of_val(&values[..]),
            Elements::Bf16(bytes) => bytes.len(),
        }
    }

    fn part(&self, kept: std::ops::Range<usize>, head_dim: usize) -> Self {
        let tokens = kept.len();
        match &self.elements {
            Elements::F32(values) => Self::new(tokens_of(values, self.tokens, kept, head_dim), tokens),
            Elements::Bf16(bytes) => {
                let part = tokens_of(&bytes[..], self.tokens, kept, 2 * head_dim);
                Self::bf16(bytes.beside(&part), tokens)
            }
        }
    }

    /// Tokens `first..` only: what is left of anchor + chunk when the anchor is stripped.
    pub fn strip(&self, first: usize, head_dim: usize) -> Self {
        self.part(first..self.tokens, head_dim)
    }

    /// One token only.
    pub fn token(&self, index: usize, head_dim: usize) -> Self {
        self.part(index..index + 1, head_dim)
    }

    /// Appends `next`'s tokens, of the same type, behind this layer's.
    fn append(&mut self, next: &Self, head_dim: usize) {
        if self.tokens == 0 {
            *self = next.clone();
            return;
        }
        fn joined<T: Copy>(a: &[T], b: &[T], (of_a, of_b): (usize, usize)) -> Vec<T> {
            let heads = a.chunks_exact(of_a.max(1)).zip(b.chunks_exact(of_b.max(1)));
            let mut all = Vec::with_capacity(a.len() + b.len());
            heads.for_each(|(ours, theirs)| {
                all.extend_from_slice(ours);
                all.extend_from_slice(theirs);
            });
            all
        }
        let tokens = self.tokens + next.tokens;
        let lengths = |width: usize| (self.tokens * width, next.tokens * width);
        let appended = match (&self.elements, &next.elements) {
            (Elements::F32(a), Elements::F32(b)) => Self::new(joined(a, b, lengths(head_dim)), tokens),
            (Elements::Bf16(a), Elements::Bf16(b)) => {
                Self::bf16(a.beside(&joined(a, b, lengths(2 * head_dim))), tokens)
            }
            _ => unreachable!("a device exports KV of one type"),
        };
        *self = appended;
    }
}

/// KV of one section over all layers; cheap to clone, and so are its layers.
#[derive(Clone, Debug)]
pub struct ChunkKv {
    layers: Arc<[Arc<LayerKv>]>,
    tokens: usize,
}

impl ChunkKv {
    /// Takes one entry per layer.
    pub fn new(layers: Vec<LayerKv>) -> Self {
        Self::shared(layers.into_iter().map(Arc::new).collect())
    }

    /// Takes one entry per layer, of which others may have a share.
    pub fn shared(layers: Vec<Arc<LayerKv>>) -> Self {
        let tokens = layers.first().map_or(0, |layer| layer.tokens);
        Self { layers: layers.into(), tokens }
    }

    /// A layer, if there is such a one.
    pub fn layer(&self, layer: usize) -> Option<&LayerKv> {
        self.layers.get(layer).map(|layer| &**layer)
    }

    /// The layers, in order.
    pub fn layers(&self) -> impl Iterator<Item = &LayerKv> {
        self.layers.iter().map(|layer| &**layer)
    }

    /// A share of each layer, in order.
    pub fn shares(&self) -> impl Iterator<Item = Arc<LayerKv>> {
        self.layers.iter().cloned()
    }

    /// Whether this is a clone, or has been cloned, and the other one still lives.
    pub fn in_use(&self) -> bool {
        Arc::strong_count(&self.layers) > 1
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes held in memory.
    pub fn bytes(&self) -> usize {
        self.layers().map(LayerKv::bytes).sum()
    }
}

/// Collects the KV of a pass, layer by layer, row block by row block.
#[derive(Clone, Debug, Default)]
pub struct Export {
    layers: Vec<LayerKv>,
}

impl Export {
    pub(crate) fn push(&mut self, layer: usize, kv: LayerKv, head_dim: usize) {
        if self.layers.len() <= layer {
            self.layers.push(kv);
        } else {
            self.layers[layer].append(&kv, head_dim);
        }
    }

    /// What was collected, without its first `skip` tokens.
    pub fn finish(self, skip: usize, head_dim: usize) -> ChunkKv {
        if skip == 0 {
            return ChunkKv::new(self.layers);
        }
        ChunkKv::new(self.layers.iter().map(|layer| layer.strip(skip, head_dim)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_and_stripped_is_what_was_there() {
        // Two heads (one of K, one of V), head_dim 1.
        let f32 = |values: &[f32], tokens| LayerKv::new(values.to_vec(), tokens);
        let bf16 = |values: &[f32], tokens| {
            let bytes: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
            LayerKv::bf16(HostPool::default().copy(&bytes), tokens)
        };
        for of in [&f32 as &dyn Fn(&[f32], usize) -> LayerKv, &bf16] {
            let mut all = of(&[1.0, 2.0, 11.0, 12.0], 2);
            let c = of(&[3.0, 13.0], 1);
            all.append(&c, 1);
            assert_eq!(*all.values(), [1.0, 2.0, 3.0, 11.0, 12.0, 13.0]);
            assert_eq!((&*all.k(), &*all.v()), (&[1.0, 2.0, 3.0][..], &[11.0, 12.0, 13.0][..]));
            assert_eq!(all.strip(2, 1), c);
            assert_eq!(all.token(1, 1), of(&[2.0, 12.0], 1));
        }
        assert_ne!(f32(&[1.0, 2.0], 1), bf16(&[1.0, 2.0], 1), "another type is another encoding");
    }

    #[test]
    fn kv_is_in_use_as_long_as_somebody_else_has_it() {
        let kv = ChunkKv::new(vec![LayerKv::new(vec![1.0; 4], 2)]);
        assert_eq!((kv.tokens(), kv.bytes(), kv.in_use()), (2, 16, false));
        let reader = kv.clone();
        assert!(kv.in_use() && reader.in_use());
        // A share of a layer is no share of the whole.
        let layers = reader.shares().collect();
        drop(reader);
        assert!(!kv.in_use() && !ChunkKv::shared(layers).in_use());
    }
}
