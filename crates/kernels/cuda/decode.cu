// decode: one row of each of several sequences against its own pages, split along the context; merge: what ranges of
// columns gave, made rows.
//
// CPU reference: crates/kernels/src/attend.rs, `attend_each` and `merge`.
//
// Shapes: queries bf16 `[batch, stride]`, rotated; tables u32 `[batch, table_stride]`; positions u32 `[batch]`, in any
// order; sums f32 `[batch, heads, ranges, HEAD_DIM]`, stats f32 `[batch, heads, ranges, 2]` (peak and total, in powers of
// two); out bf16 `[batch, heads, HEAD_DIM]`. merge takes `attend_rows`' ranges as well.
//
// Floor, where sequence b sees c(b) columns, C = sum of c(b):
//   bytes  4 * HEAD_DIM * kv_heads * C                   keys and values once: this is the limit
//   FLOPs  4 * HEAD_DIM * heads * C                      GROUP per byte, in f32
//
// A warp takes a page at a time: HEAD_DIM / 8 lanes have 16 bytes each of one token's key, so that a load of the warp is
// 512 bytes on end. Query heads that share the KV head are computed together, up to DECODE_MEMBERS of them, which is what
// registers hold; more heads are more blocks, that find the page in the second-level cache.
#include "warp.cuh"

#if !defined(HEAD_DIM) || !defined(GROUP)
#error "HEAD_DIM is the width of a head, GROUP the number of query heads to a KV head"
#endif
#ifndef DECODE_MEMBERS
#define DECODE_MEMBERS 5
#endif

namespace cacheclip {

constexpr u32 DECODE_WARPS = 4, DECODE_THREADS = DECODE_WARPS * LANES;
/// Blocks that share a KV head's query heads, and how many each has (the last may have fewer).
constexpr u32 PASSES = divide_up(GROUP, DECODE_MEMBERS), MEMBERS = divide_up(GROUP, PASSES);
/// Lanes to a token, tokens to a load, loads to a page.
constexpr u32 CHUNKS = HEAD_DIM / CHUNK, TOGETHER = LANES / CHUNKS, STEPS = PAGE_TOKENS / TOGETHER;
/// What a warp leaves in shared memory for one query head: sums, peak, total.
constexpr u32 LEFT = HEAD_DIM + 2;

constexpr u32 MERGE_WARPS = 4, MERGE_THREADS = MERGE_WARPS * LANES;

/// The lane's chunk of a token, as numbers; zeros where the row does not see the token.
__device__ __forceinline__ void read_token(const u16* from, bool present, float (&value)[CHUNK]) {
    const Chunk chunk = present ? load_chunk(from) : Chunk{};
    unpack(chunk, value);
}

}  // namespace cacheclip

CACHECLIP_KERNEL(cacheclip::DECODE_THREADS, 1)
decode(
    const unsigned short* pool, const unsigned int* tables, unsigned int table_stride, const unsigned short* queries,
    unsigned int stride, const unsigned int* positions, unsigned int kv_heads, float scale, float* sums, float* stats
) {
    using namespace cacheclip;
    CACHECLIP_SHARED(shared);
    float* left = reinterpret_cast<float*>(shared);
    const u32 lane = thread_index() % LANES, warp = thread_index() / LANES, chunk = lane % CHUNKS, among = lane / CHUNKS;
    const u32 split = block_x(), splits = grid_x(), sequence = block_z();
    const u32 kv_head = block_y() / PASSES, member = block_y() % PASSES * MEMBERS, heads = kv_heads * GROUP;
    const u32 limit = limit_of(positions[sequence]);
    const u32* table = tables + u64(sequence) * table_stride;
    const Range pages = split_range(pages_for(limit), split, splits);

    float query[MEMBERS][CHUNK], sum[MEMBERS][CHUNK], peak[MEMBERS], total[MEMBERS];
#pragma unroll
    for (u32 m = 0; m < MEMBERS; ++m) {
        const u32 head = kv_head * GROUP + least(member + m, GROUP - 1);
        unpack(load_chunk(queries + row_query(sequence, head, stride, HEAD_DIM) + chunk * CHUNK), query[m]);
        peak[m] = nothing();
        total[m] = 0;
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i) {
            query[m][i] *= scale;
            sum[m][i] = 0;
        }
    }

    for (u32 index = pages.start + warp; index < pages.end; index += DECODE_WARPS) {
        const u16* keys = pool + key_at(table[index], kv_head, 0, kv_heads, HEAD_DIM);
        float scores[STEPS][MEMBERS];
#pragma unroll
        for (u32 step = 0; step < STEPS; ++step) {
            const u32 slot = step * TOGETHER + among;
            const bool present = sees_some(limit, index * PAGE_TOKENS + slot);
            float key[CHUNK];
            read_token(keys + slot * HEAD_DIM + chunk * CHUNK, present, key);
#pragma unroll
            for (u32 m = 0; m < MEMBERS; ++m) {
                float product = 0;
#pragma unroll
                for (u32 i = 0; i < CHUNK; ++i) {
                    product += query[m][i] * key[i];
                }
#pragma unroll
                for (u32 mask = 1; mask < CHUNKS; mask *= 2) {
                    product += exchange(product, mask);
                }
                scores[step][m] = present ? product : nothing();
            }
        }
#pragma unroll
        for (u32 m = 0; m < MEMBERS; ++m) {
            float most = peak[m];
#pragma unroll
            for (u32 step = 0; step < STEPS; ++step) {
                most = larger(most, scores[step][m]);
            }
#pragma unroll
            for (u32 mask = CHUNKS; mask < LANES; mask *= 2) {
                most = larger(most, exchange(most, mask));
            }
            // The first slot of every page in the range is seen, so `most` is a number.
            const float shrink = power_of_two(peak[m] - most);
            peak[m] = most;
            total[m] *= shrink;
#pragma unroll
            for (u32 i = 0; i < CHUNK; ++i) {
                sum[m][i] *= shrink;
            }
#pragma unroll
            for (u32 step = 0; step < STEPS; ++step) {
                scores[step][m] = power_of_two(scores[step][m] - most);
                total[m] += scores[step][m];
            }
        }
#pragma unroll
        for (u32 step = 0; step < STEPS; ++step) {
            const u32 slot = step * TOGETHER + among;
            float value[CHUNK];
            read_token(
                keys + tile_size(HEAD_DIM) + slot * HEAD_DIM + chunk * CHUNK,
                sees_some(limit, index * PAGE_TOKENS + slot), value
            );
#pragma unroll
            for (u32 m = 0; m < MEMBERS; ++m) {
#pragma unroll
                for (u32 i = 0; i < CHUNK; ++i) {
                    sum[m][i] += scores[step][m] * value[i];
                }
            }
        }
    }

    // Lanes with the same chunk have seen different tokens, under the same peak.
#pragma unroll
    for (u32 m = 0; m < MEMBERS; ++m) {
#pragma unroll
        for (u32 mask = CHUNKS; mask < LANES; mask *= 2) {
            total[m] += exchange(total[m], mask);
#pragma unroll
            for (u32 i = 0; i < CHUNK; ++i) {
                sum[m][i] += exchange(sum[m][i], mask);
            }
        }
        float* to = left + (warp * MEMBERS + m) * LEFT;
        if (among == 0) {
#pragma unroll
            for (u32 i = 0; i < CHUNK; ++i) {
                to[chunk * CHUNK + i] = sum[m][i];
            }
        }
        if (lane == 0) {
            to[HEAD_DIM] = peak[m];
            to[HEAD_DIM + 1] = total[m];
        }
    }
    block_barrier();
    for (u32 index = thread_index(); index < MEMBERS * HEAD_DIM; index += DECODE_THREADS) {
        const u32 m = index / HEAD_DIM, dimension = index % HEAD_DIM;
        if (member + m >= GROUP) {
            continue;
        }
        float most = nothing(), all = 0, value = 0;
        for (u32 w = 0; w < DECODE_WARPS; ++w) {
            most = larger(most, left[(w * MEMBERS + m) * LEFT + HEAD_DIM]);
        }
        for (u32 w = 0; w < DECODE_WARPS; ++w) {
            const float* from = left + (w * MEMBERS + m) * LEFT;
            // A warp without a page has no total, and a peak that must not be subtracted.
            const float weight = from[HEAD_DIM + 1] == 0 ? 0 : power_of_two(from[HEAD_DIM] - most);
            all += weight * from[HEAD_DIM + 1];
            value += weight * from[dimension];
        }
        const u64 part = part_at(sequence, kv_head * GROUP + member + m, split, heads, splits);
        sums[part * HEAD_DIM + dimension] = value;
        if (dimension == 0) {
            stats[part * 2] = most;
            stats[part * 2 + 1] = all;
        }
    }
}

// One warp to a row's query head; ranges that saw nothing have a total of zero.
CACHECLIP_KERNEL(cacheclip::MERGE_THREADS, 1)
merge(
    const float* sums, const float* stats, unsigned int vectors, unsigned int splits, unsigned short* out, float* logs
) {
    using namespace cacheclip;
    const u32 lane = thread_index() % LANES, vector = block_x() * MERGE_WARPS + thread_index() / LANES;
    if (vector >= vectors) {
        return;
    }
    const u64 first = u64(vector) * splits;
    float peak = nothing(), total = 0, value[HEAD_DIM / LANES] = {};
    for (u32 split = 0; split < splits; ++split) {
        peak = larger(peak, stats[(first + split) * 2]);
    }
    for (u32 split = 0; split < splits; ++split) {
        const float of_range = stats[(first + split) * 2 + 1];
        if (of_range == 0) {
            continue;
        }
        const float weight = power_of_two(stats[(first + split) * 2] - peak);
        total += weight * of_range;
#pragma unroll
        for (u32 i = 0; i < HEAD_DIM / LANES; ++i) {
            value[i] += weight * sums[(first + split) * HEAD_DIM + i * LANES + lane];
        }
    }
#pragma unroll
    for (u32 i = 0; i < HEAD_DIM / LANES; ++i) {
        out[u64(vector) * HEAD_DIM + i * LANES + lane] = u16(pack_bf16(value[i] / total, 0));
    }
    if (logs != nullptr && lane == 0) {
        logs[vector] = peak + logarithm_of_two(total);
    }
}
