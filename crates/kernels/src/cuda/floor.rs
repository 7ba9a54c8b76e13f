//! What each kernel cannot do without, in bytes and operations: the floors that stand in the kernels' texts, as numbers.

use super::Heads;
use super::launch::Stored;

/// Bytes moved and floating-point operations done, at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Floor {
    /// Bytes, read and written.
    pub bytes: u64,
    /// Operations; a multiplication and its addition are two.
    pub flops: u64,
}

impl Floor {
    /// Seconds on a device of so many bytes and operations per second: whichever takes longer.
    pub fn seconds(&self, bytes_per_second: f64, flops_per_second: f64) -> f64 {
        (self.bytes as f64 / bytes_per_second).max(self.flops as f64 / flops_per_second)
    }
}

/// Bytes of an element.
fn size(stored: Stored) -> u64 {
    match stored {
        Stored::F32 => 4,
        Stored::F16 | Stored::Bf16 => 2,
    }
}

/// *place* of `tokens` tokens.
pub fn place(heads: Heads, tokens: u32, stored: Stored) -> Floor {
    let (tokens, dim) = (u64::from(tokens), u64::from(heads.dim));
    let elements = tokens * u64::from(heads.kv) * dim;
    Floor { bytes: elements * 2 * (size(stored) + 2) + tokens * dim * 4, flops: elements * 3 }
}

/// *scatter* of `rows` projected rows.
pub fn scatter(heads: Heads, rows: u32) -> Floor {
    let width = u64::from(rows) * u64::from(heads.dim);
    let (queries, kv) = (u64::from(heads.queries), u64::from(heads.kv));
    Floor { bytes: width * 4 * (queries + 2 * kv) + width * 4, flops: width * 3 * (queries + kv) }
}

/// *attend_rows* of rows at `positions`, ascending.
pub fn attend_rows(heads: Heads, positions: &[u32]) -> Floor {
    let columns = positions.iter().map(|&position| u64::from(position) + 1);
    let last = positions.last().map_or(0, |&last| u64::from(last) + 1);
    let (dim, queries, kv) = (u64::from(heads.dim), u64::from(heads.queries), u64::from(heads.kv));
    Floor {
        bytes: 4 * dim * (kv * last + queries * positions.len() as u64),
        flops: 4 * dim * queries * columns.sum::<u64>(),
    }
}

/// *decode* of one row each of `batch` sequences of `columns` columns.
pub fn decode(heads: Heads, batch: u32, columns: u32) -> Floor {
    let seen = u64::from(batch) * u64::from(columns) * u64::from(heads.dim);
    Floor { bytes: 4 * seen * u64::from(heads.kv), flops: 4 * seen * u64::from(heads.queries) }
}

/// *probe* of `rows` rows that see all of `columns` columns.
pub fn probe(heads: Heads, rows: u32, columns: u32) -> Floor {
    let (rows, columns, dim) = (u64::from(rows), u64::from(columns), u64::from(heads.dim));
    Floor {
        bytes: columns * (2 * dim * u64::from(heads.kv) + 4 * rows),
        flops: 2 * dim * u64::from(heads.queries) * rows * columns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { queries: 40, kv: 8, dim: 128 };

    #[test]
    fn floors_of_a_16k_prompt_of_a_14b_shape() {
        // A layer's KV of 16K tokens is 64 MiB in bf16; placing reads and writes it, and reads angles.
        let layer = 64 << 20;
        assert_eq!(place(HEADS, 16384, Stored::Bf16).bytes, 2 * layer + 16384 * 128 * 4);
        assert_eq!(place(HEADS, 16384, Stored::F32).bytes, 3 * layer + 16384 * 128 * 4);
        // All rows: half of the square, two products, two operations each.
        let all: Vec<u32> = (0..16384).collect();
        assert_eq!(attend_rows(HEADS, &all).flops, 4 * 128 * 40 * (16384 * 16385 / 2));
        assert_eq!(attend_rows(HEADS, &all).bytes, layer + 2 * 2 * 128 * 40 * 16384);
        assert_eq!(decode(HEADS, 1, 16384).bytes, layer);
        // One row is bound by bytes, many are by operations.
        let (bytes, flops) = (4e12, 8e14);
        let few = attend_rows(HEADS, &all[16383..]);
        assert_eq!(few.seconds(bytes, flops), few.bytes as f64 / bytes);
        let many = attend_rows(HEADS, &all);
        assert_eq!(many.seconds(bytes, flops), many.flops as f64 / flops);
        assert_eq!(attend_rows(HEADS, &[]), Floor::default());
    }

    #[test]
    fn scattered_and_probed_rows_count_every_head() {
        assert_eq!(scatter(HEADS, 3).bytes, 3 * 128 * 4 * 57);
        assert_eq!(scatter(HEADS, 3).flops, 3 * 128 * 3 * 48);
        assert_eq!(probe(HEADS, 10, 100), Floor { bytes: 100 * (2048 + 40), flops: 2 * 128 * 40 * 1000 });
    }
}
