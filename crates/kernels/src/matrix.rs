//! Weight matrices and the two products a decoder needs: many rows (GEMM) and few rows (memory-bound).
//!
//! Decoding reads every weight once per token, so bytes per weight are its speed. Published checkpoints are bf16:
//! weights that bf16 holds exactly are kept in it, which changes no result, and all others in f32.

use crate::simd::widest;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::cell::RefCell;

/// Rows up to which every weight is multiplied as it is read, instead of being packed for a GEMM first.
const FEW: usize = 4;
/// Outputs that one thread takes at a time where weights are multiplied as they are read.
const BLOCK: usize = 64;
/// Weights below which splitting over threads costs more than it gains.
const PARALLEL: usize = 1 << 16;

thread_local! {
    /// A block of weights in f32, for the GEMM.
    static WIDENED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// Inputs in the order of bf16 pairs: the first of each pair, then the second.
    static SPLIT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A weight matrix `[out, in]`, row-major, as in a checkpoint: `project` computes `x · Wᵀ`.
#[derive(Clone, Debug)]
pub struct Matrix {
    weights: Weights,
    outputs: usize,
    inputs: usize,
}

#[derive(Clone, Debug)]
enum Weights {
    F32(Vec<f32>),
    /// Two to a word, the first in its low half.
    Bf16(Vec<u32>),
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
            let word = |pair: &[f32]| (pair[0].to_bits() >> 16) | pair[1].to_bits();
            Weights::Bf16(data.par_chunks_exact(2).map(word).collect())
        } else {
            Weights::F32(data)
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

    /// Bytes of the weights in memory.
    pub fn bytes(&self) -> usize {
        match &self.weights {
            Weights::F32(values) => size_of_val(&values[..]),
            Weights::Bf16(words) => size_of_val(&words[..]),
        }
    }

    /// Copies one row of weights: of an embedding table, the embedding of token `index`.
    pub fn row_into(&self, index: usize, out: &mut [f32]) {
        match &self.weights {
            Weights::F32(values) => {
                out.copy_from_slice(&values[index * self.inputs..(index + 1) * self.inputs])
            }
            Weights::Bf16(words) => {
                let width = self.inputs / 2;
                widen(&words[index * width..(index + 1) * width], out);
            }
        }
    }

    /// `out[rows, outputs] = x[rows, inputs] · Wᵀ`.
    pub fn project(&self, x: &[f32], out: &mut [f32]) {
        let rows = x.len() / self.inputs;
        assert!(x.len() == rows * self.inputs && out.len() == rows * self.outputs);
        match (&self.weights, rows) {
            (_, 0) => {}
            (Weights::F32(values), 1..=FEW) => self.project_few(values, rows, x, out),
            (Weights::Bf16(words), 1..=FEW) => {
                // Taken, not borrowed: a thread that waits for others may come by here again.
                let mut split = SPLIT.take();
                split.clear();
                for row in x.chunks_exact(self.inputs) {
                    split.extend(row.iter().step_by(2));
                    split.extend(row.iter().skip(1).step_by(2));
                }
                self.project_few(words, rows, &split, out);
                SPLIT.set(split);
            }
            (Weights::F32(values), _) => {
                let out = Out { data: out.as_mut_ptr(), stride: self.outputs };
                multiply(
                    rows,
                    x,
                    self.inputs,
                    values,
                    out,
                    gemm::Parallelism::Rayon(rayon::current_num_threads()),
                );
            }
            (Weights::Bf16(words), _) => self.project_widened(rows, x, words, out),
        }
    }

    /// Blocks of weights are widened to f32 and multiplied, one block per thread at a time.
    fn project_widened(&self, rows: usize, x: &[f32], words: &[u32], out: &mut [f32]) {
        let blocks = 2 * rayon::current_num_threads();
        let block = self.outputs.div_ceil(blocks).next_multiple_of(BLOCK);
        let out = Out { data: out.as_mut_ptr(), stride: self.outputs };
        words.par_chunks(block * self.inputs / 2).enumerate().for_each(|(index, words)| {
            WIDENED.with_borrow_mut(|weights| {
                weights.resize(2 * words.len(), 0.0);
                widen(words, weights);
                multiply(rows, x, self.inputs, weights, out.columns(index * block), gemm::Parallelism::None);
            });
        });
    }

    /// A few rows read every weight once and hardly reuse it: split the outputs over threads and stream.
    fn project_few<W: Word>(&self, words: &[W], rows: usize, x: &[f32], out: &mut [f32]) {
        let arch = widest();
        let (inputs, outputs) = (self.inputs, self.outputs);
        let width = inputs / W::WEIGHTS;
        let shared = Out { data: out.as_mut_ptr(), stride: outputs };
        let block = |index: usize| {
            let first = index * BLOCK;
            let count = BLOCK.min(outputs - first);
            let own = shared.columns(first);
            let words = &words[first * width..(first + count) * width];
            for row in 0..rows {
                let x = &x[row * inputs..(row + 1) * inputs];
                // SAFETY: blocks are disjoint columns of rows that `out` has, as asserted in `project`.
                let out = unsafe { std::slice::from_raw_parts_mut(own.data.add(row * own.stride), count) };
                arch.dispatch(Dots { words, x, out });
            }
        };
        let blocks = outputs.div_ceil(BLOCK);
        if inputs * outputs < PARALLEL {
            (0..blocks).for_each(block);
        } else {
            (0..blocks).into_par_iter().for_each(block);
        }
    }
}

/// Where a product goes: rows `stride` apart.
#[derive(Clone, Copy)]
struct Out {
    data: *mut f32,
    stride: usize,
}

// SAFETY: threads write disjoint columns.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// The same rows from a later column on.
    fn columns(self, first: usize) -> Self {
        // SAFETY: `first` is less than the stride, and there is a row at least.
        Self { data: unsafe { self.data.add(first) }, ..self }
    }
}

/// `out[rows, weights / inputs] = x[rows, inputs] · weightsᵀ`.
fn multiply(rows: usize, x: &[f32], inputs: usize, weights: &[f32], out: Out, threads: gemm::Parallelism) {
    debug_assert!(x.len() == rows * inputs && weights.len().is_multiple_of(inputs));
    // SAFETY: lengths as asserted, strides are theirs; `out` has these columns in as many rows and is not read.
    unsafe {
        gemm::gemm(
            rows,
            weights.len() / inputs,
            inputs,
            out.data,
            1,
            out.stride as isize,
            false,
            x.as_ptr(),
            1,
            inputs as isize,
            weights.as_ptr(),
            inputs as isize,
            1,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            threads,
        );
    }
}

/// bf16 pairs as f32, in order.
fn widen(words: &[u32], out: &mut [f32]) {
    struct Widen<'a>(&'a [u32], &'a mut [f32]);
    impl WithSimd for Widen<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            let (pairs, _) = self.1.as_chunks_mut::<2>();
            for (pair, word) in pairs.iter_mut().zip(self.0) {
                *pair = [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
            }
        }
    }
    widest().dispatch(Widen(words, out));
}

/// How weights lie in memory.
trait Word: Copy + Sync {
    /// Weights in one word.
    const WEIGHTS: usize;

    /// Products of `N` rows of words with `x`.
    fn dots<S: Simd, const N: usize>(simd: S, rows: &[Self], x: &[f32]) -> [f32; N];
}

/// `out[i] = words[i] · x`.
struct Dots<'a, W> {
    words: &'a [W],
    /// In the order that the words want.
    x: &'a [f32],
    out: &'a mut [f32],
}

impl<W: Word> WithSimd for Dots<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { words, x, out } = self;
        let width = x.len() / W::WEIGHTS;
        let mut rows = words.chunks_exact(4 * width);
        let mut outs = out.chunks_exact_mut(4);
        // Four streams of weights: one alone does not keep the memory busy.
        for (rows, out) in rows.by_ref().zip(outs.by_ref()) {
            out.copy_from_slice(&W::dots::<S, 4>(simd, rows, x));
        }
        for (row, out) in rows.remainder().chunks_exact(width).zip(outs.into_remainder()) {
            [*out] = W::dots::<S, 1>(simd, row, x);
        }
    }
}

/// Plain weights.
impl Word for f32 {
    const WEIGHTS: usize = 1;

    #[inline(always)]
    fn dots<S: Simd, const N: usize>(simd: S, rows: &[Self], x: &[f32]) -> [f32; N] {
        let rows: [&[f32]; N] = std::array::from_fn(|i| &rows[i * x.len()..(i + 1) * x.len()]);
        let (vectors, rest) = S::as_simd_f32s(x);
        let row_vectors: [&[S::f32s]; N] =
            std::array::from_fn(|i| &S::as_simd_f32s(rows[i]).0[..vectors.len()]);
        let mut sums = [[simd.splat_f32s(0.0); 2]; N];
        let (pairs, odd) = vectors.as_chunks::<2>();
        for (pair, x) in pairs.iter().enumerate() {
            for half in 0..2 {
                for i in 0..N {
                    // SAFETY: every row was cut to the length of these vectors.
                    let weights = unsafe { *row_vectors[i].get_unchecked(2 * pair + half) };
                    sums[i][half] = simd.mul_add_e_f32s(x[half], weights, sums[i][half]);
                }
            }
        }
        if let [x] = odd {
            for i in 0..N {
                sums[i][0] = simd.mul_add_e_f32s(*x, row_vectors[i][vectors.len() - 1], sums[i][0]);
            }
        }
        let mut dots = sums.map(|[a, b]| simd.reduce_sum_f32s(simd.add_f32s(a, b)));
        let whole = x.len() - rest.len();
        for (dot, row) in dots.iter_mut().zip(rows) {
            *dot += row[whole..].iter().zip(rest).map(|(w, v)| w * v).sum::<f32>();
        }
        dots
    }
}

/// Two bf16 weights; `x` is split as [`SPLIT`] says.
impl Word for u32 {
    const WEIGHTS: usize = 2;

    #[inline(always)]
    fn dots<S: Simd, const N: usize>(simd: S, words: &[Self], x: &[f32]) -> [f32; N] {
        let width = x.len() / 2;
        let (first, second) = x.split_at(width);
        let (first_vectors, first_rest) = S::as_simd_f32s(first);
        let (second_vectors, second_rest) = S::as_simd_f32s(&second[..width]);
        let rows: [&[u32]; N] = std::array::from_fn(|i| &words[i * width..(i + 1) * width]);
        let vectors: [&[S::u32s]; N] =
            std::array::from_fn(|i| &S::as_simd_u32s(rows[i]).0[..first_vectors.len()]);
        let (shift, mask) = (simd.splat_u32s(16), simd.splat_u32s(0xffff_0000));
        let mut sums = [[simd.splat_f32s(0.0); 2]; N];
        for (at, (first, second)) in first_vectors.iter().zip(second_vectors).enumerate() {
            for i in 0..N {
                // SAFETY: every row was cut to the length of these vectors.
                let pair = unsafe { *vectors[i].get_unchecked(at) };
                let low = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(pair, shift));
                let high = simd.transmute_f32s_u32s(simd.and_u32s(pair, mask));
                sums[i][0] = simd.mul_add_e_f32s(low, *first, sums[i][0]);
                sums[i][1] = simd.mul_add_e_f32s(high, *second, sums[i][1]);
            }
        }
        let mut dots = sums.map(|[a, b]| simd.reduce_sum_f32s(simd.add_f32s(a, b)));
        let whole = width - first_rest.len();
        for (dot, row) in dots.iter_mut().zip(rows) {
            for (word, (a, b)) in row[whole..].iter().zip(first_rest.iter().zip(second_rest)) {
                *dot += f32::from_bits(word << 16) * a + f32::from_bits(word & 0xffff_0000) * b;
            }
        }
        dots
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

    #[test]
    fn few_rows_and_many_rows_give_the_plain_product_whatever_the_weights_are_kept_in() {
        for (inputs, outputs, exact) in [(83, 130, false), (84, 130, true), (150, 67, true), (64, 1100, true)]
        {
            let weights: Vec<f32> = (0..inputs * outputs).map(value).collect();
            let weights: Vec<f32> = weights.into_iter().map(|v| if exact { bf16(v) } else { v }).collect();
            let matrix = Matrix::new(weights.clone(), outputs, inputs);
            assert_eq!(matrix.bytes(), weights.len() * if exact { 2 } else { 4 });
            for rows in [1, 3, 5, 33] {
                let x: Vec<f32> = (0..rows * inputs).map(|i| value(i + 7)).collect();
                let mut got = vec![f32::NAN; rows * outputs];
                matrix.project(&x, &mut got);
                for (i, got) in got.iter().enumerate() {
                    let (row, output) = (&x[i / outputs * inputs..], &weights[i % outputs * inputs..]);
                    let pairs = row[..inputs].iter().zip(&output[..inputs]);
                    let want: f64 = pairs.map(|(a, b)| *a as f64 * *b as f64).sum();
                    assert!((*got as f64 - want).abs() < 1e-4, "{inputs} {outputs} {rows}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn weights_that_bf16_cannot_hold_stay_as_they_are() {
        let mut weights: Vec<f32> = (0..6).map(|i| i as f32).collect();
        weights[4] = f32::from_bits(0x3f80_0001);
        let matrix = Matrix::new(weights.clone(), 3, 2);
        let mut row = [0.0; 2];
        matrix.row_into(2, &mut row);
        assert_eq!((&row[..], matrix.bytes()), (&weights[4..], 24));
        weights[4] = 1.5;
        let matrix = Matrix::new(weights, 3, 2);
        matrix.row_into(2, &mut row);
        assert_eq!((row, matrix.bytes()), ([1.5, 5.0], 12));
    }
}
