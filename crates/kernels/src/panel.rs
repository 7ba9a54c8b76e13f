//! The inner kernels of weight products: panels of 16 outputs, multiplied as they are read.
//!
//! A panel holds, line by line, the weights of 16 outputs for one input (f32) or for two (bf16 pairs). A sum over inputs
//! therefore runs down a panel with one output to a lane: no sum across lanes, and every byte of weights is used once per
//! group of rows. bf16 is widened in registers, which costs two operations beside the 24 multiplications of six rows.

use pulp::{Simd, WithSimd};

/// Outputs of a panel.
pub(crate) const PANEL: usize = 16;
/// Lines that stay in the first-level cache (20 KiB) while groups of rows pass by, at most.
const DEPTH: usize = 320;
/// The same for one group of rows alone: pairs are read twice, and the memory should not rest meanwhile.
const STREAM_DEPTH: usize = 32;

/// One cache line of a panel: lane `i` belongs to the panel's output `i`.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line<W>(pub(crate) [W; PANEL]);

/// What weights are kept in.
pub(crate) trait Word: Copy + Default + Send + Sync {
    /// Weights in one word: the inputs that a line covers.
    const WEIGHTS: usize;

    /// The word of weights `[WEIGHTS]`, which it must be able to hold.
    fn of(weights: &[f32]) -> Self;

    /// Its weights, in the order of the inputs.
    fn weights(self, into: &mut [f32]);

    /// Weights of the line's input `step`.
    fn widen<S: Simd, const M: usize>(simd: S, line: &Line<Self>, step: usize) -> [S::f32s; M];
}

impl Word for f32 {
    const WEIGHTS: usize = 1;

    fn of(weights: &[f32]) -> Self {
        weights[0]
    }

    fn weights(self, into: &mut [f32]) {
        into[0] = self;
    }

    #[inline(always)]
    fn widen<S: Simd, const M: usize>(_: S, line: &Line<Self>, _: usize) -> [S::f32s; M] {
        std::array::from_fn(|m| S::as_simd_f32s(&line.0).0[m])
    }
}

/// Two bf16 weights, the first in the low half.
impl Word for u32 {
    const WEIGHTS: usize = 2;

    fn of(weights: &[f32]) -> Self {
        (weights[0].to_bits() >> 16) | weights[1].to_bits()
    }

    fn weights(self, into: &mut [f32]) {
        into.copy_from_slice(&[f32::from_bits(self << 16), f32::from_bits(self & 0xffff_0000)]);
    }

    #[inline(always)]
    fn widen<S: Simd, const M: usize>(simd: S, line: &Line<Self>, step: usize) -> [S::f32s; M] {
        std::array::from_fn(|m| {
            let pair = S::as_simd_u32s(&line.0).0[m];
            simd.transmute_f32s_u32s(match step {
                0 => simd.wrapping_dyn_shl_u32s(pair, simd.splat_u32s(16)),
                _ => simd.and_u32s(pair, simd.splat_u32s(0xffff_0000)),
            })
        })
    }
}

/// Where a product goes: rows `stride` apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Out {
    data: *mut f32,
    stride: usize,
}

// SAFETY: threads write disjoint rows or columns.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// `[rows, stride]`.
    pub(crate) fn new(rows: &mut [f32], stride: usize) -> Self {
        Self { data: rows.as_mut_ptr(), stride }
    }

    /// The part that begins at `row` and `column`, which must be inside.
    #[inline(always)]
    pub(crate) fn at(self, row: usize, column: usize) -> Self {
        // SAFETY: inside, as the caller promises.
        Self { data: unsafe { self.data.add(row * self.stride + column) }, ..self }
    }
}

/// `out[rows, columns] = x[rows, inputs] · panelsᵀ`, or added to `out`.
#[derive(Debug)]
pub(crate) struct Product<'a, W> {
    /// Whole panels, one after the other.
    pub(crate) panels: &'a [Line<W>],
    pub(crate) inputs: usize,
    pub(crate) x: &'a [f32],
    pub(crate) out: Out,
    /// Outputs of these panels: all 16 of each but perhaps of the last.
    pub(crate) columns: usize,
    /// Whether the product is added to what `out` holds.
    pub(crate) add: bool,
}

impl<W: Word> WithSimd for Product<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.x.len() / self.inputs, S::F32_LANES) {
            // Several panels at once: one stream does not keep the memory busy, nor one row the multipliers.
            (1, 16) => self.stream::<S, 1, 1, 4>(simd),
            (1, 8) => self.stream::<S, 1, 2, 4>(simd),
            (2, 16) => self.stream::<S, 2, 1, 2>(simd),
            (2, 8) => self.stream::<S, 2, 2, 2>(simd),
            // 32 registers.
            (_, 16) => self.blocks::<S, 12, 1>(simd),
            // 16 registers.
            (_, 8) => self.blocks::<S, 6, 2>(simd),
            (_, 4) => self.blocks::<S, 6, 4>(simd),
            _ => self.blocks::<S, 1, 16>(simd),
        }
    }
}

impl<W: Word> Product<'_, W> {
    /// Lines of a panel.
    fn width(&self) -> usize {
        self.inputs / W::WEIGHTS
    }

    /// `N` rows in all, `P` panels at a time, from their first line to their last.
    #[inline(always)]
    fn stream<S: Simd, const N: usize, const M: usize, const P: usize>(self, simd: S) {
        let count = self.panels.len() / self.width();
        for first in (0..count / P * P).step_by(P) {
            self.panels_at::<S, N, M, P>(simd, first);
        }
        for first in count / P * P..count {
            self.panels_at::<S, N, M, 1>(simd, first);
        }
    }

    #[inline(always)]
    fn panels_at<S: Simd, const N: usize, const M: usize, const P: usize>(&self, simd: S, first: usize) {
        let width = self.width();
        let panels: [&[Line<W>]; P] = std::array::from_fn(|p| &self.panels[(first + p) * width..][..width]);
        let rows: [&[f32]; N] = std::array::from_fn(|n| &self.x[n * self.inputs..][..self.inputs]);
        let mut sums = [[[simd.splat_f32s(0.0); M]; P]; N];
        for at in 0..width {
            for step in 0..W::WEIGHTS {
                for p in 0..P {
                    // SAFETY: every panel was cut to `width` lines.
                    let weights: [_; M] = W::widen(simd, unsafe { panels[p].get_unchecked(at) }, step);
                    for n in 0..N {
                        // SAFETY: every row was cut to the inputs that `width` lines cover.
                        let x = simd.splat_f32s(unsafe { *rows[n].get_unchecked(at * W::WEIGHTS + step) });
                        for m in 0..M {
                            sums[n][p][m] = simd.mul_add_e_f32s(x, weights[m], sums[n][p][m]);
                        }
                    }
                }
            }
        }
        for n in 0..N {
            for p in 0..P {
                let column = (first + p) * PANEL;
                store::<S, M>(simd, sums[n][p], self.out.at(n, column), self.columns - column, self.add);
            }
        }
    }

    /// Groups of up to `N` rows, one block of a panel at a time.
    #[inline(always)]
    fn blocks<S: Simd, const N: usize, const M: usize>(self, simd: S) {
        let (rows, width) = (self.x.len() / self.inputs, self.width());
        // Groups of nearly one size: a few rows cost nearly as much as `N`.
        let groups = rows.div_ceil(N);
        let size = rows.div_ceil(groups);
        let larger = rows - groups * (size - 1);
        let depth = if groups == 1 { STREAM_DEPTH } else { width.div_ceil(width.div_ceil(DEPTH)) };
        for start in (0..width).step_by(depth) {
            let end = width.min(start + depth);
            for (index, panel) in self.panels.chunks_exact(width).enumerate() {
                let column = index * PANEL;
                let next = match self.panels.get((index + 1) * width + start) {
                    Some(line) => line,
                    None => self.panels.as_ptr().wrapping_add(end),
                };
                let mut row = 0;
                for group in 0..groups {
                    let count = if group < larger { size } else { size - 1 };
                    let tile = Tile {
                        lines: &panel[start..end],
                        next,
                        x: &self.x[row * self.inputs..][..count * self.inputs],
                        inputs: self.inputs,
                        first: start * W::WEIGHTS,
                        out: self.out.at(row, column),
                        columns: self.columns - column,
                        add: self.add || start > 0,
                    };
                    tile.of_rows::<S, N, M>(simd, count);
                    row += count;
                }
            }
        }
    }
}

/// One group of rows and one block of a panel.
struct Tile<'a, W> {
    lines: &'a [Line<W>],
    /// The block after this one, to be asked for while this one is multiplied.
    next: *const Line<W>,
    /// Whole rows.
    x: &'a [f32],
    inputs: usize,
    /// Input of the first line.
    first: usize,
    out: Out,
    columns: usize,
    add: bool,
}

impl<W: Word> Tile<'_, W> {
    #[inline(always)]
    fn of_rows<S: Simd, const N: usize, const M: usize>(self, simd: S, rows: usize) {
        macro_rules! one_of {
            ($($count:literal)*) => {
                match rows {
                    $($count if $count <= N => self.run::<S, $count, M>(simd),)*
                    _ => unreachable!("a group has 1..={N} rows"),
                }
            };
        }
        if N == 12 { one_of!(1 2 3 4 5 6 7 8 9 10 11 12) } else { one_of!(1 2 3 4 5 6) }
    }

    #[inline(always)]
    fn run<S: Simd, const N: usize, const M: usize>(self, simd: S) {
        let Self { lines, next, x, inputs, first, .. } = self;
        assert!(x.len() == N * inputs && first + lines.len() * W::WEIGHTS <= inputs);
        // SAFETY: N rows, as asserted.
        let rows: [*const f32; N] = std::array::from_fn(|n| unsafe { x.as_ptr().add(n * inputs + first) });
        let mut sums = [[simd.splat_f32s(0.0); M]; N];
        // First inputs of all pairs, then second ones: both kinds of weights at once do not fit the registers.
        for step in 0..W::WEIGHTS {
            for (at, line) in lines.iter().enumerate() {
                if step == 0 {
                    prefetch(next.wrapping_add(at));
                }
                let weights: [_; M] = W::widen(simd, line, step);
                for n in 0..N {
                    // SAFETY: these lines' inputs are inside a row, as asserted.
                    let x = simd.splat_f32s(unsafe { *rows[n].add(at * W::WEIGHTS + step) });
                    for m in 0..M {
                        sums[n][m] = simd.mul_add_e_f32s(x, weights[m], sums[n][m]);
                    }
                }
            }
        }
        for n in 0..N {
            store::<S, M>(simd, sums[n], self.out.at(n, 0), self.columns, self.add);
        }
    }
}

/// Writes or adds the first `columns` of a row's 16 sums.
#[inline(always)]
fn store<S: Simd, const M: usize>(simd: S, sums: [S::f32s; M], out: Out, columns: usize, add: bool) {
    if columns >= PANEL {
        // SAFETY: `out` has as many columns from here on.
        let out = unsafe { std::slice::from_raw_parts_mut(out.data, PANEL) };
        let (out, _) = S::as_mut_simd_f32s(out);
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = if add { simd.add_f32s(*out, sum) } else { sum };
        }
    } else {
        let mut line = [0.0; PANEL];
        S::as_mut_simd_f32s(&mut line).0.copy_from_slice(&sums);
        // SAFETY: as above.
        let out = unsafe { std::slice::from_raw_parts_mut(out.data, columns) };
        for (out, sum) in out.iter_mut().zip(line) {
            *out = if add { *out + sum } else { sum };
        }
    }
}

/// Asks for a line that is needed soon. The processor's own prefetching does not see where the next block lies.
#[inline(always)]
fn prefetch<W>(line: *const Line<W>) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, harmless for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}
