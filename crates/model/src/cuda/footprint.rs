//! Device memory that a model needs, known before anything is allocated.

use crate::config::Config;
use crate::pages::pages_for;
use cacheclip_kernels::cuda::executor::STAGED;
use cacheclip_kernels::cuda::memory::allocated;
use cacheclip_kernels::page::HeadShape;
use std::fmt;

/// Sequences whose logits leave the device together.
const BATCH: usize = 32;
/// Bytes of an element of weights, activations and pages.
const NARROW: usize = 2;
/// Bytes of a sum, an angle, a logit.
const WIDE: usize = 4;
/// What partial results of attention take at most: ranges are made only while blocks are few, so that there are no more
/// than two rounds of blocks, of 128 vectors each, on 132 multiprocessors twice over.
const PARTS: usize = 2 * 2 * 132 * 128 * (128 + 2) * WIDE;

/// Bytes of device memory a model needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// All weights: bf16, norms and biases f32.
    pub weights: u64,
    /// Paged KV.
    pub pages: u64,
    /// To compute in: [`step`](Self::step), one longest prompt's rows between its layers, staging, angles.
    pub workspace: u64,
    /// Activations of one block of rows, and what leaves the device of it; part of the workspace.
    pub step: u64,
}

/// A model that a device has too little memory for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// What it needs.
    pub needed: Footprint,
    /// Bytes there may be.
    pub limit: u64,
}

impl std::error::Error for TooLarge {}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64);
        let Footprint { weights, pages, workspace, .. } = self.needed;
        write!(
            f,
            "the model needs {} of device memory ({} for weights, {} for pages of KV, {} to compute in) and there are {}: \
             lower page_bytes, raise cuda.memory_bytes where the device has more, or take a smaller model",
            gib(self.needed.total()),
            gib(weights),
            gib(pages),
            gib(workspace),
            gib(self.limit),
        )
    }
}

fn sum(sizes: impl IntoIterator<Item = usize>) -> u64 {
    sizes.into_iter().map(|bytes| allocated(bytes) as u64).sum()
}

impl Footprint {
    /// Of a model with `pages` pages of KV, computed in blocks of `block_rows` rows.
    pub fn of(config: &Config, pages: usize, block_rows: usize) -> Self {
        let c = config;
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let row = q + 2 * kv;
        let matrices =
            [row * c.hidden, c.hidden * q, 2 * c.intermediate * c.hidden, c.hidden * c.intermediate];
        let biases = if c.family.has_qkv_biases() { row } else { 0 };
        let norms = if c.family.has_head_norms() { 2 * c.head_dim } else { 0 };
        let layer = sum(matrices.map(|elements| elements * NARROW))
            + sum([c.hidden, c.hidden, biases, norms].map(|elements| elements * WIDE));
        let tables = if c.tied { 1 } else { 2 };
        let weights =
            layer * c.layers as u64 + sum([c.vocab * c.hidden * NARROW]) * tables + sum([c.hidden * WIDE]);

        let pool = pages * HeadShape { kv_heads: c.kv_heads, head_dim: c.head_dim }.page() * NARROW;
        let rows = |count: usize, width: usize| count * width * NARROW;
        let block = sum([
            rows(block_rows, c.hidden),
            rows(block_rows, row),
            rows(block_rows, q),
            rows(block_rows, 2 * c.intermediate),
            rows(block_rows, c.intermediate),
        ]);
        // Blocks of other sizes than the last are kept, too.
        let step = 2 * block + sum([BATCH * c.vocab * WIDE, PARTS]);
        let tokens = c.max_positions.min(16 * pages);
        let of_tokens = sum([
            rows(tokens, c.hidden),
            STAGED.max(rows(tokens, 2 * kv)),
            // Cosines and sines of two tables.
            2 * c.max_positions * c.head_dim * WIDE,
            pages_for(tokens) * WIDE,
        ]);
        Self { weights, pages: sum([pool]) * c.layers as u64, workspace: step + of_tokens, step }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.pages + self.workspace
    }

    /// Itself, if it fits `limit` bytes.
    ///
    /// # Errors
    /// It does not.
    pub fn fits(self, limit: u64) -> Result<Self, TooLarge> {
        if self.total() > limit { Err(TooLarge { needed: self, limit }) } else { Ok(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::page_bytes;

    #[test]
    fn weights_and_pages_are_what_arithmetic_says() {
        let config = Config::shape("qwen2.5-14b").expect("a known shape");
        let needed = Footprint::of(&config, 2048, 2048);
        // 14.8 billion weights of two bytes; sizes are rounded up by less than a hundredth.
        let weights = 2 * config.parameters() as u64;
        assert!(needed.weights >= weights && needed.weights < weights / 100 * 101, "{needed:?}");
        // 2048 pages of 16 tokens, 48 layers, K and V of 8 heads of 128, two bytes.
        assert_eq!(needed.pages, 2048 * 16 * 48 * 2 * 8 * 128 * 2);
        assert_eq!(needed.pages, 2048 * page_bytes(&config, 2));
        assert!(needed.workspace < 3 << 30, "{needed:?}");
    }

    #[test]
    fn what_does_not_fit_is_refused_in_one_line_that_says_what_to_do() {
        let config = Config::shape("qwen2.5-14b").expect("a known shape");
        let needed = Footprint::of(&config, 1024, 512);
        assert_eq!(needed.fits(needed.total()), Ok(needed));
        let refused = needed.fits(24 << 30).expect_err("an H100's third").to_string();
        assert!(refused.lines().count() == 1 && refused.contains("24.00 GiB"), "{refused}");
        assert!(refused.contains("lower page_bytes"), "{refused}");
    }
}
