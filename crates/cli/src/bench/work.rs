//! Operations that a pass cannot be done without.

use cacheclip_model::config::Config;

/// What is asked of the last layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The last row's logits.
    Token,
    /// Where all rows look.
    Look,
}

/// Multiply-adds of a pass of `rows` behind `before` positions, as two operations each. Of the last layer only what its
/// end needs: every row's queries, keys and values, and then scores alone, or the last row's attention and feed-forward
/// part and its logits.
pub(crate) fn operations(shape: &Config, before: usize, rows: usize, end: End) -> f64 {
    let query = (shape.heads * shape.head_dim) as f64;
    let qkv = (shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim) as f64;
    let rest = (shape.heads * shape.head_dim * shape.hidden + 3 * shape.hidden * shape.intermediate) as f64;
    let (before, rows, deep) = (before as f64, rows as f64, shape.layers as f64 - 1.0);
    // A row sees all that was before and half of the rows on average; scores and values are a product each.
    let scores = query * (before + (rows + 1.0) / 2.0);
    let layers = deep * rows * (qkv + rest + 2.0 * scores);
    let last = rows * qkv
        + match end {
            End::Token => rest + 2.0 * query * (before + rows) + (shape.vocab * shape.hidden) as f64,
            End::Look => rows * scores,
        };
    2.0 * (layers + last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_of_ones_is_counted_by_hand() {
        let config = Config::shape("aux-30m").expect("a known shape");
        let one =
            Config { hidden: 1, intermediate: 1, heads: 1, kv_heads: 1, head_dim: 1, vocab: 10, ..config };
        let of = |layers, rows, end| operations(&Config { layers, ..one.clone() }, 4, rows, end);
        // Queries, keys and values of two rows; five and six scores.
        assert_eq!(of(1, 2, End::Look), 2.0 * (2.0 * 3.0 + 11.0));
        // Of the last row besides: six scores, six values, output, three products, ten logits.
        assert_eq!(of(1, 2, End::Token), 2.0 * (2.0 * 3.0 + 12.0 + 4.0 + 10.0));
        // A layer more: all of both rows.
        let more = of(2, 2, End::Look) - of(1, 2, End::Look);
        assert_eq!(more, 2.0 * (2.0 * (3.0 + 4.0) + 2.0 * 11.0));
    }
}
