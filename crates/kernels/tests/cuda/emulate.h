// A device on the host: what `cuda/warp.cuh` has for the device, as plain C++, so that the text of the kernels runs.
//
// Every thread of a block is a fiber, and fibers of a block run one at a time. Whatever a warp does together is a meeting:
// a lane leaves its operands, waits for the other 31, and takes its result. Fragments of matrix instructions are laid out
// as the PTX ISA says, written here from its text and not from the kernels'. Asynchronous copies happen either at once or
// as late as they may; a kernel must be right with both. What this cannot show: memory order, timing, and the device's
// rounding of exp2 and of products of matrices.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __host__
#define CACHECLIP_KERNEL(threads, blocks) extern "C" void
#define CACHECLIP_SHARED(name) unsigned char* name = ::emulate::shared()

namespace emulate {

constexpr unsigned LANES = 32;
constexpr std::size_t STACK = 256 << 10;
/// Bytes behind a block's shared memory that must stay as they are.
constexpr unsigned GUARD = 4096;

/// What a warp's lanes leave for each other at a meeting.
struct Meeting {
    unsigned arrived = 0, generation = 0;
    /// Of two meetings in turn: a fast lane may leave operands for the next while a slow one still reads these.
    unsigned words[2][LANES][10];
    const void* rows[2][LANES];
};

struct Copy {
    void* to;
    const void* from;
    bool present;
};

inline void copy(const Copy& copy) {
    copy.present ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

struct Fiber {
    ucontext_t context;
    /// Copies that this thread began and has not waited for.
    std::vector<Copy> copies;
    bool done = false;
};

struct Device {
    unsigned grid[3], block[3], threads, current;
    bool late;
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    std::vector<unsigned char> memory;
    unsigned at_barrier = 0, barrier = 0, finished = 0;
    ucontext_t scheduler;
    std::function<void()> kernel;
};

inline thread_local Device* device = nullptr;

inline unsigned char* shared() {
    auto address = reinterpret_cast<std::uintptr_t>(device->memory.data());
    return reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
}

/// Lets the next fiber run.
inline void yield() {
    Device* d = device;
    const unsigned own = d->current;
    swapcontext(&d->fibers[own].context, &d->scheduler);
}

inline void begin() {
    device->kernel();
    device->fibers[device->current].done = true;
    device->finished += 1;
    yield();
}

[[noreturn]] inline void stuck(const char* why) {
    std::fprintf(stderr, "emulated kernel: %s\n", why);
    std::abort();
}

/// Waits for the 32 lanes of this warp; returns which of the two buffers they used.
inline unsigned meet(const void* row, const unsigned* words, unsigned count) {
    Meeting& warp = device->warps[device->current / LANES];
    const unsigned lane = device->current % LANES, generation = warp.generation, turn = generation % 2;
    std::copy(words, words + count, warp.words[turn][lane]);
    warp.rows[turn][lane] = row;
    if (++warp.arrived == LANES) {
        warp.arrived = 0;
        warp.generation += 1;
    } else {
        while (warp.generation == generation) {
            yield();
        }
    }
    return turn;
}

/// Stacks of fibers, kept from launch to launch: decoders launch thousands of kernels.
inline unsigned char* stacks(unsigned threads) {
    static thread_local std::unique_ptr<unsigned char[]> memory;
    static thread_local unsigned held = 0;
    if (held < threads) {
        memory.reset(new unsigned char[threads * STACK]);
        held = threads;
    }
    return memory.get();
}

/// Runs one block after another. Fibers take turns; a round in which none moves on is a deadlock.
inline void launch(const unsigned* grid, unsigned threads, unsigned bytes, bool late, std::function<void()> kernel) {
    Device d;
    d.threads = threads;
    d.late = late;
    d.kernel = std::move(kernel);
    d.fibers.resize(threads);
    device = &d;
    unsigned char* const own = stacks(threads);
    std::copy(grid, grid + 3, d.grid);
    for (d.block[2] = 0; d.block[2] < grid[2]; ++d.block[2]) {
        for (d.block[1] = 0; d.block[1] < grid[1]; ++d.block[1]) {
            for (d.block[0] = 0; d.block[0] < grid[0]; ++d.block[0]) {
                // Of no particular content, as on the device: NaNs. What follows is watched.
                d.memory.assign(bytes + GUARD + 128, 0xff);
                d.warps.assign((threads + LANES - 1) / LANES, Meeting{});
                d.at_barrier = d.finished = 0;
                for (unsigned i = 0; i < threads; ++i) {
                    Fiber& fiber = d.fibers[i];
                    fiber.done = false;
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = own + i * STACK;
                    fiber.context.uc_stack.ss_size = STACK;
                    fiber.context.uc_link = &d.scheduler;
                    makecontext(&fiber.context, begin, 0);
                }
                // Every lane comes to its next meeting in each round, and kernels of this size have thousands.
                for (unsigned round = 0; d.finished < threads; ++round) {
                    if (round > 1u << 16) {
                        stuck("lanes wait for lanes that have left");
                    }
                    for (d.current = 0; d.current < threads; ++d.current) {
                        if (!d.fibers[d.current].done) {
                            swapcontext(&d.scheduler, &d.fibers[d.current].context);
                        }
                    }
                }
                const unsigned char* end = shared() + bytes;
                for (unsigned i = 0; i < GUARD; ++i) {
                    if (end[i] != 0xff) {
                        stuck("more shared memory was written than the launch asked for");
                    }
                }
            }
        }
    }
    device = nullptr;
}

}  // namespace emulate

namespace cacheclip {

constexpr u32 LANES = emulate::LANES;

inline u32 thread_index() { return emulate::device->current; }
inline u32 block_x() { return emulate::device->block[0]; }
inline u32 block_y() { return emulate::device->block[1]; }
inline u32 block_z() { return emulate::device->block[2]; }
inline u32 grid_x() { return emulate::device->grid[0]; }
inline u32 grid_z() { return emulate::device->grid[2]; }

inline void block_barrier() {
    emulate::Device* d = emulate::device;
    const unsigned barrier = d->barrier;
    if (d->finished > 0) {
        emulate::stuck("a thread left before a barrier");
    }
    if (++d->at_barrier == d->threads) {
        d->at_barrier = 0;
        d->barrier += 1;
    } else {
        while (d->barrier == barrier) {
            emulate::yield();
        }
    }
}

inline float exchange(float value, u32 mask) {
    const u32 bits = float_to_bits(value), lane = thread_index() % LANES;
    const unsigned turn = emulate::meet(nullptr, &bits, 1);
    return bits_to_float(emulate::device->warps[thread_index() / LANES].words[turn][lane ^ mask][0]);
}

inline void copy_chunk(void* shared, const void* from, bool present) {
    if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
        emulate::stuck("a copy that is not aligned");
    }
    const emulate::Copy copy{shared, from, present};
    if (emulate::device->late) {
        emulate::device->fibers[thread_index()].copies.push_back(copy);
    } else {
        emulate::copy(copy);
    }
}
inline void await_copies() {
    std::vector<emulate::Copy>& copies = emulate::device->fibers[thread_index()].copies;
    for (const emulate::Copy& copy : copies) {
        emulate::copy(copy);
    }
    copies.clear();
}

/// Element `column` of row `row` of matrix `matrix`, of those that the lanes of the warp named.
inline u32 element(unsigned turn, u32 matrix, u32 row, u32 column) {
    const emulate::Meeting& warp = emulate::device->warps[thread_index() / LANES];
    const void* from = warp.rows[turn][matrix * 8 + row];
    if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
        emulate::stuck("a matrix row that is not aligned");
    }
    u16 value;
    std::memcpy(&value, static_cast<const u16*>(from) + column, sizeof value);
    return value;
}

/// ldmatrix: lane i holds elements 2 (i % 4) and the next of row i / 4 of each matrix.
inline void load_matrices(u32 (&to)[4], const void* row) {
    const unsigned turn = emulate::meet(row, nullptr, 0);
    const u32 lane = thread_index() % LANES;
    for (u32 m = 0; m < 4; ++m) {
        to[m] = element(turn, m, lane / 4, lane % 4 * 2) | element(turn, m, lane / 4, lane % 4 * 2 + 1) << 16;
    }
}
/// ldmatrix.trans: the same of the transposed matrix.
inline void load_transposed(u32 (&to)[4], const void* row) {
    const unsigned turn = emulate::meet(row, nullptr, 0);
    const u32 lane = thread_index() % LANES;
    for (u32 m = 0; m < 4; ++m) {
        to[m] = element(turn, m, lane % 4 * 2, lane / 4) | element(turn, m, lane % 4 * 2 + 1, lane / 4) << 16;
    }
}

/// mma.m16n8k16 of bf16. Register r of A has rows group + 8 (r % 2), columns 2 (lane % 4) + 8 (r / 2) and the next;
/// register r of B has rows 2 (lane % 4) + 8 r and the next of column group; C has rows group and group + 8, columns
/// 2 (lane % 4) and the next; where group = lane / 4.
inline void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 words[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const unsigned turn = emulate::meet(nullptr, words, 6);
    const emulate::Meeting& warp = emulate::device->warps[thread_index() / LANES];
    const u32 lane = thread_index() % LANES;
    const auto half_of = [](u32 pair, u32 upper) { return upper ? high_bf16(pair) : low_bf16(pair); };
    for (u32 j = 0; j < 4; ++j) {
        const u32 row = lane / 4 + j / 2 * 8, column = lane % 4 * 2 + j % 2;
        float total = sum[j];
        for (u32 k = 0; k < 16; ++k) {
            const u32 of_k = k % 8 / 2, above = k / 8;
            const float left = half_of(warp.words[turn][row % 8 * 4 + of_k][row / 8 + 2 * above], k % 2);
            const float right = half_of(warp.words[turn][column * 4 + of_k][4 + above], k % 2);
            total += left * right;
        }
        sum[j] = total;
    }
}

}  // namespace cacheclip
