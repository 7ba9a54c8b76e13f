//! Attention of rows at arbitrary positions against a sequence's whole paged cache (kernel *attend_rows*).
//!
//! Each row sees the columns at or before its own position, so the same kernel serves full prefill (all
//! rows), repair (selected rows and the question) and decoding (one row). Online softmax over tiles of
//! columns (Milakov and Gimelshein, arXiv 1805.02867); no mask is ever materialised, tiles beyond a block's
//! last row are not read, and grouped-query attention packs the query heads that share keys into one block.

use crate::lanes::{Fma, dispatch, exp};
use crate::page::{LayerView, PAGE_TOKENS};
use rayon::prelude::*;

/// Columns per tile: the scores of one block against a tile stay in the first-level cache.
const TILE_PAGES: usize = 8;
const TILE: usize = TILE_PAGES * PAGE_TOKENS;
/// Query vectors per block: a tile of K and V read from the second-level cache serves this many.
const BLOCK: usize = 32;
/// Query vectors whose accumulators stay in registers together.
const GROUP: usize = 4;

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

impl Queries<'_> {
    /// Copies the queries of `rows` that share KV head `head` into `[rows · group, head_dim]`, scaled by
    /// `1/√head_dim`, and notes how many columns each sees.
    pub(crate) fn pack(&self, rows: std::ops::Range<usize>, head: usize, group: usize, dim: usize) -> Packed {
        let scale = 1.0 / (dim as f32).sqrt();
        let mut packed = Packed { q: Vec::with_capacity(rows.len() * group * dim), limits: Vec::new() };
        for row in rows {
            let at = row * self.stride + head * group * dim;
            packed.q.extend(self.data[at..at + group * dim].iter().map(|v| v * scale));
            packed.limits.extend(std::iter::repeat_n(self.positions[row] as usize + 1, group));
        }
        packed
    }
}

/// Query vectors of one block and the number of columns each sees (ascending).
#[derive(Debug)]
pub(crate) struct Packed {
    pub(crate) q: Vec<f32>,
    pub(crate) limits: Vec<usize>,
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
    let head_of_rows = |rows: std::ops::Range<usize>, head: usize, write: &mut dyn FnMut(usize, &[f32])| {
        let packed = queries.pack(rows, head, group, dim);
        let mut result = vec![0.0; packed.q.len()];
        attend_block(view, head, &packed.q, &packed.limits, &mut result);
        result.chunks_exact(group * dim).enumerate().for_each(|(row, values)| write(row, values));
    };
    if rows == 1 {
        out.par_chunks_mut(group * dim).enumerate().for_each(|(head, out)| {
            head_of_rows(0..1, head, &mut |_, values| out.copy_from_slice(values));
        });
        return;
    }
    let block_rows = (BLOCK / group).max(1);
    out.par_chunks_mut(block_rows * width).enumerate().for_each(|(block, out)| {
        let first = block * block_rows;
        let range = first..first + out.len() / width;
        for head in 0..view.shape.kv_heads {
            head_of_rows(range.clone(), head, &mut |row, values| {
                let at = row * width + head * group * dim;
                out[at..at + group * dim].copy_from_slice(values);
            });
        }
    });
}

dispatch!(fn attend_block = attend_body(
    view: &LayerView<'_>, head: usize, q: &[f32], limits: &[usize], out: &mut [f32],
));

#[inline(always)]
fn attend_body<F: Fma>(view: &LayerView<'_>, head: usize, q: &[f32], limits: &[usize], out: &mut [f32]) {
    let dim = view.shape.head_dim;
    let count = limits.len();
    let columns = limits[count - 1];
    let mut largest = vec![f32::NEG_INFINITY; count];
    let mut total = vec![0.0f32; count];
    let mut scores = vec![0.0f32; count * TILE];
    for start in (0..columns).step_by(TILE) {
        // Limits ascend: queries before `first` see nothing of this tile.
        let first = limits.partition_point(|&limit| limit <= start);
        let end = (start + TILE).min(columns);
        let pages = start / PAGE_TOKENS..end.div_ceil(PAGE_TOKENS);
        for (slot, page) in pages.clone().enumerate() {
            score_page::<F>(view.k(page, head), dim, &q[first * dim..], &mut scores[first * TILE..], slot);
        }
        for i in first..count {
            let row = &mut scores[i * TILE..(i + 1) * TILE];
            let seen = (limits[i] - start).min(pages.len() * PAGE_TOKENS);
            let shrink =
                soften::<F>(&mut row[..pages.len() * PAGE_TOKENS], seen, &mut largest[i], &mut total[i]);
            if shrink != 1.0 {
                out[i * dim..(i + 1) * dim].iter_mut().for_each(|v| *v *= shrink);
            }
        }
        for (slot, page) in pages.enumerate() {
            let weights = &scores[first * TILE..];
            accumulate_page::<F>(view.v(page, head), dim, weights, slot, &mut out[first * dim..]);
        }
    }
    for (row, total) in out.chunks_exact_mut(dim).zip(total) {
        let scale = 1.0 / total;
        row.iter_mut().for_each(|v| *v *= scale);
    }
}

/// Scores of every query against one page, into columns `16·slot ..` of its score row.
#[inline(always)]
pub(crate) fn score_page<F: Fma>(k: &[f32], dim: usize, q: &[f32], scores: &mut [f32], slot: usize) {
    let (k, _) = k.as_chunks::<PAGE_TOKENS>();
    for (q, scores) in q.chunks(GROUP * dim).zip(scores.chunks_mut(GROUP * TILE)) {
        let mut sums = [[0.0f32; PAGE_TOKENS]; GROUP];
        if q.len() == GROUP * dim {
            for d in 0..dim {
                for i in 0..GROUP {
                    let value = q[i * dim + d];
                    for lane in 0..PAGE_TOKENS {
                        sums[i][lane] = F::fma(value, k[d][lane], sums[i][lane]);
                    }
                }
            }
        } else {
            for (i, q) in q.chunks_exact(dim).enumerate() {
                for d in 0..dim {
                    for lane in 0..PAGE_TOKENS {
                        sums[i][lane] = F::fma(q[d], k[d][lane], sums[i][lane]);
                    }
                }
            }
        }
        for (row, sums) in scores.chunks_mut(TILE).zip(sums) {
            row[slot * PAGE_TOKENS..(slot + 1) * PAGE_TOKENS].copy_from_slice(&sums);
        }
    }
}

/// Turns a tile's scores into weights under the running maximum; returns the factor by which what was
/// accumulated so far shrinks. Columns from `seen` on get weight zero.
#[inline(always)]
fn soften<F: Fma>(row: &mut [f32], seen: usize, largest: &mut f32, total: &mut f32) -> f32 {
    row[seen..].fill(f32::NEG_INFINITY);
    let (blocks, _) = row.as_chunks_mut::<PAGE_TOKENS>();
    let mut peaks = [f32::NEG_INFINITY; PAGE_TOKENS];
    for block in blocks.iter() {
        for lane in 0..PAGE_TOKENS {
            peaks[lane] = if block[lane] > peaks[lane] { block[lane] } else { peaks[lane] };
        }
    }
    let peak = peaks.iter().fold(*largest, |a, &b| a.max(b));
    let shrink = if *largest == peak { 1.0 } else { exp::<F>(*largest - peak) };
    let mut sums = [0.0f32; PAGE_TOKENS];
    for block in blocks.iter_mut() {
        for lane in 0..PAGE_TOKENS {
            let weight = exp::<F>(block[lane] - peak);
            block[lane] = weight;
            sums[lane] += weight;
        }
    }
    // The polynomial's floor is not zero: what is masked must not leak its 1e-38.
    row[seen..].fill(0.0);
    *largest = peak;
    *total = *total * shrink + sums.iter().sum::<f32>();
    shrink
}

/// Adds one page's values, weighted, to every query's output.
#[inline(always)]
fn accumulate_page<F: Fma>(v: &[f32], dim: usize, weights: &[f32], slot: usize, out: &mut [f32]) {
    const WIDTH: usize = 32;
    for (weights, out) in weights.chunks(GROUP * TILE).zip(out.chunks_mut(GROUP * dim)) {
        let queries = out.len() / dim;
        let mut at = 0;
        while at < dim {
            let width = WIDTH.min(dim - at);
            if queries == GROUP && width == WIDTH {
                let mut sums = [[0.0f32; WIDTH]; GROUP];
                for token in 0..PAGE_TOKENS {
                    let values = &v[token * dim + at..token * dim + at + WIDTH];
                    for i in 0..GROUP {
                        let weight = weights[i * TILE + slot * PAGE_TOKENS + token];
                        for lane in 0..WIDTH {
                            sums[i][lane] = F::fma(weight, values[lane], sums[i][lane]);
                        }
                    }
                }
                for (i, sums) in sums.iter().enumerate() {
                    let row = &mut out[i * dim + at..i * dim + at + WIDTH];
                    for lane in 0..WIDTH {
                        row[lane] += sums[lane];
                    }
                }
            } else {
                for i in 0..queries {
                    for token in 0..PAGE_TOKENS {
                        let weight = weights[i * TILE + slot * PAGE_TOKENS + token];
                        let values = &v[token * dim + at..token * dim + at + width];
                        for (o, value) in out[i * dim + at..i * dim + at + width].iter_mut().zip(values) {
                            *o = F::fma(weight, *value, *o);
                        }
                    }
                }
            }
            at += width;
        }
    }
}

/// Scores of packed queries against columns `0..columns`, `[queries, tile-padded columns]`, for the probe.
pub(crate) fn score_all(view: &LayerView<'_>, head: usize, q: &[f32], columns: usize) -> (Vec<f32>, usize) {
    let padded = columns.div_ceil(PAGE_TOKENS) * PAGE_TOKENS;
    let queries = q.len() / view.shape.head_dim;
    let mut scores = vec![0.0; queries * padded];
    let mut tile = vec![0.0; queries * TILE];
    for start in (0..columns).step_by(TILE) {
        let pages = start / PAGE_TOKENS..(start + TILE).min(padded) / PAGE_TOKENS;
        score_tile(view, head, q, pages.clone(), &mut tile);
        let width = pages.len() * PAGE_TOKENS;
        for (row, tile) in scores.chunks_exact_mut(padded).zip(tile.chunks_exact(TILE)) {
            row[start..start + width].copy_from_slice(&tile[..width]);
        }
    }
    (scores, padded)
}

dispatch!(fn score_tile = score_tile_body(
    view: &LayerView<'_>, head: usize, q: &[f32], pages: std::ops::Range<usize>, tile: &mut [f32],
));

#[inline(always)]
fn score_tile_body<F: Fma>(
    view: &LayerView<'_>,
    head: usize,
    q: &[f32],
    pages: std::ops::Range<usize>,
    tile: &mut [f32],
) {
    for (slot, page) in pages.enumerate() {
        score_page::<F>(view.k(page, head), view.shape.head_dim, q, tile, slot);
    }
}
