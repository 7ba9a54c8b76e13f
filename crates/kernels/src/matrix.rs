//! Weight matrices and the two products a decoder needs: many rows (GEMM) and one row (memory-bound).

use crate::lanes::{Fma, dispatch};
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

    /// One row of weights: of an embedding table, the embedding of token `index`.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.inputs..(index + 1) * self.inputs]
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
        let block = |(index, out): (usize, &mut [f32])| {
            let weights = &self.data[index * BLOCK * self.inputs..][..out.len() * self.inputs];
            dots(weights, x, out);
        };
        if self.data.len() < 1 << 16 {
            out.chunks_mut(BLOCK).enumerate().for_each(block);
        } else {
            out.par_chunks_mut(BLOCK).enumerate().for_each(block);
        }
    }
}

dispatch!(fn dots = dots_body(weights: &[f32], x: &[f32], out: &mut [f32]));

#[inline(always)]
fn dots_body<F: Fma>(weights: &[f32], x: &[f32], out: &mut [f32]) {
    let (x_blocks, x_rest) = x.as_chunks::<16>();
    for (row, o) in weights.chunks_exact(x.len()).zip(out) {
        let (blocks, rest) = row.as_chunks::<16>();
        let mut sums = [[0.0f32; 16]; 2];
        for (pair, x_pair) in blocks.chunks(2).zip(x_blocks.chunks(2)) {
            for ((sum, w), v) in sums.iter_mut().zip(pair).zip(x_pair) {
                for lane in 0..16 {
                    sum[lane] = F::fma(w[lane], v[lane], sum[lane]);
                }
            }
        }
        let tail: f32 = rest.iter().zip(x_rest).map(|(w, v)| w * v).sum();
        *o = sums[0].iter().zip(&sums[1]).map(|(a, b)| a + b).sum::<f32>() + tail;
    }
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
                let want: f64 = row.iter().zip(matrix.row(o)).map(|(a, b)| *a as f64 * *b as f64).sum();
                assert!((many[r * outputs + o] as f64 - want).abs() < 1e-4);
                assert!((one[o] as f64 - want).abs() < 1e-4);
            }
        }
    }
}
