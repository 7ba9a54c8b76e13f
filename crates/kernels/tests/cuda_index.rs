//! The index arithmetic of the CUDA kernels, compiled for the host, against that of the CPU kernels.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]
#![allow(unsafe_code, reason = "functions of a C++ library")]

#[path = "cuda/host.rs"]
mod host;

use cacheclip_kernels::cuda::launch::{self, Attended, Paged, Parts, Rows, Stored};
use cacheclip_kernels::cuda::{Heads, rows};
use cacheclip_kernels::page::{HeadShape, PAGE_TOKENS, pages_for};
use half::{bf16, f16};
use host::Host;
use proptest::prelude::*;
use std::sync::OnceLock;

const HEADS: Heads = Heads { queries: 10, kv: 2, dim: 128 };

/// The library; none where there is no compiler, which it says.
fn host() -> Option<&'static Host> {
    static HOST: OnceLock<Option<Host>> = OnceLock::new();
    HOST.get_or_init(|| Host::open(HEADS)).as_ref()
}

/// Calls a function of the library.
macro_rules! call {
    ($host:expr, $name:ident($($argument:expr => $type:ty),*) -> [$result:ty; $count:literal]) => {{
        let mut out = [<$result>::default(); $count];
        // SAFETY: the signature is the one in host.cpp, which writes this many numbers.
        unsafe {
            $host.function::<unsafe extern "C" fn($($type,)* *mut $result)>(stringify!($name))($($argument,)* out.as_mut_ptr())
        };
        out
    }};
    ($host:expr, $name:ident($($argument:expr => $type:ty),*) -> $result:ty) => {
        // SAFETY: the signature is the one in host.cpp.
        unsafe { $host.function::<unsafe extern "C" fn($($type),*) -> $result>(stringify!($name))($($argument),*) }
    };
}

fn dim() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![32u32, 64, 128])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_token_lies_where_the_cpu_has_it(dim in dim(), kv in 1u32..9, page in 0u32..1 << 22, head in 0u32..8, position in 0u32..1 << 20) {
        let Some(host) = host() else { return Ok(()) };
        let head = head % kv;
        let shape = HeadShape { kv_heads: kv as usize, head_dim: dim as usize };
        let [index, slot, pages, limit] = call!(host, index_position(position => u32) -> [u32; 4]);
        prop_assert_eq!(index as usize, position as usize / PAGE_TOKENS);
        prop_assert_eq!(slot as usize, position as usize % PAGE_TOKENS);
        prop_assert_eq!(pages as usize, pages_for(position as usize));
        // What `Block::prepare` has as a limit.
        prop_assert_eq!(limit, position + 1);
        let of_slot = (slot * dim) as u64;
        let key = call!(host, index_key_at(page => u32, head => u32, slot => u32, kv => u32, dim => u32) -> u64);
        let value = call!(host, index_value_at(page => u32, head => u32, slot => u32, kv => u32, dim => u32) -> u64);
        prop_assert_eq!(key, shape.k_tile(page as usize, head as usize) as u64 + of_slot);
        prop_assert_eq!(value, shape.v_tile(page as usize, head as usize) as u64 + of_slot);
    }

    #[test]
    fn pieces_of_a_stored_layer_are_all_of_it_once(dim in dim(), kv in 1u32..5, tokens in 1u32..40) {
        let Some(host) = host() else { return Ok(()) };
        let half = (kv * tokens * dim) as usize;
        let elements = call!(host, index_stored_elements(kv => u32, tokens => u32, dim => u32) -> u64);
        prop_assert_eq!(elements, 2 * half as u64);
        let mut seen = vec![0u8; half];
        for index in 0..call!(host, index_placed_count(kv => u32, tokens => u32, dim => u32) -> u32) {
            let [head, token, low, high] = call!(host, index_placed(index => u32, tokens => u32, dim => u32) -> [u32; 4]);
            prop_assert_eq!(high - low, dim / 2, "pairs are half a head apart");
            let from = call!(host, index_stored_key(head => u32, token => u32, tokens => u32, dim => u32) -> u64);
            // `place` of the CPU: `(head * tokens + token) * dim`.
            prop_assert_eq!(from, (u64::from(head) * u64::from(tokens) + u64::from(token)) * u64::from(dim));
            for i in 0..8 {
                seen[from as usize + (low + i) as usize] += 1;
                seen[from as usize + (high + i) as usize] += 1;
            }
        }
        prop_assert!(seen.iter().all(|&count| count == 1));
    }

    #[test]
    fn angles_are_rows_of_the_table(dim in dim(), position in 0u32..1 << 20, piece in 0u32..8) {
        let Some(host) = host() else { return Ok(()) };
        let piece = piece % (dim / 16);
        let at = call!(host, index_angle_at(position => u32, piece => u32, dim => u32) -> u64);
        prop_assert_eq!(at, u64::from(position) * u64::from(dim / 2) + u64::from(piece) * 8);
    }

    #[test]
    fn planes_are_those_of_the_container(bytes in prop::collection::vec(any::<u8>(), 1..64), size in prop::sample::select(vec![2usize, 4])) {
        let Some(host) = host() else { return Ok(()) };
        let elements = bytes.len().div_ceil(size);
        for element in 0..elements {
            for plane in 0..size {
                let at = call!(host, index_plane_at(element as u64 => u64, plane as u32 => u32, elements as u64 => u64) -> u64);
                prop_assert_eq!(at as usize, plane * elements + element);
            }
        }
    }

    #[test]
    fn rows_are_queries_then_keys_then_values(dim in dim(), kv in 1u32..9, group in 1u32..9, row in 0u32..1 << 16, head in 0u32..64) {
        let Some(host) = host() else { return Ok(()) };
        let heads = Heads { queries: kv * group, kv, dim };
        let head = head % heads.queries;
        let start = u64::from(row) * u64::from(heads.row());
        let [query, key, value] = call!(host, index_row(row => u32, head => u32, heads.queries => u32, kv => u32, dim => u32) -> [u64; 3]);
        prop_assert_eq!(query, start + u64::from(head * dim));
        prop_assert_eq!(key, start + u64::from((heads.queries + head % kv) * dim));
        prop_assert_eq!(value, start + u64::from((heads.queries + kv + head % kv) * dim));
    }

    #[test]
    fn vectors_of_a_group_are_numbered_as_on_the_cpu(group in 1u32..9, kv_head in 0u32..8, row in 0u32..1000, member in 0u32..8) {
        let Some(host) = host() else { return Ok(()) };
        let member = member % group;
        // `Block::prepare`: query `row * group + member`, of head `head * group + member`.
        let [of_row, of_head] = call!(host, index_vector(row * group + member => u32, kv_head => u32, group => u32) -> [u32; 2]);
        prop_assert_eq!((of_row, of_head), (row, kv_head * group + member));
    }

    #[test]
    fn parts_do_not_overlap(rows in 1u32..6, heads in 1u32..6, splits in 1u32..6) {
        let Some(host) = host() else { return Ok(()) };
        let mut seen = vec![0; (rows * heads * splits) as usize];
        for (row, head, split) in (0..rows).flat_map(|r| (0..heads).flat_map(move |h| (0..splits).map(move |s| (r, h, s)))) {
            seen[call!(host, index_part_at(row => u32, head => u32, split => u32, heads => u32, splits => u32) -> u64) as usize] += 1;
        }
        prop_assert!(seen.iter().all(|&count| count == 1));
    }

    #[test]
    fn numbers_are_rounded_as_half_does(bits in any::<u32>(), short in any::<u16>()) {
        let Some(host) = host() else { return Ok(()) };
        let value = f32::from_bits(bits);
        let rounded = call!(host, number_to_bf16(value => f32) -> u32);
        prop_assert_eq!(rounded, u32::from(bf16::from_f32(value).to_bits()));
        let wide = call!(host, number_from_f16(short => u16) -> f32);
        let expected = f16::from_bits(short).to_f32();
        prop_assert!(wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan());
    }
}

#[test]
fn a_row_sees_the_tiles_that_hold_columns_it_sees_and_no_other() {
    let Some(host) = host() else { return };
    for tile in [1, 16, 64] {
        for limit in 1..200 {
            let seen = (0..limit).map(|column| column / tile).max().unwrap() + 1;
            for index in 0..8 {
                let column = index * tile;
                let [tiles, some, all] =
                    call!(host, index_sees(limit => u32, column => u32, tile => u32) -> [u32; 3]);
                assert_eq!(tiles, seen);
                let within = (column..column + tile).filter(|&column| column < limit).count() as u32;
                assert_eq!(
                    (some != 0, all != 0),
                    (within > 0, within == tile),
                    "limit {limit}, column {column}"
                );
                assert_eq!(some != 0, index < tiles);
            }
        }
    }
}

#[test]
fn ranges_are_all_tiles_once_and_in_order() {
    let Some(host) = host() else { return };
    for count in 0..70 {
        for splits in 1..70 {
            let mut next = 0;
            for split in 0..splits {
                let [start, end] =
                    call!(host, index_split(count => u32, split => u32, splits => u32) -> [u32; 2]);
                assert!(start <= end);
                assert!(start == next || start == end);
                next = next.max(end);
            }
            assert_eq!(next, count);
        }
    }
}

#[test]
fn shared_tiles_have_every_chunk_once_and_matrix_loads_touch_every_bank_once() {
    let Some(host) = host() else { return };
    for dim in [32, 64, 128] {
        let at =
            |row: u32, chunk: u32| call!(host, index_swizzled(row => u32, chunk => u32, dim => u32) -> u32);
        let chunks = dim / 8;
        let mut seen: Vec<u32> =
            (0..64).flat_map(|row| (0..chunks).map(move |chunk| at(row, chunk))).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..64 * chunks).map(|index| index * 8).collect::<Vec<_>>());
        for (row, chunk) in (0..64).step_by(8).flat_map(|row| (0..chunks).map(move |chunk| (row, chunk))) {
            // A bank is four bytes, two elements; a row of a matrix is four banks.
            let banks: std::collections::BTreeSet<u32> =
                (0..8).map(|i| at(row + i, chunk) / 2 % 32 / 4).collect();
            assert_eq!(banks.len(), 8, "dim {dim}, rows {row}.., chunk {chunk}");
        }
    }
}

#[test]
fn lanes_name_rows_of_matrices_in_the_order_of_registers() {
    let Some(host) = host() else { return };
    for lane in 0..32 {
        let [row, column, key_token, key_chunk, value_token, value_chunk] =
            call!(host, index_lane(lane => u32) -> [u32; 6]);
        assert_eq!((row, column), (lane / 4, 2 * (lane % 4)));
        let (matrix, of_matrix) = (lane / 8, lane % 8);
        // Registers of B: rows 0–7, rows 8–15 of one product, then of the next. For keys rows are dimensions.
        assert_eq!((key_token, key_chunk), (matrix / 2 * 8 + of_matrix, matrix % 2));
        assert_eq!((value_token, value_chunk), (matrix % 2 * 8 + of_matrix, matrix / 2));
    }
}

#[test]
fn launches_have_the_constants_of_the_kernels() {
    let Some(host) = host() else { return };
    let all = call!(host, constants() -> [u32; 17]);
    let pages = Paged { pool: 16, tables: 16, stride: 0 };
    let rows = Rows { data: 16, stride: HEADS.row(), positions: 16, count: 1 };
    let (parts, to) = (Parts { sums: 16, stats: 16, splits: 1 }, Attended { out: 16, logs: 0 });
    let angles = launch::Angles { cosines: 16, sines: 16 };
    let attend = launch::attend_rows(HEADS, pages, rows, to, None);
    let decode = launch::decode(HEADS, pages, rows, parts);
    let expected = [
        PAGE_TOKENS as u32,
        8,
        size_of::<launch::Span>() as u32,
        launch::place(HEADS, pages, 16, (Stored::Bf16, false), (16, 1, 1), angles).threads,
        launch::scatter(HEADS, pages, rows, angles).threads,
        launch::ATTEND_TILE,
        launch::ATTEND_VECTORS,
        attend.threads,
        decode.grid[1] / HEADS.kv,
        decode.threads,
        launch::merge(HEADS, 1, parts, to).threads,
        4,
        launch::probe(HEADS, pages, rows, 1, 16, cacheclip_kernels::probe::Reduce::Mean, 16).threads,
        attend.shared,
        decode.shared,
        rows::ROWS_THREADS,
        rows::norm(16, 16, (1, 8), 0.0, 16).shared,
    ];
    assert_eq!(all, expected);
    // A warp to a vector, a page to a warp.
    assert_eq!(launch::merge(HEADS, 9, parts, to).grid[0], (9 * HEADS.queries).div_ceil(4));
}
