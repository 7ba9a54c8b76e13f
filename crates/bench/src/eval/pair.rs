//! The two models, proven, and a desk with pages to compute on.

use super::Error;
use cacheclip_model::certificate::{Certificate, certify};
use cacheclip_model::closure;
use cacheclip_model::kv::{ChunkKv, Export};
use cacheclip_model::pages::{Allocator, Sequence, pages_for};
use cacheclip_model::{Cpu, Decoder, Device, Logits, Pass, Probe, load};
use cacheclip_prompt::Composer;
use std::path::{Path, PathBuf};

/// A model with its prompt layout.
#[derive(Debug)]
pub struct Side {
    /// Where it came from.
    pub dir: PathBuf,
    /// The model.
    pub decoder: Decoder<Cpu>,
    /// Its tokenizer and prompt layout.
    pub composer: Composer,
    /// Ids that chunks are encoded behind.
    pub anchor: Vec<u32>,
    /// First bytes of the weights' digest, in hexadecimal.
    pub weights: String,
    /// What the instance proved about itself.
    pub certificate: Certificate,
}

impl Side {
    /// Loads a model directory and proves the instance: without a certificate nothing is evaluated.
    ///
    /// # Errors
    /// A directory that cannot be loaded, or an instance that fails its certificate.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let named = |source: cacheclip_model::Error| Error::Model { dir: dir.to_owned(), source };
        let loaded = load::load(&load::Source::Dir(dir.to_owned()), Cpu).map_err(named)?;
        let certificate = certify(&loaded.decoder).map_err(named)?;
        let composer = Composer::from_dir(dir)?;
        let anchor = composer.anchor()?;
        let weights = loaded.weights_digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { dir: dir.to_owned(), decoder: loaded.decoder, composer, anchor, weights, certificate })
    }

    /// Decoder layers.
    pub fn layers(&self) -> usize {
        self.decoder.config().layers
    }

    /// Longest sequence.
    pub fn context(&self) -> usize {
        self.decoder.config().max_positions
    }
}

/// Primary and auxiliary model.
#[derive(Debug)]
pub struct Pair {
    /// Answers.
    pub primary: Side,
    /// Scores.
    pub aux: Side,
}

impl Pair {
    /// Loads both.
    ///
    /// # Errors
    /// As [`Side::load`].
    pub fn load(primary: &Path, aux: &Path) -> Result<Self, Error> {
        Ok(Self { primary: Side::load(primary)?, aux: Side::load(aux)? })
    }
}

/// Pages for one sequence of up to a model's context, and the passes over them.
pub struct Desk<'a> {
    side: &'a Side,
    pages: <Cpu as Device>::Pages,
    sequence: Sequence,
}

impl std::fmt::Debug for Desk<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").field("dir", &self.side.dir).finish_non_exhaustive()
    }
}

impl<'a> Desk<'a> {
    /// A desk of its own for one thread.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(side: &'a Side) -> Result<Self, Error> {
        let allocator = Allocator::new(pages_for(side.context()));
        let pages = side.decoder.pages(allocator.total())?;
        Ok(Self { side, pages, sequence: allocator.sequence(side.context())? })
    }

    /// The model.
    pub fn side(&self) -> &'a Side {
        self.side
    }

    /// Puts a section's position-free KV at positions `start..`.
    ///
    /// # Errors
    /// A device fault.
    pub fn place(&mut self, kv: &ChunkKv, start: usize) -> Result<(), Error> {
        Ok(self.side.decoder.place(&mut self.pages, self.sequence.table(), kv, start)?)
    }

    /// Computes rows at ascending positions; returns the logits asked for.
    ///
    /// # Errors
    /// A sequence longer than the context, or a device fault.
    pub fn compute(
        &mut self,
        ids: &[u32],
        positions: &[u32],
        logits: Logits,
        export: Option<&mut Export>,
        probe: Option<&mut Probe>,
    ) -> Result<Vec<f32>, Error> {
        let end = positions.last().map_or(0, |&last| last as usize + 1);
        if end > self.side.context() {
            return Err(Error::TooLong { tokens: end, context: self.side.context() });
        }
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let pass = Pass { logits, export, probe, ..Pass::new(ids, positions, self.sequence.table()) };
        Ok(self.side.decoder.forward(&mut self.pages, pass)?)
    }

    /// One round of closure over `scores` of positions `0..`, whose tokens are `ids`; `starts` as in
    /// [`Chunks`](closure::Chunks).
    ///
    /// # Errors
    /// A device fault.
    pub fn follow(&mut self, starts: &[usize], ids: &[u32], scores: &mut [f32]) -> Result<(), Error> {
        let chunks = closure::Chunks { table: self.sequence.table(), starts };
        closure::follow(&self.side.decoder, &mut self.pages, chunks, |position| ids[position], scores)?;
        Ok(())
    }

    /// Position-free KV of `ids` computed behind `behind`, which is stripped.
    ///
    /// # Errors
    /// As [`compute`](Self::compute).
    pub fn section(&mut self, behind: &[u32], ids: &[u32]) -> Result<ChunkKv, Error> {
        let all = [behind, ids].concat();
        let mut export = Export::default();
        self.compute(&all, &ascending(0, all.len()), Logits::None, Some(&mut export), None)?;
        Ok(export.finish(behind.len(), self.side.decoder.config().head_dim))
    }
}

/// Positions `start .. start + count`.
pub(super) fn ascending(start: usize, count: usize) -> Vec<u32> {
    (start as u32..(start + count) as u32).collect()
}
