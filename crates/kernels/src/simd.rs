//! What the kernels need of a vector unit beyond `pulp`: how to run on the widest there is, and an exponential.
//!
//! A kernel is a [`pulp::WithSimd`]; [`widest`] picks AVX-512, AVX2 with FMA, NEON or plain code at run time. Inner
//! loops keep their sums in arrays of registers: a call or a check that can fail inside such a loop makes the compiler
//! keep them in memory instead, at a tenth of the speed.

use pulp::{Arch, Simd, WithSimd};

/// The widest vector unit of this machine.
pub(crate) fn widest() -> Arch {
    Arch::new()
}

/// Name of the widest vector unit of this machine, as figures are labelled with it.
pub fn vectors() -> &'static str {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;

        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    match widest().dispatch(Lanes) {
        16 => "AVX-512",
        8 => "AVX2 with FMA",
        4 => "128-bit vectors",
        _ => "no vectors",
    }
}

/// `exp(x)` for `x <= 0`, relative error below 3e-7: degree-6 polynomial after splitting off the power of two.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const COEFFICIENTS: [f32; 6] = [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let constant = |value| simd.splat_f32s(value);
    let x = simd.max_f32s(x, constant(-87.0));
    // Adding and subtracting 1.5·2^23 rounds to the nearest integer, which is then in the sum's low bits.
    let shifted = simd.mul_add_e_f32s(x, constant(std::f32::consts::LOG2_E), constant(12_582_912.0));
    let n = simd.sub_f32s(shifted, constant(12_582_912.0));
    let r = simd.mul_add_e_f32s(n, constant(-LN2_HIGH), x);
    let r = simd.mul_add_e_f32s(n, constant(-LN2_LOW), r);
    let mut p = constant(1.0 / 720.0);
    for coefficient in COEFFICIENTS {
        p = simd.mul_add_e_f32s(p, r, constant(coefficient));
    }
    // The shift drops all of the sum but `n`.
    let exponent = simd.add_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(127));
    let scale = simd.wrapping_dyn_shl_u32s(exponent, simd.splat_u32s(23));
    simd.mul_f32s(p, simd.transmute_f32s_u32s(scale))
}

/// Asks for values that are needed soon. The processor's own prefetching ends where a page of its memory ends, and a
/// tile of keys or values is not larger than one.
#[inline(always)]
pub(crate) fn prefetch(values: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, about memory that is ours.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

/// Turns a row of scores into weights under their largest: `exp(score − peak)`, columns from `seen` on zero. Returns
/// the peak (no smaller than `floor`) and the weights' sum. The row's length is a multiple of the vector's.
#[inline(always)]
pub(crate) fn soften<S: Simd>(simd: S, row: &mut [f32], seen: usize, floor: f32) -> (f32, f32) {
    row[seen..].fill(f32::NEG_INFINITY);
    let (vectors, _) = S::as_mut_simd_f32s(row);
    let mut peaks = simd.splat_f32s(floor);
    for vector in vectors.iter() {
        peaks = simd.max_f32s(peaks, *vector);
    }
    let peak = simd.reduce_max_f32s(peaks);
    let (peaks, mut sums) = (simd.splat_f32s(peak), simd.splat_f32s(0.0));
    for vector in vectors.iter_mut() {
        *vector = exp(simd, simd.sub_f32s(*vector, peaks));
        sums = simd.add_f32s(sums, *vector);
    }
    // The polynomial's floor is not zero: what is masked must not leak its 1e-38.
    row[seen..].fill(0.0);
    (peak, simd.reduce_sum_f32s(sums))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::Scalar;

    struct Exp<'a>(&'a mut [f32]);

    impl WithSimd for Exp<'_> {
        type Output = ();

        fn with_simd<S: Simd>(self, simd: S) {
            let (vectors, rest) = S::as_mut_simd_f32s(self.0);
            assert!(rest.is_empty());
            vectors.iter_mut().for_each(|v| *v = exp(simd, *v));
        }
    }

    #[test]
    fn the_polynomial_exponential_is_the_librarys_within_rounding() {
        let x: Vec<f32> = (0..200_000).map(|step| step as f32 * -4e-4).collect();
        let (mut wide, mut plain) = (x.clone(), x.clone());
        widest().dispatch(Exp(&mut wide));
        Exp(&mut plain).with_simd(Scalar::new());
        for (x, got) in x.iter().zip(wide).chain(x.iter().zip(plain)) {
            let want = x.exp();
            assert!((got - want).abs() <= 3e-7 * want + 1e-37, "exp({x}) = {got}, want {want}");
        }
    }

    #[test]
    fn masked_scores_vanish_and_the_largest_weighs_one() {
        let mut row: Vec<f32> = (0..32).map(|i| i as f32).collect();
        let (peak, sum) = soften(Scalar::new(), &mut row, 20, f32::NEG_INFINITY);
        assert_eq!((peak, row[19]), (19.0, 1.0));
        assert!(row[20..].iter().all(|&weight| weight == 0.0));
        let want: f32 = row.iter().sum();
        assert!((sum - want).abs() < 1e-6);
    }
}
