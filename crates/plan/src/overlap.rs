//! From one tokenizer's spans to another's: scores travel as byte ranges of the chunk's text.

use cacheclip_chunk::ByteSpan;

/// A byte range of a chunk's text with its importance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Bytes of the chunk's text.
    pub span: ByteSpan,
    /// Higher matters more; comparable within one request only.
    pub score: f32,
}

/// Score of each token: the largest score of a span it shares a byte with, 0 where there is none.
///
/// `tokens` and `scored` are ascending by start, as tokenizers produce them.
pub fn scores_of_tokens(tokens: &[ByteSpan], scored: &[Scored]) -> Vec<f32> {
    let mut first = 0;
    tokens
        .iter()
        .map(|token| {
            while first < scored.len() && scored[first].span.end <= token.start {
                first += 1;
            }
            scored[first..]
                .iter()
                .take_while(|s| s.span.start < token.end)
                .filter(|s| s.span.end > token.start)
                .map(|s| s.score)
                .fold(0.0, f32::max)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spans(cuts: &[u32]) -> Vec<ByteSpan> {
        cuts.windows(2).map(|w| ByteSpan { start: w[0], end: w[1] }).collect()
    }

    fn cuts() -> impl Strategy<Value = Vec<u32>> {
        prop::collection::btree_set(1u32..200, 0..40).prop_map(|inner| {
            let mut cuts: Vec<u32> = [0].into_iter().chain(inner).collect();
            cuts.push(200);
            cuts
        })
    }

    proptest! {
        #[test]
        fn every_scored_span_reaches_every_token_it_touches(ours in cuts(), theirs in cuts()) {
            let tokens = spans(&ours);
            let scored: Vec<Scored> = spans(&theirs)
                .into_iter()
                .enumerate()
                .map(|(i, span)| Scored { span, score: 1.0 + (i * 7 % 11) as f32 })
                .collect();
            let got = scores_of_tokens(&tokens, &scored);
            for (token, got) in tokens.iter().zip(got) {
                let want = scored
                    .iter()
                    .filter(|s| s.span.start < token.end && token.start < s.span.end)
                    .map(|s| s.score)
                    .fold(0.0, f32::max);
                prop_assert_eq!(got, want);
            }
        }
    }

    #[test]
    fn a_joiner_has_no_bytes_and_no_score() {
        let tokens = [ByteSpan { start: 0, end: 0 }, ByteSpan { start: 0, end: 4 }];
        let scored = [Scored { span: ByteSpan { start: 0, end: 4 }, score: 2.0 }];
        assert_eq!(scores_of_tokens(&tokens, &scored), [0.0, 2.0]);
    }
}
