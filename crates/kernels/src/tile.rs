//! A block of query vectors swept over a range of paged keys and values.
//!
//! A group of `N` queries goes through scores, softmax and values of a tile at once, so that its weights never leave
//! the first-level cache; keys and values are read from the second level, where they are asked for ahead of time.

use crate::inner::{Page, Scores, accumulate, accumulate_rest, score, soften};
use crate::page::{LayerView, PAGE_TOKENS};
use crate::simd::prefetch;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Pages per tile: keys and values of a tile are half of a small second-level cache.
pub(crate) const TILE_PAGES: usize = 8;
/// Pages between what is computed and what is asked for from memory.
const AHEAD: usize = 2;

/// Memory of one thread's blocks, kept between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Queries, scaled, `[groups, head_dim, N]`.
    queries: Vec<f32>,
    /// Columns that each query sees, ascending; of padding queries: as the last.
    limits: Vec<usize>,
    /// `[TILE_PAGES, N, 16]`.
    scores: Vec<f32>,
    /// Weighted values, `[groups, N, head_dim]`.
    sums: Vec<f32>,
    peaks: Vec<f32>,
    /// Sums of weights by lane, `[groups, N, 16]`.
    totals: Vec<f32>,
}

/// Query vectors that share one KV head.
#[derive(Debug)]
pub(crate) struct Block<'a> {
    pub(crate) view: &'a LayerView<'a>,
    pub(crate) head: usize,
    /// `[rows, stride]`: `group` query vectors at the beginning of each row.
    pub(crate) queries: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) group: usize,
    /// Position of each row, ascending.
    pub(crate) positions: &'a [u32],
    pub(crate) scratch: &'a mut Scratch,
}

/// Where the result of a sweep goes.
#[derive(Debug)]
pub(crate) enum Into<'a> {
    /// Rows `[rows, stride]`, `group · head_dim` values at the beginning of each: the sweep saw all columns.
    Rows(&'a mut [f32], usize),
    /// `[rows · group, head_dim + 2]`: weighted values, then peak and total, to be merged with other ranges'.
    Part(&'a mut [f32]),
    /// As `Part`, where only peaks and totals are wanted: values are not read.
    Totals(&'a mut [f32]),
}

/// Weights of a sweep that are kept, each under the peak its tile was computed with.
#[derive(Debug)]
pub(crate) struct Kept<'a> {
    /// `[groups, pages, N, 16]`. Weights of tiles that no query of a group sees are left as they were.
    pub(crate) weights: &'a mut [f32],
    /// `[groups, tiles, N]`, of any content where the weights are.
    pub(crate) peaks: &'a mut [f32],
}

/// Queries per group for `count` of them: what fills the registers, or half of it where that leaves less unused.
pub(crate) fn group_of<S: Simd>(count: usize) -> usize {
    match S::F32_LANES {
        16 if count <= 4 => 4,
        16 => 12,
        1 => 1,
        _ if count.div_ceil(4) * 4 < count.div_ceil(6) * 6 => 4,
        _ => 6,
    }
}

/// Runs `$body` with `N` queries and `M` vectors to a page that fit the registers of `$simd`.
macro_rules! with_registers {
    ($S:ty, $count:expr, $it:expr, $method:ident($($argument:expr),*)) => {
        match (<$S>::F32_LANES, $crate::tile::group_of::<$S>($count)) {
            // 32 registers.
            (16, 4) => $it.$method::<$S, 4, 1>($($argument),*),
            (16, _) => $it.$method::<$S, 12, 1>($($argument),*),
            // 16 registers.
            (8, 4) => $it.$method::<$S, 4, 2>($($argument),*),
            (8, _) => $it.$method::<$S, 6, 2>($($argument),*),
            (4, 4) => $it.$method::<$S, 4, 4>($($argument),*),
            (4, _) => $it.$method::<$S, 6, 4>($($argument),*),
            _ => $it.$method::<$S, 1, 16>($($argument),*),
        }
    };
}
pub(crate) use with_registers;

/// Attends a block over `pages` of its sequence.
#[derive(Debug)]
pub(crate) struct Sweep<'a> {
    pub(crate) block: Block<'a>,
    pub(crate) pages: Range<usize>,
    pub(crate) into: Into<'a>,
    pub(crate) kept: Option<Kept<'a>>,
}

impl WithSimd for Sweep<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        with_registers!(S, self.block.positions.len() * self.block.group, self, run(simd))
    }
}

impl Sweep<'_> {
    #[inline(always)]
    fn run<S: Simd, const N: usize, const M: usize>(self, simd: S) {
        let Self { mut block, pages, into, mut kept } = self;
        let Block { view, head, group, .. } = block;
        let dim = view.shape.head_dim;
        let (count, groups) = block.prepare::<N>();
        let Scratch { queries, limits, scores, sums, peaks, totals } = block.scratch;
        let (queries, _) = queries.as_chunks::<N>();
        let (totals, _) = totals.as_chunks_mut::<PAGE_TOKENS>();
        let end = pages.end.min(limits[count - 1].div_ceil(PAGE_TOKENS));
        let weighs = !matches!(into, Into::Totals(_));
        for page in pages.start..end.min(pages.start + AHEAD) {
            prefetch(view.k(page, head));
            prefetch(view.v(page, head));
        }
        for (index, start) in (pages.start..end).step_by(TILE_PAGES).enumerate() {
            let first_column = start * PAGE_TOKENS;
            // Limits ascend: groups before `first` see nothing of this tile.
            let first = limits[..count].partition_point(|&limit| limit <= first_column) / N;
            let mut tile: [Page<'_>; TILE_PAGES] = [Page::default(); TILE_PAGES];
            for (slot, page) in (start..end.min(start + TILE_PAGES)).enumerate() {
                let next = (page + AHEAD).min(end - 1);
                tile[slot] = Page {
                    keys: view.k(page, head),
                    values: view.v(page, head),
                    next_keys: view.k(next, head),
                    next_values: view.v(next, head),
                };
            }
            for g in first..groups {
                // The last of a group sees most.
                let last = limits[(g + 1) * N - 1] - first_column;
                let seen = last.div_ceil(PAGE_TOKENS).min(end - start).min(TILE_PAGES);
                let scores = match &mut kept {
                    Some(kept) => {
                        let at = (g * pages.len() + start - pages.start) * N * PAGE_TOKENS;
                        &mut kept.weights[at..at + seen * N * PAGE_TOKENS]
                    }
                    None => &mut scores[..seen * N * PAGE_TOKENS],
                };
                let scores: &mut [Scores<N>] = scores.as_chunks_mut::<PAGE_TOKENS>().0.as_chunks_mut::<N>().0;
                let queries = &queries[g * dim..(g + 1) * dim];
                for (page, scores) in tile[..seen].iter().zip(scores.iter_mut()) {
                    if g == first {
                        score::<S, N, M, true>(simd, page, queries, scores);
                    } else {
                        score::<S, N, M, false>(simd, page, queries, scores);
                    }
                }
                for i in 0..N {
                    let at = g * N + i;
                    let seen = limits[at].saturating_sub(first_column);
                    let shrink = soften::<S, N, M>(simd, scores, i, seen, &mut peaks[at], &mut totals[at]);
                    if shrink != 1.0 {
                        sums[at * dim..(at + 1) * dim].iter_mut().for_each(|v| *v *= shrink);
                    }
                }
                let sums = &mut sums[g * N * dim..(g + 1) * N * dim];
                for strip in (0..if weighs { dim } else { 0 }).step_by(PAGE_TOKENS) {
                    if strip + PAGE_TOKENS > dim {
                        accumulate_rest(&tile[..seen], dim, strip, scores, sums);
                    } else if g == first {
                        accumulate::<S, N, M, true>(simd, &tile[..seen], dim, strip, scores, sums);
                    } else {
                        accumulate::<S, N, M, false>(simd, &tile[..seen], dim, strip, scores, sums);
                    }
                }
                if let Some(kept) = &mut kept {
                    let at = (g * pages.len().div_ceil(TILE_PAGES) + index) * N;
                    kept.peaks[at..at + N].copy_from_slice(&peaks[g * N..(g + 1) * N]);
                }
            }
        }
        let of_query = sums.chunks_exact(dim).zip(peaks).zip(totals).take(count).enumerate();
        match into {
            Into::Rows(out, stride) => {
                for (i, ((sums, _), total)) in of_query {
                    let at = i / group * stride + i % group * dim;
                    let scale = 1.0 / total.iter().sum::<f32>();
                    out[at..at + dim].iter_mut().zip(sums).for_each(|(o, v)| *o = v * scale);
                }
            }
            Into::Part(out) | Into::Totals(out) => {
                for (out, (_, ((sums, peak), total))) in out.chunks_exact_mut(dim + 2).zip(of_query) {
                    out[..dim].copy_from_slice(sums);
                    (out[dim], out[dim + 1]) = (*peak, total.iter().sum());
                }
            }
        }
    }
}

impl Block<'_> {
    /// Packs the queries, scaled by `log₂e/√head_dim`, in groups of `N`, and resets the sums. Returns the number of
    /// queries and of groups.
    #[inline(always)]
    fn prepare<const N: usize>(&mut self) -> (usize, usize) {
        let dim = self.view.shape.head_dim;
        let count = self.positions.len() * self.group;
        let groups = count.div_ceil(N);
        let scratch = &mut *self.scratch;
        let scale = std::f32::consts::LOG2_E / (dim as f32).sqrt();
        scratch.queries.clear();
        scratch.queries.resize(groups * N * dim, 0.0);
        scratch.limits.clear();
        for (row, (queries, &position)) in self.queries.chunks(self.stride).zip(self.positions).enumerate() {
            for (g, query) in queries[..self.group * dim].chunks_exact(dim).enumerate() {
                let i = row * self.group + g;
                let packed = &mut scratch.queries[i / N * N * dim..];
                for (slot, value) in packed.chunks_exact_mut(N).zip(query) {
                    slot[i % N] = value * scale;
                }
                scratch.limits.push(position as usize + 1);
            }
        }
        scratch.limits.resize(groups * N, scratch.limits[count - 1]);
        // Every tile's scores are written before they are read.
        scratch.scores.resize(TILE_PAGES * N * PAGE_TOKENS, 0.0);
        for (values, length, with) in [
            (&mut scratch.sums, groups * N * dim, 0.0),
            (&mut scratch.peaks, groups * N, f32::NEG_INFINITY),
            (&mut scratch.totals, groups * N * PAGE_TOKENS, 0.0),
        ] {
            values.clear();
            values.resize(length, with);
        }
        (count, groups)
    }
}
