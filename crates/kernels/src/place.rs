//! Writing keys and values into pages: whole chunks at new positions, and single rows.

use crate::page::{HeadShape, PAGE_TOKENS};
use crate::rope::RopeTable;

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

/// Places tokens `0..tokens` of a stored layer at positions `start..`, rotating K on the way (kernel *place*).
///
/// `pool` is the layer's pool, `table` the sequence's pages; they must hold `start + tokens` positions.
pub fn place(
    pool: &mut [f32],
    table: &[u32],
    shape: HeadShape,
    stored: StoredLayer<'_>,
    start: usize,
    rope: &RopeTable,
) {
    let dim = shape.head_dim;
    let mut rotated = vec![0.0; dim];
    for head in 0..shape.kv_heads {
        for token in 0..stored.tokens {
            let from = (head * stored.tokens + token) * dim;
            let position = start + token;
            rotated.copy_from_slice(&stored.k[from..from + dim]);
            rope.rotate(&mut rotated, position);
            write(pool, table, shape, head, position, &rotated, &stored.v[from..from + dim]);
        }
    }
}

/// Scatters freshly projected rows (kernel *scatter*): rotates the query heads of `qkv` in place, and writes
/// its key heads (rotated) and value heads to the rows' positions.
///
/// `qkv` is `[rows, (heads + 2·kv_heads) · head_dim]`, queries first, then keys, then values.
pub fn scatter(
    pool: &mut [f32],
    table: &[u32],
    shape: HeadShape,
    heads: usize,
    qkv: &mut [f32],
    positions: &[u32],
    rope: &RopeTable,
) {
    let dim = shape.head_dim;
    let width = (heads + 2 * shape.kv_heads) * dim;
    for (row, &position) in qkv.chunks_exact_mut(width).zip(positions) {
        let position = position as usize;
        let (rotating, values) = row.split_at_mut((heads + shape.kv_heads) * dim);
        for head in rotating.chunks_exact_mut(dim) {
            rope.rotate(head, position);
        }
        let keys = &rotating[heads * dim..];
        for head in 0..shape.kv_heads {
            let at = head * dim..(head + 1) * dim;
            write(pool, table, shape, head, position, &keys[at.clone()], &values[at]);
        }
    }
}

fn write(
    pool: &mut [f32],
    table: &[u32],
    shape: HeadShape,
    head: usize,
    position: usize,
    k: &[f32],
    v: &[f32],
) {
    let page = table[position / PAGE_TOKENS] as usize;
    let slot = position % PAGE_TOKENS;
    let k_tile = shape.k_tile(page, head) + slot;
    for (i, &value) in k.iter().enumerate() {
        pool[k_tile + i * PAGE_TOKENS] = value;
    }
    let v_row = shape.v_tile(page, head) + slot * shape.head_dim;
    pool[v_row..v_row + shape.head_dim].copy_from_slice(v);
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
}
