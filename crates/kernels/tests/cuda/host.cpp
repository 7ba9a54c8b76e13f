// The kernels and their index arithmetic as a library of the host, for `tests/cuda_index.rs` and `tests/cuda_emulated.rs`.
// HEAD_DIM and GROUP are given as NVRTC is given them.
#include "place.cu"
#include "scatter.cu"
#include "attend_rows.cu"
#include "decode.cu"
#include "probe.cu"
#include "rows.cu"

#include <string>
#include <tuple>
#include <utility>

using namespace cacheclip;

namespace {

template <class... A, std::size_t... I>
std::function<void()> bound(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    const std::tuple<A...> values{*static_cast<A*>(arguments[I])...};
    return [kernel, values] { std::apply(kernel, values); };
}

/// A kernel with arguments as `cuLaunchKernel` takes them: an address each.
template <class... A>
std::function<void()> bound(void (*kernel)(A...), void** arguments, unsigned count) {
    return count == sizeof...(A) ? bound(kernel, arguments, std::index_sequence_for<A...>{}) : nullptr;
}

std::function<void()> named(const std::string& name, void** arguments, unsigned count) {
#define KERNEL(it) \
    if (name == #it) return bound(::it, arguments, count);
    KERNEL(place_f32)
    KERNEL(place_f16)
    KERNEL(place_bf16)
    KERNEL(place_f32_planes)
    KERNEL(place_f16_planes)
    KERNEL(place_bf16_planes)
    KERNEL(scatter)
    KERNEL(attend_rows)
    KERNEL(decode)
    KERNEL(merge)
    KERNEL(probe)
    KERNEL(probe_reduce)
    KERNEL(gather_rows)
    KERNEL(norm_rows)
    KERNEL(norm_heads)
    KERNEL(add_bias)
    KERNEL(gate_rows)
    KERNEL(export_rows)
    KERNEL(random_weights)
    return nullptr;
}

}  // namespace

/// Runs a kernel. 1 where no kernel has this name and number of arguments.
extern "C" int emulated(
    const char* name, const unsigned* grid, unsigned threads, unsigned bytes, void** arguments, unsigned count, int late
) {
    const auto kernel = named(name, arguments, count);
    if (!kernel) {
        return 1;
    }
    emulate::launch(grid, threads, bytes, late != 0, kernel);
    return 0;
}

/// What launches on the Rust side must agree with, in the order of `crates/kernels/tests/cuda_index.rs`.
extern "C" void constants(u32* out) {
    const u32 all[] = {
        PAGE_TOKENS,    CHUNK,          sizeof(Span),  PLACE_THREADS,  SCATTER_THREADS, ATTEND_TILE,
        ATTEND_VECTORS, ATTEND_THREADS, PASSES,        DECODE_THREADS, MERGE_THREADS,   MERGE_WARPS,
        PROBE_THREADS,  4 * ATTEND_STAGE * u32(sizeof(u16)), DECODE_WARPS * MEMBERS * LEFT * u32(sizeof(float)),
        ROWS_THREADS,   ROWS_WARPS * u32(sizeof(float)),
    };
    std::copy(std::begin(all), std::end(all), out);
}

extern "C" {
u64 index_key_at(u32 page, u32 head, u32 slot, u32 kv_heads, u32 dim) { return key_at(page, head, slot, kv_heads, dim); }
u64 index_value_at(u32 page, u32 head, u32 slot, u32 kv_heads, u32 dim) {
    return value_at(page, head, slot, kv_heads, dim);
}
void index_position(u32 position, u32* out) {
    out[0] = page_of(position);
    out[1] = slot_of(position);
    out[2] = pages_for(position);
    out[3] = limit_of(position);
}
u64 index_angle_at(u32 position, u32 piece, u32 dim) { return angle_at(position, piece, dim); }
u32 index_placed_count(u32 kv_heads, u32 tokens, u32 dim) { return placed_count(kv_heads, tokens, dim); }
void index_placed(u32 index, u32 tokens, u32 dim, u32* out) {
    const Placed at = placed(index, tokens, dim);
    out[0] = at.head;
    out[1] = at.token;
    out[2] = piece_low(at.piece);
    out[3] = piece_high(at.piece, dim);
}
u64 index_stored_key(u32 head, u32 token, u32 tokens, u32 dim) { return stored_key(head, token, tokens, dim); }
u64 index_stored_elements(u32 kv_heads, u32 tokens, u32 dim) { return stored_elements(kv_heads, tokens, dim); }
u64 index_plane_at(u64 element, u32 plane, u64 elements) { return plane_at(element, plane, elements); }
void index_row(u32 row, u32 head, u32 heads, u32 kv_heads, u32 dim, u64* out) {
    out[0] = row_query(row, head, row_width(heads, kv_heads, dim), dim);
    out[1] = row_key(row, head % kv_heads, heads, kv_heads, dim);
    out[2] = row_value(row, head % kv_heads, heads, kv_heads, dim);
}
void index_vector(u32 vector, u32 kv_head, u32 group, u32* out) {
    out[0] = vector_row(vector, group);
    out[1] = vector_head(vector, kv_head, group);
}
void index_split(u32 count, u32 split, u32 splits, u32* out) {
    const Range range = split_range(count, split, splits);
    out[0] = range.start;
    out[1] = range.end;
}
void index_sees(u32 limit, u32 column, u32 tile, u32* out) {
    out[0] = tiles_seen(limit, tile);
    out[1] = sees_some(limit, column);
    out[2] = sees_all(limit, column, tile);
}
u64 index_part_at(u32 row, u32 head, u32 split, u32 heads, u32 splits) { return part_at(row, head, split, heads, splits); }
u32 index_swizzled(u32 row, u32 chunk, u32 dim) { return swizzled(row, chunk, dim); }
void index_lane(u32 lane, u32* out) {
    const u32 all[] = {
        fragment_row(lane),   fragment_column(lane),  key_load_token(lane),
        key_load_chunk(lane), value_load_token(lane), value_load_chunk(lane),
    };
    std::copy(std::begin(all), std::end(all), out);
}
u32 number_to_bf16(float value) { return to_bf16(value); }
float number_from_f16(u16 bits) { return from_f16(bits); }
}
