//! KV on the host, as it is stored: position-free keys.

use std::sync::Arc;

/// One layer's keys and values: K `[kv_heads, tokens, head_dim]` before rotation, then V of the same shape.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerKv {
    /// K, then V.
    pub data: Vec<f32>,
    /// Tokens in both.
    pub tokens: usize,
}

impl LayerKv {
    /// Position-free keys, `[kv_heads, tokens, head_dim]`.
    pub fn k(&self) -> &[f32] {
        &self.data[..self.data.len() / 2]
    }

    /// Values, `[kv_heads, tokens, head_dim]`.
    pub fn v(&self) -> &[f32] {
        &self.data[self.data.len() / 2..]
    }

    /// Tokens `first..` only: what is left of anchor + chunk when the anchor is stripped.
    pub fn strip(&self, first: usize, head_dim: usize) -> Self {
        let kept = self.tokens - first;
        let heads = self.data.len() / (self.tokens * head_dim);
        let mut data = Vec::with_capacity(heads * kept * head_dim);
        for head in self.data.chunks_exact(self.tokens * head_dim) {
            data.extend_from_slice(&head[first * head_dim..]);
        }
        Self { data, tokens: kept }
    }

    /// One token only.
    pub fn token(&self, index: usize, head_dim: usize) -> Self {
        let heads = self.data.chunks_exact(self.tokens * head_dim);
        let data = heads.flat_map(|head| &head[index * head_dim..(index + 1) * head_dim]).copied().collect();
        Self { data, tokens: 1 }
    }

    /// Appends `next`'s tokens behind this layer's.
    fn append(&mut self, next: &Self, head_dim: usize) {
        let (a, b) = (self.tokens * head_dim, next.tokens * head_dim);
        if a == 0 {
            *self = next.clone();
            return;
        }
        let mut data = Vec::with_capacity(self.data.len() + next.data.len());
        for (ours, theirs) in self.data.chunks_exact(a).zip(next.data.chunks_exact(b)) {
            data.extend_from_slice(ours);
            data.extend_from_slice(theirs);
        }
        *self = Self { data, tokens: self.tokens + next.tokens };
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
        self.layers().map(|layer| layer.data.len() * size_of::<f32>()).sum()
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
        let ab = LayerKv { data: vec![1.0, 2.0, 11.0, 12.0], tokens: 2 };
        let c = LayerKv { data: vec![3.0, 13.0], tokens: 1 };
        let mut all = ab;
        all.append(&c, 1);
        assert_eq!(all.data, [1.0, 2.0, 3.0, 11.0, 12.0, 13.0]);
        assert_eq!(all.strip(2, 1), c);
        assert_eq!(all.token(1, 1), LayerKv { data: vec![2.0, 12.0], tokens: 1 });
    }

    #[test]
    fn kv_is_in_use_as_long_as_somebody_else_has_it() {
        let kv = ChunkKv::new(vec![LayerKv { data: vec![1.0; 4], tokens: 2 }]);
        assert_eq!((kv.tokens(), kv.bytes(), kv.in_use()), (2, 16, false));
        let reader = kv.clone();
        assert!(kv.in_use() && reader.in_use());
        // A share of a layer is no share of the whole.
        let layers = reader.shares().collect();
        drop(reader);
        assert!(!kv.in_use() && !ChunkKv::shared(layers).in_use());
    }
}
