// attend_rows: rows at arbitrary positions against the whole paged cache of one sequence.
//
// CPU reference: crates/kernels/src/attend.rs, `attend_rows`. All rows make it full prefill, a block of rows chunked
// prefill, selected rows repair. A row sees the columns at or before its own position; no mask is stored anywhere.
//
// Shapes: queries bf16 `[rows, stride]`, rotated, GROUP * kv_heads heads of HEAD_DIM at the beginning of each row;
// positions u32 `[rows]`, ascending; table: page i holds positions 16 i .. 16 i + 16; out bf16 `[rows, heads, HEAD_DIM]`;
// logs f32 `[rows, heads]` or null: log2 of the sum of 2^(scale * score), from which `probe` has probabilities again.
// With more than one range of columns (grid z), sums f32 `[rows, heads, ranges, HEAD_DIM]` and stats
// `[rows, heads, ranges, 2]` are written instead and `merge` (decode.cu) makes rows of them.
//
// Floor, where row r sees c(r) columns, C = sum of c(r):
//   FLOPs  4 * HEAD_DIM * heads * C                      two products; this is the limit from some 100 rows up
//   bytes  4 * HEAD_DIM * kv_heads * max c(r)            keys and values once, plus
//          4 * HEAD_DIM * heads * rows                   queries and results
//
// After FlashAttention-2 (Dao, arXiv 2307.08691): a block of query vectors stays in registers while tiles of keys and
// values pass through shared memory, softmax is online and in f32, and the result is divided once, at the end. What
// differs: vectors of one block are the query heads that share a KV head, row by row, so that a tile is read once for
// the whole group; limits are per row; and a warp leaves out tiles behind its own last row.
#include "warp.cuh"

#if !defined(HEAD_DIM) || !defined(GROUP)
#error "HEAD_DIM is the width of a head, GROUP the number of query heads to a KV head"
#endif
#ifndef ATTEND_WARPS
#define ATTEND_WARPS 8
#endif

namespace cacheclip {

/// Columns per tile: four pages.
constexpr u32 ATTEND_TILE = 64;
constexpr u32 ATTEND_THREADS = ATTEND_WARPS * LANES;
/// Query vectors per block: one fragment's rows for each warp.
constexpr u32 ATTEND_VECTORS = ATTEND_WARPS * FRAGMENT;
/// Elements of a tile of keys; one of values follows. Two such pairs: one is computed with while the other is filled.
constexpr u32 ATTEND_STAGE = ATTEND_TILE * HEAD_DIM;

/// Two f32, one access.
struct alignas(8) Pair {
    float value[2];
};

/// Begins to copy a tile of keys and one of values. What no row of the block sees becomes zeros: a weight of zero
/// would not undo a NaN that a page's last owner left there.
__device__ __forceinline__ void load_tile(
    u16* stage, const u16* pool, const u32* table, u32 kv_head, u32 kv_heads, u32 column, u32 limit
) {
    constexpr u32 CHUNKS = HEAD_DIM / CHUNK;
    static_assert(ATTEND_TILE * CHUNKS % ATTEND_THREADS == 0, "threads copy equally many chunks");
#pragma unroll
    for (u32 i = 0; i < ATTEND_TILE * CHUNKS / ATTEND_THREADS; ++i) {
        const u32 index = i * ATTEND_THREADS + thread_index(), token = index / CHUNKS, chunk = index % CHUNKS;
        const bool present = sees_some(limit, column + token);
        const u32 position = present ? column + token : 0, page = table[page_of(position)];
        const u64 from = key_at(page, kv_head, slot_of(position), kv_heads, HEAD_DIM) + chunk * CHUNK;
        u16* to = stage + swizzled(token, chunk, HEAD_DIM);
        copy_chunk(to, pool + from, present);
        copy_chunk(to + ATTEND_STAGE, pool + from + tile_size(HEAD_DIM), present);
    }
}

/// Queries of a warp and what they have gathered. Index `half` is 0 for a lane's upper row of the fragments, 1 for its
/// lower.
struct Gathered {
    u32 query[HEAD_DIM / FRAGMENT][4];
    float sum[HEAD_DIM / 8][4];
    float peak[2], total[2];
    /// Columns seen; 0 where there is no such vector.
    u32 limit[2];
};

/// Scores of a tile: products with its keys.
__device__ __forceinline__ void score(float (&scores)[ATTEND_TILE / 8][4], const Gathered& rows, const u16* keys, u32 lane) {
#pragma unroll
    for (u32 n = 0; n < ATTEND_TILE / 8; ++n) {
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            scores[n][j] = 0;
        }
    }
#pragma unroll
    for (u32 k = 0; k < HEAD_DIM / FRAGMENT; ++k) {
#pragma unroll
        for (u32 n = 0; n < ATTEND_TILE / FRAGMENT; ++n) {
            u32 b[4];
            load_matrices(b, keys + swizzled(n * FRAGMENT + key_load_token(lane), 2 * k + key_load_chunk(lane), HEAD_DIM));
            multiply(scores[2 * n], rows.query[k], b[0], b[1]);
            multiply(scores[2 * n + 1], rows.query[k], b[2], b[3]);
        }
    }
}

/// Makes weights of scores, under each row's highest score so far; earlier sums shrink to it.
__device__ __forceinline__ void soften(float (&scores)[ATTEND_TILE / 8][4], Gathered& rows, float scale) {
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float most = nothing();
#pragma unroll
        for (u32 n = 0; n < ATTEND_TILE / 8; ++n) {
            most = larger(most, larger(scores[n][2 * half], scores[n][2 * half + 1]));
        }
        const float peak = larger(rows.peak[half], largest_of_quad(most) * scale);
        // A row that has seen nothing yet keeps weights of zero, not of NaN.
        const float base = peak == nothing() ? 0.0f : peak, shrink = power_of_two(rows.peak[half] - base);
        float total = 0;
#pragma unroll
        for (u32 n = 0; n < ATTEND_TILE / 8; ++n) {
#pragma unroll
            for (u32 j = 2 * half; j < 2 * half + 2; ++j) {
                scores[n][j] = power_of_two(scores[n][j] * scale - base);
                total += scores[n][j];
            }
        }
        rows.peak[half] = peak;
        rows.total[half] = rows.total[half] * shrink + total;
#pragma unroll
        for (u32 n = 0; n < HEAD_DIM / 8; ++n) {
            rows.sum[n][2 * half] *= shrink;
            rows.sum[n][2 * half + 1] *= shrink;
        }
    }
}

/// Adds a tile's values under their weights. C of one product is A of the next: pairs of columns lie in the same lanes.
__device__ __forceinline__ void accumulate(
    Gathered& rows, const float (&weights)[ATTEND_TILE / 8][4], const u16* values, u32 lane
) {
#pragma unroll
    for (u32 k = 0; k < ATTEND_TILE / FRAGMENT; ++k) {
        const u32 a[4] = {
            pack_bf16(weights[2 * k][0], weights[2 * k][1]),
            pack_bf16(weights[2 * k][2], weights[2 * k][3]),
            pack_bf16(weights[2 * k + 1][0], weights[2 * k + 1][1]),
            pack_bf16(weights[2 * k + 1][2], weights[2 * k + 1][3]),
        };
#pragma unroll
        for (u32 n = 0; n < HEAD_DIM / FRAGMENT; ++n) {
            u32 b[4];
            load_transposed(
                b, values + swizzled(k * FRAGMENT + value_load_token(lane), 2 * n + value_load_chunk(lane), HEAD_DIM)
            );
            multiply(rows.sum[2 * n], a, b[0], b[1]);
            multiply(rows.sum[2 * n + 1], a, b[2], b[3]);
        }
    }
}

}  // namespace cacheclip

CACHECLIP_KERNEL(cacheclip::ATTEND_THREADS, 1)
attend_rows(
    const unsigned short* pool, const unsigned int* table, const unsigned short* queries, unsigned int stride,
    const unsigned int* positions, unsigned int rows, unsigned int kv_heads, float scale, unsigned short* out,
    float* logs, float* sums, float* stats
) {
    using namespace cacheclip;
    CACHECLIP_SHARED(shared);
    u16* stages = reinterpret_cast<u16*>(shared);
    const u32 lane = thread_index() % LANES, warp = thread_index() / LANES;
    const u32 kv_head = block_y(), heads = kv_heads * GROUP, vectors = rows * GROUP;
    // Late rows see most: their blocks start first.
    const u32 first = (grid_x() - 1 - block_x()) * ATTEND_VECTORS, own = first + warp * FRAGMENT;
    // Of the block, and of this warp's first and last vector (0 where it has none).
    const u32 limit = limit_of(positions[vector_row(least(first + ATTEND_VECTORS, vectors) - 1, GROUP)]);
    const u32 least_limit = own < vectors ? limit_of(positions[vector_row(own, GROUP)]) : 0;
    const u32 most_limit =
        own < vectors ? limit_of(positions[vector_row(least(own + FRAGMENT, vectors) - 1, GROUP)]) : 0;

    Gathered gathered;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 vector = own + fragment_row(lane) + 8 * half, row = vector_row(vector, GROUP);
        const bool present = vector < vectors;
        const u16* query = queries + (present ? row_query(row, vector_head(vector, kv_head, GROUP), stride, HEAD_DIM) : 0);
        gathered.limit[half] = present ? limit_of(positions[row]) : 0;
        gathered.peak[half] = nothing();
        gathered.total[half] = 0;
#pragma unroll
        for (u32 k = 0; k < HEAD_DIM / FRAGMENT; ++k) {
            const u16* from = query + k * FRAGMENT + fragment_column(lane);
            gathered.query[k][half] = present ? *reinterpret_cast<const u32*>(from) : 0;
            gathered.query[k][half + 2] = present ? *reinterpret_cast<const u32*>(from + 8) : 0;
        }
    }
#pragma unroll
    for (u32 n = 0; n < HEAD_DIM / 8; ++n) {
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            gathered.sum[n][j] = 0;
        }
    }

    const Range tiles = split_range(tiles_seen(limit, ATTEND_TILE), block_z(), grid_z());
    if (tiles.start < tiles.end) {
        load_tile(stages, pool, table, kv_head, kv_heads, tiles.start * ATTEND_TILE, limit);
    }
    for (u32 tile = tiles.start; tile < tiles.end; ++tile) {
        const u32 column = tile * ATTEND_TILE, turn = (tile - tiles.start) % 2;
        u16* stage = stages + turn * 2 * ATTEND_STAGE;
        // This tile has come for everybody, and everybody is done with the one before: its place may be filled.
        await_copies();
        block_barrier();
        if (tile + 1 < tiles.end) {
            u16* next = stages + (1 - turn) * 2 * ATTEND_STAGE;
            load_tile(next, pool, table, kv_head, kv_heads, column + ATTEND_TILE, limit);
        }
        if (!sees_some(most_limit, column)) {
            continue;
        }
        float scores[ATTEND_TILE / 8][4];
        score(scores, gathered, stage, lane);
        if (!sees_all(least_limit, column, ATTEND_TILE)) {
#pragma unroll
            for (u32 n = 0; n < ATTEND_TILE / 8; ++n) {
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    if (!sees_some(gathered.limit[j / 2], column + n * 8 + fragment_column(lane) + j % 2)) {
                        scores[n][j] = nothing();
                    }
                }
            }
        }
        soften(scores, gathered, scale);
        accumulate(gathered, scores, stage + ATTEND_STAGE, lane);
    }

#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 vector = own + fragment_row(lane) + 8 * half;
        const float total = sum_of_quad(gathered.total[half]);
        if (vector >= vectors) {
            continue;
        }
        const u32 row = vector_row(vector, GROUP), head = vector_head(vector, kv_head, GROUP);
        if (sums != nullptr) {
            const u64 part = part_at(row, head, block_z(), heads, grid_z());
#pragma unroll
            for (u32 n = 0; n < HEAD_DIM / 8; ++n) {
                float* to = sums + part * HEAD_DIM + n * 8 + fragment_column(lane);
                *reinterpret_cast<Pair*>(to) = Pair{{gathered.sum[n][2 * half], gathered.sum[n][2 * half + 1]}};
            }
            if (lane % 4 == 0) {
                *reinterpret_cast<Pair*>(stats + part * 2) = Pair{{gathered.peak[half], total}};
            }
            continue;
        }
        const float whole = 1.0f / total;
#pragma unroll
        for (u32 n = 0; n < HEAD_DIM / 8; ++n) {
            u16* to = out + (u64(row) * heads + head) * HEAD_DIM + n * 8 + fragment_column(lane);
            *reinterpret_cast<u32*>(to) = pack_bf16(gathered.sum[n][2 * half] * whole, gathered.sum[n][2 * half + 1] * whole);
        }
        if (logs != nullptr && lane % 4 == 0) {
            logs[u64(row) * heads + head] = gathered.peak[half] + logarithm_of_two(total);
        }
    }
}
