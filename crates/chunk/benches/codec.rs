//! Speeds of what KV passes on its way into and out of a container, on one core: `cargo bench --bench codec`.
//!
//! Throughput is in bytes of KV. Values are drawn as activations are distributed, closely enough for exponents to
//! compress; `cacheclip bench codec` measures on the KV of models.

use cacheclip_chunk::container::planes::{join, split};
use cacheclip_chunk::{ChunkKey, Codec, Container, Dtype, KvShape, LayoutId, Parts, encode};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

/// One layer of Llama 3.1 8B over 256 tokens.
const SHAPE: KvShape = KvShape { layers: 1, kv_heads: 8, head_dim: 128 };
const TOKENS: u32 = 256;

/// Sums of few random numbers: their exponents are near each other, their mantissas are noise.
fn layer(dtype: Dtype) -> Vec<u8> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let elements = SHAPE.layer_bytes(TOKENS, dtype) as usize / dtype.size();
    let values = (0..elements).map(|_| uniform() + uniform() + uniform());
    // The upper half of an f32 is a bf16.
    values.flat_map(|value| value.to_le_bytes()[4 - dtype.size()..].to_vec()).collect()
}

fn planes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("planes");
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let raw = layer(dtype);
        let apart = split(&raw, dtype.size());
        group.throughput(Throughput::Bytes(raw.len() as u64));
        group.bench_function(BenchmarkId::new("split", dtype), |it| {
            it.iter(|| split(black_box(&raw), dtype.size()));
        });
        group.bench_function(BenchmarkId::new("join", dtype), |it| {
            it.iter(|| join(black_box(&apart), dtype.size()));
        });
    }
    group.finish();
}

fn container(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("container");
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let raw = layer(dtype);
        let parts = Parts {
            layout: LayoutId::from_bytes([1; 32]),
            key: ChunkKey::from_bytes([2; 32]),
            shape: SHAPE,
            tokens: TOKENS,
            dtype,
            layers: vec![&raw],
            spans: None,
            rank: None,
        };
        group.throughput(Throughput::Bytes(raw.len() as u64));
        for (name, codec) in [("raw", Codec::Raw), ("planes-zstd-1", Codec::COMPRESSED)] {
            group.bench_function(BenchmarkId::new(format!("encode-{name}"), dtype), |it| {
                it.iter(|| encode(black_box(&parts), codec).expect("whole parts"));
            });
            let bytes = encode(&parts, codec).expect("whole parts");
            let container = Container::parse(bytes.into()).expect("a container");
            group.bench_function(BenchmarkId::new(format!("verify-decode-{name}"), dtype), |it| {
                it.iter(|| black_box(&container).layer(0).expect("an undamaged layer"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, planes, container);
criterion_main!(benches);
