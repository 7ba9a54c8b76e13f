//! Where a token's key and value live: the arithmetic of paged KV.
//!
//! One page holds [`PAGE_TOKENS`] tokens of **one layer**. Inside a page each KV head owns one tile:
//!
//! ```text
//! head 0: K [head_dim, 16]  V [16, head_dim] | head 1: K … V … | …
//! ```
//!
//! K is transposed inside its tile so that one vector register holds the same dimension of 16 tokens: a
//! query's scores against a page are `head_dim` fused multiply-adds and no horizontal sum.

/// Tokens per page; also the lane count of a 512-bit register of `f32`.
pub const PAGE_TOKENS: usize = 16;

/// Shape of the keys and values of one token in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Heads that own keys and values (grouped-query attention shares each among several query heads).
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
}

impl HeadShape {
    /// Floats of one head's K tile (its V tile is as large).
    pub const fn tile(&self) -> usize {
        self.head_dim * PAGE_TOKENS
    }

    /// Floats of one page of one layer.
    pub const fn page(&self) -> usize {
        self.kv_heads * 2 * self.tile()
    }

    /// Offset of a head's K tile inside a layer's pool.
    pub const fn k_tile(&self, page: usize, head: usize) -> usize {
        page * self.page() + head * 2 * self.tile()
    }

    /// Offset of a head's V tile inside a layer's pool.
    pub const fn v_tile(&self, page: usize, head: usize) -> usize {
        self.k_tile(page, head) + self.tile()
    }
}

/// Pages that hold `tokens` tokens.
pub const fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}

/// A sequence's view of one layer: the layer's pool and the pages the sequence owns, in order of position.
#[derive(Clone, Copy, Debug)]
pub struct LayerView<'a> {
    /// The layer's pool, `[pages, page()]`.
    pub pool: &'a [f32],
    /// Page `i` holds positions `16·i .. 16·i + 16`.
    pub table: &'a [u32],
    /// Shape of one token.
    pub shape: HeadShape,
}

impl LayerView<'_> {
    /// The K tile `[head_dim, 16]` of the sequence's `index`-th page.
    #[inline(always)]
    pub(crate) fn k(&self, index: usize, head: usize) -> &[f32] {
        let at = self.shape.k_tile(self.table[index] as usize, head);
        &self.pool[at..at + self.shape.tile()]
    }

    /// The V tile `[16, head_dim]` of the sequence's `index`-th page.
    #[inline(always)]
    pub(crate) fn v(&self, index: usize, head: usize) -> &[f32] {
        let at = self.shape.v_tile(self.table[index] as usize, head);
        &self.pool[at..at + self.shape.tile()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_a_pool_neither_overlap_nor_leave_gaps() {
        let shape = HeadShape { kv_heads: 3, head_dim: 8 };
        let mut covered = vec![0u8; 4 * shape.page()];
        for page in 0..4 {
            for head in 0..3 {
                for start in [shape.k_tile(page, head), shape.v_tile(page, head)] {
                    covered[start..start + shape.tile()].iter_mut().for_each(|byte| *byte += 1);
                }
            }
        }
        assert!(covered.iter().all(|&count| count == 1));
    }
}
