//! KV to be stored: of the small pair over a text, and of random weights at a true shape.

use anyhow::Context as _;
use cacheclip_bench::{Family, world};
use cacheclip_chunk::Dtype;
use cacheclip_model::kv::{ChunkKv, Export};
use cacheclip_model::load::{Source, load};
use cacheclip_model::pages::{Allocator, pages_for};
use cacheclip_model::{Cpu, Decoder, Logits, Pass};
use cacheclip_prompt::Composer;
use half::{bf16, f16};
use std::path::Path;

/// KV of one chunk.
#[derive(Debug)]
pub(crate) struct Sample {
    /// What computed it.
    pub(crate) name: String,
    kv: ChunkKv,
    pub(crate) head_dim: usize,
}

impl Sample {
    /// KV of a text of `tokens` tokens by a model of a directory, behind its anchor.
    pub(crate) fn of_text(models: &Path, model: &str, tokens: usize) -> anyhow::Result<Self> {
        let dir = models.join(model);
        let decoder = load(&Source::Dir(dir.clone()), Cpu)?.decoder;
        let composer = Composer::from_dir(&dir)?;
        let anchor = composer.anchor()?;
        let most = decoder.config().max_positions.saturating_sub(anchor.len());
        anyhow::ensure!(most > 0, "{model} has no room behind its anchor");
        let ids = text(&composer, tokens.min(most))?;
        let name = format!("{model}, text of {} tokens", ids.len());
        let skip = anchor.len();
        Self::compute(name, &decoder, [anchor, ids].concat(), skip)
    }

    /// KV of `tokens` tokens by random weights of a named shape.
    pub(crate) fn of_shape(shape: &str, tokens: usize) -> anyhow::Result<Self> {
        let config = super::super::bed::named(shape)?;
        let vocabulary = config.vocab as u32;
        let decoder = load(&Source::Random { config, seed: 1 }, Cpu)?.decoder;
        let ids = (0..tokens as u32).map(|at| at.wrapping_mul(7919) % vocabulary).collect();
        Self::compute(format!("{shape}, random weights, {tokens} tokens"), &decoder, ids, 0)
    }

    fn compute(name: String, decoder: &Decoder<Cpu>, ids: Vec<u32>, skip: usize) -> anyhow::Result<Self> {
        let allocator = Allocator::new(pages_for(ids.len()));
        let sequence = allocator.sequence(ids.len())?;
        let mut pages = decoder.pages(allocator.total())?;
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        let mut export = Export::default();
        let pass = Pass {
            logits: Logits::None,
            export: Some(&mut export),
            ..Pass::new(&ids, &positions, sequence.table())
        };
        decoder.forward(&mut pages, pass)?;
        let head_dim = decoder.config().head_dim;
        Ok(Self { name, kv: export.finish(skip, head_dim), head_dim })
    }

    pub(crate) fn tokens(&self) -> usize {
        self.kv.tokens()
    }

    /// Its layers' little-endian bytes.
    pub(crate) fn layers(&self, dtype: Dtype) -> Vec<Vec<u8>> {
        let bytes = |data: &[f32]| match dtype {
            Dtype::F32 => data.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Dtype::F16 => data.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
            Dtype::Bf16 => data.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        };
        self.kv.layers().map(|layer| bytes(&layer.values())).collect()
    }
}

/// Token ids of so much text.
fn text(composer: &Composer, tokens: usize) -> anyhow::Result<Vec<u32>> {
    for districts in 1..64 {
        let corpus = world::generate(1, districts, 1, &Family::ALL);
        let texts: Vec<&str> = corpus.documents.iter().map(|document| document.text.as_str()).collect();
        let mut ids = composer.chunk(&texts.join(" "))?.ids;
        if ids.len() >= tokens {
            ids.truncate(tokens);
            return Ok(ids);
        }
    }
    None.context("the generated world has no text of so many tokens")
}
