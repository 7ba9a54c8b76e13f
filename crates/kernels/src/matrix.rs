//! Weight matrices and the two products a decoder needs: many rows (GEMM) and one row (memory-bound).

use crate::simd::widest;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// A weight matrix `[out, in]`, row-major, as in a checkpoint: `project` computes `x · Wᵀ`.
#[derive(Clone, Debug)]
pub struct Matrix {
    data: Vec<f32>,
    outputs: usize,
    inputs: usize,
}

impl Matrix {
    /// Takes `[outputs, inputs]` row-major values.
    ///
    /// # Panics
    /// When the length is not `outputs · inputs`.
    pub fn new(data: Vec<f32>, outputs: usize, inputs: usize) -> Self {
        assert_eq!(
            data.len(),
            outputs * inputs,
            "a matrix of [{outputs}, {inputs}] has {} values",
            data.len()
        );
        Self { data, outputs, inputs }
    }

    /// Width of a projected row.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Width of a row before projection.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// All weights, row-major: of an embedding table, row `i` is the embedding of token `i`.
    pub fn values(&self) -> &[f32] {
        &self.data
    }

    /// `out[rows, outputs] = x[rows, inputs] · Wᵀ`.
    pub fn project(&self, x: &[f32], out: &mut [f32]) {
        let rows = x.len() / self.inputs;
        match rows {
            0 => {}
            1 => self.project_row(x, out),
            _ => self.project_rows(rows, x, out),
        }
    }

    fn project_rows(&self, rows: usize, x: &[f32], out: &mut [f32]) {
        assert!(x.len() == rows * self.inputs && out.len() == rows * self.outputs);
        let threads = rayon::current_num_threads();
        // SAFETY: the three buffers have the lengths asserted above and in `new`, the strides are theirs, and
        // `out` is not read.
        unsafe {
            gemm::gemm(
                rows,
                self.outputs,
                self.inputs,
                out.as_mut_ptr(),
                1,
                self.outputs as isize,
                false,
                x.as_ptr(),
                1,
                self.inputs as isize,
                self.data.as_ptr(),
                self.inputs as isize,
                1,
                0.0f32,
                1.0f32,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(threads),
            );
        }
    }

    /// One row reads every weight once and reuses none: split the outputs over threads and stream.
    fn project_row(&self, x: &[f32], out: &mut [f32]) {
        const BLOCK: usize = 64;
        let arch = widest();
        let block = |(index, out): (usize, &mut [f32])| {
            let weights = &self.data[index * BLOCK * self.inputs..][..out.len() * self.inputs];
            arch.dispatch(Dots { weights, x, out });
        };
        if self.data.len() < 1 << 16 {
            out.chunks_mut(BLOCK).enumerate().for_each(block);
        } else {
            out.par_chunks_mut(BLOCK).enumerate().for_each(block);
        }
    }
}

/// `out[i] = weights[i] · x`.
struct Dots<'a> {
    weights: &'a [f32],
    x: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { weights, x, out } = self;
        let mut rows = weights.chunks_exact(4 * x.len());
        let mut outs = out.chunks_exact_mut(4);
        // Four streams of weights: one alone does not keep the memory busy.
        for (rows, out) in rows.by_ref().zip(outs.by_ref()) {
            out.copy_from_slice(&dots::<S, 4>(simd, rows, x));
        }
        for (row, out) in rows.remainder().chunks_exact(x.len()).zip(outs.into_remainder()) {
            [*out] = dots::<S, 1>(simd, row, x);
        }
    }
}

#[inline(always)]
fn dots<S: Simd, const N: usize>(simd: S, rows: &[f32], x: &[f32]) -> [f32; N] {
    let rows: [&[f32]; N] = std::array::from_fn(|i| &rows[i * x.len()..(i + 1) * x.len()]);
    let (vectors, rest) = S::as_simd_f32s(x);
    let row_vectors: [&[S::f32s]; N] = std::array::from_fn(|i| &S::as_simd_f32s(rows[i]).0[..vectors.len()]);
    let mut sums = [[simd.splat_f32s(0.0); 2]; N];
    let pairs = vectors.len() / 2;
    for pair in 0..pairs {
        for half in 0..2 {
            let at = 2 * pair + half;
            for i in 0..N {
                sums[i][half] = simd.mul_add_e_f32s(vectors[at], row_vectors[i][at], sums[i][half]);
            }
        }
    }
    if vectors.len() % 2 == 1 {
        let at = vectors.len() - 1;
        for i in 0..N {
            sums[i][0] = simd.mul_add_e_f32s(vectors[at], row_vectors[i][at], sums[i][0]);
        }
    }
    let whole = x.len() - rest.len();
    std::array::from_fn(|i| {
        let tail: f32 = rows[i][whole..].iter().zip(rest).map(|(w, v)| w * v).sum();
        simd.reduce_sum_f32s(simd.add_f32s(sums[i][0], sums[i][1])) + tail
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_row_and_many_rows_give_the_plain_product() {
        let (inputs, outputs, rows) = (83, 130, 5);
        let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
        let matrix = Matrix::new((0..inputs * outputs).map(value).collect(), outputs, inputs);
        let x: Vec<f32> = (0..rows * inputs).map(|i| value(i + 7)).collect();
        let mut many = vec![0.0; rows * outputs];
        matrix.project(&x, &mut many);
        for r in 0..rows {
            let row = &x[r * inputs..(r + 1) * inputs];
            let mut one = vec![0.0; outputs];
            matrix.project(row, &mut one);
            for o in 0..outputs {
                let want: f64 =
                    row.iter().zip(&matrix.values()[o * inputs..]).map(|(a, b)| *a as f64 * *b as f64).sum();
                assert!((many[r * outputs + o] as f64 - want).abs() < 1e-4);
                assert!((one[o] as f64 - want).abs() < 1e-4);
            }
        }
    }
}
