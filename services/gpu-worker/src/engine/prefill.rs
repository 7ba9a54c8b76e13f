//! From sections to a first token: canonical KV, assembly, selection, repair.

use super::generation::{First, Generation};
use super::{Error, Thread};
use cacheclip_model::kv::{ChunkKv, Export};
use cacheclip_model::pages::Sequence;
use cacheclip_model::sample::Sampler;
use cacheclip_model::{Logits, Pass, Probe, Reduce};
use cacheclip_plan::{Rung, Selection, Signals, select};
use std::time::Instant;

/// A section's canonical KV with what ingest learns about its tokens.
#[derive(Clone, Debug)]
pub(crate) struct Canonical {
    /// Position-free KV, anchor stripped.
    pub kv: ChunkKv,
    /// Static rank per token, 255 for the token that the chunk's own later tokens look at most.
    pub rank: Vec<u8>,
}

/// Version of the static rank's algorithm: mean attention a token receives from the rows that see it, over
/// all heads and layers, as ranks.
pub(crate) const RANK_VERSION: u16 = 1;

impl Thread {
    /// Computes a section behind its anchor and strips the anchor.
    pub(super) fn canonical(
        &mut self,
        behind: &[u32],
        ids: &[u32],
        sequence: &Sequence,
    ) -> Result<Canonical, Error> {
        let began = Instant::now();
        let all = [behind, ids].concat();
        let positions: Vec<u32> = (0..all.len() as u32).collect();
        let mut export = Export::default();
        let layers = 0..self.decoder.config().layers;
        let mut probe = Probe::new(behind.len() as u32, all.len(), layers, Reduce::Mean, Reduce::Mean);
        let pass = Pass {
            logits: Logits::None,
            export: Some(&mut export),
            probe: Some(&mut probe),
            ..Pass::new(&all, &positions, sequence.table())
        };
        self.decoder.forward(&mut self.pages, pass)?;
        self.rate.saw(all.len(), began.elapsed());
        let kv = export.finish(behind.len(), self.decoder.config().head_dim);
        Ok(Canonical { kv, rank: ranks(&probe.scores()[behind.len()..]) })
    }

    /// Assembles, selects, recomputes and draws the first token.
    pub(super) fn prefill(&mut self, generation: &Generation, sequence: Sequence) -> Result<First, Error> {
        let mut stages = vec![("queue", generation.queued.elapsed().as_secs_f64())];
        let began = Instant::now();
        let mut last = began;
        let mut lap = |name: &'static str| {
            stages.push((name, last.elapsed().as_secs_f64()));
            last = Instant::now();
        };
        let table = sequence.table();
        let (logits, selection) = if generation.in_context() {
            let positions: Vec<u32> = (0..generation.ids.len() as u32).collect();
            let logits =
                self.decoder.forward(&mut self.pages, Pass::new(&generation.ids, &positions, table))?;
            lap("prefill");
            self.rate.saw(generation.ids.len(), began.elapsed());
            (logits, Selection::in_context(&generation.assembly, generation.nominal()))
        } else {
            for section in &generation.placed {
                self.decoder.place(&mut self.pages, table, &section.kv, section.start)?;
            }
            lap("place");
            let probed = generation.probe.then(|| self.probe(generation, table)).transpose()?;
            if probed.is_some() {
                lap("probe");
            }
            let selection = plan(generation, probed.as_deref())?;
            lap("plan");
            let question = generation.assembly.question();
            let rows: Vec<u32> =
                selection.rows.iter().copied().chain(question.start as u32..question.end as u32).collect();
            let ids: Vec<u32> = rows.iter().map(|&row| generation.ids[row as usize]).collect();
            let logits = self.decoder.forward(&mut self.pages, Pass::new(&ids, &rows, table))?;
            lap("recompute");
            (logits, selection)
        };
        if !generation.in_context() {
            crate::metrics::saved(self.rate.saved(generation.ids.len(), began.elapsed()));
        }
        let mut sampler = Sampler::new(generation.sampling);
        let token = sampler.next(&logits)?;
        Ok(First { token, sampler, sequence, selection, stages, ttft: generation.received.elapsed() })
    }

    /// The primary's own question attention on the stale cache, one value per reused row.
    fn probe(&mut self, generation: &Generation, table: &[u32]) -> Result<Vec<f32>, Error> {
        let (question, reused) = (generation.assembly.question(), generation.assembly.reused());
        let positions: Vec<u32> = (question.start as u32..question.end as u32).collect();
        let layers = 0..self.decoder.config().layers;
        let mut probe = Probe::new(positions[0], reused.end, layers, Reduce::Max, Reduce::Max);
        let ids = &generation.ids[question];
        let pass =
            Pass { logits: Logits::None, probe: Some(&mut probe), ..Pass::new(ids, &positions, table) };
        self.decoder.forward(&mut self.pages, pass)?;
        Ok(probe.scores().split_off(reused.start))
    }
}

fn plan(generation: &Generation, probed: Option<&[f32]>) -> Result<Selection, Error> {
    let ranked = generation.rung == Rung::StaticRank || generation.fuse_rank;
    let signals = Signals {
        scored: generation.scored.as_deref().map(Vec::as_slice),
        spans: generation.spans.iter().map(Vec::as_slice).collect(),
        probe: probed,
        rank: generation.rank.as_deref().filter(|_| ranked),
    };
    if generation.assembly.candidate_rows() == 0 {
        return Ok(Selection::new(&generation.assembly, Vec::new(), generation.nominal()));
    }
    Ok(select(&generation.assembly, &generation.policy, generation.ratio, &signals)?)
}

/// Ranks of attention mass as bytes; later tokens are seen by fewer rows, so mass is per row that sees it.
fn ranks(mass: &[f32]) -> Vec<u8> {
    let count = mass.len();
    let seen = |i: usize| mass[i] / (count - i) as f32;
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|&a, &b| seen(b).total_cmp(&seen(a)).then(a.cmp(&b)));
    let mut ranks = vec![0; count];
    for (place, token) in order.into_iter().enumerate() {
        ranks[token] = (255 - place * 255 / count.max(1)) as u8;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_seen_token_ranks_highest_and_every_token_has_a_rank() {
        assert_eq!(ranks(&[0.1, 0.9, 0.2, 0.05]), [64, 255, 192, 128]);
        assert!(ranks(&[]).is_empty());
    }
}
