//! What all policies of a task share: sections, canonical KV, and full prefill with its answer.

use super::Error;
use super::judge::{Reader, Verdict};
use super::pair::{Desk, ascending};
use super::scene::{Scene, Sections};
use super::task::{Scoring, Task};
use cacheclip_model::Logits;
use cacheclip_model::kv::{ChunkKv, Export, LayerKv};
use cacheclip_plan::Assembly;

/// What chunks are encoded behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// The layout's anchor; the prefix itself, where a task brings none of its own.
    Layout,
    /// BOS alone: an anchor, and not the prefix.
    Bos,
    /// Nothing: the chunk's first token takes the attention sink.
    Nothing,
}

impl Anchor {
    /// Its ids.
    fn ids(self, desk: &Desk<'_>) -> Vec<u32> {
        let anchor = &desk.side().anchor;
        match self {
            Self::Layout => anchor.clone(),
            Self::Bos => anchor[..1].to_vec(),
            Self::Nothing => Vec::new(),
        }
    }
}

/// One task, prepared for every policy.
#[derive(Debug)]
pub struct Prepared {
    /// The primary's sections.
    pub sections: Sections,
    /// The prefix's KV.
    pub prefix: ChunkKv,
    /// Tokens that every policy's answer is compared along: the right answer, or full prefill's own.
    pub target: Vec<u32>,
    /// Full prefill's logits, one row for each token of the target.
    pub logits: Vec<f32>,
    /// Full prefill judged.
    pub full: Verdict,
    /// Rows of the statements that the answer rests on.
    pub decisive: Vec<u32>,
    canonical: Vec<(Anchor, Vec<ChunkKv>, Assembly)>,
    in_context: ChunkKv,
    /// Of one head.
    width: usize,
}

impl Prepared {
    /// Computes full prefill and the canonical KV behind each of `anchors`.
    ///
    /// # Errors
    /// A prompt longer than the model's context, or a device fault.
    pub fn new(desk: &mut Desk<'_>, task: &Task, anchors: &[Anchor]) -> Result<Self, Error> {
        let side = desk.side();
        let sections = Sections::of(side, task)?;
        let ids = sections.context_ids();
        let mut export = Export::default();
        desk.compute(&ids, &ascending(0, ids.len()), Logits::None, Some(&mut export), None)?;
        let in_context = export.finish(0, side.decoder.config().head_dim);
        let target = match task.scoring {
            Scoring::Exact => {
                let answer = format!(" {}", task.answers.first().map_or("", String::as_str));
                let mut ids = side.composer.tokenizer().encode(&answer)?.ids;
                ids.push(side.composer.tokenizer().eos()[0]);
                ids
            }
            _ => Vec::new(),
        };
        let mut reader = Reader::of_desk(desk, sections.end());
        let (target, logits, full) = reader.full(side, &sections.question, target, task)?;
        let prefix = desk.section(&[], &sections.prefix)?;
        let mut prepared = Self {
            decisive: decisive(&sections, task),
            canonical: Vec::new(),
            sections,
            prefix,
            target,
            logits,
            full,
            in_context,
            width: side.decoder.config().head_dim,
        };
        // Signals are measured on the layout's own encoding.
        prepared.encode(desk, Anchor::Layout)?;
        for &anchor in anchors {
            prepared.encode(desk, anchor)?;
        }
        Ok(prepared)
    }

    fn encode(&mut self, desk: &mut Desk<'_>, anchor: Anchor) -> Result<(), Error> {
        if self.canonical.iter().any(|(known, ..)| *known == anchor) {
            return Ok(());
        }
        let behind = anchor.ids(desk);
        let sections = &self.sections;
        let chunks = sections.chunks.iter().map(|chunk| desk.section(&behind, &chunk.ids));
        let chunks = chunks.collect::<Result<Vec<_>, _>>()?;
        let lengths: Vec<usize> = chunks.iter().map(ChunkKv::tokens).collect();
        let assembly = Assembly::new(
            sections.prefix.len(),
            &lengths,
            sections.question.len(),
            sections.prefix == behind,
        );
        self.canonical.push((anchor, chunks, assembly));
        Ok(())
    }

    fn of(&self, anchor: Anchor) -> &(Anchor, Vec<ChunkKv>, Assembly) {
        // The layout's own stands first.
        self.canonical.iter().find(|(known, ..)| *known == anchor).unwrap_or(&self.canonical[0])
    }

    /// The prompt's rows, with chunks encoded behind `anchor`.
    pub fn assembly(&self, anchor: Anchor) -> &Assembly {
        &self.of(anchor).2
    }

    /// Canonical KV of the chunks behind the layout's anchor.
    pub fn chunks(&self) -> &[ChunkKv] {
        &self.canonical[0].1
    }

    /// The assembled, stale cache behind the layout's anchor.
    pub fn stale(&self) -> Scene<'_> {
        self.assembled(Anchor::Layout)
    }

    /// The assembled, stale cache, with chunks encoded behind `anchor`.
    pub fn assembled(&self, anchor: Anchor) -> Scene<'_> {
        let starts = self.sections.starts.clone();
        let chunks = self.of(anchor).1.iter().zip(starts.iter().copied());
        let cache = std::iter::once((&self.prefix, 0)).chain(chunks).collect();
        Scene { cache, starts, ids: self.sections.context_ids() }
    }

    /// The cache as full prefill leaves it.
    pub fn in_context(&self) -> Scene<'_> {
        Scene {
            cache: vec![(&self.in_context, 0)],
            starts: self.sections.starts.clone(),
            ids: self.sections.context_ids(),
        }
    }

    /// Squared difference of stale K and V from full prefill's in one layer, per reused row.
    pub fn deviation(&self, layer: usize) -> Vec<f32> {
        let mut deviation = Vec::new();
        for (chunk, &start) in self.chunks().iter().zip(&self.sections.starts) {
            // Where a model has fewer layers, its last.
            let (stale, full) = (nth(chunk, layer), nth(&self.in_context, layer));
            for token in 0..stale.tokens {
                let (k, v) = differences(stale, token, full, start + token, self.width);
                deviation.push(k.0 + v.0);
            }
        }
        deviation
    }

    /// Relative error of stale K and V: root of squared differences over squared magnitudes, over all layers.
    pub fn kv_error(&self) -> KvError {
        let mut sums = [[(0.0, 0.0); 2]; 3];
        for (index, (chunk, &start)) in self.chunks().iter().zip(&self.sections.starts).enumerate() {
            for (stale, full) in chunk.layers().zip(self.in_context.layers()) {
                for token in 0..stale.tokens {
                    let region = if index == 0 { 0 } else { 1 + usize::from(token >= HEAD) };
                    let (k, v) = differences(stale, token, full, start + token, self.width);
                    for (sum, part) in sums[region].iter_mut().zip([k, v]) {
                        *sum = (sum.0 + part.0, sum.1 + part.1);
                    }
                }
            }
        }
        let relative = |(error, size): (f32, f32)| (error / size.max(f32::MIN_POSITIVE)).sqrt();
        let [first, head, interior] = sums.map(|[k, v]| [relative(k), relative(v)]);
        KvError { first, head, interior }
    }
}

/// Tokens of a chunk that count as its head.
const HEAD: usize = 8;

/// Relative errors of stale keys and of stale values, `[K, V]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct KvError {
    /// Of the first chunk.
    pub first: [f32; 2],
    /// Of the first eight tokens of later chunks.
    pub head: [f32; 2],
    /// Of the rest of later chunks.
    pub interior: [f32; 2],
}

/// Sums over one token's K, and over its V: (squared differences, squares of what is right).
type Sums = ((f32, f32), (f32, f32));

/// `token` of the stale layer against `row` of the right one.
fn differences(stale: &LayerKv, token: usize, right: &LayerKv, row: usize, width: usize) -> Sums {
    let of = |stale_data: &[f32], right_data: &[f32]| {
        let pairs = vectors(stale_data, stale.tokens, token, width).zip(vectors(
            right_data,
            right.tokens,
            row,
            width,
        ));
        pairs.fold((0.0, 0.0), |(error, size), (x, y)| (error + (x - y) * (x - y), size + y * y))
    };
    (of(&stale.k(), &right.k()), of(&stale.v(), &right.v()))
}

/// One token's values in `[heads, tokens, width]`.
fn vectors(data: &[f32], tokens: usize, token: usize, width: usize) -> impl Iterator<Item = f32> {
    data.chunks_exact(tokens * width)
        .flat_map(move |head| head[token * width..(token + 1) * width].iter().copied())
}

/// A layer; the last where there are fewer.
fn nth(kv: &ChunkKv, layer: usize) -> &LayerKv {
    kv.layers().take(layer + 1).last().expect("a model has layers")
}

/// Rows whose bytes share something with the decisive statements.
fn decisive(sections: &Sections, task: &Task) -> Vec<u32> {
    let mut rows: Vec<u32> = Vec::new();
    for (chunk, bytes) in &task.decisive {
        let spans = sections.chunks[*chunk].spans.iter().enumerate();
        let inside = spans.filter(|(_, span)| span.start < bytes.end && span.end > bytes.start);
        rows.extend(inside.map(|(token, _)| (sections.starts[*chunk] + token) as u32));
    }
    rows.sort_unstable();
    rows.dedup();
    rows
}
