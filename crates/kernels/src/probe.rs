//! Where rows look: attention probabilities reduced over heads and rows, in the sweep that attends (kernel *probe*).
//!
//! A probability needs the total over all columns, which is known when the sweep ends. So the sweep keeps its weights,
//! each under the peak its tile was computed with, and they are scaled where they are reduced: neither are scores
//! computed twice, nor are weights read more than once.

use crate::attend::{BLOCK, Queries, Split, attend_rows, merge, whole, with_scratch};
use crate::inner::{vectors, vectors_mut};
use crate::page::{LayerView, PAGE_TOKENS};
use crate::simd::widest;
use crate::tile::{Into, Kept, Sweep, TILE_PAGES, group_of, with_registers};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::cell::Cell;

/// Most weights that are kept at the same time (8 MiB): rows beyond that are looked at after one another.
const WEIGHTS: usize = 2 << 20;

thread_local! {
    static KEPT: Cell<[Vec<f32>; 3]> = const { Cell::new([const { Vec::new() }; 3]) };
}

/// How several probabilities of one column become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their mean.
    Mean,
    /// Their largest.
    Max,
}

impl Reduce {
    /// Adds a value to a running reduction that began with zero; see [`finish`](Self::finish).
    pub fn fold(self, into: &mut f32, value: f32) {
        match self {
            Self::Mean => *into += value,
            Self::Max => *into = into.max(value),
        }
    }

    /// Completes a reduction over `count` values.
    pub fn finish(self, values: &mut [f32], count: usize) {
        if self == Self::Mean {
            let scale = 1.0 / count.max(1) as f32;
            values.iter_mut().for_each(|v| *v *= scale);
        }
    }
}

/// What is reported of a pass's attention.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// First row that is looked at; rows before it only attend.
    pub first: usize,
    /// Columns reported, from 0.
    pub columns: usize,
    /// Reduction over heads.
    pub heads: Reduce,
    /// Reduction over rows, if any.
    pub rows: Option<Reduce>,
}

/// Attends every row, as [`attend_rows`], and reports the probabilities that rows `look.first ..` attended with: reduced
/// over heads, then (where the look says how) over rows: `[columns]`, else `[rows looked at, columns]`. Columns a row
/// does not see count as zero for it.
///
/// # Panics
/// As [`attend_rows`], or when there are fewer than `look.first` rows.
pub fn attend_and_look(view: &LayerView<'_>, queries: Queries<'_>, look: Look, out: &mut [f32]) -> Vec<f32> {
    let (before, out) = out.split_at_mut(look.first * queries.heads * view.shape.head_dim);
    attend_rows(view, queries.rows(0..look.first), before);
    look_at_all(view, queries, look, Some(out))
}

/// As [`probe_rows`], then reduced over rows: `[columns]`.
pub fn probe(
    view: &LayerView<'_>,
    queries: Queries<'_>,
    columns: usize,
    heads: Reduce,
    rows: Reduce,
) -> Vec<f32> {
    look_at_all(view, queries, Look { first: 0, columns, heads, rows: Some(rows) }, None)
}

/// As [`attend_and_look`] at all rows, where nobody needs what they attend to: `[rows, columns]`, reduced over heads.
pub fn probe_rows(view: &LayerView<'_>, queries: Queries<'_>, columns: usize, heads: Reduce) -> Vec<f32> {
    look_at_all(view, queries, Look { first: 0, columns, heads, rows: None }, None)
}

/// `out` is of the rows looked at.
fn look_at_all(
    view: &LayerView<'_>,
    queries: Queries<'_>,
    look: Look,
    mut out: Option<&mut [f32]>,
) -> Vec<f32> {
    let width = queries.heads * view.shape.head_dim;
    let queries = queries.rows(look.first..queries.positions.len());
    let rows = queries.positions.len();
    let mut result = vec![0.0; if look.rows.is_some() { 1 } else { rows } * look.columns];
    let together = WEIGHTS / (queries.heads * queries.pages().max(1) * PAGE_TOKENS);
    let together = together.min(BLOCK * view.shape.kv_heads / queries.heads).max(1);
    let mut per_row = vec![0.0; if look.rows.is_some() { together.min(rows) * look.columns } else { 0 }];
    let mut buffers = KEPT.take();
    for start in (0..rows).step_by(together) {
        let range = start..(start + together).min(rows);
        let out = out.as_deref_mut().map(|out| &mut out[range.start * width..range.end * width]);
        let queries = queries.rows(range.clone());
        match look.rows {
            None => look_at(view, queries, look, out, &mut result[start * look.columns..], &mut buffers),
            Some(reduce) => {
                let per_row = &mut per_row[..range.len() * look.columns];
                per_row.fill(0.0);
                look_at(view, queries, look, out, per_row, &mut buffers);
                for row in per_row.chunks_exact(look.columns.max(1)) {
                    result.iter_mut().zip(row).for_each(|(into, &value)| reduce.fold(into, value));
                }
            }
        }
    }
    KEPT.set(buffers);
    if let Some(reduce) = look.rows {
        reduce.finish(&mut result, rows);
    }
    result
}

/// One block of rows: its attention, and its probabilities `[rows, columns]`, reduced over heads, into zeros.
fn look_at(
    view: &LayerView<'_>,
    queries: Queries<'_>,
    look: Look,
    mut out: Option<&mut [f32]>,
    per_row: &mut [f32],
    buffers: &mut [Vec<f32>; 3],
) {
    let (shape, rows, pages) = (view.shape, queries.positions.len(), queries.pages());
    let (group, width) = (queries.heads / shape.kv_heads, queries.heads * shape.head_dim);
    let count = rows * group;
    let arch = widest();
    // With those that fill its last group.
    let padded = arch.dispatch(Padded(count));
    let split = Split::new(std::iter::once(pages), shape.kv_heads);
    let each = split.each(pages);
    // Of one head and range.
    let sizes =
        [count * (shape.head_dim + 2), padded * PAGE_TOKENS * each, padded * each.div_ceil(TILE_PAGES)];
    let units = shape.kv_heads * split.parts;
    for (buffer, size) in buffers.iter_mut().zip(sizes) {
        if buffer.len() < units * size {
            buffer.resize(units * size, 0.0);
        }
    }
    let [parts, weights, peaks] = buffers;
    let parts = &mut parts[..units * sizes[0]];
    let of_unit = parts.par_chunks_mut(sizes[0]).zip(weights.par_chunks_mut(sizes[1]));
    of_unit.zip(peaks.par_chunks_mut(sizes[2])).enumerate().for_each(|(unit, ((part, weights), peaks))| {
        let (_, head, range) = split.unit(unit, shape.kv_heads);
        let pages = split.range(pages, range);
        if !pages.is_empty() {
            with_scratch(|scratch| {
                let block = queries.block(view, 0..rows, head, scratch);
                let kept = Some(Kept { weights, peaks });
                let into = if out.is_some() { Into::Part(part) } else { Into::Totals(part) };
                arch.dispatch(Sweep { block, pages, into, kept });
            });
        }
    });
    let ranges = split.ranges(pages);
    for (head, parts) in parts.chunks_exact(split.parts * sizes[0]).enumerate() {
        let Some(out) = &mut out else { break };
        let out = &mut out[head * group * shape.head_dim..];
        merge(&parts[..ranges * sizes[0]], sizes[0], shape.head_dim, group, out, width);
    }
    if look.columns > 0 {
        per_row.par_chunks_mut(look.columns).take(rows).enumerate().for_each(|(row, out)| {
            let position = queries.positions[row] as usize;
            for head in 0..shape.kv_heads {
                let at = |size: usize| head * split.parts * size..;
                let (parts, weights) = (&parts[at(sizes[0])], &weights[at(sizes[1])]);
                let (dim, first) = (shape.head_dim, row * group);
                arch.dispatch(Gather {
                    split,
                    sizes,
                    pages,
                    count,
                    dim,
                    first,
                    position,
                    parts,
                    weights,
                    peaks: &peaks[at(sizes[2])],
                    heads: look.heads,
                    group,
                    out,
                });
            }
            look.heads.finish(out, queries.heads);
        });
    }
}

/// How many queries the groups of `.0` queries have room for.
struct Padded(usize);

impl WithSimd for Padded {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        self.0.next_multiple_of(group_of::<S>(self.0))
    }
}

/// Adds the probabilities of one row's queries of one KV head to `out` `[columns]`.
struct Gather<'a> {
    split: Split,
    /// Floats per range in `parts`, `weights` and `peaks`.
    sizes: [usize; 3],
    /// Pages that the block sees.
    pages: usize,
    /// Queries of the block.
    count: usize,
    dim: usize,
    /// The row's first query and how many there are.
    first: usize,
    group: usize,
    position: usize,
    parts: &'a [f32],
    weights: &'a [f32],
    peaks: &'a [f32],
    heads: Reduce,
    out: &'a mut [f32],
}

impl WithSimd for Gather<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        with_registers!(S, self.count, self, run(simd))
    }
}

impl Gather<'_> {
    #[inline(always)]
    fn run<S: Simd, const N: usize, const M: usize>(self, simd: S) {
        let Self { split, sizes, pages, dim, .. } = self;
        // Columns that are both seen and reported.
        let columns = self.out.len().min(self.position + 1);
        for query in self.first..self.first + self.group {
            let totals = self.parts.chunks(sizes[0]).take(split.ranges(pages));
            let totals =
                totals.map(|part| (part[query * (dim + 2) + dim], part[query * (dim + 2) + dim + 1]));
            let (peak, scale) = whole(totals);
            for range in 0..split.ranges(pages) {
                let (weights, peaks) = (&self.weights[range * sizes[1]..], &self.peaks[range * sizes[2]..]);
                let range = split.range(pages, range);
                let (g, i, tiles) = (query / N, query % N, range.len().div_ceil(TILE_PAGES));
                let mut factor = 0.0;
                for (slot, page) in
                    range.clone().enumerate().take_while(|(_, page)| page * PAGE_TOKENS < columns)
                {
                    if slot % TILE_PAGES == 0 {
                        factor = (peaks[(g * tiles + slot / TILE_PAGES) * N + i] - peak).exp2() * scale;
                    }
                    let from = ((g * range.len() + slot) * N + i) * PAGE_TOKENS;
                    let (weights, _) = weights[from..from + PAGE_TOKENS].as_chunks::<PAGE_TOKENS>();
                    let to = page * PAGE_TOKENS;
                    let end = self.out.len().min(to + PAGE_TOKENS);
                    match self.out[to..end].as_chunks_mut::<PAGE_TOKENS>() {
                        ([out], _) => {
                            let (out, weights) = (vectors_mut::<S, M>(out), vectors::<S, M>(&weights[0]));
                            let factors = simd.splat_f32s(factor);
                            for m in 0..M {
                                out[m] = match self.heads {
                                    Reduce::Mean => simd.mul_add_e_f32s(weights[m], factors, out[m]),
                                    Reduce::Max => simd.max_f32s(simd.mul_f32s(weights[m], factors), out[m]),
                                };
                            }
                        }
                        (_, out) => out
                            .iter_mut()
                            .zip(weights[0])
                            .for_each(|(into, weight)| self.heads.fold(into, weight * factor)),
                    }
                }
            }
        }
    }
}
