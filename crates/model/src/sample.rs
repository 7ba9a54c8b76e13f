//! The next token, and when to stop.

use crate::error::Error;
use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: the smallest set of tokens with at least this probability; 1 is off.
    pub top_p: f32,
    /// Same seed, same tokens.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

/// Draws tokens from logits.
pub struct Sampler(Draw);

enum Draw {
    Greedy,
    Random(Box<LogitsProcessor>),
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sampler")
    }
}

impl Sampler {
    /// A sampler for one sequence.
    pub fn new(options: Options) -> Self {
        let temperature = f64::from(options.temperature);
        let sampling = match options {
            Options { temperature: 0.0, .. } => return Self(Draw::Greedy),
            Options { top_p, .. } if top_p < 1.0 => Sampling::TopP { p: f64::from(top_p), temperature },
            _ => Sampling::All { temperature },
        };
        Self(Draw::Random(Box::new(LogitsProcessor::from_sampling(options.seed, sampling))))
    }

    /// The next token from logits `[vocab]`.
    ///
    /// # Errors
    /// Logits that are not numbers.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32, Error> {
        match &mut self.0 {
            Draw::Greedy => greedy(logits),
            Draw::Random(processor) => {
                Ok(processor.sample(&Tensor::from_slice(logits, logits.len(), &Device::Cpu)?)?)
            }
        }
    }
}

/// The first of the largest.
fn greedy(logits: &[f32]) -> Result<u32, Error> {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return Err(Error::NoNumber { token });
        }
        if logit > best.1 {
            best = (token, logit);
        }
    }
    Ok(best.0 as u32)
}

/// Watches generated text for texts that end it.
#[derive(Clone, Debug)]
pub struct StopTexts {
    stops: Vec<String>,
    text: String,
    released: usize,
}

impl StopTexts {
    /// Ends the text before the first of `stops` (empty ones are ignored).
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|s| !s.is_empty()).collect(),
            text: String::new(),
            released: 0,
        }
    }

    /// Adds text; returns what may be shown now and whether a stop was reached. Text that could still
    /// become a stop is held back.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.text.push_str(piece);
        let found = self.stops.iter().filter_map(|s| self.text[self.released..].find(s.as_str())).min();
        if let Some(at) = found {
            let end = self.released + at;
            let shown = self.text[self.released..end].to_owned();
            self.text.truncate(end);
            self.released = end;
            return (shown, true);
        }
        let open = &self.text[self.released..];
        let held = (0..open.len())
            .filter(|&i| open.is_char_boundary(i))
            .find(|&i| self.stops.iter().any(|s| s.starts_with(&open[i..])));
        let end = self.released + held.unwrap_or(open.len());
        let shown = self.text[self.released..end].to_owned();
        self.released = end;
        (shown, false)
    }

    /// What was held back, when generation ends for another reason.
    pub fn flush(&mut self) -> String {
        let rest = self.text[self.released..].to_owned();
        self.released = self.text.len();
        rest
    }

    /// All text shown, flushed text included.
    pub fn shown(&self) -> &str {
        &self.text[..self.released]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_largest_and_seeds_repeat() {
        let logits: Vec<f32> = (0..50).map(|i| ((i * 17) % 50) as f32 / 10.0).collect();
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
        assert_eq!(Sampler::new(Options::default()).next(&logits).unwrap(), best);
        let draw = |seed| {
            let mut sampler = Sampler::new(Options { temperature: 1.0, top_p: 0.9, seed });
            (0..20).map(|_| sampler.next(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn a_stop_text_cut_over_pieces_is_found_and_never_shown() {
        let mut stops = StopTexts::new(["\n\n".to_owned(), "END".to_owned()]);
        assert_eq!(stops.push("amber"), ("amber".to_owned(), false));
        assert_eq!(stops.push(" E"), (" ".to_owned(), false));
        assert_eq!(stops.push("N"), (String::new(), false));
        assert_eq!(stops.push("Glish"), ("ENGlish".to_owned(), false));
        assert_eq!(stops.push(" falcon\n"), (" falcon".to_owned(), false));
        assert_eq!(stops.push("\nmore"), (String::new(), true));
        assert_eq!(stops.shown(), "amber ENGlish falcon");
    }
}
