//! The scorer's own code on an auxiliary model of random weights: what choosing rows costs on the host's processor.

use anyhow::Context as _;
use cacheclip_aux_scorer::auxiliary::{Auxiliary, Chunk, Mode};
use cacheclip_bench::world::{Family, generate};
use cacheclip_chunk::ByteSpan;
use cacheclip_model::Cpu;
use cacheclip_model::config::Config;
use cacheclip_model::load::{Source, load};
use cacheclip_plan::{Assembly, Policy, Scored, Signals, select};
use cacheclip_prompt::Composer;
use std::path::Path;

/// Longest question, in auxiliary tokens.
const QUESTION: usize = 128;

/// An auxiliary model that knows some chunks.
#[derive(Debug)]
pub struct Scorer {
    auxiliary: Auxiliary,
    chunks: Vec<Chunk>,
    /// Bytes of each chunk's text.
    lengths: Vec<usize>,
    question: String,
}

impl Scorer {
    /// Random weights of `shape`, the tokenizer of the tiny auxiliary model in `dir`, and `count` chunks of about
    /// `tokens` auxiliary tokens.
    ///
    /// # Errors
    /// The model's directory cannot be read.
    pub fn new(shape: &Config, dir: &Path, count: usize, tokens: usize) -> anyhow::Result<Self> {
        let composer = Composer::from_dir(dir).with_context(|| format!("{}", dir.display()))?;
        let decoder = load(&Source::Random { config: shape.clone(), seed: 2 }, Cpu)?.decoder;
        let corpus = generate(5, 4, 1, &Family::ALL);
        let question = corpus.questions.first().map(|it| it.text.clone()).context("a question")?;
        let statements: Vec<&str> = corpus.documents.iter().map(|it| it.text.as_str()).collect();
        let auxiliary = Auxiliary::new(decoder, composer.clone(), QUESTION, 1)?;
        let mut scorer = Self { auxiliary, chunks: Vec::new(), lengths: Vec::new(), question };
        for index in 0..count {
            let text = text(&composer, &statements, index, tokens)?;
            scorer.chunks.push(scorer.auxiliary.chunk(&text)?);
            scorer.lengths.push(text.len());
        }
        Ok(scorer)
    }

    /// Auxiliary tokens of the first `count` chunks.
    pub fn tokens(&self, count: usize) -> usize {
        self.chunks[..count].iter().map(|chunk| chunk.ids.len()).sum()
    }

    /// Scores as many chunks as the prompt has, and selects this share of its rows.
    ///
    /// # Errors
    /// A ratio that is no share; a fault of the model.
    pub fn choose(&self, assembly: &Assembly, ratio: f32) -> anyhow::Result<Vec<u32>> {
        let count = assembly.chunks();
        let scored: Vec<Vec<Scored>> =
            self.auxiliary.score(None, &self.chunks[..count], &self.question, Mode::Joint)?;
        let spans: Vec<Vec<ByteSpan>> =
            (0..count).map(|index| even(self.lengths[index], assembly.chunk(index).len())).collect();
        let signals = Signals {
            scored: Some(&scored),
            spans: spans.iter().map(Vec::as_slice).collect(),
            ..Signals::default()
        };
        let policy: Policy = "cacheclip".parse()?;
        Ok(select(assembly, &policy, Some(ratio), &signals)?.rows)
    }
}

/// A text of at least `tokens` tokens, one of its own for every index.
fn text(composer: &Composer, statements: &[&str], index: usize, tokens: usize) -> anyhow::Result<String> {
    let mut text = String::new();
    let mut turn = index;
    while composer.chunk(&text)?.ids.len() < tokens {
        text.push_str(statements[turn % statements.len()]);
        text.push(' ');
        turn += 1 + index / statements.len();
    }
    Ok(text)
}

/// `tokens` spans of a text of `bytes` bytes: another tokenizer's, all equally long.
fn even(bytes: usize, tokens: usize) -> Vec<ByteSpan> {
    let at = |index: usize| (index * bytes / tokens) as u32;
    (0..tokens).map(|index| ByteSpan { start: at(index), end: at(index + 1) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale::Scale;

    #[test]
    fn as_many_rows_are_chosen_as_were_asked_for() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny/aux");
        let shape = Config { vocab: 2048, ..Scale::REHEARSAL.shape("aux-30m").unwrap() };
        let scorer = Scorer::new(&shape, &dir, 3, 40).unwrap();
        assert!(scorer.tokens(3) >= 120);
        let assembly = Assembly::new(4, &[32, 32, 32], 8, true);
        let rows = scorer.choose(&assembly, 0.25).unwrap();
        assert_eq!(rows.len(), 24);
        assert!(rows.is_sorted() && rows.iter().all(|&row| (36..100).contains(&row)), "{rows:?}");
        assert_ne!(rows, scorer.choose(&Assembly::new(4, &[32, 32], 8, true), 0.25).unwrap());
    }

    #[test]
    fn spans_cover_a_text_without_holes() {
        let spans = even(100, 7);
        assert_eq!((spans[0].start, spans[6].end, spans.len()), (0, 100, 7));
        assert!(spans.windows(2).all(|pair| pair[0].end == pair[1].start));
    }
}
