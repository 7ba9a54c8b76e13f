//! Where rows look: attention probabilities reduced over heads and rows (kernel *probe*).

use crate::attend::{Queries, score_all};
use crate::page::LayerView;
use rayon::prelude::*;

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

/// Attention of `queries` over columns `0..columns`: softmax over everything each row sees, then reduced
/// over heads, then over rows. Returns `[columns]`; columns a row does not see count as zero for it.
pub fn probe(
    view: &LayerView<'_>,
    queries: Queries<'_>,
    columns: usize,
    heads: Reduce,
    rows: Reduce,
) -> Vec<f32> {
    let dim = view.shape.head_dim;
    let group = queries.heads / view.shape.kv_heads;
    let count = queries.positions.len();
    let per_row: Vec<Vec<f32>> = (0..count)
        .into_par_iter()
        .map(|row| {
            let mut reduced = vec![0.0; columns];
            for head in 0..view.shape.kv_heads {
                let packed = queries.pack(row..row + 1, head, group, dim);
                let seen = packed.limits[0];
                let (scores, padded) = score_all(view, head, &packed.q, seen);
                for scores in scores.chunks_exact(padded) {
                    let scores = &scores[..seen];
                    let peak = scores.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                    let weights: Vec<f32> = scores.iter().map(|s| (s - peak).exp()).collect();
                    let scale = 1.0 / weights.iter().sum::<f32>();
                    for (into, weight) in reduced.iter_mut().zip(&weights) {
                        heads.fold(into, weight * scale);
                    }
                }
            }
            heads.finish(&mut reduced, queries.heads);
            reduced
        })
        .collect();
    let mut result = vec![0.0; columns];
    for row in &per_row {
        for (into, &value) in result.iter_mut().zip(row) {
            rows.fold(into, value);
        }
    }
    rows.finish(&mut result, count);
    result
}
