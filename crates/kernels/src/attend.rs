//! Attention of rows at arbitrary positions against a sequence's whole paged cache (kernel *attend_rows*).
//!
//! Each row sees the columns at or before its own position, so the same kernel serves full prefill (all
//! rows), repair (selected rows and the question) and decoding (one row). Online softmax over tiles of
//! columns (Milakov and Gimelshein, arXiv 1805.02867); no mask is ever materialised, tiles beyond a block's
//! last row are not read, and grouped-query attention packs the query heads that share keys into one block.

use crate::page::LayerView;
use crate::simd::widest;
use crate::tile::{Attend, Block, Scratch};
use rayon::prelude::*;
use std::cell::RefCell;

/// Most query vectors per block: a tile of K and V read from the second-level cache serves this many.
const BLOCK: usize = 96;
/// Fewest, where there are enough rows: what fills the registers.
const LEAST: usize = 12;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Lends this thread's scratch memory.
pub(crate) fn with_scratch<T>(work: impl FnOnce(&mut Scratch) -> T) -> T {
    SCRATCH.with_borrow_mut(work)
}

/// The queries of a pass: `[rows, stride]`, the first `heads · head_dim` of each row, already rotated.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// Row-major values.
    pub data: &'a [f32],
    /// Floats from one row to the next.
    pub stride: usize,
    /// Query heads; a multiple of the view's KV heads.
    pub heads: usize,
    /// Position of each row, ascending.
    pub positions: &'a [u32],
}

impl<'a> Queries<'a> {
    /// The query vectors of `rows` that share KV head `head`.
    pub(crate) fn block(
        &self,
        view: &'a LayerView<'a>,
        rows: std::ops::Range<usize>,
        head: usize,
        scratch: &'a mut Scratch,
    ) -> Block<'a> {
        let group = self.heads / view.shape.kv_heads;
        Block {
            view,
            head,
            queries: &self.data[rows.start * self.stride + head * group * view.shape.head_dim..],
            stride: self.stride,
            group,
            positions: &self.positions[rows],
            scratch,
        }
    }
}

/// Attends every row and writes `out` `[rows, heads · head_dim]`.
///
/// # Panics
/// When the view's pages do not cover the last position, or shapes disagree.
pub fn attend_rows(view: &LayerView<'_>, queries: Queries<'_>, out: &mut [f32]) {
    let dim = view.shape.head_dim;
    let group = queries.heads / view.shape.kv_heads;
    let width = queries.heads * dim;
    let rows = queries.positions.len();
    assert_eq!(out.len(), rows * width, "output is [rows, heads * head_dim]");
    debug_assert!(queries.positions.is_sorted(), "rows come in order of position");
    let arch = widest();
    if rows == 1 {
        out.par_chunks_mut(group * dim).enumerate().for_each(|(head, out)| {
            with_scratch(|scratch| {
                let block = queries.block(view, 0..1, head, scratch);
                arch.dispatch(Attend { block, out, out_stride: width });
            });
        });
        return;
    }
    // Few rows are spread over the threads; late rows see more, so that more blocks than threads balance better.
    let share = (rows * group).div_ceil(4 * rayon::current_num_threads());
    let block_rows = (share.clamp(LEAST, BLOCK) / group).max(1);
    out.par_chunks_mut(block_rows * width).enumerate().for_each(|(index, out)| {
        let first = index * block_rows;
        let rows = first..first + out.len() / width;
        with_scratch(|scratch| {
            for head in 0..view.shape.kv_heads {
                let block = queries.block(view, rows.clone(), head, scratch);
                let out = &mut out[head * group * dim..];
                arch.dispatch(Attend { block, out, out_stride: width });
            }
        });
    });
}
