//! Launches of `rows.cu`: what happens to rows between products.

use super::Heads;
use super::launch::{Address, Arguments, Launch};

/// Threads of every kernel of `rows.cu`.
pub const ROWS_THREADS: u32 = 256;
const WARPS: u32 = ROWS_THREADS / 32;
/// Elements of 16 bits that one thread has.
pub const CHUNK: u32 = 8;

fn launch(kernel: &'static str, blocks: u64, shared: u32, arguments: Arguments) -> Launch {
    // Device memory holds no rows that need more blocks than a grid may have.
    let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
    Launch { kernel, grid: [blocks, 1, 1], threads: ROWS_THREADS, shared, arguments }
}

/// Blocks that have a thread for every chunk of `[rows, width]`.
fn chunks(rows: u32, width: u32) -> u64 {
    (u64::from(rows) * u64::from(width / CHUNK)).div_ceil(ROWS_THREADS.into())
}

/// *gather_rows*: rows `indices`, u32 `[rows]`, of `from`, bf16 `[.., width]`, to `out`.
pub fn gather(from: Address, indices: Address, (rows, width): (u32, u32), out: Address) -> Launch {
    let arguments = Arguments::default().address(from).address(indices).word(rows).word(width).address(out);
    launch("gather_rows", chunks(rows, width), 0, arguments)
}

/// *norm_rows*: of each row of `x`, bf16 `[rows, width]`, under `weight`, f32 `[width]`.
pub fn norm(x: Address, weight: Address, (rows, width): (u32, u32), eps: f32, out: Address) -> Launch {
    let arguments = Arguments::default().address(x).address(weight).word(width).float(eps).address(out);
    // A sum of each warp.
    launch("norm_rows", rows.into(), WARPS * 4, arguments)
}

/// *norm_heads*: of every query and key head of whole projected rows, in place; weights f32 `[dim]`.
pub fn norm_heads(heads: Heads, qkv: Address, rows: u32, query: Address, key: Address, eps: f32) -> Launch {
    let normed = u64::from(rows) * u64::from(heads.queries + heads.kv);
    let arguments = Arguments::default()
        .address(qkv)
        .word(rows)
        .word(heads.queries)
        .word(heads.kv)
        .address(query)
        .address(key)
        .float(eps);
    launch("norm_heads", normed.div_ceil(WARPS.into()), 0, arguments)
}

/// *add_bias*: `bias`, f32 `[width]`, to every row of `x`, bf16 `[rows, width]`.
pub fn add_bias(x: Address, bias: Address, (rows, width): (u32, u32)) -> Launch {
    let arguments = Arguments::default().address(x).address(bias).word(rows).word(width);
    launch("add_bias", chunks(rows, width), 0, arguments)
}

/// *gate_rows*: `[rows, 2·width]` to `[rows, width]`.
pub fn gate(gate_up: Address, (rows, width): (u32, u32), out: Address) -> Launch {
    let arguments = Arguments::default().address(gate_up).word(rows).word(width).address(out);
    launch("gate_rows", chunks(rows, width), 0, arguments)
}

/// *export_rows*: keys and values of whole projected rows, `[2, kv, rows, dim]`.
pub fn export(heads: Heads, qkv: Address, rows: u32, out: Address) -> Launch {
    let arguments =
        Arguments::default().address(qkv).word(rows).word(heads.queries).word(heads.kv).address(out);
    launch("export_rows", chunks(rows, 2 * heads.kv * heads.dim), 0, arguments)
}

/// *random_weights*: `count` values of the sequence `base`.
pub fn random_weights(out: Address, count: u64, base: u64, bound: f32) -> Launch {
    let arguments = Arguments::default().address(out).address(count).address(base).float(bound);
    launch("random_weights", count.div_ceil(ROWS_THREADS.into()), 0, arguments)
}
