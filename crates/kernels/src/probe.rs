//! Where rows look: attention probabilities reduced over heads and rows (kernel *probe*).

use crate::attend::{Queries, with_scratch};
use crate::page::LayerView;
use crate::simd::widest;
use crate::tile::Weigh;
use rayon::prelude::*;

/// Query vectors that are looked at together: what fills the registers.
const VECTORS: usize = 12;

/// How several probabilities of one column become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Their mean.
    Mean,
    /// Their largest.
    Max,
}

impl Reduce {
    /// Folds `value` into `into`; means are sums until [`finish`](Self::finish).
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

/// As [`probe_rows`], then reduced over rows: `[columns]`.
pub fn probe(
    view: &LayerView<'_>,
    queries: Queries<'_>,
    columns: usize,
    heads: Reduce,
    rows: Reduce,
) -> Vec<f32> {
    let mut result = vec![0.0; columns];
    for row in probe_rows(view, queries, columns, heads).chunks_exact(columns.max(1)) {
        for (into, &value) in result.iter_mut().zip(row) {
            rows.fold(into, value);
        }
    }
    rows.finish(&mut result, queries.positions.len());
    result
}

/// Attention of `queries` over columns `0..columns`: softmax over everything each row sees, then reduced over heads.
/// Returns `[rows, columns]`; columns a row does not see count as zero for it.
pub fn probe_rows(view: &LayerView<'_>, queries: Queries<'_>, columns: usize, heads: Reduce) -> Vec<f32> {
    let group = queries.heads / view.shape.kv_heads;
    let count = queries.positions.len();
    let arch = widest();
    let mut per_row = vec![0.0; count * columns];
    let together = (VECTORS / group).max(1);
    let of_rows = |weights: &mut Vec<f32>, (index, reduced): (usize, &mut [f32])| {
        let rows = index * together..index * together + reduced.len() / columns;
        for head in 0..view.shape.kv_heads {
            let padded = with_scratch(|scratch| {
                let block = queries.block(view, rows.clone(), head, scratch);
                arch.dispatch(Weigh { block, out: weights })
            });
            for (vector, weights) in weights.chunks_exact(padded).take(rows.len() * group).enumerate() {
                let reduced = &mut reduced[vector / group * columns..][..columns];
                reduced.iter_mut().zip(weights).for_each(|(into, &weight)| heads.fold(into, weight));
            }
        }
        reduced.chunks_exact_mut(columns).for_each(|row| heads.finish(row, queries.heads));
    };
    if columns > 0 {
        per_row.par_chunks_mut(together * columns).enumerate().for_each_init(Vec::new, of_rows);
    }
    per_row
}
