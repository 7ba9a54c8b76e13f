//! What every selection promises, over random prompts and signals.

use cacheclip_chunk::ByteSpan;
use cacheclip_plan::{Assembly, Error, Policy, Rung, Scored, Settings, Signals, choose_rung, select};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Prompt {
    assembly: Assembly,
    spans: Vec<Vec<ByteSpan>>,
    scored: Vec<Vec<Scored>>,
}

impl Prompt {
    fn signals(&self) -> Signals<'_> {
        Signals {
            scored: Some(&self.scored),
            spans: self.spans.iter().map(Vec::as_slice).collect(),
            ..Signals::default()
        }
    }
}

fn prompt() -> impl Strategy<Value = Prompt> {
    let chunk = (1usize..90).prop_flat_map(|len| (Just(len), prop::collection::vec(0.0f32..1.0, len)));
    (0usize..20, prop::collection::vec(chunk, 1..9), 1usize..30, any::<bool>()).prop_map(
        |(prefix, chunks, question, anchored)| {
            let lengths: Vec<usize> = chunks.iter().map(|(len, _)| *len).collect();
            let span = |i: usize| ByteSpan { start: 4 * i as u32, end: 4 * i as u32 + 4 };
            Prompt {
                assembly: Assembly::new(prefix, &lengths, question, anchored),
                spans: lengths.iter().map(|&len| (0..len).map(span).collect()).collect(),
                scored: chunks
                    .iter()
                    .map(|(_, scores)| {
                        scores.iter().enumerate().map(|(i, &score)| Scored { span: span(i), score }).collect()
                    })
                    .collect(),
            }
        },
    )
}

proptest! {
    #[test]
    fn cacheclip_spends_its_budget_exactly_and_only_on_candidates(
        prompt in prompt(),
        ratio in 0.0f32..=1.0,
        window in 1usize..17,
    ) {
        let policy = Policy::CacheClip(Settings { window, ..Settings::default() });
        let selection = select(&prompt.assembly, &policy, Some(ratio), &prompt.signals()).unwrap();
        let budget = (ratio as f64 * prompt.assembly.reused().len() as f64).round() as usize;
        prop_assert_eq!(selection.rows.len(), budget.min(prompt.assembly.candidate_rows()));
        prop_assert!(selection.rows.is_sorted_by(|a, b| a < b));
        for &row in &selection.rows {
            prop_assert!(prompt.assembly.candidates().any(|(_, rows)| rows.contains(&(row as usize))));
        }
        let counts = selection.counts;
        prop_assert_eq!(counts.exact + counts.repaired + counts.stale, prompt.assembly.reused().len());
    }

    #[test]
    fn ratio_one_leaves_nothing_stale(prompt in prompt(), window in 1usize..17) {
        for policy in [Policy::CacheClip(Settings { window, ..Settings::default() }), Policy::Full] {
            let selection = select(&prompt.assembly, &policy, Some(1.0), &prompt.signals()).unwrap();
            prop_assert_eq!(selection.counts.stale, 0);
            prop_assert_eq!(selection.counts.repaired, 0);
        }
    }

    #[test]
    fn published_windows_are_whole_and_never_cross_chunks(prompt in prompt(), ratio in 0.0f32..=1.0) {
        let selection = select(&prompt.assembly, &Policy::Paper, Some(ratio), &prompt.signals()).unwrap();
        let chosen = |row: usize| selection.rows.binary_search(&(row as u32)).is_ok();
        for (_, rows) in prompt.assembly.candidates() {
            let mut run = 0;
            for row in rows.clone() {
                if chosen(row) {
                    run += 1;
                } else {
                    prop_assert!(run == 0 || run >= 8, "a run of {} rows", run);
                    run = 0;
                }
            }
            prop_assert!(run == 0 || run >= 8);
        }
    }

    #[test]
    fn only_the_order_of_scores_matters(prompt in prompt(), ratio in 0.05f32..0.9, window in 1usize..17) {
        let policy = Policy::CacheClip(Settings { window, ..Settings::default() });
        let base = select(&prompt.assembly, &policy, Some(ratio), &prompt.signals()).unwrap();
        let mut bent = prompt.clone();
        bent.scored.iter_mut().flatten().for_each(|s| s.score = s.score.powi(3) * 1000.0);
        let ties = prompt.scored.iter().flatten().zip(bent.scored.iter().flatten()).any(|(a, b)| a.score > 0.0 && b.score == 0.0);
        prop_assume!(!ties);
        prop_assert_eq!(base.rows, select(&bent.assembly, &policy, Some(ratio), &bent.signals()).unwrap().rows);
    }
}

/// Rows of two chunks of 100 tokens, one byte each, behind a prefix of 4; no heads.
fn taken(settings: Settings, ratio: f32, score: impl Fn(usize, u32) -> f32) -> Vec<u32> {
    let assembly = Assembly::new(4, &[100, 100], 5, false);
    let spans: Vec<ByteSpan> = (0..100).map(|i| ByteSpan { start: i, end: i + 1 }).collect();
    let scored: Vec<Vec<Scored>> = (0..2)
        .map(|chunk| spans.iter().map(|&span| Scored { span, score: score(chunk, span.start) }).collect())
        .collect();
    let signals = Signals { scored: Some(&scored), spans: vec![&spans, &spans], ..Signals::default() };
    let settings = Settings { head: 0, ..settings };
    select(&assembly, &Policy::CacheClip(settings), Some(ratio), &signals).expect("a selection").rows
}

#[test]
fn windows_surround_what_scores_high() {
    let peaks = |chunk, at| if (chunk, at) == (0, 40) || (chunk, at) == (1, 70) { 9.0 } else { 0.0 };
    let rows = taken(Settings { window: 8, ..Settings::default() }, 0.08, peaks);
    assert_eq!(rows.len(), 16);
    assert!(rows.contains(&44) && rows.contains(&174), "{rows:?}");
    assert!(rows.iter().all(|&row| row.abs_diff(44) < 8 || row.abs_diff(174) < 8), "{rows:?}");
}

#[test]
fn by_default_one_decisive_token_is_not_outweighed_by_a_run_of_mediocre_ones() {
    // The best token stands alone in the second chunk; the eight next best ones stand together in the first.
    let score = |chunk, at: u32| match (chunk, at) {
        (1, 70) => 100.0,
        (0, 40..48) => (48 - at) as f32,
        _ => 0.0,
    };
    assert_eq!(taken(Settings::default(), 0.04, score), [44, 45, 46, 47, 48, 49, 50, 174]);
    let windows = Settings { window: 8, ..Settings::default() };
    assert_eq!(taken(windows, 0.04, score), [44, 45, 46, 47, 48, 49, 50, 51]);
}

#[test]
fn a_ratio_outside_its_range_is_refused_by_value() {
    let assembly = Assembly::new(4, &[10], 5, false);
    for ratio in [-0.1, 1.1, f32::NAN] {
        let error = select(&assembly, &Policy::Stale, Some(ratio), &Signals::default()).unwrap_err();
        assert!(matches!(error, Error::Ratio(_)));
    }
}

#[test]
fn the_ladder_goes_down_one_rung_at_a_time() {
    let ours: Policy = "cacheclip".parse().unwrap();
    assert_eq!(choose_rung(&ours, true, true, true), Rung::Scorer);
    assert_eq!(choose_rung(&ours, false, true, true), Rung::CachedSet);
    assert_eq!(choose_rung(&ours, false, false, true), Rung::StaticRank);
    assert_eq!(choose_rung(&ours, false, false, false), Rung::FullPrefill);
    assert_eq!(choose_rung(&Policy::Paper, false, false, true), Rung::FullPrefill);
    assert_eq!(choose_rung(&Policy::Stale, false, false, false), Rung::None);
    assert!("nonsense".parse::<Policy>().is_err());
}
