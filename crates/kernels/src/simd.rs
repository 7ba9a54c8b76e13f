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

/// Asks for values that are needed soon, into the second-level cache. The processor's own prefetching ends where a page
/// of its memory ends, and a tile of keys or values is not larger than one.
#[inline(always)]
pub(crate) fn prefetch(values: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(16) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, about memory that is ours.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

/// `2^x` for `x <= 0`, relative error below 3e-7, never less than 2^-126.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Taylor's, at most half a step from an integer.
    const COEFFICIENTS: [f32; 6] =
        [1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0];
    let constant = |value| simd.splat_f32s(value);
    let x = simd.max_f32s(x, constant(-126.0));
    // As in `exp`.
    let shifted = simd.add_f32s(x, constant(12_582_912.0));
    let r = simd.sub_f32s(x, simd.sub_f32s(shifted, constant(12_582_912.0)));
    let mut p = constant(1.540_353e-4);
    for coefficient in COEFFICIENTS {
        p = simd.mul_add_e_f32s(p, r, constant(coefficient));
    }
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(p), exponent))
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

    struct Exp2<'a>(&'a mut [f32]);

    impl WithSimd for Exp2<'_> {
        type Output = ();

        fn with_simd<S: Simd>(self, simd: S) {
            let (vectors, rest) = S::as_mut_simd_f32s(self.0);
            assert!(rest.is_empty());
            vectors.iter_mut().for_each(|v| *v = exp2(simd, *v));
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
        let (mut wide, mut plain) = (x.clone(), x.clone());
        widest().dispatch(Exp2(&mut wide));
        Exp2(&mut plain).with_simd(Scalar::new());
        for (x, got) in x.iter().zip(wide).chain(x.iter().zip(plain)) {
            let want = x.exp2();
            assert!((got - want).abs() <= 3e-7 * want + 1e-37, "2^{x} = {got}, want {want}");
        }
    }
}
