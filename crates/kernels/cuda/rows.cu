// What happens to rows between products: gather_rows, norm_rows, norm_heads, add_bias, gate_rows; export_rows, by which
// fresh keys and values leave the device; random_weights.
//
// CPU reference: crates/kernels/src/ops.rs (`rms_norm`, `silu_gate`, `add_bias`); for norm_heads, gather_rows and
// export_rows `norm_heads`, `embed` and `export` of crates/model/src/cpu.rs; for random_weights
// crates/kernels/src/random.rs.
//
// Shapes: x bf16 `[rows, width]`, width a multiple of CHUNK; weight and bias f32 `[width]`; gate_up `[rows, 2 width]`,
// the gates before the ups; indices u32 `[rows]`; qkv bf16 `[rows, (heads + 2 kv_heads) HEAD_DIM]`. Sums are f32, in a
// fixed order; each result is rounded once.
//
// Floor, for n = rows * width elements that are written:
//   bytes  4 n (gather_rows, norm_rows, add_bias, export_rows), 6 n (gate_rows), 2 n (random_weights),
//          4 rows (heads + kv_heads) HEAD_DIM (norm_heads)
//   FLOPs  a few per element: never the limit
#include "warp.cuh"

#ifndef HEAD_DIM
#error "HEAD_DIM is the width of a head"
#endif

namespace cacheclip {

constexpr u32 ROWS_THREADS = 256, ROWS_WARPS = ROWS_THREADS / LANES;
/// Elements of a head that one lane has.
constexpr u32 OWN = HEAD_DIM / LANES;

/// Sum over the lanes of a warp, the same in each.
__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (u32 mask = 1; mask < LANES; mask *= 2) {
        value += exchange(value, mask);
    }
    return value;
}

__device__ __forceinline__ float inverse_root(float value) {
#ifdef __CUDA_ARCH__
    return rsqrtf(value);
#elif defined(__CUDACC__)
    return value;
#else
    return 1.0f / std::sqrt(value);
#endif
}

__device__ __forceinline__ float silu(float value) {
    // e^-x as a power of two; what overflows gives a zero.
    return value / (1.0f + power_of_two(value * -1.44269504f));
}

/// `count` as a float, rounded to nearest.
__device__ __forceinline__ float to_float(u32 count) {
#ifdef __CUDA_ARCH__
    return __uint2float_rn(count);
#else
    return float(count);
#endif
}

__device__ __forceinline__ float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

/// Value `index` of the pseudo-random sequence `base`: splitmix64, uniform in [-bound, bound], cut to bf16.
__device__ __forceinline__ u16 random_value(u64 base, u64 index, float bound) {
    u64 z = base + index * 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    const float unit = quotient(to_float(u32(z ^ z >> 31)), 4294967296.0f);
    return u16(float_to_bits(times(plus(times(unit, 2.0f), -1.0f), bound)) >> 16);
}

}  // namespace cacheclip

// Rows of a table, or of other rows.
CACHECLIP_KERNEL(cacheclip::ROWS_THREADS, 1)
gather_rows(
    const unsigned short* from, const unsigned int* indices, unsigned int rows, unsigned int width, unsigned short* out
) {
    using namespace cacheclip;
    const u64 index = u64(block_x()) * ROWS_THREADS + thread_index();
    const u32 chunks = width / CHUNK;
    if (index >= u64(rows) * chunks) {
        return;
    }
    const u32 row = u32(index / chunks), chunk = u32(index % chunks);
    store_chunk(out + index * CHUNK, load_chunk(from + u64(indices[row]) * width + chunk * CHUNK));
}

// One block to a row, which is read twice: the second time from the first-level cache.
CACHECLIP_KERNEL(cacheclip::ROWS_THREADS, 1)
norm_rows(const unsigned short* x, const float* weight, unsigned int width, float eps, unsigned short* out) {
    using namespace cacheclip;
    CACHECLIP_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
    const u64 first = u64(block_x()) * width;
    float sum = 0, value[CHUNK];
    for (u32 at = thread_index() * CHUNK; at < width; at += ROWS_THREADS * CHUNK) {
        unpack(load_chunk(x + first + at), value);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) {
            sum += value[i] * value[i];
        }
    }
    sum = sum_of_warp(sum);
    if (thread_index() % LANES == 0) {
        sums[thread_index() / LANES] = sum;
    }
    block_barrier();
    sum = 0;
#pragma unroll
    for (u32 warp = 0; warp < ROWS_WARPS; ++warp) {
        sum += sums[warp];
    }
    const float factor = inverse_root(sum / float(width) + eps);
    for (u32 at = thread_index() * CHUNK; at < width; at += ROWS_THREADS * CHUNK) {
        unpack(load_chunk(x + first + at), value);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) {
            value[i] = value[i] * factor * reinterpret_cast<const Quad*>(weight + at)[i / 4].value[i % 4];
        }
        store_chunk(out + first + at, packed(value));
    }
}

// One warp to a head; queries and keys in place, values as they are.
CACHECLIP_KERNEL(cacheclip::ROWS_THREADS, 1)
norm_heads(
    unsigned short* qkv, unsigned int rows, unsigned int heads, unsigned int kv_heads, const float* query,
    const float* key, float eps
) {
    using namespace cacheclip;
    const u32 lane = thread_index() % LANES, normed = heads + kv_heads;
    const u32 index = block_x() * ROWS_WARPS + thread_index() / LANES;
    // All lanes of a warp leave together.
    if (index >= rows * normed) {
        return;
    }
    const u32 row = index / normed, head = index % normed;
    u16* at = qkv + row_query(row, head, row_width(heads, kv_heads, HEAD_DIM), HEAD_DIM) + lane * OWN;
    const float* weight = (head < heads ? query : key) + lane * OWN;
    float value[OWN], sum = 0;
#pragma unroll
    for (u32 i = 0; i < OWN; ++i) {
        value[i] = low_bf16(at[i]);
        sum += value[i] * value[i];
    }
    const float factor = inverse_root(sum_of_warp(sum) / float(HEAD_DIM) + eps);
#pragma unroll
    for (u32 i = 0; i < OWN; ++i) {
        at[i] = u16(pack_bf16(value[i] * factor * weight[i], 0));
    }
}

CACHECLIP_KERNEL(cacheclip::ROWS_THREADS, 1)
add_bias(unsigned short* x, const float* bias, unsigned int rows, unsigned int width) {
    using namespace cacheclip;
    const u64 index = u64(block_x()) * ROWS_THREADS + thread_index();
    if (index >= u64(rows) * (width / CHUNK)) {
        return;
    }
    const u32 at = u32(index % (width / CHUNK)) * CHUNK;
    float value[CHUNK];
    unpack(load_chunk(x + index * CHUNK), value);
#pragma unroll
    for (u32 i = 0; i < CHUNK; ++i) {
        value[i] += reinterpret_cast<const Quad*>(bias + at)[i / 4].value[i % 4];
    }
    store_chunk(x + index * CHUNK, packed(value));
}

CACHECLIP_KERNEL(cacheclip::ROWS_THREADS, 1)
gate_rows(const unsigned short* gate_up, unsigned int rows, unsigned int width, unsigned short* out) {
    using namespace cacheclip;
    const u64 index = u64(block_x()) * ROWS_THREADS + thread_index();
    const u32 chunks = width / CHUNK;
    if (index >= u64(rows) * chunks) {
        return;
    }
    const u16* from = gate_up + index / chunks * (2 * u64(width)) + index % chunks * CHUNK;
    float value[CHUNK], up[CHUNK];
    unpack(load_chunk(from), value);
    unpack(load_chunk(from + width), up);
#pragma unroll
    for (u32 i = 0; i < CHUNK; ++i) {
        value[i] = silu(value[i]) * up[i];
    }
    store_chunk(out + index * CHUNK, packed(value));
}

// Keys and values of rows as they are stored: K `[kv_heads, rows, HEAD_DIM]`, then V.
CACHECLIP_KERNEL(cacheclip::ROWS_THREADS, 1)
export_rows(
    const unsigned short* qkv, unsigned int rows, unsigned int heads, unsigned int kv_heads, unsigned short* out
) {
    using namespace cacheclip;
    constexpr u32 CHUNKS = HEAD_DIM / CHUNK;
    const u64 index = u64(block_x()) * ROWS_THREADS + thread_index();
    if (index >= stored_elements(kv_heads, rows, HEAD_DIM) / CHUNK) {
        return;
    }
    // Heads of K, then heads of V: as `stored_key` numbers them, and as a row has them behind its queries.
    const u32 chunk = u32(index % CHUNKS), row = u32(index / CHUNKS % rows), head = u32(index / CHUNKS / rows);
    const u64 from = row_query(row, heads + head, row_width(heads, kv_heads, HEAD_DIM), HEAD_DIM) + chunk * CHUNK;
    store_chunk(out + stored_key(head, row, rows, HEAD_DIM) + chunk * CHUNK, load_chunk(qkv + from));
}

CACHECLIP_KERNEL(cacheclip::ROWS_THREADS, 1)
random_weights(unsigned short* out, unsigned long long count, unsigned long long base, float bound) {
    using namespace cacheclip;
    const u64 index = u64(block_x()) * ROWS_THREADS + thread_index();
    if (index < count) {
        out[index] = random_value(base, index, bound);
    }
}
