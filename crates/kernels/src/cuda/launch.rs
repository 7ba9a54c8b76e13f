//! Which kernel, over what grid, with what arguments: everything about a launch that needs no device.
//!
//! Buffers are addresses on the device that the kernel is launched on. The emulation of `tests/cuda_emulated.rs` is one
//! whose addresses are the host's, so the launches that it tests are those a GPU gets.

use super::Heads;
use crate::probe::Reduce;

/// Columns per tile of *attend_rows*.
pub const ATTEND_TILE: u32 = 64;
/// Query vectors per block of *attend_rows*; also its threads, halved.
pub const ATTEND_VECTORS: u32 = 128;
const ATTEND_THREADS: u32 = 2 * ATTEND_VECTORS;
/// Threads of *place* and *scatter*.
const COPY_THREADS: u32 = 256;
/// Threads of *decode*, *merge* and *probe*: four warps.
const FEW_THREADS: u32 = 128;
const WARPS: u32 = 4;
/// Most query heads that one block of *decode* computes together.
const DECODE_MEMBERS: u32 = 5;
/// Pairs that one thread rotates.
const PIECE: u32 = 8;
const PAGE: u32 = crate::page::PAGE_TOKENS as u32;
/// Blocks per multiprocessor from which a launch is not split further.
const WAVES: u32 = 2;
/// Fewest tiles (of *attend_rows*) and pages (of *decode*) that are worth a range of their own.
const LEAST_TILES: u32 = 4;
const LEAST_PAGES: u32 = 16;
/// Most ranges: merging reads each of them.
const MOST_SPLITS: u32 = 64;

/// An address on a device; 0 is none.
pub type Address = u64;

/// Arguments of a kernel, in its order; each in a slot of its own, as drivers take them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments(Vec<u64>);

impl Arguments {
    pub(super) fn address(mut self, value: Address) -> Self {
        self.0.push(value);
        self
    }

    /// The lower half of a slot is where a kernel looks for four bytes: the hosts of CUDA devices are little-endian.
    pub(super) fn word(self, value: u32) -> Self {
        self.address(value.into())
    }

    pub(super) fn float(self, value: f32) -> Self {
        self.word(value.to_bits())
    }

    /// The slots.
    pub fn slots(&self) -> &[u64] {
        &self.0
    }
}

/// A launch of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
    /// What it is given.
    pub arguments: Arguments,
}

/// Elements of stored KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// 32 bits.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of 32 bits.
    Bf16,
}

/// A section to place, as the kernel reads it. Where it lies is the same in every layer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Bytes from the start of the staging buffer; a multiple of 16.
    pub offset: u64,
    /// Tokens.
    pub tokens: u32,
    /// Position of the first.
    pub start: u32,
}

/// Angles of positions, f32 `[positions, head_dim / 2]` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Angles {
    /// Cosines.
    pub cosines: Address,
    /// Sines.
    pub sines: Address,
}

/// A layer's pool, bf16, and the tables of the sequences that are at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paged {
    /// `[pages, page()]`.
    pub pool: Address,
    /// u32 `[sequences, stride]`.
    pub tables: Address,
    /// Entries from one table to the next; 0 where all rows are of one sequence.
    pub stride: u32,
}

/// Rows that have queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// bf16 `[count, stride]`, queries first.
    pub data: Address,
    /// Elements from one row to the next.
    pub stride: u32,
    /// u32 `[count]`; ascending where the rows are of one sequence.
    pub positions: Address,
    /// Rows, at least one.
    pub count: u32,
}

/// Room for what ranges of columns give: f32 sums `[rows, heads, splits, head_dim]` and stats `[rows, heads, splits, 2]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Weighted values.
    pub sums: Address,
    /// Peaks and totals.
    pub stats: Address,
    /// Ranges.
    pub splits: u32,
}

/// Where attention goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attended {
    /// bf16 `[rows, heads · head_dim]`.
    pub out: Address,
    /// f32 `[rows, heads]`, for *probe*; 0 where nobody looks.
    pub logs: Address,
}

/// *place*: spans of one sequence, whose longest has `longest` tokens.
pub fn place(
    heads: Heads,
    pages: Paged,
    staging: Address,
    (stored, planes): (Stored, bool),
    (spans, count, longest): (Address, u32, u32),
    angles: Angles,
) -> Launch {
    let kernel = match (stored, planes) {
        (Stored::F32, false) => "place_f32",
        (Stored::F16, false) => "place_f16",
        (Stored::Bf16, false) => "place_bf16",
        (Stored::F32, true) => "place_f32_planes",
        (Stored::F16, true) => "place_f16_planes",
        (Stored::Bf16, true) => "place_bf16_planes",
    };
    let pieces = heads.kv * longest * (heads.dim / (2 * PIECE));
    let arguments = Arguments::default()
        .address(pages.pool)
        .address(pages.tables)
        .address(staging)
        .address(spans)
        .word(heads.kv)
        .address(angles.cosines)
        .address(angles.sines);
    Launch {
        kernel,
        grid: [pieces.div_ceil(COPY_THREADS), count, 1],
        threads: COPY_THREADS,
        shared: 0,
        arguments,
    }
}

/// *scatter*: `rows` are whole projected rows.
pub fn scatter(heads: Heads, pages: Paged, rows: Rows, angles: Angles) -> Launch {
    let pieces = rows.count * heads.row() / (2 * PIECE);
    let arguments = Arguments::default()
        .address(pages.pool)
        .address(pages.tables)
        .word(pages.stride)
        .address(rows.data)
        .address(rows.positions)
        .word(rows.count)
        .word(heads.queries)
        .word(heads.kv)
        .address(angles.cosines)
        .address(angles.sines);
    Launch {
        kernel: "scatter",
        grid: [pieces.div_ceil(COPY_THREADS), 1, 1],
        threads: COPY_THREADS,
        shared: 0,
        arguments,
    }
}

/// *attend_rows*: with `parts`, ranges of columns are attended apart, and [`merge`] must follow.
pub fn attend_rows(heads: Heads, pages: Paged, rows: Rows, to: Attended, parts: Option<Parts>) -> Launch {
    let arguments = Arguments::default()
        .address(pages.pool)
        .address(pages.tables)
        .address(rows.data)
        .word(rows.stride)
        .address(rows.positions)
        .word(rows.count)
        .word(heads.kv)
        .float(heads.scale())
        .address(to.out)
        .address(to.logs)
        .address(parts.map_or(0, |parts| parts.sums))
        .address(parts.map_or(0, |parts| parts.stats));
    Launch {
        kernel: "attend_rows",
        grid: [attend_blocks(heads, rows.count), heads.kv, parts.map_or(1, |parts| parts.splits)],
        threads: ATTEND_THREADS,
        // Two stages of a tile of keys and one of values, two bytes an element.
        shared: 2 * 2 * ATTEND_TILE * heads.dim * 2,
        arguments,
    }
}

/// Blocks of *attend_rows* to a KV head.
fn attend_blocks(heads: Heads, rows: u32) -> u32 {
    (rows * heads.group()).div_ceil(ATTEND_VECTORS)
}

/// Ranges of columns that let `rows` rows, the last of which sees `columns`, fill a device.
pub fn attend_splits(heads: Heads, rows: u32, columns: u32, multiprocessors: u32) -> u32 {
    let blocks = attend_blocks(heads, rows) * heads.kv;
    splits(blocks, columns.div_ceil(ATTEND_TILE) / LEAST_TILES, multiprocessors)
}

/// As [`attend_splits`], of [`decode`]; `columns` is of the longest sequence.
pub fn decode_splits(heads: Heads, rows: u32, columns: u32, multiprocessors: u32) -> u32 {
    let blocks = rows * heads.kv * passes(heads);
    splits(blocks, columns.div_ceil(PAGE) / LEAST_PAGES, multiprocessors)
}

fn splits(blocks: u32, most: u32, multiprocessors: u32) -> u32 {
    // Down: blocks more than are resident at once would be a round of their own.
    (WAVES * multiprocessors / blocks.max(1)).min(most).clamp(1, MOST_SPLITS)
}

/// Blocks of *decode* that share a KV head's query heads.
fn passes(heads: Heads) -> u32 {
    heads.group().div_ceil(DECODE_MEMBERS)
}

/// *decode*: row `i` against the sequence of table `i`; [`merge`] must follow.
pub fn decode(heads: Heads, pages: Paged, rows: Rows, parts: Parts) -> Launch {
    let arguments = Arguments::default()
        .address(pages.pool)
        .address(pages.tables)
        .word(pages.stride)
        .address(rows.data)
        .word(rows.stride)
        .address(rows.positions)
        .word(heads.kv)
        .float(heads.scale())
        .address(parts.sums)
        .address(parts.stats);
    let members = heads.group().div_ceil(passes(heads));
    Launch {
        kernel: "decode",
        grid: [parts.splits, heads.kv * passes(heads), rows.count],
        threads: FEW_THREADS,
        // Sums, peak and total of each warp and head.
        shared: WARPS * members * (heads.dim + 2) * 4,
        arguments,
    }
}

/// *merge*: what ranges of columns gave, made rows.
pub fn merge(heads: Heads, rows: u32, parts: Parts, to: Attended) -> Launch {
    let vectors = rows * heads.queries;
    let arguments = Arguments::default()
        .address(parts.sums)
        .address(parts.stats)
        .word(vectors)
        .word(parts.splits)
        .address(to.out)
        .address(to.logs);
    Launch {
        kernel: "merge",
        grid: [vectors.div_ceil(WARPS), 1, 1],
        threads: FEW_THREADS,
        shared: 0,
        arguments,
    }
}

fn reduction(reduce: Reduce) -> u32 {
    match reduce {
        Reduce::Mean => 0,
        Reduce::Max => 1,
    }
}

/// *probe*: probabilities of `rows` over `columns` columns to `out`, f32 `[rows, columns]`, reduced over heads. `logs` are
/// these rows'.
pub fn probe(
    heads: Heads,
    pages: Paged,
    rows: Rows,
    columns: u32,
    logs: Address,
    reduce: Reduce,
    out: Address,
) -> Launch {
    let arguments = Arguments::default()
        .address(pages.pool)
        .address(pages.tables)
        .address(rows.data)
        .word(rows.stride)
        .address(rows.positions)
        .word(rows.count)
        .word(heads.kv)
        .word(columns)
        .float(heads.scale())
        .address(logs)
        .word(reduction(reduce))
        .address(out);
    Launch {
        kernel: "probe",
        grid: [columns.div_ceil(WARPS * PAGE), rows.count.div_ceil(16), 1],
        threads: FEW_THREADS,
        shared: 0,
        arguments,
    }
}

/// *probe_reduce*: f32 `[rows, columns]` to `[columns]`.
pub fn probe_reduce(probabilities: Address, rows: u32, columns: u32, reduce: Reduce, out: Address) -> Launch {
    let arguments = Arguments::default()
        .address(probabilities)
        .word(rows)
        .word(columns)
        .word(reduction(reduce))
        .address(out);
    Launch {
        kernel: "probe_reduce",
        grid: [columns.div_ceil(FEW_THREADS), 1, 1],
        threads: FEW_THREADS,
        shared: 0,
        arguments,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { queries: 40, kv: 8, dim: 128 };

    #[test]
    fn few_rows_are_split_and_many_are_not() {
        // A question of 20 rows over 16K tokens: one block to a KV head, and 132 multiprocessors.
        assert_eq!(attend_splits(HEADS, 20, 16384, 132), 33);
        assert_eq!(attend_splits(HEADS, 16384, 16384, 132), 1);
        // Not into ranges that are not worth it, nor into none.
        assert_eq!(attend_splits(HEADS, 20, 512, 132), 2);
        assert_eq!(attend_splits(HEADS, 1, 1, 132), 1);
        assert_eq!(decode_splits(HEADS, 1, 32768, 132), 33);
        assert_eq!(decode_splits(HEADS, 32, 32768, 132), 1);
        assert_eq!(decode_splits(Heads { queries: 4, kv: 1, dim: 64 }, 1, 1 << 20, 132), MOST_SPLITS);
    }

    #[test]
    fn shared_memory_fits_the_oldest_device() {
        let pages = Paged { pool: 16, tables: 16, stride: 0 };
        let rows = Rows { data: 16, stride: HEADS.row(), positions: 16, count: 100 };
        let launch = attend_rows(HEADS, pages, rows, Attended { out: 16, logs: 0 }, None);
        assert_eq!((launch.grid, launch.shared), ([4, 8, 1], 64 << 10));
        // Compute capability 8.0 has 163 KiB to a block, 8.6 has 99.
        assert!(launch.shared <= 99 << 10);
        assert!(decode(HEADS, pages, rows, Parts { sums: 16, stats: 16, splits: 3 }).shared <= 48 << 10);
    }
}
