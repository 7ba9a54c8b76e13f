//! Policies by name, the rungs of the ladder, and the one function that selects.

use crate::assembly::{Assembly, Counts};
use crate::cacheclip::{Settings, fuse, windows};
use crate::overlap::Scored;
use crate::paper;
use cacheclip_chunk::ByteSpan;
use std::fmt;
use std::str::FromStr;

/// How the rows to recompute are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Policy {
    /// The best known composition, every term switchable.
    CacheClip(Settings),
    /// As published.
    Paper,
    /// Nothing is recomputed.
    Stale,
    /// Nothing is reused: the prompt is computed in context.
    Full,
}

impl Policy {
    /// The names a request may choose from.
    pub const NAMES: [&'static str; 4] = ["cacheclip", "cacheclip-paper", "stale", "full"];

    /// The policy's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::CacheClip(_) => "cacheclip",
            Self::Paper => "cacheclip-paper",
            Self::Stale => "stale",
            Self::Full => "full",
        }
    }

    /// Whether the policy waits for the scorer.
    pub fn needs_scores(&self) -> bool {
        matches!(self, Self::CacheClip(_) | Self::Paper)
    }

    /// Share of reused rows recomputed when the request names none.
    pub fn default_ratio(&self) -> f32 {
        match self {
            Self::CacheClip(_) | Self::Paper => 0.2,
            Self::Stale => 0.0,
            Self::Full => 1.0,
        }
    }
}

impl FromStr for Policy {
    type Err = Error;

    /// Parses a policy's name; the empty name is the default policy.
    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "" | "cacheclip" => Ok(Self::CacheClip(Settings::default())),
            "cacheclip-paper" => Ok(Self::Paper),
            "stale" => Ok(Self::Stale),
            "full" => Ok(Self::Full),
            other => Err(Error::UnknownPolicy(other.to_owned())),
        }
    }
}

/// What a request got wrong.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum Error {
    /// No policy has this name.
    #[error("unknown policy {0:?}: choose one of cacheclip, cacheclip-paper, stale, full")]
    UnknownPolicy(String),
    /// The ratio is not a share.
    #[error("ratio {0} is not within 0..1")]
    Ratio(f32),
    /// A signal does not cover the reused rows.
    #[error("signal {name} has {got} values for {want} reused rows")]
    SignalLength {
        /// Which signal.
        name: &'static str,
        /// Values it has.
        got: usize,
        /// Reused rows.
        want: usize,
    },
    /// The policy cannot select without scores.
    #[error("policy {0} needs importance sets and has none")]
    NoScores(&'static str),
}

/// What is known about the reused rows: one value per row in order, where present.
#[derive(Clone, Debug, Default)]
pub struct Signals<'a> {
    /// The scorer's spans per chunk, with the byte spans of the chunk's rows.
    pub scored: Option<&'a [Vec<Scored>]>,
    /// Byte spans of each chunk's rows.
    pub spans: Vec<&'a [ByteSpan]>,
    /// The primary's own question attention on the stale cache.
    pub probe: Option<&'a [f32]>,
    /// Static rank from ingest: larger matters more.
    pub rank: Option<&'a [f32]>,
}

/// Where the scores came from, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// The scorer answered in time.
    Scorer,
    /// An earlier answer for the same chunks and question.
    CachedSet,
    /// The rank computed at ingest, and chunk heads.
    StaticRank,
    /// Nothing known: the whole prompt in context.
    FullPrefill,
    /// The policy asks for no scores.
    None,
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scorer => "scorer",
            Self::CachedSet => "cached-set",
            Self::StaticRank => "static-rank",
            Self::FullPrefill => "full-prefill",
            Self::None => "none",
        })
    }
}

/// The best rung of the ladder for what has arrived.
pub fn choose_rung(policy: &Policy, scorer: bool, cached: bool, ranks: bool) -> Rung {
    match policy {
        Policy::Stale | Policy::Full => Rung::None,
        _ if scorer => Rung::Scorer,
        _ if cached => Rung::CachedSet,
        // The published method has no static rank: without scores it has nothing to go by.
        Policy::CacheClip(_) if ranks => Rung::StaticRank,
        _ => Rung::FullPrefill,
    }
}

/// The exact rows to recompute.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// Rows of the prompt, ascending, chunk rows only.
    pub rows: Vec<u32>,
    /// What was asked for.
    pub nominal: f32,
    /// Recomputed reused rows divided by all reused chunk rows; 0 without chunks.
    pub realised: f32,
    /// How all chunk rows stand afterwards.
    pub counts: Counts,
}

impl Selection {
    /// Wraps rows chosen by any means.
    pub fn new(assembly: &Assembly, rows: Vec<u32>, nominal: f32) -> Self {
        let reused = assembly.reused().len();
        let realised = if reused == 0 { 0.0 } else { rows.len() as f32 / reused as f32 };
        Self { realised, counts: assembly.counts(&rows), rows, nominal }
    }

    /// The whole prompt computed in context: every chunk row is computed, none is reused, all are exact.
    pub fn in_context(assembly: &Assembly, nominal: f32) -> Self {
        let rows: Vec<u32> = assembly.reused().map(|row| row as u32).collect();
        let counts = Counts { exact: rows.len(), ..Counts::default() };
        Self { realised: if rows.is_empty() { 0.0 } else { 1.0 }, counts, rows, nominal }
    }
}

/// Selects the rows to recompute.
///
/// # Errors
/// A ratio outside 0..1, a signal of the wrong length, or a policy that needs scores without any.
pub fn select(
    assembly: &Assembly,
    policy: &Policy,
    ratio: Option<f32>,
    signals: &Signals<'_>,
) -> Result<Selection, Error> {
    let ratio = ratio.unwrap_or_else(|| policy.default_ratio());
    if !(0.0..=1.0).contains(&ratio) {
        return Err(Error::Ratio(ratio));
    }
    let rows = match policy {
        Policy::Stale => Vec::new(),
        Policy::Full => assembly.candidates().flat_map(|(_, rows)| rows).map(|row| row as u32).collect(),
        Policy::Paper => {
            let scored = signals.scored.ok_or(Error::NoScores("cacheclip-paper"))?;
            paper::grouped(assembly, &signals.spans, scored, ratio)
        }
        Policy::CacheClip(settings) => {
            let budget = (ratio as f64 * assembly.reused().len() as f64).round() as usize;
            windows(assembly, settings, &fused(assembly, settings, signals)?, budget)
        }
    };
    Ok(Selection::new(assembly, rows, ratio))
}

/// All signals present, fused by rank over the candidate rows.
fn fused(assembly: &Assembly, settings: &Settings, signals: &Signals<'_>) -> Result<Vec<f32>, Error> {
    let reused = assembly.reused().len();
    let scored: Option<Vec<f32>> = signals.scored.map(|sets| {
        sets.iter().zip(&signals.spans).flat_map(|(set, spans)| crate::scores_of_tokens(spans, set)).collect()
    });
    let present = [("scorer", scored.as_deref()), ("probe", signals.probe), ("static rank", signals.rank)];
    let mut masked = Vec::new();
    for (name, signal) in present {
        let Some(signal) = signal else { continue };
        if signal.len() != reused {
            return Err(Error::SignalLength { name, got: signal.len(), want: reused });
        }
        // Exact rows get no rank: they would only push candidates down.
        let mut values = vec![0.0; reused];
        let base = assembly.reused().start;
        for (_, rows) in assembly.candidates() {
            let at = rows.start - base..rows.end - base;
            values[at.clone()].copy_from_slice(&signal[at]);
        }
        masked.push(values);
    }
    if masked.is_empty() {
        return Err(Error::NoScores("cacheclip"));
    }
    let slices: Vec<&[f32]> = masked.iter().map(Vec::as_slice).collect();
    Ok(fuse(&slices, settings.fusion_offset))
}
