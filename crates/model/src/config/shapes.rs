//! Shapes to measure time and bytes on where no weights are at hand; with random weights they mean nothing as text.

use super::{Config, Family};

impl Config {
    /// Names that [`shape`](Self::shape) knows.
    pub const SHAPES: [&str; 5] = ["smollm2-135m", "qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-14b", "aux-30m"];

    /// A shape by its name: published models, and an auxiliary model of 30M parameters (d 512, 12 layers).
    pub fn shape(name: &str) -> Option<Self> {
        let llama = Self {
            family: Family::Llama,
            vocab: 49_152,
            hidden: 576,
            intermediate: 1536,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            norm_eps: 1e-5,
            rope_theta: 100_000.0,
            rope_scaling: None,
            tied: true,
            // Longer than it was trained for: weights that mean nothing mean nothing at any length.
            max_positions: 65_536,
            eos: vec![2],
        };
        let qwen = Self {
            family: Family::Qwen2,
            vocab: 152_064,
            head_dim: 128,
            norm_eps: 1e-6,
            rope_theta: 1_000_000.0,
            tied: false,
            eos: vec![151_643],
            ..llama.clone()
        };
        Some(match name {
            "smollm2-135m" => llama,
            "qwen2.5-0.5b" => Self {
                vocab: 151_936,
                hidden: 896,
                intermediate: 4864,
                layers: 24,
                heads: 14,
                kv_heads: 2,
                head_dim: 64,
                tied: true,
                ..qwen
            },
            "qwen2.5-7b" => {
                Self { hidden: 3584, intermediate: 18_944, layers: 28, heads: 28, kv_heads: 4, ..qwen }
            }
            "qwen2.5-14b" => Self {
                hidden: 5120,
                intermediate: 13_824,
                layers: 48,
                heads: 40,
                kv_heads: 8,
                norm_eps: 1e-5,
                ..qwen
            },
            "aux-30m" => Self {
                vocab: 2048,
                hidden: 512,
                intermediate: 1024,
                layers: 12,
                heads: 8,
                kv_heads: 4,
                rope_theta: 10_000.0,
                max_positions: 32_768,
                ..llama
            },
            _ => return None,
        })
    }

    /// Weights of a decoder of this shape, the embedding table once where it is tied.
    pub fn parameters(&self) -> usize {
        let attention = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head_dim;
        let layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden;
        let tables = if self.tied { 1 } else { 2 };
        self.layers * layer + tables * self.vocab * self.hidden + self.hidden
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_shape_has_about_the_parameters_of_its_name() {
        let millions = |name| Config::shape(name).expect("a known shape").parameters() / 1_000_000;
        assert_eq!(Config::SHAPES.map(millions), [134, 494, 7615, 14_769, 29]);
        assert_eq!(Config::shape("gpt-2"), None);
    }
}
