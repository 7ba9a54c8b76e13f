//! The explain record: what was hit, what was recomputed, what it cost.

use crate::engine::Outcome;
use crate::loader::Found;
use crate::request::Request;
use cacheclip_chunk::ByteSpan;
use cacheclip_plan::{Policy, Rung};
use cacheclip_rpc::convert;
use cacheclip_rpc::v1;

/// The final message of a generation.
pub(crate) fn done(
    request: &Request,
    found: &[Found],
    rung: Rung,
    outcome: Outcome,
    stages: &[(&'static str, f64)],
) -> v1::WorkerDone {
    let assembly = &request.assembly;
    let selection = &outcome.selection;
    let cached: usize = found
        .iter()
        .zip(&request.wanted)
        .filter(|(found, _)| found.reason.is_none())
        .map(|(_, want)| want.ids.len())
        .sum();
    // Computed in context: what was found was not used.
    let in_context = request.policy == Policy::Full || rung == Rung::FullPrefill;
    let cached = if in_context { 0 } else { cached };
    let usage = v1::Usage {
        prompt_tokens: assembly.total() as u32,
        cached_tokens: cached as u32,
        // Of what was cached or computed canonically, which is nothing where all was computed in context.
        recomputed_tokens: if in_context { 0 } else { selection.rows.len() as u32 },
        completion_tokens: outcome.tokens as u32,
    };
    let explain = v1::Explain {
        policy: request.policy.name().to_owned(),
        rung: rung.to_string(),
        nominal_ratio: selection.nominal,
        realised_ratio: selection.realised,
        rows_exact: selection.counts.exact as u32,
        rows_repaired: selection.counts.repaired as u32,
        rows_stale: selection.counts.stale as u32,
        rows_question: assembly.question().len() as u32,
        chunks: (0..assembly.chunks())
            .map(|index| chunk(request, found, rung, index, &selection.rows))
            .collect(),
        stages: stages
            .iter()
            .map(|(name, seconds)| v1::Stage { name: (*name).to_owned(), seconds: *seconds })
            .collect(),
        ttft_seconds: outcome.ttft.as_secs_f64(),
    };
    v1::WorkerDone {
        text: outcome.text,
        finish_reason: if outcome.stopped { v1::FinishReason::Stop } else { v1::FinishReason::Length }.into(),
        usage: Some(usage),
        explain: Some(explain),
    }
}

fn chunk(request: &Request, found: &[Found], rung: Rung, index: usize, rows: &[u32]) -> v1::ChunkReport {
    let want = &request.wanted[index + 1];
    let range = request.assembly.chunk(index);
    let from = rows.partition_point(|&row| (row as usize) < range.start);
    let to = rows.partition_point(|&row| (row as usize) < range.end);
    let spans = rows[from..to].iter().map(|&row| want.spans[row as usize - range.start]);
    // A prompt computed in context uses nothing that was found: computed, and nothing was missed.
    let (tier, reason, bytes) = match found.get(index + 1).filter(|_| rung != Rung::FullPrefill) {
        Some(found) => (found.tier, found.reason, found.container_bytes),
        None => (v1::Tier::Computed, Some(v1::MissReason::Unspecified), 0),
    };
    v1::ChunkReport {
        index: index as u32,
        key: convert::id_bytes(want.key.as_bytes()),
        tokens: want.ids.len() as u32,
        hit: reason.is_none(),
        tier: tier.into(),
        reason: reason.unwrap_or_default().into(),
        recomputed: (to - from) as u32,
        recomputed_spans: merged(spans),
        bytes,
    }
}

/// Touching spans become one.
fn merged(spans: impl Iterator<Item = ByteSpan>) -> Vec<v1::ByteSpan> {
    let mut merged: Vec<v1::ByteSpan> = Vec::new();
    for span in spans.filter(|span| span.start < span.end) {
        match merged.last_mut() {
            Some(last) if span.start <= last.end => last.end = last.end.max(span.end),
            _ => merged.push(span.into()),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_rows_read_as_one_piece_of_text() {
        let spans =
            [(0, 4), (4, 9), (12, 13), (13, 13), (13, 15)].map(|(start, end)| ByteSpan { start, end });
        let got: Vec<(u32, u32)> = merged(spans.into_iter()).iter().map(|s| (s.start, s.end)).collect();
        assert_eq!(got, [(0, 9), (12, 15)]);
    }
}
