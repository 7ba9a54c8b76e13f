//! What is asked: one prompt with its right answer.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How an answer is judged; every judgement is a number from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scoring {
    /// Every token of the first answer, the end token included, is what greedy decoding gives: 1, else 0.
    Exact,
    /// Share of the answers that occur in the text (RULER's `string_match_all`), without regard to case.
    Contains,
    /// The largest word F1 with one of the answers (LongBench's question answering).
    F1,
}

/// A prompt `prefix + chunks + question` and what should follow it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Name of the family or, for tasks of a file, of the data set.
    pub family: String,
    /// Number within the family, from 0.
    pub index: usize,
    /// The prompt's head; the model's anchor where there is none.
    pub prefix: Option<String>,
    /// Retrieved passages in the order of the prompt.
    pub chunks: Vec<String>,
    /// Everything behind the last chunk.
    pub question: String,
    /// Right answers.
    pub answers: Vec<String>,
    /// How they are compared.
    pub scoring: Scoring,
    /// Most tokens of a decoded answer.
    pub max_tokens: usize,
    /// Chunk and bytes of the statements that the answer rests on, where the generator knows them.
    pub decisive: Vec<(usize, Range<u32>)>,
}

impl Scoring {
    /// Judges a decoded text. [`Scoring::Exact`] is judged by tokens elsewhere; here it compares trimmed texts.
    pub fn judge(self, text: &str, answers: &[String]) -> f32 {
        match self {
            Self::Exact => f32::from(answers.first().is_some_and(|answer| answer.trim() == text.trim())),
            Self::Contains => {
                let text = text.to_lowercase();
                let found = answers.iter().filter(|answer| text.contains(&answer.to_lowercase())).count();
                found as f32 / answers.len().max(1) as f32
            }
            Self::F1 => answers.iter().map(|answer| f1(text, answer)).fold(0.0, f32::max),
        }
    }
}

/// Harmonic mean of precision and recall over words, as LongBench counts: lower case, no punctuation, no articles.
fn f1(text: &str, answer: &str) -> f32 {
    let words = |text: &str| -> Vec<String> {
        let kept: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
        kept.split_whitespace().filter(|word| !["a", "an", "the"].contains(word)).map(str::to_owned).collect()
    };
    let (ours, mut theirs) = (words(text), words(answer));
    let (count, total) = (ours.len(), theirs.len());
    let mut common = 0;
    for word in ours {
        if let Some(at) = theirs.iter().position(|other| *other == word) {
            theirs.swap_remove(at);
            common += 1;
        }
    }
    if common == 0 { 0.0 } else { 2.0 * common as f32 / (count + total) as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_as_the_benchmarks_judge_them() {
        let answers = ["Amber Falcon".to_owned(), "teal owl".to_owned()];
        assert_eq!(Scoring::Contains.judge("It is the amber falcon.", &answers), 0.5);
        assert_eq!(Scoring::F1.judge("The amber falcon!", &answers), 1.0);
        assert!((Scoring::F1.judge("amber heron", &answers) - 0.5).abs() < 1e-6);
        assert_eq!(Scoring::F1.judge("", &answers), 0.0);
        assert_eq!(Scoring::Exact.judge(" Amber Falcon ", &answers), 1.0);
        assert_eq!(Scoring::Exact.judge("amber falcon", &answers), 0.0);
    }
}
