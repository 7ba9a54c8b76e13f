//! A prompt of one model: its sections, their KV, and where rows of it look.

use super::Error;
use super::pair::{Desk, Side, ascending};
use super::task::Task;
use cacheclip_model::kv::ChunkKv;
use cacheclip_model::{Logits, Probe, Reduce};
use cacheclip_prompt::Section;
use std::ops::Range;

/// Token ids of a prompt, section by section.
#[derive(Clone, Debug)]
pub struct Sections {
    /// The prompt's head, BOS included.
    pub prefix: Vec<u32>,
    /// The chunks.
    pub chunks: Vec<Section>,
    /// Everything behind the last chunk.
    pub question: Vec<u32>,
    /// First position of each chunk, then that of the question.
    pub starts: Vec<usize>,
}

impl Sections {
    /// Lays a task out for one model.
    ///
    /// # Errors
    /// A text that its tokenizer refuses.
    pub fn of(side: &Side, task: &Task) -> Result<Self, Error> {
        let prefix = match &task.prefix {
            Some(text) => side.composer.prefix(text)?.ids,
            None => side.anchor.clone(),
        };
        let chunks =
            task.chunks.iter().map(|text| side.composer.chunk(text)).collect::<Result<Vec<_>, _>>()?;
        let question = side.composer.question(&task.question)?.ids;
        let mut starts = vec![prefix.len()];
        for chunk in &chunks {
            starts.push(starts[starts.len() - 1] + chunk.ids.len());
        }
        Ok(Self { prefix, chunks, question, starts })
    }

    /// First position of the question.
    pub fn end(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// Ids of prefix and chunks in order.
    pub fn context_ids(&self) -> Vec<u32> {
        self.prefix.iter().chain(self.chunks.iter().flat_map(|chunk| &chunk.ids)).copied().collect()
    }
}

/// Which layers are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layers {
    /// All.
    All,
    /// The upper half.
    Deep,
    /// The last.
    Last,
    /// From 55 % to 65 % of the depth: layers 22 to 25 of 40.
    LateMiddle,
    /// One, from 0; the last where there are fewer.
    One(usize),
}

impl Layers {
    /// The layers of a model of `count`.
    pub fn of(self, count: usize) -> Range<usize> {
        match self {
            Self::All => 0..count,
            Self::Deep => count / 2..count,
            Self::Last => count - 1..count,
            Self::LateMiddle => {
                let first = (count * 55 / 100).min(count - 1);
                first..(count * 65).div_ceil(100).clamp(first + 1, count)
            }
            Self::One(layer) => layer.min(count - 1)..layer.min(count - 1) + 1,
        }
    }
}

/// How attention `[layers, heads, rows, columns]` becomes one number per column; layers are averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Which layers.
    pub layers: Layers,
    /// Over heads.
    pub heads: Reduce,
    /// Over rows.
    pub rows: Reduce,
    /// Only the question's last row instead of all.
    pub last_row: bool,
}

impl Reading {
    /// The largest over heads and rows, mean over all layers: what the scorer and the worker's probe use.
    pub const MAX: Self =
        Self { layers: Layers::All, heads: Reduce::Max, rows: Reduce::Max, last_row: false };
    /// The mean over all.
    pub const MEAN: Self =
        Self { layers: Layers::All, heads: Reduce::Mean, rows: Reduce::Mean, last_row: false };
}

/// A model's cache of prefix and chunks, as its rows find it.
#[derive(Clone, Debug)]
pub struct Scene<'a> {
    /// Sections with their first positions; together they cover `0..end`.
    pub cache: Vec<(&'a ChunkKv, usize)>,
    /// First position of each chunk, then the end of the last.
    pub starts: Vec<usize>,
    /// Ids of positions `0..end`.
    pub ids: Vec<u32>,
}

impl Scene<'_> {
    /// First position behind the last chunk.
    pub fn end(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// Puts the whole cache into the desk's pages.
    ///
    /// # Errors
    /// A device fault.
    pub fn place(&self, desk: &mut Desk<'_>) -> Result<(), Error> {
        self.cache.iter().try_for_each(|(kv, start)| desk.place(kv, *start))
    }

    /// Attention of rows behind the context: score per position, `[end]`. Rows before `from` are computed and not
    /// looked at. Then `rounds` of closure, as scorers do it.
    ///
    /// # Errors
    /// A sequence longer than the context, or a device fault.
    pub fn attention(
        &self,
        desk: &mut Desk<'_>,
        ids: &[u32],
        from: usize,
        reading: Reading,
        rounds: usize,
    ) -> Result<Vec<f32>, Error> {
        let end = self.end();
        let layers = reading.layers.of(desk.side().layers());
        let from = if reading.last_row { ids.len().saturating_sub(1) } else { from };
        let mut probe = Probe::new((end + from) as u32, end, layers, reading.heads, reading.rows);
        self.place(desk)?;
        desk.compute(ids, &ascending(end, ids.len()), Logits::None, None, Some(&mut probe))?;
        let mut scores = probe.scores();
        for round in 0..rounds {
            // A round leaves the rows it followed recomputed.
            if round > 0 {
                self.place(desk)?;
            }
            desk.follow(&self.starts, &self.ids, &mut scores)?;
        }
        Ok(scores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_layers_exist_in_models_of_any_depth() {
        for count in 1..60 {
            for layers in [Layers::All, Layers::Deep, Layers::Last, Layers::LateMiddle, Layers::One(1)] {
                let range = layers.of(count);
                assert!(!range.is_empty() && range.end <= count, "{layers:?} of {count}: {range:?}");
            }
        }
        assert_eq!(Layers::LateMiddle.of(40), 22..26);
    }
}
