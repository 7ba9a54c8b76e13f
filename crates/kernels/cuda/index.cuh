// Where everything is: the index arithmetic of all kernels, and nothing else.
//
// NVRTC compiles this for the device. A plain C++ compiler compiles the same text for the host, where
// `tests/cuda_index.rs` holds it against the CPU kernels. So nothing here may touch memory, threads or floats.
//
// A page is that of `src/page.rs` (16 tokens of one layer; per KV head a K tile, then a V tile) with one difference:
// here K lies as V does, `[16, head_dim]`. Tensor cores read a token's dimensions side by side, a vector register of a
// CPU reads one dimension of 16 tokens.
#pragma once

#ifdef __CUDACC__
#define CACHECLIP_INLINE __host__ __device__ __forceinline__
#else
#define CACHECLIP_INLINE inline
#endif

namespace cacheclip {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

/// Tokens per page.
constexpr u32 PAGE_TOKENS = 16;
/// 16-bit elements in the widest access of one thread (16 bytes): the unit in which rows are copied and rotated.
constexpr u32 CHUNK = 8;
/// Rows of one matrix instruction, and columns of a pair of them.
constexpr u32 FRAGMENT = 16;

CACHECLIP_INLINE constexpr u32 divide_up(u32 a, u32 b) { return a / b + (a % b != 0); }
CACHECLIP_INLINE constexpr u32 least(u32 a, u32 b) { return a < b ? a : b; }

// ---- pages ----------------------------------------------------------------------------------------------------------

/// Page of the sequence that holds a position, and the slot in it.
CACHECLIP_INLINE constexpr u32 page_of(u32 position) { return position / PAGE_TOKENS; }
CACHECLIP_INLINE constexpr u32 slot_of(u32 position) { return position % PAGE_TOKENS; }
CACHECLIP_INLINE constexpr u32 pages_for(u32 tokens) { return divide_up(tokens, PAGE_TOKENS); }

/// Elements of one head's K tile (its V tile is as large), and of one page of one layer.
CACHECLIP_INLINE constexpr u32 tile_size(u32 head_dim) { return head_dim * PAGE_TOKENS; }
CACHECLIP_INLINE constexpr u32 page_size(u32 kv_heads, u32 head_dim) { return kv_heads * 2 * tile_size(head_dim); }

/// Start of a token's key in a layer's pool; `page` is an entry of the sequence's table. 64 bits, because pools pass
/// 2^32 elements.
CACHECLIP_INLINE constexpr u64 key_at(u32 page, u32 head, u32 slot, u32 kv_heads, u32 head_dim) {
    return u64(page) * page_size(kv_heads, head_dim) + head * 2 * tile_size(head_dim) + slot * head_dim;
}
/// Start of a token's value.
CACHECLIP_INLINE constexpr u64 value_at(u32 page, u32 head, u32 slot, u32 kv_heads, u32 head_dim) {
    return key_at(page, head, slot, kv_heads, head_dim) + tile_size(head_dim);
}

// ---- RoPE -----------------------------------------------------------------------------------------------------------

/// A head is rotated in pairs `(i, i + head_dim / 2)`. One piece is CHUNK pairs: a chunk of the low half and one of the
/// high half, so that both are 16-byte accesses.
CACHECLIP_INLINE constexpr u32 pieces_of(u32 head_dim) { return head_dim / (2 * CHUNK); }
CACHECLIP_INLINE constexpr u32 piece_low(u32 piece) { return piece * CHUNK; }
CACHECLIP_INLINE constexpr u32 piece_high(u32 piece, u32 head_dim) { return head_dim / 2 + piece * CHUNK; }
/// Angle of a piece's first pair in tables `[positions, head_dim / 2]`.
CACHECLIP_INLINE constexpr u64 angle_at(u32 position, u32 piece, u32 head_dim) {
    return u64(position) * (head_dim / 2) + piece * CHUNK;
}

// ---- a stored layer: K [kv_heads, tokens, head_dim], then V of the same shape ---------------------------------------

/// Elements of K and V together.
CACHECLIP_INLINE constexpr u64 stored_elements(u32 kv_heads, u32 tokens, u32 head_dim) {
    return u64(2) * kv_heads * tokens * head_dim;
}
/// Element with which a token's key begins; its value begins half of all elements later.
CACHECLIP_INLINE constexpr u64 stored_key(u32 head, u32 token, u32 tokens, u32 head_dim) {
    return (u64(head) * tokens + token) * head_dim;
}
/// Byte `plane` of an element in a layer split into byte planes (`crates/chunk/src/container/planes.rs`).
CACHECLIP_INLINE constexpr u64 plane_at(u64 element, u32 plane, u64 elements) { return plane * elements + element; }

/// What one thread places: a piece of a token's head, key and value. Pieces of one token are neighbours, then tokens,
/// then heads, which is the order of the stored bytes.
struct Placed {
    u32 head, token, piece;
};
CACHECLIP_INLINE constexpr u32 placed_count(u32 kv_heads, u32 tokens, u32 head_dim) {
    return kv_heads * tokens * pieces_of(head_dim);
}
CACHECLIP_INLINE constexpr Placed placed(u32 index, u32 tokens, u32 head_dim) {
    const u32 pieces = pieces_of(head_dim);
    return Placed{index / pieces / tokens, index / pieces % tokens, index % pieces};
}

// ---- projected rows: [rows, (heads + 2 kv_heads) head_dim], queries, then keys, then values -------------------------

CACHECLIP_INLINE constexpr u32 row_width(u32 heads, u32 kv_heads, u32 head_dim) {
    return (heads + 2 * kv_heads) * head_dim;
}
CACHECLIP_INLINE constexpr u64 row_query(u32 row, u32 head, u32 stride, u32 head_dim) {
    return u64(row) * stride + head * head_dim;
}
CACHECLIP_INLINE constexpr u64 row_key(u32 row, u32 kv_head, u32 heads, u32 kv_heads, u32 head_dim) {
    return row_query(row, heads + kv_head, row_width(heads, kv_heads, head_dim), head_dim);
}
CACHECLIP_INLINE constexpr u64 row_value(u32 row, u32 kv_head, u32 heads, u32 kv_heads, u32 head_dim) {
    return row_key(row, kv_heads + kv_head, heads, kv_heads, head_dim);
}

// ---- grouped-query attention ----------------------------------------------------------------------------------------

/// Query vectors that share a KV head are numbered row by row: vector `row * group + member`. Rows of one block
/// then share every tile of keys and values that is read.
CACHECLIP_INLINE constexpr u32 vector_row(u32 vector, u32 group) { return vector / group; }
CACHECLIP_INLINE constexpr u32 vector_head(u32 vector, u32 kv_head, u32 group) {
    return kv_head * group + vector % group;
}

// ---- tiles of columns -----------------------------------------------------------------------------------------------

/// Columns that a row sees: those at or before its own position.
CACHECLIP_INLINE constexpr u32 limit_of(u32 position) { return position + 1; }

struct Range {
    u32 start, end;
};
/// One of `splits` ranges of `count` tiles (or pages); may be empty. Together they are `0 .. count`, each once.
CACHECLIP_INLINE constexpr Range split_range(u32 count, u32 split, u32 splits) {
    const u32 each = divide_up(count, splits);
    const u32 start = least(split * each, count);
    return Range{start, least(start + each, count)};
}
/// Tiles of `tile` columns that somebody sees where the last row sees `limit` columns.
CACHECLIP_INLINE constexpr u32 tiles_seen(u32 limit, u32 tile) { return divide_up(limit, tile); }
/// Whether a row that sees `limit` columns sees any, or all, of the tile that starts at `column`.
CACHECLIP_INLINE constexpr bool sees_some(u32 limit, u32 column) { return limit > column; }
CACHECLIP_INLINE constexpr bool sees_all(u32 limit, u32 column, u32 tile) { return limit >= column + tile; }

/// Partial results of attention: of row `row`'s query head `head`, range `split`. Times head_dim for sums, times 2 for
/// peak and total.
CACHECLIP_INLINE constexpr u64 part_at(u32 row, u32 head, u32 split, u32 heads, u32 splits) {
    return (u64(row) * heads + head) * splits + split;
}

// ---- shared memory --------------------------------------------------------------------------------------------------

/// Element at which 16-byte chunk `chunk` of row `row` lies in a shared tile whose rows are `head_dim` elements long.
/// The 8 rows that one matrix load reads at one chunk come to lie in 8 different groups of 4 banks.
CACHECLIP_INLINE constexpr u32 swizzled(u32 row, u32 chunk, u32 head_dim) {
    const u32 chunks = head_dim / CHUNK;
    const u32 turn = chunks >= 8 ? row % 8 : row * chunks / 8 % chunks;
    return (row * chunks + (chunk ^ turn)) * CHUNK;
}

// ---- fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16") ---------------------------------------

/// Of a lane: the row in the upper half of A and C (the lower is 8 below), and its first column in C.
CACHECLIP_INLINE constexpr u32 fragment_row(u32 lane) { return lane / 4; }
CACHECLIP_INLINE constexpr u32 fragment_column(u32 lane) { return lane % 4 * 2; }

/// Which row of 16 bytes a lane names when four 8x8 matrices are loaded to be B of two neighbouring instructions.
/// Keys (columns of scores are tokens): matrices go dimensions first, then tokens.
CACHECLIP_INLINE constexpr u32 key_load_token(u32 lane) { return lane / 16 * 8 + lane % 8; }
CACHECLIP_INLINE constexpr u32 key_load_chunk(u32 lane) { return lane / 8 % 2; }
/// Values (columns of the result are dimensions, loaded transposed): tokens first, then dimensions.
CACHECLIP_INLINE constexpr u32 value_load_token(u32 lane) { return lane % 16; }
CACHECLIP_INLINE constexpr u32 value_load_chunk(u32 lane) { return lane / 16; }

}  // namespace cacheclip
