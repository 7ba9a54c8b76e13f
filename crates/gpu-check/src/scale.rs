//! How much of everything: what a GPU is asked, and the little that a rehearsal on the CPU does of it.

use crate::model::ANCHOR;
use anyhow::Context as _;
use cacheclip_model::config::Config;

/// Lengths, counts and shapes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Tokens in chunks, the most telling first: a part that is cut has those.
    pub lengths: &'static [usize],
    /// Shapes whose kernels are timed alone: the first at every length.
    pub shapes: &'static [&'static str],
    /// Where shapes and auxiliary models are compared.
    pub telling: usize,
    /// Tokens per chunk.
    pub chunk: usize,
    /// Tokens of the question.
    pub question: usize,
    /// Rounds, and rounds of what takes seconds.
    pub rounds: usize,
    /// Rows of a block that goes through a layer.
    pub block_rows: usize,
    /// Sequences decoded together.
    pub batches: &'static [usize],
    /// Tokens in the cache of each.
    pub columns: usize,
    /// Steps of decoding in a round.
    pub steps: usize,
    /// Bytes of a copy that kernels are compared with: on a GPU more than any second-level cache.
    pub copy: usize,
    /// Questions whose answers are compared.
    pub questions: usize,
    /// Whether this is a rehearsal.
    pub rehearsal: bool,
}

impl Scale {
    /// On a GPU.
    pub const FULL: Self = Self {
        lengths: &[16_384, 1024, 4096, 2048, 8192, 32_768],
        shapes: &["qwen2.5-14b", "qwen2.5-7b", "smollm2-135m"],
        telling: 16_384,
        chunk: 512,
        question: 32,
        rounds: 7,
        // 4,096 tokens of chunks, an anchor and a question are one block.
        block_rows: 4160,
        batches: &[1, 32, 2, 4, 8, 16],
        columns: 2048,
        steps: 16,
        copy: 1 << 30,
        questions: 24,
        rehearsal: false,
    };

    /// On a CPU, in seconds: figures mean nothing.
    pub const REHEARSAL: Self = Self {
        lengths: &[128, 64],
        shapes: &["qwen2.5-14b"],
        telling: 128,
        chunk: 32,
        question: 8,
        rounds: 2,
        block_rows: 64,
        batches: &[1, 2],
        columns: 40,
        steps: 3,
        copy: 1 << 16,
        questions: 3,
        rehearsal: true,
    };

    /// The shape of a name; in a rehearsal one of its family that a CPU computes at once.
    ///
    /// # Errors
    /// An unknown name.
    pub fn shape(&self, name: &str) -> anyhow::Result<Config> {
        let shape = Config::shape(name).with_context(|| format!("unknown shape {name}"))?;
        if !self.rehearsal {
            return Ok(shape);
        }
        let (heads, kv_heads) = (2 * shape.heads / shape.kv_heads, 2);
        Ok(Config {
            // More than the tiny tokenizers have.
            vocab: 2560,
            hidden: 64,
            intermediate: 96,
            layers: 3,
            heads,
            kv_heads,
            head_dim: 32,
            ..shape
        })
    }

    /// Tokens of a prompt with so many in chunks.
    pub fn prompt(&self, length: usize) -> usize {
        ANCHOR + length + self.question
    }

    /// Tokens of the longest prompt.
    pub fn longest(&self) -> usize {
        self.prompt(self.lengths.iter().max().copied().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rehearsal_has_small_shapes_of_the_same_families_and_groups() {
        for name in Config::SHAPES {
            let (full, small) = (Scale::FULL.shape(name).unwrap(), Scale::REHEARSAL.shape(name).unwrap());
            assert_eq!(small.family, full.family);
            assert_eq!(small.heads / small.kv_heads, full.heads / full.kv_heads);
            assert!(small.parameters() < 1_000_000, "{name}");
        }
        assert!(Scale::FULL.shape("gpt-2").is_err());
    }

    #[test]
    fn the_telling_length_is_measured_first() {
        for scale in [Scale::FULL, Scale::REHEARSAL] {
            assert_eq!(scale.lengths[0], scale.telling);
            assert!(scale.lengths.iter().all(|length| length % scale.chunk == 0));
        }
    }
}
