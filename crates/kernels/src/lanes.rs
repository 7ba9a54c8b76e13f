//! Runs one kernel body compiled for the widest vector unit this machine has.
//!
//! A body is an `#[inline(always)]` function generic over [`Fma`]; [`dispatch!`] instantiates it inside a
//! function compiled for AVX-512, one for AVX2 + FMA and one for the baseline, and picks at run time. The
//! loops are plain Rust over 16-lane arrays, which the compiler turns into vector code of that width.

/// How to compute `a * b + c`: one fused instruction where there is one, two roundings where there is not
/// (`f32::mul_add` without the instruction is a slow library call).
pub(crate) trait Fma {
    fn fma(a: f32, b: f32, c: f32) -> f32;
}

#[derive(Debug)]
pub(crate) struct Fused;
#[derive(Debug)]
pub(crate) struct Split;

impl Fma for Fused {
    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Fma for Split {
    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// `exp(x)` for `x <= 0`, relative error below 2e-7: degree-6 polynomial after splitting off the power of
/// two. Written without branches so that sixteen of them become vector code; the library's is a call each.
#[inline(always)]
pub(crate) fn exp<F: Fma>(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.max(-87.0);
    // Adding and subtracting 1.5·2^23 rounds to the nearest integer.
    let shifted = F::fma(x, std::f32::consts::LOG2_E, 12_582_912.0);
    let n = shifted - 12_582_912.0;
    let r = F::fma(n, -LN2_LOW, F::fma(n, -LN2_HIGH, x));
    let mut p = 1.0 / 720.0;
    p = F::fma(p, r, 1.0 / 120.0);
    p = F::fma(p, r, 1.0 / 24.0);
    p = F::fma(p, r, 1.0 / 6.0);
    p = F::fma(p, r, 0.5);
    p = F::fma(p, r, 1.0);
    p = F::fma(p, r, 1.0);
    let scale = f32::from_bits((((n as i32) + 127) << 23) as u32);
    p * scale
}

/// `dispatch!(name, body, (arg: Type, …))` defines `fn name(arg, …)` that runs `body::<Fused|Split>(arg, …)`
/// compiled for this machine.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "kernels take their operands one by one")]
        $vis fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments, reason = "as above")]
                fn wide($($arg: $ty),*) {
                    $body::<$crate::lanes::Fused>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments, reason = "as above")]
                fn middle($($arg: $ty),*) {
                    $body::<$crate::lanes::Fused>($($arg),*)
                }
                if $crate::lanes::has_avx512() {
                    // SAFETY: the features were just seen on this machine.
                    return unsafe { wide($($arg),*) };
                }
                if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                    // SAFETY: as above.
                    return unsafe { middle($($arg),*) };
                }
            }
            $body::<$crate::lanes::Split>($($arg),*)
        }
    };
}
pub(crate) use dispatch;

#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("fma")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_polynomial_exponential_is_the_librarys_within_rounding() {
        for step in 0..200_000 {
            let x = -(step as f32) * 4e-4;
            for got in [exp::<Fused>(x), exp::<Split>(x)] {
                let want = x.exp();
                assert!((got - want).abs() <= 3e-7 * want + 1e-37, "exp({x}) = {got}, want {want}");
            }
        }
    }

    #[test]
    fn masked_scores_vanish() {
        assert!(exp::<Fused>(f32::NEG_INFINITY) < 1e-37);
        assert_eq!(exp::<Fused>(0.0), 1.0);
    }
}
