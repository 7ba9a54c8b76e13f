//! The inner loops of attention: a group of query vectors against the pages of one tile.
//!
//! Registers hold `N` queries by `M` vectors, which together are the 16 tokens of a page (scores) or 16 of a head's
//! dimensions (values). Per 16 columns and query: `head_dim` multiplications for the scores, as many for the values.

use crate::page::PAGE_TOKENS;
use crate::simd::{exp2, prefetch};
use pulp::Simd;

/// Scores, then weights, of `N` queries for one page.
pub(crate) type Scores<const N: usize> = [[f32; PAGE_TOKENS]; N];

/// One page of a head, and the one that is asked for meanwhile.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Page<'a> {
    pub(crate) keys: &'a [f32],
    pub(crate) values: &'a [f32],
    pub(crate) next_keys: &'a [f32],
    pub(crate) next_values: &'a [f32],
}

#[inline(always)]
pub(crate) fn vectors<S: Simd, const M: usize>(values: &[f32; PAGE_TOKENS]) -> &[S::f32s; M] {
    S::as_simd_f32s(values).0.try_into().expect("M vectors are 16 lanes")
}

#[inline(always)]
pub(crate) fn vectors_mut<S: Simd, const M: usize>(values: &mut [f32; PAGE_TOKENS]) -> &mut [S::f32s; M] {
    S::as_mut_simd_f32s(values).0.try_into().expect("M vectors are 16 lanes")
}

/// Scores of `N` queries `[head_dim, N]` against one page of keys `[head_dim, 16]`; where `ASK` says so, lines of a later
/// page are asked for in between.
#[inline(always)]
pub(crate) fn score<S: Simd, const N: usize, const M: usize, const ASK: bool>(
    simd: S,
    page: &Page<'_>,
    queries: &[[f32; N]],
    out: &mut Scores<N>,
) {
    let mut sums = [[simd.splat_f32s(0.0); M]; N];
    let (keys, next) = (page.keys.as_chunks::<PAGE_TOKENS>().0, page.next_keys.as_chunks::<PAGE_TOKENS>().0);
    for ((keys, next), queries) in keys.iter().zip(next).zip(queries) {
        if ASK {
            prefetch(next);
        }
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
pub(crate) fn soften<S: Simd, const N: usize, const M: usize>(
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
pub(crate) fn accumulate<S: Simd, const N: usize, const M: usize, const ASK: bool>(
    simd: S,
    tile: &[Page<'_>],
    dim: usize,
    strip: usize,
    weights: &[Scores<N>],
    out: &mut [f32],
) {
    let whole = PAGE_TOKENS * dim;
    assert!(tile.iter().all(|page| page.values.len() == whole && page.next_values.len() == whole));
    assert!(strip + PAGE_TOKENS <= dim && out.len() == N * dim);
    let mut sums = [[simd.splat_f32s(0.0); M]; N];
    for (page, weights) in tile.iter().zip(weights) {
        for token in 0..PAGE_TOKENS {
            // SAFETY: a page has 16 rows of `dim` values, asserted above, as is the strip's place in them.
            let strip_of = |values: &[f32]| unsafe {
                &*values.as_ptr().add(token * dim + strip).cast::<[f32; PAGE_TOKENS]>()
            };
            if ASK {
                prefetch(strip_of(page.next_values));
            }
            let values = strip_of(page.values);
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
pub(crate) fn accumulate_rest<const N: usize>(
    tile: &[Page<'_>],
    dim: usize,
    strip: usize,
    weights: &[Scores<N>],
    out: &mut [f32],
) {
    for (i, row) in out.chunks_exact_mut(dim).enumerate() {
        for (page, weights) in tile.iter().zip(weights) {
            for (values, weight) in page.values.chunks_exact(dim).zip(weights[i]) {
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
