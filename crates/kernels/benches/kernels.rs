//! Speeds of the kernels at the shapes of small published models: `cargo bench --bench kernels [-- FILTER]`.
//!
//! Throughput is in floating-point operations per second. `RAYON_NUM_THREADS=1` gives the speed of one core.

use cacheclip_kernels::attend::{Queries, attend_each, attend_rows};
use cacheclip_kernels::matrix::Matrix;
use cacheclip_kernels::page::{HeadShape, LayerView, pages_for};
use cacheclip_kernels::place::{StoredLayer, place, scatter};
use cacheclip_kernels::probe::{Look, Reduce, attend_and_look};
use cacheclip_kernels::rope::RopeTable;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

/// Inputs and outputs of the projections of SmolLM2-135M: attention in and out, MLP in and out, and the head.
const PROJECTIONS: [(usize, usize); 5] = [(576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152)];

/// Values between −1 and 1 that bf16 holds exactly.
fn values(count: usize) -> Vec<f32> {
    let value = |i: usize| (i.wrapping_mul(2_654_435_761) % 1000) as f32 / 500.0 - 1.0;
    (0..count).map(|i| f32::from_bits(value(i).to_bits() & 0xffff_0000)).collect()
}

fn project(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("project");
    for (inputs, outputs) in PROJECTIONS {
        let matrix = Matrix::new(values(inputs * outputs), outputs, inputs);
        // A head projects one row of a prompt.
        for rows in [1, 8, 64, 1024].into_iter().filter(|&rows| outputs < 10_000 || rows <= 64) {
            let (x, mut out) = (values(rows * inputs), vec![0.0; rows * outputs]);
            group.throughput(Throughput::Elements(2 * (rows * inputs * outputs) as u64));
            group.bench_function(BenchmarkId::new(format!("{inputs}x{outputs}"), rows), |bencher| {
                bencher.iter(|| matrix.project(black_box(&x), &mut out));
            });
        }
    }
    group.finish();
}

/// Query and KV heads of width 64: SmolLM2-135M, Qwen2.5-0.5B, and the auxiliary shape of 30M parameters.
const HEADS: [(usize, usize); 3] = [(9, 3), (14, 2), (8, 4)];
const DIM: usize = 64;

/// Pools of one layer each, which together are more than a processor caches, and the pages of a sequence in all of them.
fn pools(shape: HeadShape, columns: usize, bytes: usize) -> (Vec<Vec<f32>>, Vec<u32>) {
    let pages = pages_for(columns);
    let count = bytes.div_ceil(pages * shape.page() * size_of::<f32>());
    let table = (0..pages).map(|page| (page * 7919 % pages) as u32).collect();
    ((0..count).map(|_| values(pages * shape.page())).collect(), table)
}

/// Last rows of a sequence, as a block of a prefill has them.
fn attend(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attend");
    for (heads, kv_heads) in HEADS {
        let shape = HeadShape { kv_heads, head_dim: DIM };
        for (rows, columns) in [(1024, 2048), (1024, 4096), (1024, 16_384), (32, 8192)] {
            let (pools, table) = pools(shape, columns, 1);
            let positions: Vec<u32> = ((columns - rows) as u32..columns as u32).collect();
            let (data, mut out) = (values(rows * heads * DIM), vec![0.0; rows * heads * DIM]);
            let view = LayerView { pool: &pools[0], table: &table, shape };
            let queries = Queries { data: &data, stride: heads * DIM, heads, positions: &positions };
            let seen: usize = positions.iter().map(|&position| position as usize + 1).sum();
            group.throughput(Throughput::Elements((4 * heads * DIM * seen) as u64));
            let id =
                |name| BenchmarkId::new(format!("{heads}/{kv_heads}/{name}"), format!("{rows}x{columns}"));
            group.bench_function(id("rows"), |bencher| {
                bencher.iter(|| attend_rows(&view, black_box(queries), &mut out));
            });
            if rows == 32 {
                let look =
                    Look { first: 0, columns: columns - rows, heads: Reduce::Max, rows: Some(Reduce::Max) };
                group.bench_function(id("rows and look"), |bencher| {
                    bencher.iter(|| attend_and_look(&view, black_box(queries), look, &mut out));
                });
            }
        }
    }
    group.finish();
}

/// One row of each of several sequences, whose keys and values come from memory: throughput is in bytes of those.
fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    for (heads, kv_heads) in HEADS {
        let shape = HeadShape { kv_heads, head_dim: DIM };
        for (sequences, columns) in [(1, 2048), (1, 8192), (4, 2048)] {
            let (pools, table) = pools(shape, columns, 96 << 20);
            let positions = vec![columns as u32 - 1; sequences];
            let (data, mut out) = (values(sequences * heads * DIM), vec![0.0; sequences * heads * DIM]);
            let queries = Queries { data: &data, stride: heads * DIM, heads, positions: &positions };
            group.throughput(Throughput::Bytes((sequences * columns * kv_heads * 2 * DIM * 4) as u64));
            let id = BenchmarkId::new(format!("{heads}/{kv_heads}"), format!("{sequences}x{columns}"));
            let mut next = (0..pools.len()).cycle();
            group.bench_function(id, |bencher| {
                bencher.iter(|| {
                    let first = next.nth(sequences - 1).unwrap_or_default();
                    let view_of = |row: usize| LayerView {
                        pool: &pools[(first + row) % pools.len()],
                        table: &table,
                        shape,
                    };
                    attend_each(view_of, black_box(queries), &mut out);
                });
            });
        }
    }
    group.finish();
}

/// A block of 1024 rows on its way into the pages of one layer, fresh and from the store.
fn write(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("write");
    let (heads, kv_heads) = HEADS[0];
    let (rows, shape) = (1024, HeadShape { kv_heads, head_dim: DIM });
    let (mut pools, table) = pools(shape, rows, 1);
    let rope = RopeTable::new(DIM, rows, 100_000.0, None);
    let positions: Vec<u32> = (0..rows as u32).collect();
    let mut qkv = values(rows * (heads + 2 * kv_heads) * DIM);
    group.bench_function("scatter", |bencher| {
        bencher.iter(|| scatter(&mut pools[0], &table, shape, heads, &mut qkv, &positions, &rope));
    });
    let (k, v) = (values(rows * kv_heads * DIM), values(rows * kv_heads * DIM));
    group.bench_function("place", |bencher| {
        let stored = StoredLayer { k: &k, v: &v, tokens: rows };
        bencher.iter(|| place(&mut pools[0], &table, shape, stored, 0, &rope));
    });
    group.finish();
}

criterion_group!(benches, project, attend, decode, write);
criterion_main!(benches);
