//! Reads an answer off a cache and compares it with the right one and with full prefill's.

use super::Error;
use super::pair::{Desk, Side};
use super::reference::{Columns, Reference, Reshape};
use super::task::{Scoring, Task};
use cacheclip_model::Logits;

/// How an answer compares.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdict {
    /// By the task's scoring, 0 to 1.
    pub score: f32,
    /// Mean over the target's tokens of KL(full prefill ‖ this), in nats, given the target's tokens before each.
    pub kl: f32,
    /// Whether the first token is full prefill's.
    pub first_agrees: bool,
}

/// A cache that holds everything before the question, with whatever computes on it.
#[derive(Debug)]
pub enum Reader<'a, 'b> {
    /// The engine's decoder; rows at their own positions.
    Desk {
        /// Holds the cache.
        desk: &'b mut Desk<'a>,
        /// Position of the question's first row.
        start: usize,
    },
    /// The plain decoder.
    Plain {
        /// Its weights.
        reference: &'b Reference,
        /// The cache and what was read behind it.
        columns: Columns,
        /// Columns of the cache.
        cached: usize,
        /// Position of the question's first row.
        start: usize,
        /// Attention over the context.
        reshape: Reshape,
    },
}

impl<'a, 'b> Reader<'a, 'b> {
    /// Reads off a desk whose pages hold positions `0..start`.
    pub fn of_desk(desk: &'b mut Desk<'a>, start: usize) -> Self {
        Self::Desk { desk, start }
    }

    /// Logits of rows `from..` behind the cache, `[rows, vocab]`; rows follow each other from call to call.
    fn run(&mut self, ids: &[u32], from: usize) -> Result<Vec<f32>, Error> {
        let positions = |start: usize| super::pair::ascending(start + from, ids.len());
        match self {
            Self::Desk { desk, start } => desk.compute(ids, &positions(*start), Logits::All, None, None),
            Self::Plain { reference, columns, cached, start, reshape } => {
                columns.truncate(*cached + from);
                Ok(reference.run(columns, ids, &positions(*start), *reshape))
            }
        }
    }

    /// Tokens an answer may have: as the task says, and as the context has room for.
    fn most(&self, side: &Side, question: &[u32], task: &Task) -> usize {
        let (Self::Desk { start, .. } | Self::Plain { start, .. }) = self;
        task.max_tokens.min(side.context().saturating_sub(start + question.len())).max(1)
    }

    /// Logits of the rows that write `target`'s tokens, given the question and the tokens before each.
    fn along(&mut self, question: &[u32], target: &[u32]) -> Result<Vec<f32>, Error> {
        let (head, last) = question.split_at(question.len() - 1);
        self.run(head, 0)?;
        self.run(&[last, &target[..target.len().saturating_sub(1)]].concat(), head.len())
    }

    /// Full prefill's target (its own greedy answer where none is given), logits along it, and verdict.
    pub(super) fn full(
        &mut self,
        side: &Side,
        question: &[u32],
        target: Vec<u32>,
        task: &Task,
    ) -> Result<(Vec<u32>, Vec<f32>, Verdict), Error> {
        let most = self.most(side, question, task);
        let (target, logits) = if target.is_empty() {
            let mut logits = self.along(question, &[])?;
            let mut target = vec![largest(&logits)];
            while !ended(side, &target, most) {
                let row = self.run(&target[target.len() - 1..], question.len() + target.len() - 1)?;
                target.push(largest(&row));
                logits.extend(row);
            }
            (target, logits)
        } else {
            let logits = self.along(question, &target)?;
            (target, logits)
        };
        let vocab = logits.len() / target.len();
        let score = match task.scoring {
            Scoring::Exact => f32::from(matching(&logits, vocab, &target) == target.len()),
            scoring => scoring.judge(&text(side, &target), &task.answers),
        };
        Ok((target, logits, Verdict { score, kl: 0.0, first_agrees: true }))
    }

    /// Judges what this cache answers, against full prefill's logits along `target`.
    pub(super) fn verdict(
        &mut self,
        side: &Side,
        question: &[u32],
        target: &[u32],
        full: &[f32],
        task: &Task,
    ) -> Result<Verdict, Error> {
        let most = self.most(side, question, task);
        let logits = self.along(question, target)?;
        let vocab = logits.len() / target.len();
        let same = matching(&logits, vocab, target);
        let score = match task.scoring {
            Scoring::Exact => f32::from(same == target.len()),
            scoring => {
                let mut tokens = target[..same].to_vec();
                if same < target.len() {
                    tokens.push(largest(&logits[same * vocab..(same + 1) * vocab]));
                }
                // Behind the first difference the rows along the target are of no use: they are written over.
                while !ended(side, &tokens, most) {
                    let row = self.run(&tokens[tokens.len() - 1..], question.len() + tokens.len() - 1)?;
                    tokens.push(largest(&row));
                }
                scoring.judge(&text(side, &tokens), &task.answers)
            }
        };
        let rows = logits.chunks_exact(vocab).zip(full.chunks_exact(vocab));
        let kl = rows.map(|(ours, full)| divergence(full, ours)).sum::<f32>() / target.len() as f32;
        let first_agrees = largest(&logits[..vocab]) == largest(&full[..vocab]);
        Ok(Verdict { score, kl, first_agrees })
    }
}

/// Leading target tokens that greedy decoding gives.
fn matching(logits: &[f32], vocab: usize, target: &[u32]) -> usize {
    logits.chunks_exact(vocab).zip(target).take_while(|(row, id)| largest(row) == **id).count()
}

fn ended(side: &Side, tokens: &[u32], most: usize) -> bool {
    let last = tokens[tokens.len() - 1];
    let stops = &side.composer.format().stop;
    tokens.len() >= most
        || side.composer.tokenizer().eos().contains(&last)
        || (!stops.is_empty() && {
            let text = side.composer.tokenizer().decode(tokens);
            stops.iter().any(|stop| text.contains(stop))
        })
}

/// The answer's text, up to the first stop text.
fn text(side: &Side, tokens: &[u32]) -> String {
    let text = side.composer.tokenizer().decode(tokens);
    let stops = side.composer.format().stop.iter().filter_map(|stop| text.find(stop));
    text[..stops.min().unwrap_or(text.len())].trim().to_owned()
}

fn largest(row: &[f32]) -> u32 {
    let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)));
    best.unwrap_or_default() as u32
}

/// KL(p ‖ q) of two rows of logits, in nats.
fn divergence(p: &[f32], q: &[f32]) -> f32 {
    let log_sum = |row: &[f32]| {
        let most = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        most + row.iter().map(|logit| (logit - most).exp()).sum::<f32>().ln()
    };
    let (p_sum, q_sum) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(&a, &b)| (a - p_sum).exp() * ((a - p_sum) - (b - q_sum)));
    terms.sum::<f32>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_zero_between_equals_and_known_between_others() {
        assert!(divergence(&[1.0, 2.0, 3.0], &[11.0, 12.0, 13.0]) < 1e-6);
        // p = (1/2, 1/2), q = (1/4, 3/4).
        let known = 0.5 * 2.0f32.ln() + 0.5 * (2.0f32 / 3.0).ln();
        assert!((divergence(&[0.0, 0.0], &[0.0, 3.0f32.ln()]) - known).abs() < 1e-6);
    }

    #[test]
    fn the_first_of_equal_logits_is_taken_and_a_mismatch_ends_the_match() {
        assert_eq!(largest(&[1.0, 5.0, 5.0]), 1);
        assert_eq!(matching(&[1.0, 5.0, 5.0, 1.0, 9.0, 0.0], 2, &[1, 1, 0]), 1);
    }
}
