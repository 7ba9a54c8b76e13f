//! A model on a device, its prompts, and how long it takes to their first token.

use crate::bed::{Bed, Room, Timed};
use cacheclip_model::config::Config;
use cacheclip_model::device::At;
use cacheclip_model::kv::{ChunkKv, Export};
use cacheclip_model::load::{Source, load};
use cacheclip_model::pages::{Allocator, Sequence};
use cacheclip_model::{Collect, Decoder, Device, Logits, Pass};
use cacheclip_plan::Assembly;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Tokens of the anchor, which is the prefix of every prompt here.
pub const ANCHOR: usize = 16;
/// Layers that are placed ahead of the one that is computed.
const AHEAD: usize = 1;
/// Pause between two looks at what has come.
const PAUSE: Duration = Duration::from_micros(50);

/// A model with pages.
pub struct Model<D: Device> {
    decoder: Decoder<D>,
    pages: D::Pages,
    allocator: Allocator,
    block_rows: usize,
    /// Canonical KV of the first chunks of prompts, and how many tokens each has.
    known: (usize, Vec<ChunkKv>),
}

impl<D: Device> std::fmt::Debug for Model<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("decoder", &self.decoder).finish_non_exhaustive()
    }
}

/// A prompt whose chunks' KV is in the host's memory.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// All tokens.
    pub ids: Vec<u32>,
    /// Its rows.
    pub assembly: Assembly,
    /// Prefix and chunks, with their first positions.
    pub sections: Vec<(ChunkKv, usize)>,
    /// Layers of the sections that count as here.
    came: Arc<AtomicUsize>,
}

impl Prompt {
    /// A prompt all of whose KV is here.
    pub fn new(ids: Vec<u32>, assembly: Assembly, sections: Vec<(ChunkKv, usize)>) -> Self {
        Self { ids, assembly, sections, came: Arc::new(usize::MAX.into()) }
    }

    /// Bytes of the sections' KV.
    pub fn bytes(&self) -> usize {
        self.sections.iter().map(|(kv, _)| kv.bytes()).sum()
    }

    /// The same as if its KV had not come yet, for somebody to let [`arrive`](Self::arrive).
    pub fn arriving(&self) -> Self {
        Self { came: Arc::default(), ..self.clone() }
    }

    /// The next layer of every section has come.
    pub fn arrive(&self) {
        self.came.fetch_add(1, Ordering::Release);
    }

    /// Whether a layer of every section is here.
    fn has(&self, layer: usize) -> bool {
        self.came.load(Ordering::Acquire) > layer
    }
}

/// Seconds to a prompt's first logits, all in.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// From the beginning to the logits on the host.
    pub all: f64,
    /// Of that, until the rows to recompute were known.
    pub choosing: f64,
    /// Rows recomputed, without the question's.
    pub recomputed: usize,
}

/// Tokens that mean nothing, the same every time.
pub fn tokens(count: usize, seed: usize, vocab: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729 + 17) % vocab) as u32).collect()
}

impl<D: Timed> Model<D> {
    /// Random weights of a shape on a device with room for sequences of `tokens` tokens together.
    ///
    /// # Errors
    /// No device, or no room.
    pub fn random<B: Bed<Device = D>>(
        bed: &B,
        shape: &Config,
        tokens: usize,
        room: Room,
    ) -> anyhow::Result<Self> {
        let shape = Config { max_positions: shape.max_positions.max(tokens), ..shape.clone() };
        let device = bed.open(&shape, room)?;
        Self::load(&Source::Random { config: shape, seed: 1 }, device, room)
    }

    /// A model from anywhere on a device that was opened with this room.
    ///
    /// # Errors
    /// It cannot be loaded, or there is no room.
    pub fn load(source: &Source, device: D, room: Room) -> anyhow::Result<Self> {
        let decoder = load(source, device)?.decoder;
        let pages = decoder.pages(room.pages)?;
        let (allocator, block_rows) = (Allocator::new(room.pages), room.block_rows);
        Ok(Self { decoder, pages, allocator, block_rows, known: (0, Vec::new()) })
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder<D> {
        &self.decoder
    }

    /// Its shape.
    pub fn shape(&self) -> &Config {
        self.decoder.config()
    }

    /// Other blocks from now on.
    pub fn set_block_rows(&mut self, rows: usize) {
        self.block_rows = rows;
    }

    /// Pages for a sequence.
    ///
    /// # Errors
    /// Too few are free.
    pub fn sequence(&self, tokens: usize) -> anyhow::Result<Sequence> {
        Ok(self.allocator.sequence(tokens)?)
    }

    /// A prompt of `chunks` chunks of `tokens` tokens and a question; the canonical KV of its chunks is computed now.
    ///
    /// # Errors
    /// A device fault, or too few pages for one chunk.
    pub fn prompt(&mut self, chunks: usize, tokens_each: usize, question: usize) -> anyhow::Result<Prompt> {
        let vocab = self.shape().vocab;
        let anchor = tokens(ANCHOR, 0, vocab);
        let assembly = Assembly::new(ANCHOR, &vec![tokens_each; chunks], question, true);
        let mut sections = vec![(self.canonical(&[], &anchor)?, 0)];
        let mut ids = anchor.clone();
        // The same chunks in every prompt: what a shorter one computed is not computed again.
        if self.known.0 != tokens_each {
            self.known = (tokens_each, Vec::new());
        }
        for chunk in 0..chunks {
            let own = tokens(tokens_each, chunk + 1, vocab);
            if self.known.1.len() == chunk {
                let kv = self.canonical(&anchor, &own)?;
                self.known.1.push(kv);
            }
            sections.push((self.known.1[chunk].clone(), ids.len()));
            ids.extend(own);
        }
        ids.extend(tokens(question, chunks + 1, vocab));
        Ok(Prompt::new(ids, assembly, sections))
    }

    /// Position-free KV of `ids` behind `behind`.
    ///
    /// # Errors
    /// As [`prompt`](Self::prompt).
    pub fn canonical(&mut self, behind: &[u32], ids: &[u32]) -> anyhow::Result<ChunkKv> {
        let all = [behind, ids].concat();
        let sequence = self.sequence(all.len())?;
        let positions: Vec<u32> = (0..all.len() as u32).collect();
        let mut export = Export::default();
        let pass = Pass {
            logits: Logits::None,
            export: Some(&mut export),
            ..Pass::new(&all, &positions, sequence.table())
        };
        self.decoder.forward(&mut self.pages, pass)?;
        Ok(export.finish(behind.len(), self.shape().head_dim))
    }

    /// Full prefill of `ids`: the last row's logits, and seconds until they were on the host.
    ///
    /// # Errors
    /// As [`prompt`](Self::prompt).
    pub fn full(&mut self, ids: &[u32]) -> anyhow::Result<(Vec<f32>, f64)> {
        let sequence = self.sequence(ids.len())?;
        self.decoder.device().finish()?;
        let began = Instant::now();
        let logits = self.rows(sequence.table(), ids, (0..ids.len() as u32).collect(), |_, _, _| Ok(()))?;
        Ok((logits, began.elapsed().as_secs_f64()))
    }

    /// Reuse: `choose` says on a thread of its own which rows to recompute; KV is placed meanwhile, and then just ahead
    /// of the layer that needs it. The last row's logits.
    ///
    /// # Errors
    /// Of `choose`; as [`prompt`](Self::prompt).
    pub fn reuse(
        &mut self,
        prompt: &Prompt,
        choose: impl FnOnce() -> anyhow::Result<Vec<u32>> + Send,
    ) -> anyhow::Result<(Vec<f32>, Spent)> {
        let sequence = self.sequence(prompt.ids.len())?;
        let (table, layers) = (sequence.table(), self.shape().layers);
        self.decoder.device().finish()?;
        let began = Instant::now();
        let mut placed = 0;
        let chosen = std::thread::scope(|scope| {
            let choosing = scope.spawn(choose);
            while placed < layers && !choosing.is_finished() {
                if prompt.has(placed) {
                    self.place(prompt, table, placed)?;
                    placed += 1;
                } else {
                    std::thread::sleep(PAUSE);
                }
            }
            choosing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        let choosing = began.elapsed().as_secs_f64();
        let recomputed = chosen.len();
        let question = prompt.assembly.question();
        let rows: Vec<u32> = chosen.into_iter().chain(question.start as u32..question.end as u32).collect();
        let ids: Vec<u32> = rows.iter().map(|&row| prompt.ids[row as usize]).collect();
        let logits = self.rows(table, &ids, rows, |model, layer, pages| {
            while placed <= (layer + AHEAD).min(layers - 1) {
                wait_for(prompt, placed);
                let at = At { layer: placed, table };
                place_sections(model, pages, prompt, at)?;
                placed += 1;
            }
            Ok(())
        })?;
        Ok((logits, Spent { all: began.elapsed().as_secs_f64(), choosing, recomputed }))
    }

    fn place(&mut self, prompt: &Prompt, table: &[u32], layer: usize) -> anyhow::Result<()> {
        place_sections(&self.decoder, &mut self.pages, prompt, At { layer, table })
    }

    /// Rows through the layers; `ahead` is called before each.
    fn rows(
        &mut self,
        table: &[u32],
        ids: &[u32],
        positions: Vec<u32>,
        mut ahead: impl FnMut(&Decoder<D>, usize, &mut D::Pages) -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<f32>> {
        // Blocks of one size: 48 rows behind 4,096 would read all weights for little.
        let blocks = ids.len().div_ceil(self.block_rows).max(1);
        let rows = ids.len().div_ceil(blocks).max(1);
        let mut walk = self.decoder.walk(ids, positions, Logits::Last, rows)?;
        while !walk.done() {
            if walk.at_layer_start() {
                ahead(&self.decoder, walk.layer(), &mut self.pages)?;
            }
            self.decoder.step(&mut self.pages, &mut walk, table, Collect::default())?;
        }
        Ok(self.decoder.logits(walk)?)
    }

    /// One step of decoding of each sequence: `ids[i]` at `positions[i]` of `tables[i]`. Logits, one row each.
    ///
    /// # Errors
    /// A device fault.
    pub fn decode(
        &mut self,
        ids: &[u32],
        positions: &[u32],
        tables: &[&[u32]],
        logits: &mut Vec<f32>,
    ) -> anyhow::Result<()> {
        let batch = cacheclip_model::Batch { ids, positions, tables };
        Ok(self.decoder.decode(&mut self.pages, batch, logits)?)
    }

    /// Fills a sequence's cache with `ids`.
    ///
    /// # Errors
    /// A device fault.
    pub fn fill(&mut self, sequence: &Sequence, ids: &[u32]) -> anyhow::Result<()> {
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        let pass = Pass { logits: Logits::None, ..Pass::new(ids, &positions, sequence.table()) };
        self.decoder.forward(&mut self.pages, pass)?;
        Ok(())
    }

    /// Fills a sequence's cache with a prompt's stored KV, then computes these rows and the question; logits of the last.
    ///
    /// # Errors
    /// A device fault.
    pub fn repaired(
        &mut self,
        sequence: &Sequence,
        prompt: &Prompt,
        rows: &[u32],
    ) -> anyhow::Result<Vec<f32>> {
        for layer in 0..self.shape().layers {
            self.place(prompt, sequence.table(), layer)?;
        }
        let question = prompt.assembly.question();
        let rows: Vec<u32> = rows.iter().copied().chain(question.start as u32..question.end as u32).collect();
        let ids: Vec<u32> = rows.iter().map(|&row| prompt.ids[row as usize]).collect();
        self.rows(sequence.table(), &ids, rows, |_, _, _| Ok(()))
    }
}

/// Waits until a layer of every section is here: somebody lets it arrive at a moment that is not far.
fn wait_for(prompt: &Prompt, layer: usize) {
    while !prompt.has(layer) {
        std::hint::spin_loop();
    }
}

fn place_sections<D: Device>(
    decoder: &Decoder<D>,
    pages: &mut D::Pages,
    prompt: &Prompt,
    at: At<'_>,
) -> anyhow::Result<()> {
    anyhow::ensure!(prompt.has(at.layer), "layer {} has not come", at.layer);
    let sections: Vec<_> =
        prompt.sections.iter().filter_map(|(kv, start)| Some((kv.layer(at.layer)?, *start))).collect();
    Ok(decoder.place_sections(pages, at, &sections)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bed::Rehearsal;
    use crate::scale::Scale;
    use cacheclip_model::certificate::relative_error;

    fn model() -> Model<cacheclip_model::Cpu> {
        let shape = Scale::REHEARSAL.shape("qwen2.5-14b").unwrap();
        let room = Room::of(&shape, &[160, 160], 160, 64);
        Model::random(&Rehearsal, &shape, 160, room).unwrap()
    }

    #[test]
    fn reuse_of_all_rows_is_full_prefill_and_of_none_is_not() {
        let mut model = model();
        let prompt = model.prompt(3, 32, 8).unwrap();
        assert_eq!(prompt.ids.len(), 16 + 3 * 32 + 8);
        let (full, _) = model.full(&prompt.ids).unwrap();
        // Rows of the first chunk are exact behind its anchor.
        let all: Vec<u32> = (48..112).collect();
        let (repaired, spent) = model.reuse(&prompt, || Ok(all.clone())).unwrap();
        assert_eq!(spent.recomputed, 64);
        assert!(spent.choosing <= spent.all);
        assert!(relative_error(&repaired, &full) < 1e-4);
        let (stale, _) = model.reuse(&prompt, || Ok(Vec::new())).unwrap();
        assert!(relative_error(&stale, &full) > 1e-2, "the control is not told apart");
        let sequence = model.sequence(prompt.ids.len()).unwrap();
        assert_eq!(model.repaired(&sequence, &prompt, &all).unwrap(), repaired);
    }

    #[test]
    fn what_arrives_while_it_is_waited_for_is_placed() {
        let mut model = model();
        let prompt = model.prompt(2, 32, 8).unwrap();
        let (resident, _) = model.reuse(&prompt, || Ok(Vec::new())).unwrap();
        let layers = model.shape().layers;
        let on_its_way = prompt.arriving();
        let (arrived, _) = std::thread::scope(|scope| {
            scope.spawn(|| (0..layers).for_each(|_| on_its_way.arrive()));
            model.reuse(&on_its_way, || Ok(Vec::new())).unwrap()
        });
        assert_eq!(arrived, resident);
    }
}
