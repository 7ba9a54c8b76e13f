//! Pseudo-random weights: every value from its index alone, so that threads, and a device, need no shared state.

/// Value `index` of the sequence `base` (splitmix64): uniform in `[-bound, bound]`, and one that bf16 holds exactly, as
/// published checkpoints are. `random_weights` of `cuda/rows.cu` gives the same bits.
pub fn value(base: u64, index: u64, bound: f32) -> f32 {
    let mut z = base.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    let unit = (z ^ (z >> 31)) as u32 as f32 / u32::MAX as f32;
    f32::from_bits(((unit * 2.0 - 1.0) * bound).to_bits() & 0xffff_0000)
}
