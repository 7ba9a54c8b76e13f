//! The elementwise parts of a decoder layer.

use crate::lanes::{Fma, dispatch, exp};
use rayon::prelude::*;

/// Rows below which splitting over threads costs more than it gains.
const PARALLEL_ROWS: usize = 32;

/// Root-mean-square norm of each row of `x` `[rows, width]` into `out`, scaled by `weight` `[width]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    let row = |(x, out): (&[f32], &mut [f32])| norm_row(x, weight, eps, out);
    if x.len() / width < PARALLEL_ROWS {
        x.chunks_exact(width).zip(out.chunks_exact_mut(width)).for_each(row);
    } else {
        x.par_chunks_exact(width).zip(out.par_chunks_exact_mut(width)).for_each(row);
    }
}

/// `silu(gate) · up` for rows that hold both halves, `[rows, 2·width]` into `[rows, width]`.
pub fn silu_gate(gate_up: &[f32], width: usize, out: &mut [f32]) {
    let row = |(both, out): (&[f32], &mut [f32])| gate_row(&both[..width], &both[width..], out);
    if out.len() / width < PARALLEL_ROWS {
        gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)).for_each(row);
    } else {
        gate_up.par_chunks_exact(2 * width).zip(out.par_chunks_exact_mut(width)).for_each(row);
    }
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    for (a, b) in x.iter_mut().zip(y) {
        *a += b;
    }
}

dispatch!(fn norm_row = norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));
dispatch!(fn gate_row = gate_body(gate: &[f32], up: &[f32], out: &mut [f32]));

#[inline(always)]
fn norm_body<F: Fma>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // Sixteen partial sums: one running sum would chain every addition behind the last.
    let mut sums = [0.0f32; 16];
    let (blocks, rest) = x.as_chunks::<16>();
    for block in blocks {
        for (sum, &v) in sums.iter_mut().zip(block) {
            *sum = F::fma(v, v, *sum);
        }
    }
    let total: f32 = sums.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>();
    let scale = 1.0 / (total / x.len() as f32 + eps).sqrt();
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = v * scale * w;
    }
}

#[inline(always)]
fn gate_body<F: Fma>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        // The exponential takes non-positive arguments only; sigmoid(g) = e / (1 + e) or 1 / (1 + e).
        let e = exp::<F>(-g.abs());
        let sigmoid = if g >= 0.0 { 1.0 } else { e } / (1.0 + e);
        *o = g * sigmoid * u;
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
    fn a_normed_row_has_unit_mean_square() {
        let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
        let mut out = vec![0.0; 37];
        rms_norm(&x, &[1.0; 37], 0.0, &mut out);
        let mean = out.iter().map(|v| v * v).sum::<f32>() / 37.0;
        assert!((mean - 1.0).abs() < 1e-5);
    }
}
