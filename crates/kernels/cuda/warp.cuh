// What a warp does together: matrix instructions, loads for them, asynchronous copies, exchanges, barriers.
//
// The only file with instructions of the device in it. `tests/cuda/emulate.h` has the same functions for the host, where
// every lane is a fiber; CACHECLIP_EMULATE chooses it.
#pragma once

#include "number.cuh"

#ifdef CACHECLIP_EMULATE
#include "emulate.h"
#else

#define CACHECLIP_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define CACHECLIP_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace cacheclip {

/// Lanes of a warp.
constexpr u32 LANES = 32;
/// Every lane takes part in every exchange.
constexpr u32 ALL_LANES = 0xffffffffu;

__device__ __forceinline__ u32 thread_index() { return threadIdx.x; }
__device__ __forceinline__ u32 block_size() { return blockDim.x; }
__device__ __forceinline__ u32 block_x() { return blockIdx.x; }
__device__ __forceinline__ u32 block_y() { return blockIdx.y; }
__device__ __forceinline__ u32 block_z() { return blockIdx.z; }
__device__ __forceinline__ u32 grid_x() { return gridDim.x; }
__device__ __forceinline__ u32 grid_z() { return gridDim.z; }
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

__device__ __forceinline__ float exchange(float value, u32 mask) {
    return __shfl_xor_sync(ALL_LANES, value, mask);
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

/// Begins to copy 16 bytes past the first-level cache, or zeros where `present` is false (`from` is not read then).
__device__ __forceinline__ void copy_chunk(void* shared, const void* from, bool present) {
    const u32 bytes = present ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(from), "r"(bytes)
                 : "memory");
}
/// Waits for all copies this thread began.
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// Loads four 8x8 matrices of 16-bit elements. Lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}
/// As load_matrices, each matrix transposed.
__device__ __forceinline__ void load_transposed(u32 (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// `sum += a b` of a 16x16 and a 16x8 matrix of bf16, in f32.
__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace cacheclip

#endif

namespace cacheclip {

/// Reduces over the four lanes that share a row of a fragment.
__device__ __forceinline__ float largest_of_quad(float value) {
    value = larger(value, exchange(value, 1));
    return larger(value, exchange(value, 2));
}
__device__ __forceinline__ float sum_of_quad(float value) {
    value += exchange(value, 1);
    return value + exchange(value, 2);
}

}  // namespace cacheclip
