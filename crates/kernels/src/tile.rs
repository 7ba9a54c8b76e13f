//! The inner kernel of attention: a block of query vectors swept over a range of paged keys and values.
//!
//! Registers hold `N` queries by `M` vectors, which together are the 16 tokens of a page (scores) or 16 of a head's
//! dimensions (values). Per 16 columns and query: `head_dim` multiplications for the scores, as many for the values.
//! A group of `N` queries goes through scores, softmax and values of a tile at once, so that its weights never leave
//! the first-level cache; keys and values are read from the second level, where they are asked for ahead of time.

use crate::page::{LayerView, PAGE_TOKENS};
use crate::simd::{exp2, prefetch};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Pages per tile: keys and values of a tile are half of a small second-level cache.
pub(crate) const TILE_PAGES: usize = 8;
/// Pages between what is computed and what is asked for from memory.
const AHEAD: usize = 4;

/// Scores, then weights, of `N` queries for one page.
type Scores<const N: usize> = [[f32; PAGE_TOKENS]; N];

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
        let ask = Ask { view, head, end };
        let weighs = !matches!(into, Into::Totals(_));
        (pages.start..pages.start + AHEAD).for_each(|page| ask.part(page, 0, 1));
        for (tile, start) in (pages.start..end).step_by(TILE_PAGES).enumerate() {
            let first_column = start * PAGE_TOKENS;
            // Limits ascend: groups before `first` see nothing of this tile.
            let first = limits[..count].partition_point(|&limit| limit <= first_column) / N;
            let mut keys: [&[f32]; TILE_PAGES] = [&[]; TILE_PAGES];
            let mut values = keys;
            for (slot, page) in (start..end.min(start + TILE_PAGES)).enumerate() {
                (keys[slot], values[slot]) = (view.k(page, head), view.v(page, head));
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
                for slot in 0..seen {
                    ask.part(start + slot + AHEAD, g - first, groups - first);
                    score::<S, N, M>(simd, keys[slot], &queries[g * dim..(g + 1) * dim], &mut scores[slot]);
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
                    if strip + PAGE_TOKENS <= dim {
                        accumulate::<S, N, M>(simd, &values[..seen], dim, strip, scores, sums);
                    } else {
                        accumulate_rest(&values[..seen], dim, strip, scores, sums);
                    }
                }
                if let Some(kept) = &mut kept {
                    let at = (g * pages.len().div_ceil(TILE_PAGES) + tile) * N;
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

/// Asks for pages ahead of their use.
struct Ask<'a> {
    view: &'a LayerView<'a>,
    head: usize,
    end: usize,
}

impl Ask<'_> {
    /// The `part`-th of `parts` equal parts of a page: each group of a block asks for one.
    #[inline(always)]
    fn part(&self, page: usize, part: usize, parts: usize) {
        if page >= self.end {
            return;
        }
        let (keys, values) = (self.view.k(page, self.head), self.view.v(page, self.head));
        let share = keys.len().div_ceil(parts).next_multiple_of(16);
        let range = (part * share).min(keys.len())..((part + 1) * share).min(keys.len());
        prefetch(&keys[range.clone()]);
        prefetch(&values[range]);
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

#[inline(always)]
pub(crate) fn vectors<S: Simd, const M: usize>(values: &[f32; PAGE_TOKENS]) -> &[S::f32s; M] {
    S::as_simd_f32s(values).0.try_into().expect("M vectors are 16 lanes")
}

#[inline(always)]
pub(crate) fn vectors_mut<S: Simd, const M: usize>(values: &mut [f32; PAGE_TOKENS]) -> &mut [S::f32s; M] {
    S::as_mut_simd_f32s(values).0.try_into().expect("M vectors are 16 lanes")
}

/// Scores of `N` queries `[head_dim, N]` against one page of keys `[head_dim, 16]`.
#[inline(always)]
fn score<S: Simd, const N: usize, const M: usize>(
    simd: S,
    keys: &[f32],
    queries: &[[f32; N]],
    out: &mut Scores<N>,
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
        *vectors_mut::<S, M>(row) = sums;
    }
}

/// Turns the scores of query `i`, of which it sees `seen`, into weights `2^(score − peak)` under the largest so far,
/// and adds them to `totals`. Returns what sums under the former peak are to be multiplied with.
#[inline(always)]
fn soften<S: Simd, const N: usize, const M: usize>(
    simd: S,
    scores: &mut [Scores<N>],
    i: usize,
    seen: usize,
    peak: &mut f32,
    totals: &mut [f32; PAGE_TOKENS],
) -> f32 {
    let whole = seen / PAGE_TOKENS;
    if let Some(beyond) = scores.get_mut(whole..) {
        // Nothing is as small as this; what it weighs is forgotten below.
        for (page, scores) in beyond.iter_mut().enumerate() {
            scores[i][if page == 0 { seen % PAGE_TOKENS } else { 0 }..].fill(f32::NEG_INFINITY);
        }
    }
    if seen == 0 {
        scores.iter_mut().for_each(|scores| scores[i].fill(0.0));
        return 1.0;
    }
    let mut peaks = [simd.splat_f32s(*peak); M];
    for scores in scores.iter() {
        let scores = vectors::<S, M>(&scores[i]);
        for m in 0..M {
            peaks[m] = simd.max_f32s(peaks[m], scores[m]);
        }
    }
    let largest = peaks.into_iter().reduce(|a, b| simd.max_f32s(a, b));
    let largest = largest.map_or(*peak, |peaks| simd.reduce_max_f32s(peaks));
    let totals = vectors_mut::<S, M>(totals);
    let mut shrink = 1.0;
    if largest != *peak {
        shrink = (*peak - largest).exp2();
        for m in 0..M {
            totals[m] = simd.mul_f32s(totals[m], simd.splat_f32s(shrink));
        }
        *peak = largest;
    }
    let (peaks, mut sums) = (simd.splat_f32s(largest), *totals);
    for scores in scores.iter_mut() {
        let scores = vectors_mut::<S, M>(&mut scores[i]);
        for m in 0..M {
            scores[m] = exp2(simd, simd.sub_f32s(scores[m], peaks));
            sums[m] = simd.add_f32s(sums[m], scores[m]);
        }
    }
    *totals = sums;
    // The polynomial's floor is not zero: what is masked must not leak its 1e-38.
    if let Some(beyond) = scores.get_mut(whole..) {
        for (page, scores) in beyond.iter_mut().enumerate() {
            scores[i][if page == 0 { seen % PAGE_TOKENS } else { 0 }..].fill(0.0);
        }
    }
    shrink
}

/// Adds dimensions `strip .. strip + 16` of a tile's values, weighted, to `N` queries' sums `[N, head_dim]`.
#[inline(always)]
fn accumulate<S: Simd, const N: usize, const M: usize>(
    simd: S,
    tile: &[&[f32]],
    dim: usize,
    strip: usize,
    weights: &[Scores<N>],
    out: &mut [f32],
) {
    assert!(tile.iter().all(|page| page.len() == PAGE_TOKENS * dim));
    assert!(strip + PAGE_TOKENS <= dim && out.len() == N * dim);
    let mut sums = [[simd.splat_f32s(0.0); M]; N];
    for (values, weights) in tile.iter().zip(weights) {
        for token in 0..PAGE_TOKENS {
            // SAFETY: a page has 16 rows of `dim` values, asserted above, as is the strip's place in them.
            let values: &[f32; PAGE_TOKENS] = unsafe { &*values.as_ptr().add(token * dim + strip).cast() };
            let values = vectors::<S, M>(values);
            for i in 0..N {
                let weight = simd.splat_f32s(weights[i][token]);
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
    weights: &[Scores<N>],
    out: &mut [f32],
) {
    for (i, row) in out.chunks_exact_mut(dim).enumerate() {
        for (values, weights) in tile.iter().zip(weights) {
            for (values, weight) in values.chunks_exact(dim).zip(weights[i]) {
                row[strip..]
                    .iter_mut()
                    .zip(&values[strip..])
                    .for_each(|(into, value)| *into += weight * value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::Scalar;

    #[test]
    fn masked_scores_weigh_nothing_and_the_largest_one() {
        let mut scores = [[std::array::from_fn(|i| i as f32)], [std::array::from_fn(|i| 16.0 + i as f32)]];
        let (mut peak, mut totals) = (f32::NEG_INFINITY, [0.0; PAGE_TOKENS]);
        let shrink = soften::<_, 1, 16>(Scalar::new(), &mut scores, 0, 20, &mut peak, &mut totals);
        assert_eq!((peak, scores[1][0][3], shrink), (19.0, 1.0, 0.0));
        assert!(scores[1][0][4..].iter().all(|&weight| weight == 0.0));
        assert!(
            (totals.iter().sum::<f32>() - scores.as_flattened().as_flattened().iter().sum::<f32>()).abs()
                < 1e-6
        );
    }
}
