// probe: attention probabilities that rows give to columns, reduced over heads; probe_reduce: then over rows.
//
// CPU reference: crates/kernels/src/probe.rs, `probe_rows` and `probe`. There the sweep that attends keeps its weights;
// here scores are computed again, because weights of all heads would be written and read at four bytes each, and keys
// are two bytes for all query heads of a group. What a probability needs besides is one number per row and head, the
// `logs` that `attend_rows` (or `merge`) left.
//
// Shapes: queries bf16 `[rows, stride]`, rotated; positions u32 `[rows]`, ascending; logs f32 `[rows, heads]`;
// out f32 `[rows, columns]`, zero where a row does not see; reduced f32 `[columns]`. All pointers begin with the first row
// looked at.
//
// Floor, for r rows that see most of the columns:
//   bytes  columns * (2 * HEAD_DIM * kv_heads + 4 * r)       keys once, probabilities once
//   FLOPs  2 * HEAD_DIM * heads * r * columns                one exponential for each of heads * r * columns besides
//
// A warp has one page of columns and 16 rows. It goes through the heads with its sums in registers, so that the order of
// summation is fixed and nothing is added atomically. Dimensions enter the products in an order in which a lane's
// operands are 16 bytes on end, the same for queries and keys: no shared memory, no barriers.
#include "warp.cuh"

#if !defined(HEAD_DIM) || !defined(GROUP)
#error "HEAD_DIM is the width of a head, GROUP the number of query heads to a KV head"
#endif

namespace cacheclip {

constexpr u32 PROBE_WARPS = 4, PROBE_THREADS = PROBE_WARPS * LANES;
/// Dimensions that four lanes have in chunks: two products deep.
constexpr u32 STRIP = 4 * CHUNK;
constexpr u32 STRIPS = HEAD_DIM / STRIP;
/// Reductions, as `Reduce` of the CPU: mean 0, max 1.
constexpr u32 MAX = 1;

__device__ __forceinline__ float fold(u32 reduce, float into, float value) {
    return reduce == MAX ? larger(into, value) : into + value;
}

}  // namespace cacheclip

CACHECLIP_KERNEL(cacheclip::PROBE_THREADS, 1)
probe(
    const unsigned short* pool, const unsigned int* table, const unsigned short* queries, unsigned int stride,
    const unsigned int* positions, unsigned int rows, unsigned int kv_heads, unsigned int columns, float scale,
    const float* logs, unsigned int reduce, float* out
) {
    using namespace cacheclip;
    const u32 lane = thread_index() % LANES, page = block_x() * PROBE_WARPS + thread_index() / LANES;
    const u32 column = page * PAGE_TOKENS, first = block_y() * FRAGMENT, heads = kv_heads * GROUP;
    if (column >= columns) {
        return;
    }
    float folded[2][4] = {};
    // Pages that no row of the tile sees need not exist.
    if (sees_some(limit_of(positions[least(first + FRAGMENT, rows) - 1]), column)) {
        const u32 entry = table[page];
        u32 row[2], limit[2];
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 own = first + fragment_row(lane) + 8 * half;
            // A row that is not there reads the last one's queries and sees nothing.
            row[half] = least(own, rows - 1);
            limit[half] = own < rows ? limit_of(positions[own]) : 0;
        }
        for (u32 kv_head = 0; kv_head < kv_heads; ++kv_head) {
            Chunk key[2][STRIPS];
#pragma unroll
            for (u32 n = 0; n < 2; ++n) {
                const u16* from = pool + key_at(entry, kv_head, n * 8 + lane / 4, kv_heads, HEAD_DIM);
#pragma unroll
                for (u32 strip = 0; strip < STRIPS; ++strip) {
                    key[n][strip] = load_chunk(from + strip * STRIP + lane % 4 * CHUNK);
                }
            }
            for (u32 member = 0; member < GROUP; ++member) {
                const u32 head = kv_head * GROUP + member;
                float scores[2][4] = {};
#pragma unroll
                for (u32 strip = 0; strip < STRIPS; ++strip) {
                    Chunk query[2];
#pragma unroll
                    for (u32 half = 0; half < 2; ++half) {
                        const u16* from = queries + row_query(row[half], head, stride, HEAD_DIM);
                        query[half] = load_chunk(from + strip * STRIP + lane % 4 * CHUNK);
                    }
#pragma unroll
                    for (u32 k = 0; k < 2; ++k) {
                        const u32 a[4] = {
                            query[0].pair[2 * k], query[1].pair[2 * k], query[0].pair[2 * k + 1],
                            query[1].pair[2 * k + 1]
                        };
#pragma unroll
                        for (u32 n = 0; n < 2; ++n) {
                            multiply(scores[n], a, key[n][strip].pair[2 * k], key[n][strip].pair[2 * k + 1]);
                        }
                    }
                }
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const float log = logs[u64(row[half]) * heads + head];
#pragma unroll
                    for (u32 n = 0; n < 2; ++n) {
#pragma unroll
                        for (u32 j = 2 * half; j < 2 * half + 2; ++j) {
                            const bool seen = sees_some(limit[half], column + n * 8 + fragment_column(lane) + j % 2);
                            // Chosen, not multiplied: a slot that nobody wrote may hold anything.
                            const float probability = seen ? power_of_two(scores[n][j] * scale - log) : 0.0f;
                            folded[n][j] = fold(reduce, folded[n][j], probability);
                        }
                    }
                }
            }
        }
    }
    const float whole = reduce == MAX ? 1.0f : 1.0f / float(heads);
#pragma unroll
    for (u32 n = 0; n < 2; ++n) {
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            const u32 own = first + fragment_row(lane) + 8 * (j / 2);
            const u32 at = column + n * 8 + fragment_column(lane) + j % 2;
            if (own < rows && at < columns) {
                out[u64(own) * columns + at] = folded[n][j] * whole;
            }
        }
    }
}

CACHECLIP_KERNEL(cacheclip::PROBE_THREADS, 1)
probe_reduce(const float* probabilities, unsigned int rows, unsigned int columns, unsigned int reduce, float* reduced) {
    using namespace cacheclip;
    const u32 column = block_x() * PROBE_THREADS + thread_index();
    if (column >= columns) {
        return;
    }
    float folded = 0;
    for (u32 row = 0; row < rows; ++row) {
        folded = fold(reduce, folded, probabilities[u64(row) * columns + column]);
    }
    reduced[column] = reduce == MAX || rows == 0 ? folded : folded / float(rows);
}
