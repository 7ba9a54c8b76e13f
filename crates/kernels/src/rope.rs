//! Rotary position embedding: angle tables and the rotation itself.
//!
//! Pairs are `(i, i + head_dim/2)`, the form of Hugging Face checkpoints. Keys are stored before rotation
//! and rotated when they are placed, so a chunk's KV serves at any position.

use rayon::prelude::*;

/// Frequency scaling of Llama 3.1 and later ("llama3" in `config.json`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// Stretch of the low frequencies.
    pub factor: f64,
    /// Wavelengths above `original_max_position / low_freq_factor` are stretched.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position / high_freq_factor` are kept.
    pub high_freq_factor: f64,
    /// Context length of the unscaled model.
    pub original_max_position: usize,
}

/// What a table of angles follows from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotation {
    head_dim: usize,
    positions: usize,
    theta: f64,
    scaling: Option<Llama3Scaling>,
}

/// Cosines and sines for every position of a model, `[positions, head_dim / 2]` each.
#[derive(Clone, Debug)]
pub struct RopeTable {
    made_of: Rotation,
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Angles for positions `0..positions`, computed in f64 (f32 angles lose digits at long contexts).
    pub fn new(head_dim: usize, positions: usize, theta: f64, scaling: Option<Llama3Scaling>) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f64> = (0..half)
            .map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64))
            .map(|f| scaling.map_or(f, |scaling| scaled(f, scaling)))
            .collect();
        let turn = |index: usize| {
            let (sin, cos) = ((index / half) as f64 * frequencies[index % half]).sin_cos();
            (cos as f32, sin as f32)
        };
        let (cos, sin) = (0..positions * half).into_par_iter().map(turn).unzip();
        Self { made_of: Rotation { head_dim, positions, theta, scaling }, half, cos, sin }
    }

    /// What it follows from: tables of the same are the same.
    pub fn made_of(&self) -> Rotation {
        self.made_of
    }

    /// Positions the table covers.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(0)
    }

    /// Cosines and sines of one position, `[head_dim / 2]` each.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }

    /// Rotates one head `[head_dim]` in place.
    pub fn rotate(&self, head: &mut [f32], position: usize) {
        let (cos, sin) = self.at(position);
        let (low, high) = head.split_at_mut(self.half);
        for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}

/// Llama-3 scaling of one frequency: long waves stretched, short ones kept, a linear blend between.
fn scaled(frequency: f64, scaling: Llama3Scaling) -> f64 {
    let turns = scaling.original_max_position as f64 * frequency / std::f64::consts::TAU;
    if turns < scaling.low_freq_factor {
        return frequency / scaling.factor;
    }
    if turns > scaling.high_freq_factor {
        return frequency;
    }
    let blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
    frequency * ((1.0 - blend) / scaling.factor + blend)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotating_twice_is_rotating_by_the_sum() {
        let table = RopeTable::new(8, 64, 10_000.0, None);
        let mut twice: Vec<f32> = (0..8).map(|i| i as f32 - 3.5).collect();
        let mut once = twice.clone();
        table.rotate(&mut twice, 11);
        table.rotate(&mut twice, 23);
        table.rotate(&mut once, 34);
        for (a, b) in twice.iter().zip(&once) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_and_stretches_long_ones() {
        let scaling = Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        };
        assert_eq!(scaled(1.0, scaling), 1.0);
        assert_eq!(scaled(1e-6, scaling), 1e-6 / 8.0);
        let middle = scaled(std::f64::consts::TAU * 2.0 / 8192.0, scaling);
        let base = std::f64::consts::TAU * 2.0 / 8192.0;
        assert!(base / 8.0 < middle && middle < base);
    }
}
