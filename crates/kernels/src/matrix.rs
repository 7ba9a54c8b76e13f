//! Weight matrices and the product that a decoder needs: rows of activations with every output's weights.
//!
//! Decoding reads every weight once per step, so bytes per weight are its speed. Published checkpoints are bf16:
//! weights that bf16 holds exactly are kept in it, which changes no result, and all others in f32. Weights are laid out
//! once, when they are loaded, in the order in which products of one row and of thousands read them.

use crate::panel::{Line, Out, PANEL, Product, Word};
use crate::simd::widest;
use rayon::prelude::*;

/// Rows whose activations stay in the second-level cache while a thread's panels pass by; a multiple of every group of
/// rows that the kernels take.
const ROWS: usize = 96;
const GROUPS: usize = 12;
/// Panels that one thread takes at a time, at least (so many are read side by side) and at most.
const FEW_PANELS: usize = 4;
const MANY_PANELS: usize = 32;
/// Multiplications below which splitting over threads costs more than it gains.
const PARALLEL: usize = 1 << 16;

/// A weight matrix `[out, in]` as in a checkpoint: `project` computes `x · Wᵀ`.
#[derive(Clone, Debug)]
pub struct Matrix {
    weights: Weights,
    outputs: usize,
    inputs: usize,
}

#[derive(Clone, Debug)]
enum Weights {
    F32(Vec<Line<f32>>),
    Bf16(Vec<Line<u32>>),
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
        let exact = inputs.is_multiple_of(2) && data.par_iter().all(|value| value.to_bits() & 0xffff == 0);
        let weights = if exact {
            Weights::Bf16(panels(&data, outputs, inputs))
        } else {
            Weights::F32(panels(&data, outputs, inputs))
        };
        Self { weights, outputs, inputs }
    }

    /// Width of a projected row.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Width of a row before projection.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes of the weights in memory; outputs are padded to a multiple of 16.
    pub fn bytes(&self) -> usize {
        match &self.weights {
            Weights::F32(lines) => size_of_val(&lines[..]),
            Weights::Bf16(lines) => size_of_val(&lines[..]),
        }
    }

    /// Copies one row of weights: of an embedding table, the embedding of token `index`.
    ///
    /// # Panics
    /// When there is no such row, or `out` is not as wide as one.
    pub fn row_into(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.outputs && out.len() == self.inputs);
        match &self.weights {
            Weights::F32(lines) => copy_row(lines, index, out),
            Weights::Bf16(lines) => copy_row(lines, index, out),
        }
    }

    /// `out[rows, outputs] = x[rows, inputs] · Wᵀ`.
    ///
    /// # Panics
    /// When `x` and `out` are not as many rows of these widths.
    pub fn project(&self, x: &[f32], out: &mut [f32]) {
        self.multiply(x, out, false);
    }

    /// `out[rows, outputs] += x[rows, inputs] · Wᵀ`: a projection back onto the residual stream, which spares a pass over
    /// it.
    ///
    /// # Panics
    /// As [`project`](Self::project).
    pub fn project_add(&self, x: &[f32], out: &mut [f32]) {
        self.multiply(x, out, true);
    }

    fn multiply(&self, x: &[f32], out: &mut [f32], add: bool) {
        let rows = x.len() / self.inputs;
        assert!(x.len() == rows * self.inputs && out.len() == rows * self.outputs);
        match &self.weights {
            _ if rows == 0 => {}
            Weights::F32(lines) => self.split(lines, rows, x, out, add),
            Weights::Bf16(lines) => self.split(lines, rows, x, out, add),
        }
    }

    /// Each task is a block of rows and a range of panels; what follows another shares its rows.
    fn split<W: Word>(&self, lines: &[Line<W>], rows: usize, x: &[f32], out: &mut [f32], add: bool) {
        let Self { inputs, outputs, .. } = *self;
        let width = inputs / W::WEIGHTS;
        let block = rows.div_ceil(rows.div_ceil(ROWS)).next_multiple_of(GROUPS);
        let share = outputs.div_ceil(PANEL) / (4 * rayon::current_num_threads());
        let share = share.next_multiple_of(FEW_PANELS).clamp(FEW_PANELS, MANY_PANELS);
        let ranges = outputs.div_ceil(share * PANEL);
        let (arch, out) = (widest(), Out::new(out, outputs));
        let task = |index: usize| {
            let (row, column) = (index / ranges * block, index % ranges * share * PANEL);
            let panels = &lines[column / PANEL * width..];
            arch.dispatch(Product {
                panels: &panels[..panels.len().min(share * width)],
                inputs,
                x: &x[row * inputs..rows.min(row + block) * inputs],
                out: out.at(row, column),
                columns: (outputs - column).min(share * PANEL),
                add,
            });
        };
        let tasks = 0..rows.div_ceil(block) * ranges;
        if rows * inputs * outputs < PARALLEL {
            tasks.for_each(task);
        } else {
            tasks.into_par_iter().for_each(task);
        }
    }
}

/// Row-major `[outputs, inputs]` as panels; what pads the last one is zero.
fn panels<W: Word>(data: &[f32], outputs: usize, inputs: usize) -> Vec<Line<W>> {
    let width = inputs / W::WEIGHTS;
    let line = |index: usize| {
        let (first, input) = (index / width * PANEL, index % width * W::WEIGHTS);
        Line(std::array::from_fn(|lane| match first + lane {
            output if output < outputs => W::of(&data[output * inputs + input..][..W::WEIGHTS]),
            _ => W::default(),
        }))
    };
    (0..outputs.div_ceil(PANEL) * width).into_par_iter().map(line).collect()
}

fn copy_row<W: Word>(lines: &[Line<W>], index: usize, out: &mut [f32]) {
    let panel = &lines[index / PANEL * (out.len() / W::WEIGHTS)..];
    for (line, into) in panel.iter().zip(out.chunks_exact_mut(W::WEIGHTS)) {
        line.0[index % PANEL].weights(into);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize) -> f32 {
        ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0
    }

    fn bf16(value: f32) -> f32 {
        f32::from_bits(value.to_bits() & 0xffff_0000)
    }

    fn weights(outputs: usize, inputs: usize, exact: bool) -> Vec<f32> {
        (0..inputs * outputs).map(value).map(|v| if exact { bf16(v) } else { v }).collect()
    }

    /// Row by row and output by output, in f64.
    fn plain(x: &[f32], weights: &[f32], inputs: usize) -> Vec<f64> {
        let dot = |row: &[f32], output: &[f32]| -> f64 {
            row.iter().zip(output).map(|(a, b)| *a as f64 * *b as f64).sum()
        };
        x.chunks_exact(inputs)
            .flat_map(|row| weights.chunks_exact(inputs).map(move |output| dot(row, output)))
            .collect()
    }

    fn assert_close(got: &[f32], want: &[f64], what: &str) {
        assert_eq!(got.len(), want.len(), "{what}");
        for (got, want) in got.iter().zip(want) {
            let close = 1e-4 * want.abs().max(1.0);
            assert!((*got as f64 - want).abs() < close, "{what}: {got}, want {want}");
        }
    }

    #[test]
    fn any_number_of_rows_gives_the_plain_product_whatever_the_weights_are_kept_in() {
        // Odd inputs, more inputs than one block of either depth, outputs that end in a panel's middle or fill it.
        for (inputs, outputs, exact) in [
            (83, 130, false),
            (84, 130, true),
            (150, 67, true),
            (1500, 33, true),
            (700, 80, false),
            (2, 5, true),
        ] {
            let weights = weights(outputs, inputs, exact);
            let matrix = Matrix::new(weights.clone(), outputs, inputs);
            for rows in (1..=40).chain([97, 200]) {
                let x: Vec<f32> = (0..rows * inputs).map(|i| value(i + 7)).collect();
                let mut got = vec![f32::NAN; rows * outputs];
                matrix.project(&x, &mut got);
                let what = format!("{rows} rows of [{outputs}, {inputs}]");
                assert_close(&got, &plain(&x, &weights, inputs), &what);
            }
        }
    }

    #[test]
    fn a_wide_matrix_split_over_threads_gives_the_plain_product() {
        let (inputs, outputs) = (64, 1100);
        let weights = weights(outputs, inputs, true);
        let matrix = Matrix::new(weights.clone(), outputs, inputs);
        for rows in [1, 2, 5, 33] {
            let x: Vec<f32> = (0..rows * inputs).map(|i| value(i + 7)).collect();
            let mut got = vec![f32::NAN; rows * outputs];
            matrix.project(&x, &mut got);
            assert_close(&got, &plain(&x, &weights, inputs), &format!("{rows} rows"));
        }
    }

    #[test]
    fn a_product_can_be_added_to_what_is_there() {
        let (inputs, outputs) = (530, 37);
        let weights = weights(outputs, inputs, true);
        let matrix = Matrix::new(weights.clone(), outputs, inputs);
        for rows in [1, 2, 4, 13] {
            let x: Vec<f32> = (0..rows * inputs).map(|i| value(i + 7)).collect();
            let before: Vec<f32> = (0..rows * outputs).map(value).collect();
            let mut got = before.clone();
            matrix.project_add(&x, &mut got);
            let product = plain(&x, &weights, inputs);
            let want: Vec<f64> = product.iter().zip(before).map(|(p, b)| p + b as f64).collect();
            assert_close(&got, &want, &format!("{rows} rows"));
        }
    }

    #[test]
    fn no_rows_project_to_none() {
        Matrix::new(vec![1.0; 6], 3, 2).project(&[], &mut []);
    }

    #[test]
    fn weights_that_bf16_cannot_hold_stay_as_they_are() {
        let mut weights: Vec<f32> = (0..64).map(|i| i as f32).collect();
        weights[9] = f32::from_bits(0x3f80_0001);
        let matrix = Matrix::new(weights.clone(), 32, 2);
        let mut row = [0.0; 2];
        matrix.row_into(4, &mut row);
        assert_eq!((&row[..], matrix.bytes()), (&weights[8..10], 256));
        weights[9] = 1.5;
        let matrix = Matrix::new(weights, 32, 2);
        matrix.row_into(4, &mut row);
        assert_eq!((row, matrix.bytes()), ([8.0, 1.5], 128));
    }

    #[test]
    fn every_row_of_weights_can_be_copied_out() {
        for (outputs, inputs, exact) in [(35, 7, false), (35, 8, true), (16, 2, true)] {
            let weights = weights(outputs, inputs, exact);
            let matrix = Matrix::new(weights.clone(), outputs, inputs);
            let mut row = vec![f32::NAN; inputs];
            for (index, want) in weights.chunks_exact(inputs).enumerate() {
                matrix.row_into(index, &mut row);
                assert_eq!(row, want);
            }
        }
    }
}
