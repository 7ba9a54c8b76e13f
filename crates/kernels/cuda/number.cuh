// Numbers: bf16 and f16 to f32 and back, and the rotation of a pair. Bits in, bits out; no memory, no threads.
//
// On the host the same functions are plain C++, so that tests compare what kernels compute with the CPU's kernels.
#pragma once

#include "index.cuh"

#ifndef __CUDACC__
#include <cmath>
#include <cstring>
#endif

namespace cacheclip {

CACHECLIP_INLINE float bits_to_float(u32 bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

CACHECLIP_INLINE u32 float_to_bits(float value) {
#ifdef __CUDACC__
    return __float_as_uint(value);
#else
    u32 bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

/// Score of a column that a row does not see, and peak of a row that has seen nothing: minus infinity.
CACHECLIP_INLINE float nothing() { return bits_to_float(0xff800000u); }

/// Two bf16 of one register, first the lower.
CACHECLIP_INLINE float low_bf16(u32 pair) { return bits_to_float(pair << 16); }
CACHECLIP_INLINE float high_bf16(u32 pair) { return bits_to_float(pair & 0xffff0000u); }

/// Rounds to nearest, ties to even, as `half::bf16::from_f32` does.
CACHECLIP_INLINE u32 to_bf16(float value) {
    const u32 bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return bits >> 16 | 0x40;
    }
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/// Rounds two numbers into one register.
CACHECLIP_INLINE u32 pack_bf16(float low, float high) {
#ifdef __CUDA_ARCH__
    u32 pair;
    // The first source operand becomes the upper half.
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return to_bf16(low) | to_bf16(high) << 16;
#endif
}

CACHECLIP_INLINE float from_f16(u16 bits) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    const u32 sign = u32(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) {
        return bits_to_float(sign | 0x7f800000u | fraction << 13);
    }
    if (exponent == 0) {
        // A subnormal is a fraction of 2^-24.
        const float value = float(fraction) * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

/// Products and sums that are rounded one by one: fused, they would differ from `RopeTable::rotate` in the last bit.
CACHECLIP_INLINE float times(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
CACHECLIP_INLINE float plus(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

/// Rotates a pair by an angle.
CACHECLIP_INLINE void rotate(float& low, float& high, float cosine, float sine) {
    const float a = low, b = high;
    low = plus(times(a, cosine), -times(b, sine));
    high = plus(times(b, cosine), times(a, sine));
}

CACHECLIP_INLINE float power_of_two(float exponent) {
#ifdef __CUDA_ARCH__
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(exponent));
    return value;
#elif defined(__CUDACC__)
    return exponent;
#else
    return std::exp2(exponent);
#endif
}

CACHECLIP_INLINE float logarithm_of_two(float value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("lg2.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
#elif defined(__CUDACC__)
    return value;
#else
    return std::log2(value);
#endif
}

CACHECLIP_INLINE float larger(float a, float b) {
#ifdef __CUDA_ARCH__
    // One instruction; a comparison and a choice would be two.
    return fmaxf(a, b);
#else
    return a > b ? a : b;
#endif
}

/// Eight elements of 16 bits, the unit of copies.
struct alignas(16) Chunk {
    u32 pair[4];
};

CACHECLIP_INLINE void unpack(const Chunk& chunk, float (&value)[CHUNK]) {
    for (u32 i = 0; i < CHUNK / 2; ++i) {
        value[2 * i] = low_bf16(chunk.pair[i]);
        value[2 * i + 1] = high_bf16(chunk.pair[i]);
    }
}

CACHECLIP_INLINE Chunk packed(const float (&value)[CHUNK]) {
    Chunk chunk;
    for (u32 i = 0; i < CHUNK / 2; ++i) {
        chunk.pair[i] = pack_bf16(value[2 * i], value[2 * i + 1]);
    }
    return chunk;
}

/// Four f32, one access.
struct alignas(16) Quad {
    float value[4];
};

/// Rotates a piece: CHUNK pairs, halves of a head apart. Angles lie on 16 bytes.
CACHECLIP_INLINE void rotate_piece(
    float (&low)[CHUNK], float (&high)[CHUNK], const float* cosines, const float* sines
) {
    for (u32 i = 0; i < CHUNK; i += 4) {
        const Quad cosine = *reinterpret_cast<const Quad*>(cosines + i);
        const Quad sine = *reinterpret_cast<const Quad*>(sines + i);
        for (u32 j = 0; j < 4; ++j) {
            rotate(low[i + j], high[i + j], cosine.value[j], sine.value[j]);
        }
    }
}

CACHECLIP_INLINE Chunk load_chunk(const u16* from) { return *reinterpret_cast<const Chunk*>(from); }
CACHECLIP_INLINE void store_chunk(u16* to, const Chunk& chunk) { *reinterpret_cast<Chunk*>(to) = chunk; }

}  // namespace cacheclip
