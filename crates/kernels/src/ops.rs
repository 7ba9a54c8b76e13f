//! The elementwise parts of a decoder layer.

use crate::simd::{exp, widest};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Rows below which splitting over threads costs more than it gains.
const PARALLEL_ROWS: usize = 32;

/// Root-mean-square norm of each row of `x` `[rows, width]` into `out`, scaled by `weight` `[width]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    let arch = widest();
    let row = |(x, out): (&[f32], &mut [f32])| arch.dispatch(Norm { x, weight, eps, out });
    if x.len() / width < PARALLEL_ROWS {
        x.chunks_exact(width).zip(out.chunks_exact_mut(width)).for_each(row);
    } else {
        x.par_chunks_exact(width).zip(out.par_chunks_exact_mut(width)).for_each(row);
    }
}

/// `silu(gate) · up` for rows that hold both halves, `[rows, 2·width]` into `[rows, width]`.
pub fn silu_gate(gate_up: &[f32], width: usize, out: &mut [f32]) {
    let arch = widest();
    let row = |(both, out): (&[f32], &mut [f32])| {
        arch.dispatch(Gate { gate: &both[..width], up: &both[width..], out });
    };
    if out.len() / width < PARALLEL_ROWS {
        gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)).for_each(row);
    } else {
        gate_up.par_chunks_exact(2 * width).zip(out.par_chunks_exact_mut(width)).for_each(row);
    }
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    widest().dispatch(Add { x, y });
}

/// Adds `bias` `[width]` to every row of `x` `[rows, width]`.
pub fn add_bias(x: &mut [f32], bias: &[f32]) {
    let arch = widest();
    let row = |x: &mut [f32]| arch.dispatch(Add { x, y: bias });
    if x.len() / bias.len() < PARALLEL_ROWS {
        x.chunks_exact_mut(bias.len()).for_each(row);
    } else {
        x.par_chunks_exact_mut(bias.len()).for_each(row);
    }
}

struct Add<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
}

impl WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (a, b) in self.x.iter_mut().zip(self.y) {
            *a += b;
        }
    }
}

struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl WithSimd for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (vectors, rest) = S::as_simd_f32s(self.x);
        // Four sums: each addition to one waits for the one before.
        let (fours, odd) = vectors.as_chunks::<4>();
        let mut sums = [simd.splat_f32s(0.0); 4];
        for four in fours {
            for i in 0..4 {
                sums[i] = simd.mul_add_e_f32s(four[i], four[i], sums[i]);
            }
        }
        for vector in odd {
            sums[0] = simd.mul_add_e_f32s(*vector, *vector, sums[0]);
        }
        let [a, b, c, d] = sums;
        let sums = simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d));
        let total = simd.reduce_sum_f32s(sums) + rest.iter().map(|v| v * v).sum::<f32>();
        let scale = 1.0 / (total / self.x.len() as f32 + self.eps).sqrt();
        for ((o, &v), &w) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *o = v * scale * w;
        }
    }
}

struct Gate<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (gate, gate_rest) = S::as_simd_f32s(self.gate);
        let (up, up_rest) = S::as_simd_f32s(self.up);
        let (out, out_rest) = S::as_mut_simd_f32s(self.out);
        let (one, zero) = (simd.splat_f32s(1.0), simd.splat_f32s(0.0));
        for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            // The exponential takes non-positive arguments only; sigmoid(g) = e / (1 + e) or 1 / (1 + e).
            let e = exp(simd, simd.sub_f32s(zero, simd.abs_f32s(g)));
            let above = simd.select_f32s(simd.less_than_f32s(g, zero), e, one);
            let sigmoid = simd.div_f32s(above, simd.add_f32s(one, e));
            *o = simd.mul_f32s(simd.mul_f32s(g, sigmoid), u);
        }
        for ((o, &g), &u) in out_rest.iter_mut().zip(gate_rest).zip(up_rest) {
            *o = g / (1.0 + (-g).exp()) * u;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_is_silu_times_up() {
        let gate: Vec<f32> = (-40..40).map(|i| i as f32 * 0.5).collect();
        let up: Vec<f32> = (0..80).map(|i| 1.0 + i as f32 * 0.01).collect();
        let both = [gate.clone(), up.clone()].concat();
        let mut out = vec![0.0; 80];
        silu_gate(&both, 80, &mut out);
        for ((o, g), u) in out.iter().zip(gate).zip(up) {
            let want = g / (1.0 + (-g).exp()) * u;
            assert!((o - want).abs() <= 1e-6 * want.abs().max(1e-3), "{o} {want}");
        }
    }

    #[test]
    fn sums_are_of_values_side_by_side_in_one_thread_and_in_many() {
        for length in [1, 37, 50_005] {
            let mut x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            let y: Vec<f32> = (0..length).map(|i| 1.0 - 2.0 * i as f32).collect();
            add(&mut x, &y);
            assert!(x.iter().enumerate().all(|(i, &sum)| sum == 1.0 - i as f32), "{length}");
        }
    }

    #[test]
    fn every_row_gets_the_bias() {
        for rows in [1, PARALLEL_ROWS + 1] {
            let mut x = vec![1.0; rows * 5];
            add_bias(&mut x, &[0.0, 1.0, 2.0, 3.0, 4.0]);
            assert!(x.chunks_exact(5).all(|row| row == [1.0, 2.0, 3.0, 4.0, 5.0]), "{rows}");
        }
    }

    #[test]
    fn a_normed_row_has_unit_mean_square() {
        let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
        let mut out = vec![0.0; 37];
        rms_norm(&x, &[1.0; 37], 0.0, &mut out);
        let mean = out.iter().map(|v| v * v).sum::<f32>() / 37.0;
        assert!((mean - 1.0).abs() < 1e-5);
    }
}
