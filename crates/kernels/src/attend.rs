//! Attention of rows at arbitrary positions against a sequence's whole paged cache (kernel *attend_rows*).
//!
//! Each row sees the columns at or before its own position, so the same kernel serves full prefill (all
//! rows), repair (selected rows and the question) and decoding (one row each of several sequences). Online softmax
//! over tiles of columns (Milakov and Gimelshein, arXiv 1805.02867); no mask is ever materialised, tiles beyond a
//! block's last row are not read, and grouped-query attention packs the query heads that share keys into one block.
//! Many rows are split over threads by rows; few are split by KV head and range of columns, and what the ranges give
//! is merged.

use crate::page::{LayerView, PAGE_TOKENS};
use crate::simd::widest;
use crate::tile::{Block, Into, Scratch, Sweep};
use rayon::prelude::*;
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// Most query vectors per block: a tile of K and V read from the second-level cache serves this many.
pub(crate) const BLOCK: usize = 96;
/// Blocks per thread from which rows alone balance: late rows see more than early ones.
const BLOCKS: usize = 4;
/// Fewest pages that are worth a range of their own.
const LEAST: usize = 16;
/// Tiles of keys and values below which handing work to other threads costs more than it saves.
const ALONE: usize = 64;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static PARTS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
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
    /// Position of each row, ascending where the rows are of one sequence.
    pub positions: &'a [u32],
}

impl<'a> Queries<'a> {
    /// The query vectors of `rows` that share KV head `head`.
    pub(crate) fn block(
        &self,
        view: &'a LayerView<'a>,
        rows: Range<usize>,
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

    /// Some of the rows.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Self {
        Self { data: &self.data[rows.start * self.stride..], positions: &self.positions[rows], ..*self }
    }

    /// Pages that the last of these rows sees.
    pub(crate) fn pages(&self) -> usize {
        self.positions.last().map_or(0, |&last| last as usize / PAGE_TOKENS + 1)
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
    let block_rows = (BLOCK / group).max(1);
    if rows < BLOCKS * block_rows * rayon::current_num_threads() {
        return by_columns(|_| *view, queries, block_rows, out);
    }
    let arch = widest();
    out.par_chunks_mut(block_rows * width).enumerate().for_each(|(index, out)| {
        let first = index * block_rows;
        let rows = first..first + out.len() / width;
        let pages = 0..queries.rows(rows.clone()).pages();
        with_scratch(|scratch| {
            for head in 0..view.shape.kv_heads {
                let block = queries.block(view, rows.clone(), head, scratch);
                let into = Into::Rows(&mut out[head * group * dim..], width);
                arch.dispatch(Sweep { block, pages: pages.clone(), into, kept: None });
            }
        });
    });
}

/// Attends one row of each of several sequences, as a step of decoding does: row `i` of `queries` sees `view_of(i)`, and
/// all views have one shape. Writes `out` `[rows, heads · head_dim]`. Nothing is allocated once a thread has seen a call
/// as large.
///
/// # Panics
/// When a view's pages do not cover its row's position, or shapes disagree.
pub fn attend_each<'a>(
    view_of: impl Fn(usize) -> LayerView<'a> + Sync,
    queries: Queries<'_>,
    out: &mut [f32],
) {
    by_columns(view_of, queries, 1, out);
}

/// Attends blocks of rows, each in ranges of columns; `view_of` is the sequence of a block.
fn by_columns<'a>(
    view_of: impl Fn(usize) -> LayerView<'a> + Sync,
    queries: Queries<'_>,
    block_rows: usize,
    out: &mut [f32],
) {
    let rows = queries.positions.len();
    if rows == 0 {
        return;
    }
    let shape = view_of(0).shape;
    let (group, width) = (queries.heads / shape.kv_heads, queries.heads * shape.head_dim);
    assert_eq!(out.len(), rows * width, "output is [rows, heads * head_dim]");
    let blocks = rows.div_ceil(block_rows);
    let rows_of = |block: usize| block * block_rows..((block + 1) * block_rows).min(rows);
    let pages_of = |block| queries.rows(rows_of(block)).pages();
    let split = Split::new((0..blocks).map(pages_of), shape.kv_heads);
    // Of one block, head and range.
    let part = block_rows * group * (shape.head_dim + 2);
    let mut parts = PARTS.take();
    let length = blocks * shape.kv_heads * split.parts * part;
    if parts.len() < length {
        parts.resize(length, 0.0);
    }
    let arch = widest();
    split.chunks(&mut parts[..length], part, |index, out| {
        let (block, head, range) = split.unit(index, shape.kv_heads);
        let pages = split.range(pages_of(block), range);
        if !pages.is_empty() {
            let view = view_of(block);
            with_scratch(|scratch| {
                let block = queries.block(&view, rows_of(block), head, scratch);
                arch.dispatch(Sweep { block, pages, into: Into::Part(out), kept: None });
            });
        }
    });
    split.chunks(out, width * block_rows, |block, out| {
        let ranges = split.ranges(pages_of(block));
        let of_head = parts.chunks_exact(split.parts * part).skip(block * shape.kv_heads);
        for (head, parts) in of_head.take(shape.kv_heads).enumerate() {
            merge(
                &parts[..ranges * part],
                part,
                shape.head_dim,
                group,
                &mut out[head * group * shape.head_dim..],
                width,
            );
        }
    });
    PARTS.set(parts);
}

/// Merges what ranges of columns gave (each as [`Into::Part`] says) into rows of `out`, as [`Into::Rows`] says.
pub(crate) fn merge(parts: &[f32], part: usize, dim: usize, group: usize, out: &mut [f32], stride: usize) {
    for (row, out) in out.chunks_mut(stride).enumerate() {
        for (member, out) in out.chunks_exact_mut(dim).take(group).enumerate() {
            let of_query = parts[(row * group + member) * (dim + 2)..].chunks(part);
            let (peak, scale) = whole(of_query.clone().map(|part| (part[dim], part[dim + 1])));
            out.fill(0.0);
            for part in of_query {
                let scale = (part[dim] - peak).exp2() * scale;
                out.iter_mut().zip(part).for_each(|(into, value)| *into += value * scale);
            }
        }
    }
}

/// Peak of all ranges' scores and what makes probabilities of weights under it, of each range's `(peak, total)`.
pub(crate) fn whole(ranges: impl Iterator<Item = (f32, f32)> + Clone) -> (f32, f32) {
    let peak = ranges.clone().fold(f32::NEG_INFINITY, |most, (peak, _)| most.max(peak));
    let total: f32 = ranges.map(|(peak_of, total)| total * (peak_of - peak).exp2()).sum();
    (peak, 1.0 / total)
}

/// How the columns of blocks are split into ranges, so that every thread has some.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Split {
    /// Most ranges of a block.
    pub(crate) parts: usize,
    /// Whether the calling thread does it all.
    alone: bool,
}

impl Split {
    /// Of blocks that see so many pages each, in each of `heads` heads.
    pub(crate) fn new(pages: impl Iterator<Item = usize>, heads: usize) -> Self {
        let (total, longest) =
            pages.fold((0, 0), |(total, longest), pages| (total + pages, longest.max(pages)));
        let threads = rayon::current_num_threads();
        let unit = if threads == 1 { longest } else { heads * total / (BLOCKS * threads) };
        Self { parts: longest.div_ceil(unit.max(LEAST)).max(1), alone: heads * total < ALONE }
    }

    /// Block, head and range of a piece of work.
    pub(crate) fn unit(&self, index: usize, heads: usize) -> (usize, usize, usize) {
        (index / self.parts / heads, index / self.parts % heads, index % self.parts)
    }

    /// Pages per range of a block.
    pub(crate) fn each(&self, pages: usize) -> usize {
        pages.div_ceil(self.parts).max(LEAST)
    }

    /// Ranges of a block that have any pages.
    pub(crate) fn ranges(&self, pages: usize) -> usize {
        pages.div_ceil(self.each(pages))
    }

    /// Pages of one of a block's ranges; none, where the block is shorter than others.
    pub(crate) fn range(&self, pages: usize, part: usize) -> Range<usize> {
        let start = (part * self.each(pages)).min(pages);
        start..(start + self.each(pages)).min(pages)
    }

    /// Works on chunks of `values`, on all threads where that is worth it.
    pub(crate) fn chunks(
        &self,
        values: &mut [f32],
        size: usize,
        work: impl Fn(usize, &mut [f32]) + Sync + Send,
    ) {
        if self.alone {
            values.chunks_mut(size).enumerate().for_each(|(index, chunk)| work(index, chunk));
        } else {
            values.par_chunks_mut(size).enumerate().for_each(|(index, chunk)| work(index, chunk));
        }
    }
}
