//! What policies go by: one number per reused row of the primary, or per auxiliary token.

use super::Error;
use super::pair::{Desk, ascending};
use super::prepare::Prepared;
use super::reference::{Columns, Reference};
use super::scene::{Layers, Reading, Scene, Sections};
use cacheclip_model::kv::ChunkKv;
use cacheclip_model::{Logits, Probe, Reduce};
use cacheclip_plan::{Scored, scores_of_tokens};
use std::time::Instant;

/// A signal by what it measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// The auxiliary model's question, run once over all chunks jointly, then so many rounds of closure.
    Aux(Reading, usize),
    /// The auxiliary model's question over each chunk alone, last layer, mean over heads and question tokens: as
    /// CacheClip was published.
    AuxPerChunk,
    /// The primary's question on the stale cache, then so many rounds of closure.
    Question(Reading, usize),
    /// Cached keys as seen by the primary's question that saw nothing but the prefix (ProphetKV).
    Independent,
    /// Squared difference of K and V of one layer from full prefill's (CacheBlend).
    Deviation(usize),
    /// Mean attention a token receives from the later tokens of its own chunk: the static rank of ingest.
    StaticRank,
    /// Under full prefill, what the rows that write the right answer look at, then so many rounds of closure.
    Answer(usize),
    /// Under full prefill, what the question's rows look at.
    InContext(Reading),
}

impl Signal {
    /// The stage that its time is counted under.
    fn stage(self) -> &'static str {
        match self {
            Self::Aux(..) | Self::AuxPerChunk => "auxiliary scores",
            Self::Question(..) => "question on stale cache",
            Self::Independent => "independent question",
            Self::Deviation(_) => "deviation",
            Self::StaticRank => "static rank",
            Self::Answer(_) | Self::InContext(_) => "attention in context",
        }
    }
}

/// The signals of one task.
#[derive(Debug, Default)]
pub struct Signals {
    /// Per reused row.
    rows: Vec<(Signal, Vec<f32>)>,
    /// Per auxiliary token of each chunk.
    scored: Vec<(Signal, Vec<Vec<Scored>>)>,
    /// Seconds by stage.
    pub seconds: Vec<(&'static str, f64)>,
}

impl Signals {
    /// A signal per reused row; auxiliary ones as the row with the same bytes has it.
    ///
    /// # Errors
    /// [`Error::Undeclared`] where the policy did not say that it needs the signal.
    pub fn rows(&self, wanted: Signal) -> Result<&[f32], Error> {
        let found = self.rows.iter().find(|(signal, _)| *signal == wanted);
        found.map(|(_, rows)| &rows[..]).ok_or(Error::Undeclared(wanted))
    }

    /// An auxiliary signal per token and chunk.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub fn scored(&self, wanted: Signal) -> Result<&[Vec<Scored>], Error> {
        let found = self.scored.iter().find(|(signal, _)| *signal == wanted);
        found.map(|(_, scored)| &scored[..]).ok_or(Error::Undeclared(wanted))
    }
}

/// The auxiliary side of a task: sections and canonical KV, computed once.
#[derive(Debug)]
pub struct AuxPrompt {
    sections: Sections,
    prefix: ChunkKv,
    chunks: Vec<ChunkKv>,
}

impl AuxPrompt {
    /// Computes the canonical KV of prefix and chunks.
    ///
    /// # Errors
    /// A text that is refused or too long for the auxiliary model.
    pub fn new(desk: &mut Desk<'_>, sections: Sections) -> Result<Self, Error> {
        let prefix = desk.section(&[], &sections.prefix)?;
        let anchor = &desk.side().anchor;
        let chunks = sections.chunks.iter().map(|chunk| desk.section(anchor, &chunk.ids));
        Ok(Self { chunks: chunks.collect::<Result<_, _>>()?, prefix, sections })
    }

    /// Scores of every token of every chunk.
    ///
    /// # Errors
    /// A chunk that does not fit the auxiliary context beside the question, or a device fault.
    pub fn score(
        &self,
        desk: &mut Desk<'_>,
        reading: Reading,
        rounds: usize,
        jointly: bool,
    ) -> Result<Vec<Vec<Scored>>, Error> {
        let room =
            desk.side().context().saturating_sub(self.sections.prefix.len() + self.sections.question.len());
        let mut scored = Vec::with_capacity(self.chunks.len());
        while scored.len() < self.chunks.len() {
            // Chunks that fit the auxiliary context together; usually all.
            let first = scored.len();
            let mut used = 0;
            let fits = self.chunks[first..].iter().take_while(|chunk| {
                used += chunk.tokens();
                used <= room
            });
            let count = if jointly { fits.count().max(1) } else { 1 };
            scored.extend(self.group(desk, first..first + count, reading, rounds)?);
        }
        Ok(scored)
    }

    fn group(
        &self,
        desk: &mut Desk<'_>,
        group: std::ops::Range<usize>,
        reading: Reading,
        rounds: usize,
    ) -> Result<Vec<Vec<Scored>>, Error> {
        let sections = &self.sections;
        let mut scene = Scene {
            cache: vec![(&self.prefix, 0)],
            starts: vec![self.prefix.tokens()],
            ids: sections.prefix.clone(),
        };
        for (kv, section) in self.chunks[group.clone()].iter().zip(&sections.chunks[group.clone()]) {
            scene.cache.push((kv, scene.end()));
            scene.ids.extend(&section.ids);
            scene.starts.push(scene.ids.len());
        }
        let scores = scene.attention(desk, &sections.question, 0, reading, rounds)?;
        let of_chunk = |(section, &start): (&cacheclip_prompt::Section, &usize)| {
            let spans = section.spans.iter().zip(&scores[start..]);
            spans
                .filter(|(span, _)| span.start < span.end)
                .map(|(&span, &score)| Scored { span, score })
                .collect()
        };
        Ok(sections.chunks[group].iter().zip(&scene.starts).map(of_chunk).collect())
    }
}

/// The desks and tools that signals are measured with.
#[derive(Debug)]
pub struct Instruments<'a, 'b> {
    /// Of the primary.
    pub primary: &'b mut Desk<'a>,
    /// Of the auxiliary model.
    pub aux: &'b mut Desk<'a>,
    /// The plain decoder with the primary's weights, where a policy needs it.
    pub reference: Option<&'b Reference>,
}

/// Measures `wanted`, each once.
///
/// # Errors
/// A text that is too long for a model, or a device fault.
pub fn measure(
    tools: &mut Instruments<'_, '_>,
    prepared: &Prepared,
    aux: Option<&AuxPrompt>,
    wanted: &[Signal],
) -> Result<Signals, Error> {
    let mut signals = Signals::default();
    for &signal in wanted {
        if signals.rows.iter().any(|(known, _)| *known == signal) {
            continue;
        }
        let began = Instant::now();
        let scored = match (signal, aux) {
            (Signal::Aux(reading, rounds), Some(aux)) => Some(aux.score(tools.aux, reading, rounds, true)?),
            (Signal::AuxPerChunk, Some(aux)) => {
                let reading = Reading { layers: Layers::Last, ..Reading::MEAN };
                Some(aux.score(tools.aux, reading, 0, false)?)
            }
            _ => None,
        };
        let rows = match &scored {
            Some(sets) => {
                let chunks = prepared.sections.chunks.iter().zip(sets);
                chunks.flat_map(|(chunk, set)| scores_of_tokens(&chunk.spans, set)).collect()
            }
            None => of_primary(tools, prepared, signal)?,
        };
        signals.rows.push((signal, rows));
        signals.scored.extend(scored.map(|scored| (signal, scored)));
        signals.seconds.push((signal.stage(), began.elapsed().as_secs_f64()));
    }
    Ok(signals)
}

fn of_primary(
    tools: &mut Instruments<'_, '_>,
    prepared: &Prepared,
    signal: Signal,
) -> Result<Vec<f32>, Error> {
    let (desk, sections) = (&mut *tools.primary, &prepared.sections);
    let first = sections.starts[0];
    let mut scores = match signal {
        Signal::Question(reading, rounds) => {
            prepared.stale().attention(desk, &sections.question, 0, reading, rounds)?
        }
        Signal::InContext(reading) => {
            prepared.in_context().attention(desk, &sections.question, 0, reading, 0)?
        }
        Signal::Answer(rounds) => {
            // The row before each token of the answer is the one that writes it.
            let rows = [&sections.question[..], &prepared.target[..prepared.target.len() - 1]].concat();
            let from = sections.question.len() - 1;
            prepared.in_context().attention(desk, &rows, from, Reading::MAX, rounds)?
        }
        Signal::Deviation(layer) => return Ok(prepared.deviation(layer)),
        Signal::StaticRank => return static_rank(desk, prepared),
        Signal::Independent => {
            let reference = tools.reference.ok_or(Error::Undeclared(signal))?;
            return Ok(independent(reference, prepared));
        }
        Signal::Aux(..) | Signal::AuxPerChunk => return Err(Error::Undeclared(signal)),
    };
    Ok(scores.split_off(first))
}

/// The question behind the prefix alone, at the positions it has in the prompt.
fn independent(reference: &Reference, prepared: &Prepared) -> Vec<f32> {
    let sections = &prepared.sections;
    let (mut own, mut watched) = (Columns::default(), Columns::default());
    reference.place(&mut own, &prepared.prefix, &ascending(0, sections.prefix.len()));
    for (kv, &start) in prepared.chunks().iter().zip(&sections.starts) {
        reference.place(&mut watched, kv, &ascending(start, kv.tokens()));
    }
    let positions = ascending(sections.end(), sections.question.len());
    reference.foreign_attention(&mut own, &watched, &sections.question, &positions)
}

/// Attention mass that each chunk token receives inside its chunk, per row that sees it.
fn static_rank(desk: &mut Desk<'_>, prepared: &Prepared) -> Result<Vec<f32>, Error> {
    let anchor = desk.side().anchor.clone();
    let mut rank = Vec::new();
    for chunk in &prepared.sections.chunks {
        let ids = [&anchor[..], &chunk.ids].concat();
        let layers = Layers::All.of(desk.side().layers());
        let mut probe = Probe::new(anchor.len() as u32, ids.len(), layers, Reduce::Mean, Reduce::Mean);
        desk.compute(&ids, &ascending(0, ids.len()), Logits::None, None, Some(&mut probe))?;
        let mass = probe.scores().split_off(anchor.len());
        let count = mass.len();
        rank.extend(mass.iter().enumerate().map(|(token, mass)| mass / (count - token) as f32));
    }
    Ok(rank)
}
