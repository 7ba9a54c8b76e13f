//! The inner kernels of attention: a block of query vectors against one tile of paged keys and values at a time.
//!
//! Registers hold `N` queries by `M` vectors, which together are the 16 tokens of a page (scores) or 16 of a head's
//! dimensions (values). Per 16 columns and query: `head_dim` multiplications for the scores, as many for the values;
//! a tile of keys and one of values are read from the second-level cache once per group of `N` queries.

use crate::page::{LayerView, PAGE_TOKENS};
use crate::simd::{prefetch, soften};
use pulp::{Simd, WithSimd};

/// Columns per tile: the scores of a group of queries and a strip of values stay in the first-level cache.
const TILE_PAGES: usize = 8;
const TILE: usize = TILE_PAGES * PAGE_TOKENS;

/// Memory of one thread's blocks, kept between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Queries, scaled, `[groups, head_dim, N]`.
    queries: Vec<f32>,
    /// Columns that each query sees, ascending; of padding queries: as the last.
    limits: Vec<usize>,
    /// `[groups, N, TILE]`.
    scores: Vec<f32>,
    /// Weighted values, `[groups, N, head_dim]`.
    sums: Vec<f32>,
    peaks: Vec<f32>,
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

/// Runs `$body` with `N` queries and `M` vectors to a page that fit the registers of `$simd`.
macro_rules! with_registers {
    ($S:ty, $block:expr, $method:ident($($argument:expr),*)) => {
        match <$S>::F32_LANES {
            // 32 registers.
            16 => $block.$method::<$S, 12, 1>($($argument),*),
            // 16 registers.
            8 => $block.$method::<$S, 6, 2>($($argument),*),
            4 => $block.$method::<$S, 6, 4>($($argument),*),
            _ => $block.$method::<$S, 1, 16>($($argument),*),
        }
    };
}

/// Attends a block and writes its rows, `[rows, out_stride]`, `group · head_dim` values at the beginning of each.
#[derive(Debug)]
pub(crate) struct Attend<'a> {
    pub(crate) block: Block<'a>,
    pub(crate) out: &'a mut [f32],
    pub(crate) out_stride: usize,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        with_registers!(S, self, run(simd))
    }
}

impl Attend<'_> {
    #[inline(always)]
    fn run<S: Simd, const N: usize, const M: usize>(self, simd: S) {
        let Self { mut block, out, out_stride } = self;
        let Block { view, head, group, .. } = block;
        let dim = view.shape.head_dim;
        let (count, groups) = block.prepare::<N>();
        let Scratch { queries, limits, scores, sums, peaks, totals } = block.scratch;
        let (queries, _) = queries.as_chunks::<N>();
        let (scores, _) = scores.as_chunks_mut::<TILE>();
        let columns = limits[count - 1];
        for start in (0..columns).step_by(TILE) {
            // Limits ascend: groups before `first` see nothing of this tile.
            let first = limits[..count].partition_point(|&limit| limit <= start) / N;
            let mut keys: [&[f32]; TILE_PAGES] = [&[]; TILE_PAGES];
            let mut values = keys;
            let pages = start / PAGE_TOKENS..(start + TILE).min(columns).div_ceil(PAGE_TOKENS);
            let tile = pages.len();
            for (slot, page) in pages.enumerate() {
                (keys[slot], values[slot]) = (view.k(page, head), view.v(page, head));
            }
            let (keys, values) = (&keys[..tile], &values[..tile]);
            let after = start / PAGE_TOKENS + TILE_PAGES;
            let next: &[f32] = if after * PAGE_TOKENS < columns { view.k(after, head) } else { &[] };
            let width = tile * PAGE_TOKENS;
            for g in first..groups {
                let queries = &queries[g * dim..(g + 1) * dim];
                let (scores, _) = scores[g * N..(g + 1) * N].as_chunks_mut::<N>();
                for slot in 0..tile {
                    if g == first {
                        prefetch(values[slot]);
                        prefetch(keys.get(slot + 1).unwrap_or(&next));
                    }
                    score::<S, N, M>(simd, keys[slot], queries, &mut scores[0], slot * PAGE_TOKENS);
                }
            }
            for i in first * N..groups * N {
                let seen = limits[i].saturating_sub(start).min(width);
                if seen == 0 {
                    scores[i][..width].fill(0.0);
                    continue;
                }
                let (peak, total) = soften(simd, &mut scores[i][..width], seen, peaks[i]);
                let shrink = if peak == peaks[i] { 1.0 } else { (peaks[i] - peak).exp() };
                if shrink != 1.0 {
                    sums[i * dim..(i + 1) * dim].iter_mut().for_each(|v| *v *= shrink);
                }
                peaks[i] = peak;
                totals[i] = totals[i] * shrink + total;
            }
            // Strip by strip: of a tile of values only these lines are in the first-level cache.
            for strip in (0..dim).step_by(PAGE_TOKENS) {
                for g in first..groups {
                    let (weights, _) = scores[g * N..(g + 1) * N].as_chunks::<N>();
                    let sums = &mut sums[g * N * dim..(g + 1) * N * dim];
                    if strip + PAGE_TOKENS <= dim {
                        accumulate::<S, N, M>(simd, values, dim, strip, &weights[0], sums);
                    } else {
                        accumulate_rest(values, dim, strip, &weights[0], sums);
                    }
                }
            }
        }
        for (i, (sums, total)) in sums.chunks_exact(dim).zip(totals).take(count).enumerate() {
            let at = i / group * out_stride + i % group * dim;
            let scale = 1.0 / *total;
            out[at..at + dim].iter_mut().zip(sums).for_each(|(o, v)| *o = v * scale);
        }
    }
}

/// Weights of a block's queries over all that each sees, `[rows · group, padded]`, columns beyond zero.
#[derive(Debug)]
pub(crate) struct Weigh<'a> {
    pub(crate) block: Block<'a>,
    pub(crate) out: &'a mut Vec<f32>,
}

impl WithSimd for Weigh<'_> {
    /// Columns of a row of `out`: a multiple of 16.
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> usize {
        with_registers!(S, self, run(simd))
    }
}

impl Weigh<'_> {
    #[inline(always)]
    fn run<S: Simd, const N: usize, const M: usize>(self, simd: S) -> usize {
        let Self { mut block, out } = self;
        let Block { view, head, .. } = block;
        let dim = view.shape.head_dim;
        let (count, groups) = block.prepare::<N>();
        let Scratch { queries, limits, scores, .. } = block.scratch;
        let (queries, _) = queries.as_chunks::<N>();
        let (scores, _) = scores.as_chunks_mut::<TILE>();
        let (scores, _) = scores.as_chunks_mut::<N>();
        let pages = limits[count - 1].div_ceil(PAGE_TOKENS);
        let padded = pages * PAGE_TOKENS;
        out.clear();
        out.resize(groups * N * padded, 0.0);
        for page in 0..pages {
            let keys = view.k(page, head);
            for g in 0..groups {
                score::<S, N, M>(simd, keys, &queries[g * dim..(g + 1) * dim], &mut scores[g], 0);
                for (i, scores) in scores[g].iter().enumerate() {
                    let at = (g * N + i) * padded + page * PAGE_TOKENS;
                    out[at..at + PAGE_TOKENS].copy_from_slice(&scores[..PAGE_TOKENS]);
                }
            }
        }
        for (row, &seen) in out.chunks_exact_mut(padded).zip(&limits[..]).take(count) {
            let (_, total) = soften(simd, row, seen, f32::NEG_INFINITY);
            let scale = simd.splat_f32s(1.0 / total);
            let (vectors, _) = S::as_mut_simd_f32s(row);
            vectors.iter_mut().for_each(|v| *v = simd.mul_f32s(*v, scale));
        }
        padded
    }
}

impl Block<'_> {
    /// Packs the queries, scaled by `1/√head_dim`, in groups of `N`, and resets the sums. Returns the number of
    /// queries and of groups.
    #[inline(always)]
    fn prepare<const N: usize>(&mut self) -> (usize, usize) {
        let dim = self.view.shape.head_dim;
        let count = self.positions.len() * self.group;
        let groups = count.div_ceil(N);
        let scratch = &mut *self.scratch;
        let scale = 1.0 / (dim as f32).sqrt();
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
        scratch.scores.resize(groups * N * TILE, 0.0);
        for (values, length, with) in [
            (&mut scratch.sums, groups * N * dim, 0.0),
            (&mut scratch.peaks, groups * N, f32::NEG_INFINITY),
            (&mut scratch.totals, groups * N, 0.0),
        ] {
            values.clear();
            values.resize(length, with);
        }
        (count, groups)
    }
}

#[inline(always)]
fn vectors<S: Simd, const M: usize>(values: &[f32; PAGE_TOKENS]) -> &[S::f32s; M] {
    S::as_simd_f32s(values).0.try_into().expect("M vectors are 16 lanes")
}

/// Scores of `N` queries `[head_dim, N]` against one page of keys `[head_dim, 16]`, into columns `at ..`.
#[inline(always)]
fn score<S: Simd, const N: usize, const M: usize>(
    simd: S,
    keys: &[f32],
    queries: &[[f32; N]],
    out: &mut [[f32; TILE]; N],
    at: usize,
) {
    let mut sums = [[simd.splat_f32s(0.0); M]; N];
    let (keys, _) = keys.as_chunks::<PAGE_TOKENS>();
    for (keys, queries) in keys.iter().zip(queries) {
        let keys = vectors::<S, M>(keys);
        for i in 0..N {
            let query = simd.splat_f32s(queries[i]);
            for m in 0..M {
                sums[i][m] = simd.mul_add_e_f32s(query, keys[m], sums[i][m]);
            }
        }
    }
    for (row, sums) in out.iter_mut().zip(sums) {
        S::as_mut_simd_f32s(&mut row[at..at + PAGE_TOKENS]).0.copy_from_slice(&sums);
    }
}

/// Adds dimensions `strip .. strip + 16` of a tile's values, weighted, to `N` queries' sums `[N, head_dim]`.
#[inline(always)]
fn accumulate<S: Simd, const N: usize, const M: usize>(
    simd: S,
    tile: &[&[f32]],
    dim: usize,
    strip: usize,
    weights: &[[f32; TILE]; N],
    out: &mut [f32],
) {
    assert!(tile.len() <= TILE_PAGES && tile.iter().all(|page| page.len() == PAGE_TOKENS * dim));
    assert!(strip + PAGE_TOKENS <= dim && out.len() == N * dim);
    let mut sums = [[simd.splat_f32s(0.0); M]; N];
    for (slot, values) in tile.iter().enumerate() {
        for token in 0..PAGE_TOKENS {
            // SAFETY: a page has 16 rows of `dim` values, asserted above, as is the strip's place in them.
            let values: &[f32; PAGE_TOKENS] = unsafe { &*values.as_ptr().add(token * dim + strip).cast() };
            let values = vectors::<S, M>(values);
            for i in 0..N {
                // SAFETY: a tile has no more than TILE columns, asserted above.
                let weight = unsafe { *weights[i].get_unchecked(slot * PAGE_TOKENS + token) };
                let weight = simd.splat_f32s(weight);
                for m in 0..M {
                    sums[i][m] = simd.mul_add_e_f32s(weight, values[m], sums[i][m]);
                }
            }
        }
    }
    for (row, sums) in out.chunks_exact_mut(dim).zip(sums) {
        let (row, _) = S::as_mut_simd_f32s(&mut row[strip..strip + PAGE_TOKENS]);
        row.iter_mut().zip(sums).for_each(|(into, sum)| *into = simd.add_f32s(*into, sum));
    }
}

/// As [`accumulate`] for the last dimensions of heads whose width is no multiple of 16.
#[inline(always)]
fn accumulate_rest<const N: usize>(
    tile: &[&[f32]],
    dim: usize,
    strip: usize,
    weights: &[[f32; TILE]; N],
    out: &mut [f32],
) {
    for (row, weights) in out.chunks_exact_mut(dim).zip(weights) {
        for (values, weights) in tile.iter().zip(weights.chunks_exact(PAGE_TOKENS)) {
            for (values, weight) in values.chunks_exact(dim).zip(weights) {
                row[strip..]
                    .iter_mut()
                    .zip(&values[strip..])
                    .for_each(|(into, value)| *into += weight * value);
            }
        }
    }
}
