// scatter: freshly projected rows get their positions: queries are rotated where they are, keys are rotated and written
// to their pages, values are written to their pages.
//
// CPU reference: crates/kernels/src/place.rs, `scatter`. The rows of one sequence (table_stride 0: one table for all) or
// one row of each of many (`scatter_each` of crates/model/src/device.rs).
//
// Shapes: qkv bf16 `[rows, (heads + 2 kv_heads) HEAD_DIM]`; positions u32 `[rows]`; table u32 `[rows, table_stride]`.
//
// Floor, for w = rows * HEAD_DIM:
//   bytes  w * 4 * (heads + 2 kv_heads)        every element read once and written once, plus rows * HEAD_DIM * 4 of angles
//   FLOPs  w * 3 * (heads + kv_heads)
//
// One thread has a piece (CHUNK pairs) of one head of one row. No two threads write one place unless two rows have one
// position, which callers do not send.
#include "warp.cuh"

#ifndef HEAD_DIM
#error "HEAD_DIM is the width of a head"
#endif

namespace cacheclip {
constexpr u32 SCATTER_THREADS = 256;
}

CACHECLIP_KERNEL(cacheclip::SCATTER_THREADS, 1)
scatter(
    unsigned short* pool, const unsigned int* table, unsigned int table_stride, unsigned short* qkv,
    const unsigned int* positions, unsigned int rows, unsigned int heads, unsigned int kv_heads, const float* cosines,
    const float* sines
) {
    using namespace cacheclip;
    const u32 per_row = (heads + 2 * kv_heads) * pieces_of(HEAD_DIM);
    const u32 index = block_x() * SCATTER_THREADS + thread_index();
    if (index >= rows * per_row) {
        return;
    }
    const u32 row = index / per_row, head = index % per_row / pieces_of(HEAD_DIM), piece = index % pieces_of(HEAD_DIM);
    const u32 position = positions[row], low = piece_low(piece), high = piece_high(piece, HEAD_DIM);
    u16* from = qkv + row_query(row, head, row_width(heads, kv_heads, HEAD_DIM), HEAD_DIM);
    Chunk first = load_chunk(from + low), second = load_chunk(from + high);

    if (head < heads + kv_heads) {
        float a[CHUNK], b[CHUNK];
        unpack(first, a);
        unpack(second, b);
        const u64 angle = angle_at(position, piece, HEAD_DIM);
        rotate_piece(a, b, cosines + angle, sines + angle);
        first = packed(a);
        second = packed(b);
    }
    u16* to = from;
    if (head >= heads) {
        const u32 page = table[u64(row) * table_stride + page_of(position)], slot = slot_of(position);
        to = pool + (head < heads + kv_heads
                         ? key_at(page, head - heads, slot, kv_heads, HEAD_DIM)
                         : value_at(page, head - heads - kv_heads, slot, kv_heads, HEAD_DIM));
    }
    store_chunk(to + low, first);
    store_chunk(to + high, second);
}
