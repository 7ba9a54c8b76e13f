// place: position-free K and V, as fetched, to the pages of a sequence, in one pass.
//
// CPU reference: crates/kernels/src/place.rs, `place`. Joins byte planes (crates/chunk/src/container/planes.rs), converts
// to bf16 and rotates keys at their new positions on the way. Spans of one launch are sections of one sequence.
//
// Shapes: a span is a layer of one chunk: K `[kv_heads, tokens, HEAD_DIM]`, then V of the same shape, in f32, f16 or bf16,
// element by element or in byte planes. Pool: bf16 `[pages, page_size]`. Angles: f32 `[positions, HEAD_DIM / 2]`.
//
// Floor, for n = tokens * kv_heads * HEAD_DIM and e bytes per stored element:
//   bytes  n * 2 * (e + 2)         K and V read once and written once, plus tokens * HEAD_DIM * 4 of angles
//   FLOPs  n * 3                   four products and two sums per pair of a key: never the limit
//
// One thread has a piece: CHUNK pairs of a key and the same of a value, two 16-byte writes each. Neighbours in a warp
// have neighbouring pieces, so that reads and writes of a token are whole lines.
#include "warp.cuh"

#ifndef HEAD_DIM
#error "HEAD_DIM is the width of a head"
#endif

namespace cacheclip {

constexpr u32 PLACE_THREADS = 256;

/// A section to place. Where it lies is the same in every layer, so a request uploads its spans once.
struct Span {
    /// Bytes from the start of the staging buffer; a multiple of 16.
    u64 offset;
    u32 tokens;
    /// Position of its first token.
    u32 start;
};

enum class Dtype { F32, F16, BF16 };

/// Bytes of an element.
template <Dtype DTYPE>
constexpr u32 SIZE = DTYPE == Dtype::F32 ? 4 : 2;

/// Eight bytes of a plane.
struct alignas(8) Eight {
    u32 word[CHUNK / 4];
};

/// Reads CHUNK elements from `element`, which is a multiple of CHUNK.
template <Dtype DTYPE, bool PLANES>
__device__ __forceinline__ void read_chunk(const u8* layer, u64 element, u64 elements, float (&value)[CHUNK]) {
    u32 bits[CHUNK] = {};
    if constexpr (PLANES) {
#pragma unroll
        for (u32 plane = 0; plane < SIZE<DTYPE>; ++plane) {
            const Eight eight = *reinterpret_cast<const Eight*>(layer + plane_at(element, plane, elements));
#pragma unroll
            for (u32 i = 0; i < CHUNK; ++i) {
                bits[i] |= (eight.word[i / 4] >> 8 * (i % 4) & 0xff) << 8 * plane;
            }
        }
    } else if constexpr (DTYPE == Dtype::F32) {
#pragma unroll
        for (u32 i = 0; i < CHUNK; i += 4) {
            const Quad quad = *reinterpret_cast<const Quad*>(layer + 4 * (element + i));
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                bits[i + j] = float_to_bits(quad.value[j]);
            }
        }
    } else {
        const Chunk chunk = *reinterpret_cast<const Chunk*>(layer + 2 * element);
#pragma unroll
        for (u32 i = 0; i < CHUNK / 2; ++i) {
            bits[2 * i] = chunk.pair[i] & 0xffff;
            bits[2 * i + 1] = chunk.pair[i] >> 16;
        }
    }
#pragma unroll
    for (u32 i = 0; i < CHUNK; ++i) {
        value[i] = DTYPE == Dtype::F32   ? bits_to_float(bits[i])
                   : DTYPE == Dtype::F16 ? from_f16(u16(bits[i]))
                                         : bits_to_float(bits[i] << 16);
    }
}

template <Dtype DTYPE, bool PLANES>
__device__ __forceinline__ void place(
    u16* pool, const u32* table, const u8* staging, const Span* spans, u32 kv_heads, const float* cosines,
    const float* sines
) {
    const Span span = spans[block_y()];
    const u32 index = block_x() * PLACE_THREADS + thread_index();
    // The grid is as wide as its longest span.
    if (index >= placed_count(kv_heads, span.tokens, HEAD_DIM)) {
        return;
    }
    const Placed at = placed(index, span.tokens, HEAD_DIM);
    const u32 position = span.start + at.token, page = table[page_of(position)], slot = slot_of(position);
    const u32 low = piece_low(at.piece), high = piece_high(at.piece, HEAD_DIM);
    const u8* layer = staging + span.offset;
    const u64 elements = stored_elements(kv_heads, span.tokens, HEAD_DIM);
    const u64 from_key = stored_key(at.head, at.token, span.tokens, HEAD_DIM), from_value = from_key + elements / 2;

    // All that is read is asked for before anything is written: for all the compiler knows, pages and staging overlap.
    float first[CHUNK], second[CHUNK], third[CHUNK], fourth[CHUNK];
    read_chunk<DTYPE, PLANES>(layer, from_key + low, elements, first);
    read_chunk<DTYPE, PLANES>(layer, from_key + high, elements, second);
    read_chunk<DTYPE, PLANES>(layer, from_value + low, elements, third);
    read_chunk<DTYPE, PLANES>(layer, from_value + high, elements, fourth);
    const u64 angle = angle_at(position, at.piece, HEAD_DIM);
    rotate_piece(first, second, cosines + angle, sines + angle);
    u16* key = pool + key_at(page, at.head, slot, kv_heads, HEAD_DIM);
    store_chunk(key + low, packed(first));
    store_chunk(key + high, packed(second));

    u16* value = pool + value_at(page, at.head, slot, kv_heads, HEAD_DIM);
    store_chunk(value + low, packed(third));
    store_chunk(value + high, packed(fourth));
}

}  // namespace cacheclip

#define CACHECLIP_PLACE(name, dtype, planes)                                                                     \
    CACHECLIP_KERNEL(cacheclip::PLACE_THREADS, 1)                                                                \
    name(unsigned short* pool, const unsigned int* table, const unsigned char* staging,                          \
         const cacheclip::Span* spans, unsigned int kv_heads, const float* cosines, const float* sines) {        \
        cacheclip::place<cacheclip::Dtype::dtype, planes>(pool, table, staging, spans, kv_heads, cosines, sines); \
    }

CACHECLIP_PLACE(place_f32, F32, false)
CACHECLIP_PLACE(place_f16, F16, false)
CACHECLIP_PLACE(place_bf16, BF16, false)
CACHECLIP_PLACE(place_f32_planes, F32, true)
CACHECLIP_PLACE(place_f16_planes, F16, true)
CACHECLIP_PLACE(place_bf16_planes, BF16, true)
