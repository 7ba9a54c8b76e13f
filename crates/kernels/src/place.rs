//! Writing keys and values into pages: whole chunks at new positions, and single rows.

use crate::page::{HeadShape, PAGE_TOKENS};
use crate::rope::RopeTable;
use rayon::prelude::*;

/// A chunk's keys and values of one layer as stored: K before rotation.
#[derive(Clone, Copy, Debug)]
pub struct StoredLayer<'a> {
    /// Position-free keys, `[kv_heads, tokens, head_dim]`.
    pub k: &'a [f32],
    /// Values, `[kv_heads, tokens, head_dim]`.
    pub v: &'a [f32],
    /// Tokens in both.
    pub tokens: usize,
}

/// Pages that one thread fills at least: fewer are not worth handing over.
const LEAST: usize = 4;

/// Places tokens `0..tokens` of a stored layer at positions `start..`, rotating K on the way (kernel *place*).
///
/// `pool` is the layer's pool, `table` the sequence's pages, each of them once; they must hold `start + tokens`
/// positions.
pub fn place(
    pool: &mut [f32],
    table: &[u32],
    shape: HeadShape,
    stored: StoredLayer<'_>,
    start: usize,
    rope: &RopeTable,
) {
    let (dim, end) = (shape.head_dim, start + stored.tokens);
    let pages = start / PAGE_TOKENS..end.div_ceil(PAGE_TOKENS);
    let wanted = pages.map(|page| (table[page] as usize, page)).collect();
    apart(pool, shape, wanted).into_par_iter().with_min_len(LEAST).for_each(|(values, page)| {
        let positions = start.max(page * PAGE_TOKENS)..end.min((page + 1) * PAGE_TOKENS);
        for head in 0..shape.kv_heads {
            for position in positions.clone() {
                let from = (head * stored.tokens + position - start) * dim;
                write(
                    values,
                    shape,
                    head,
                    position,
                    &stored.k[from..from + dim],
                    &stored.v[from..from + dim],
                    rope,
                );
            }
        }
    });
}

/// Scatters freshly projected rows (kernel *scatter*): rotates the query heads of `qkv` in place, and writes
/// its key heads (rotated) and value heads to the rows' positions.
///
/// `qkv` is `[rows, (heads + 2·kv_heads) · head_dim]`, queries first, then keys, then values; `positions` ascend, and
/// `table` has each of its pages once.
pub fn scatter(
    pool: &mut [f32],
    table: &[u32],
    shape: HeadShape,
    heads: usize,
    qkv: &mut [f32],
    positions: &[u32],
    rope: &RopeTable,
) {
    let width = (heads + 2 * shape.kv_heads) * shape.head_dim;
    // Rows of one page, which follow one another, go to it together.
    let runs = positions.chunk_by(|a, b| *a as usize / PAGE_TOKENS == *b as usize / PAGE_TOKENS);
    let mut rest = qkv;
    let runs = runs.map(|positions| {
        let (rows, after) = std::mem::take(&mut rest).split_at_mut(positions.len() * width);
        rest = after;
        (table[positions[0] as usize / PAGE_TOKENS] as usize, (rows, positions))
    });
    let fill = |page: &mut [f32], (rows, positions): (&mut [f32], &[u32])| {
        for (row, &position) in rows.chunks_exact_mut(width).zip(positions) {
            scatter_row(page, shape, heads, row, position as usize, rope);
        }
    };
    if positions.len() <= LEAST * PAGE_TOKENS {
        runs.for_each(|(page, run)| fill(&mut pool[page * shape.page()..][..shape.page()], run));
    } else {
        let pages = apart(pool, shape, runs.collect());
        pages.into_par_iter().with_min_len(LEAST).for_each(|(page, run)| fill(page, run));
    }
}

fn scatter_row(
    page: &mut [f32],
    shape: HeadShape,
    heads: usize,
    row: &mut [f32],
    position: usize,
    rope: &RopeTable,
) {
    let dim = shape.head_dim;
    let (queries, rest) = row.split_at_mut(heads * dim);
    queries.chunks_exact_mut(dim).for_each(|head| rope.rotate(head, position));
    let (keys, values) = rest.split_at(shape.kv_heads * dim);
    for (head, (k, v)) in keys.chunks_exact(dim).zip(values.chunks_exact(dim)).enumerate() {
        write(page, shape, head, position, k, v, rope);
    }
}

/// Pages of a pool, each with what it is wanted for, to be written side by side.
fn apart<T>(pool: &mut [f32], shape: HeadShape, mut wanted: Vec<(usize, T)>) -> Vec<(&mut [f32], T)> {
    wanted.sort_unstable_by_key(|(page, _)| *page);
    let (mut rest, mut next) = (pool, 0);
    let split = |(page, with): (usize, T)| {
        assert!(page >= next, "a table has each of its pages once");
        let (_, from) = std::mem::take(&mut rest).split_at_mut((page - next) * shape.page());
        let (values, after) = from.split_at_mut(shape.page());
        (rest, next) = (after, page + 1);
        (values, with)
    };
    wanted.into_iter().map(split).collect()
}

/// Writes one head's key, rotated, and value to their place in a page.
fn write(
    page: &mut [f32],
    shape: HeadShape,
    head: usize,
    position: usize,
    k: &[f32],
    v: &[f32],
    rope: &RopeTable,
) {
    let slot = position % PAGE_TOKENS;
    let tile = shape.k_tile(0, head);
    let (tokens, _) = page[tile..tile + shape.tile()].as_chunks_mut::<PAGE_TOKENS>();
    let half = shape.head_dim / 2;
    let ((low, high), (a, b), (cos, sin)) = (tokens.split_at_mut(half), k.split_at(half), rope.at(position));
    for (((((low, high), a), b), c), s) in low.iter_mut().zip(high).zip(a).zip(b).zip(cos).zip(sin) {
        (low[slot], high[slot]) = (a * c - b * s, b * c + a * s);
    }
    let row = shape.v_tile(0, head) + slot * shape.head_dim;
    page[row..row + shape.head_dim].copy_from_slice(v);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: HeadShape = HeadShape { kv_heads: 2, head_dim: 4 };

    fn values(n: usize, salt: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37 + salt).sin()).collect()
    }

    #[test]
    fn placing_a_chunk_equals_scattering_its_rows_one_by_one() {
        let rope = RopeTable::new(4, 128, 10_000.0, None);
        let table = [3, 0, 2];
        let (tokens, start) = (19, 13);
        let (k, v) = (values(2 * tokens * 4, 0.1), values(2 * tokens * 4, 0.7));
        let mut placed = vec![0.0; 4 * SHAPE.page()];
        place(&mut placed, &table, SHAPE, StoredLayer { k: &k, v: &v, tokens }, start, &rope);

        let mut scattered = vec![0.0; 4 * SHAPE.page()];
        for token in (0..tokens).rev() {
            let row = |source: &[f32]| -> Vec<f32> {
                (0..2).flat_map(|head| source[(head * tokens + token) * 4..][..4].to_vec()).collect()
            };
            let mut qkv = [vec![1.0; 8], row(&k), row(&v)].concat();
            scatter(&mut scattered, &table, SHAPE, 2, &mut qkv, &[(start + token) as u32], &rope);
        }
        assert_eq!(placed, scattered);
    }

    #[test]
    fn rows_scattered_together_lie_where_each_alone_would() {
        let rope = RopeTable::new(4, 512, 10_000.0, None);
        let table: Vec<u32> = (0..32).map(|page| (page * 13 + 5) % 32).collect();
        // Gaps, so that pages have one row, some, and none.
        let positions: Vec<u32> = (0..500).filter(|p| p % 7 != 3 && !(100..140).contains(p)).collect();
        let mut together = values(positions.len() * 24, 0.3);
        let mut alone = together.clone();
        let mut pools = [vec![0.0; 32 * SHAPE.page()], vec![0.0; 32 * SHAPE.page()]];
        scatter(&mut pools[0], &table, SHAPE, 2, &mut together, &positions, &rope);
        for (row, position) in alone.chunks_exact_mut(24).zip(positions.chunks(1)) {
            scatter(&mut pools[1], &table, SHAPE, 2, row, position, &rope);
        }
        assert_eq!(pools[0], pools[1]);
        assert_eq!(together, alone);
    }

    #[test]
    #[should_panic(expected = "each of its pages once")]
    fn a_page_that_a_table_has_twice_is_refused() {
        let rope = RopeTable::new(4, 64, 10_000.0, None);
        let (k, v) = (values(32 * 8, 0.1), values(32 * 8, 0.2));
        let stored = StoredLayer { k: &k, v: &v, tokens: 32 };
        place(&mut vec![0.0; 2 * SHAPE.page()], &[1, 1], SHAPE, stored, 0, &rope);
    }
}
