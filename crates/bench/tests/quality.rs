//! Promises of the evaluation, on the shipped pair.

use cacheclip_bench::eval::policies::{Attention, Policy, View, catalogue};
use cacheclip_bench::eval::{
    Anchor, Bench, Cell, Columns, Desk, Family, Pair, Prepared, Reading, Reference, Reshape, Sections,
    Settings, Signal, Signals, Source, measure, run,
};
use cacheclip_model::certificate::relative_error;
use cacheclip_model::{Logits, Probe};
use cacheclip_plan::{Assembly, Policy as Plan, Settings as Terms, Signals as PlanSignals, select};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny")
}

fn pair() -> &'static Pair {
    static PAIR: OnceLock<Pair> = OnceLock::new();
    PAIR.get_or_init(|| Pair::load(&models().join("primary"), &models().join("aux")).expect("the tiny pair"))
}

fn reference() -> &'static Reference {
    static REFERENCE: OnceLock<Reference> = OnceLock::new();
    REFERENCE.get_or_init(|| Reference::load(&models().join("primary")).expect("the tiny pair evaluates"))
}

fn positions(start: usize, count: usize) -> Vec<u32> {
    (start as u32..(start + count) as u32).collect()
}

/// Selections of every policy that recomputes, on one task.
fn selections(family: Family, ratio: f32, mut look: impl FnMut(&dyn Policy, &View<'_>, Vec<u32>)) {
    let policies = catalogue(&[]);
    let mut bench = Bench::new(pair(), Some(reference()), 1).expect("the tiny pair evaluates");
    let task = family.task(77, 0);
    let needs: Vec<Signal> = policies.iter().filter(|it| it.takes(ratio)).flat_map(|it| it.needs()).collect();
    let aux = bench.auxiliary(&task, &needs).expect("the tiny pair evaluates");
    let mut tools = bench.instruments();
    let prepared = Prepared::new(tools.primary, &task, &[Anchor::Bos, Anchor::Nothing])
        .expect("the tiny pair evaluates");
    let signals: Signals =
        measure(&mut tools, &prepared, aux.as_ref(), &needs).expect("the tiny pair evaluates");
    for policy in
        policies.iter().filter(|policy| policy.takes(ratio) && policy.name() != "cacheclip-adaptive")
    {
        let assembly = prepared.assembly(policy.anchor());
        let view = View { assembly, prepared: &prepared, signals: &signals, seed: 5 };
        let rows = policy.select(&view, ratio).expect("the tiny pair evaluates");
        look(&**policy, &view, rows);
    }
}

#[test]
fn budgeted_policies_spend_exactly_what_was_asked_for_on_candidates_alone() {
    for (family, ratio) in [(Family::Vt2, 0.1), (Family::Chunks16, 0.05), (Family::NiahMultiKey, 1.0)] {
        selections(family, ratio, |policy, view, rows| {
            let candidates: Vec<u32> =
                view.assembly.candidates().flat_map(|(_, rows)| rows).map(|row| row as u32).collect();
            assert!(rows.windows(2).all(|pair| pair[0] < pair[1]), "{}: ascending, each once", policy.name());
            if policy.attention() != Attention::InContext {
                assert!(rows.iter().all(|row| candidates.binary_search(row).is_ok()), "{}", policy.name());
            }
            // The published grouping spends what falls out of it.
            if policy.budgeted() && policy.name() != "cacheclip-paper" {
                let budget = view.budget(ratio).min(candidates.len());
                assert_eq!(rows.len(), budget, "{} at {ratio}", policy.name());
            }
        });
    }
}

#[test]
fn everything_recomputed_is_full_prefill_whatever_the_policy() {
    let policies = catalogue(&[]);
    let everything = ["random", "cacheblend", "prophetkv", "cacheclip", "cacheclip/anchor-none"];
    let cells: Vec<Cell<'_>> = policies
        .iter()
        .filter(|policy| everything.contains(&policy.name()))
        .map(|policy| Cell { policy: &**policy, ratio: Some(1.0) })
        .chain(
            policies
                .iter()
                .filter(|it| it.name() == "prefix-only")
                .map(|it| Cell { policy: &**it, ratio: None }),
        )
        .collect();
    let mut bench = Bench::new(pair(), Some(reference()), 1).unwrap();
    for family in [Family::Vt2, Family::Chunks16, Family::Cut] {
        let record = bench.record(&family.task(78, 0), &cells, false).unwrap();
        assert_eq!(record.outcomes.len(), 6);
        for outcome in &record.outcomes {
            assert!(outcome.kl < 1e-5 && outcome.first, "{}: {}", outcome.policy, outcome.kl);
            assert_eq!(outcome.score, record.full, "{}", outcome.policy);
        }
    }
    // And it can fail: nothing recomputed is something else.
    let stale = policies.iter().find(|policy| policy.name() == "stale").unwrap();
    let cell = [Cell { policy: &**stale, ratio: None }];
    assert!(bench.record(&Family::Vt2.task(78, 0), &cell, false).unwrap().outcomes[0].kl > 1e-2);
}

#[test]
fn a_joint_question_pass_over_the_kv_of_one_prefill_sees_what_that_prefill_saw() {
    for side in [&pair().primary, &pair().aux] {
        let task = Family::Vt1.task(79, 0);
        let sections = Sections::of(side, &task).unwrap();
        let (ids, end) = ([sections.context_ids(), sections.question.clone()].concat(), sections.end());
        let mut desk = Desk::new(side).unwrap();
        let reading = Reading::MAX;
        let mut probe = Probe::new(end as u32, end, 0..side.layers(), reading.heads, reading.rows);
        desk.compute(&ids, &positions(0, ids.len()), Logits::None, None, Some(&mut probe)).unwrap();
        let whole = desk.section(&[], &ids[..end]).unwrap();
        let scene = cacheclip_bench::eval::Scene {
            cache: vec![(&whole, 0)],
            starts: sections.starts.clone(),
            ids: sections.context_ids(),
        };
        let joint = scene.attention(&mut desk, &sections.question, 0, reading, 0).unwrap();
        let error = relative_error(&joint, &probe.scores());
        assert!(error < 1e-4, "{error}");
        // The last question token alone is another reading, and a pass over it shows that.
        let last = Reading { last_row: true, ..reading };
        let other = scene.attention(&mut desk, &sections.question, 0, last, 0).unwrap();
        assert!(relative_error(&other, &joint) > 1e-2);
    }
}

#[test]
fn the_plain_decoder_is_the_engines_decoder() {
    let side = &pair().primary;
    let task = Family::NiahMultiQuery.task(80, 0);
    let mut desk = Desk::new(side).unwrap();
    let prepared = Prepared::new(&mut desk, &task, &[]).unwrap();
    let (sections, scene) = (&prepared.sections, prepared.stale());
    scene.place(&mut desk).unwrap();
    let at = positions(sections.end(), sections.question.len());
    let engine = desk.compute(&sections.question, &at, Logits::All, None, None).unwrap();
    let mut columns = Columns::default();
    for (kv, start) in &scene.cache {
        reference().place(&mut columns, kv, &positions(*start, kv.tokens()));
    }
    columns.context = sections.starts[0]..sections.end();
    let plain = reference().run(&mut columns.clone(), &sections.question, &at, Reshape::NONE);
    let error = relative_error(&plain, &engine);
    assert!(error < 1e-4, "{error}");
    let sharper = Reshape { temperature: 0.5, scale: 0.5 };
    let reshaped = reference().run(&mut columns, &sections.question, &at, sharper);
    assert!(relative_error(&reshaped, &engine) > 1e-2, "temperature and scale change attention");
}

#[test]
fn chunks_side_by_side_have_no_order_and_chunks_in_a_row_have_one() {
    let side = &pair().primary;
    let task = Family::Vt1.task(81, 0);
    let mut desk = Desk::new(side).unwrap();
    let prepared = Prepared::new(&mut desk, &task, &[]).unwrap();
    let sections = &prepared.sections;
    let logits = |reversed: bool, parallel: bool| {
        let mut columns = Columns::default();
        reference().place(&mut columns, &prepared.prefix, &positions(0, sections.prefix.len()));
        let mut chunks: Vec<_> = prepared.chunks().iter().collect();
        if reversed {
            chunks.reverse();
        }
        let mut next = sections.prefix.len();
        for kv in chunks {
            let start = if parallel { sections.prefix.len() } else { next };
            reference().place(&mut columns, kv, &positions(start, kv.tokens()));
            next += kv.tokens();
        }
        let at = positions(sections.end(), sections.question.len());
        reference().run(&mut columns, &sections.question, &at, Reshape::NONE)
    };
    assert!(relative_error(&logits(true, true), &logits(false, true)) < 1e-4);
    assert!(relative_error(&logits(true, false), &logits(false, false)) > 1e-3);
}

#[test]
fn the_scores_of_a_text_of_many_scripts_reach_the_tokens_of_the_other_tokenizer_in_order() {
    let text = "Alder keeps the naïve 猫 🦉 – Ελλάδα – near the mill.";
    let spans = |side: &cacheclip_bench::eval::Side| side.composer.chunk(text).unwrap().spans;
    let (aux, primary) = (spans(&pair().aux), spans(&pair().primary));
    let mut last = (0, 0);
    for span in aux.iter().filter(|span| span.start < span.end) {
        let set = [cacheclip_plan::Scored { span: *span, score: 1.0 }];
        let rows = cacheclip_plan::scores_of_tokens(&primary, &set);
        let reached: Vec<usize> = (0..rows.len()).filter(|&row| rows[row] > 0.0).collect();
        let reach =
            (*reached.first().expect("every auxiliary token reaches a row"), reached[reached.len() - 1]);
        assert!(reach.0 >= last.0 && reach.1 >= last.1, "{span:?} reaches {reach:?} after {last:?}");
        last = reach;
    }
}

proptest! {
    #[test]
    fn a_window_stays_in_the_chunk_of_the_row_it_is_taken_for(
        lengths in prop::collection::vec(1usize..40, 2..8),
        pick in any::<prop::sample::Index>(),
        window in 1usize..17,
    ) {
        let assembly = Assembly::new(3, &lengths, 4, true);
        let candidates: Vec<usize> = assembly.candidates().flat_map(|(_, rows)| rows).collect();
        let row = candidates[pick.index(candidates.len())];
        let chunk = (0..assembly.chunks()).map(|it| assembly.chunk(it)).find(|rows| rows.contains(&row)).unwrap();
        let mut scores = vec![0.0; assembly.reused().len()];
        scores[row - assembly.reused().start] = 1.0;
        // What one window of that chunk costs.
        let budget = window.min(chunk.end - row).max(1);
        let ratio = (budget as f64 / assembly.reused().len() as f64) as f32;
        let terms = Terms { window, head_share: 0.0, ..Terms::default() };
        let signals = PlanSignals { probe: Some(&scores), ..PlanSignals::default() };
        let rows = select(&assembly, &Plan::CacheClip(terms), Some(ratio), &signals).unwrap().rows;
        prop_assert_eq!(rows.len(), budget);
        prop_assert!(rows.iter().all(|&it| chunk.contains(&(it as usize))), "{:?} leaves {:?}", rows, chunk);
        prop_assert!(rows.contains(&(row as u32)), "{:?} holds {}", rows, row);
    }
}

fn settings(out: Option<PathBuf>, resume: bool, threads: usize) -> Settings {
    Settings {
        suite: "test".into(),
        source: Source::Families(vec![Family::Vt1, Family::NiahMultiKey]),
        policies: ["full", "stale", "question-on-stale", "cacheclip", "cacheclip-adaptive"]
            .map(str::to_owned)
            .to_vec(),
        ratios: vec![0.1],
        n: 3,
        seed: 42,
        agreement: 2,
        out,
        resume,
        threads,
    }
}

/// Everything of a report but its seconds.
fn figures(report: &cacheclip_bench::eval::Report) -> serde_json::Value {
    let mut value = serde_json::to_value(report).expect("the tiny pair evaluates");
    value["seconds"].take();
    value
}

#[test]
fn a_seed_gives_the_same_report_on_one_thread_or_more_and_after_an_interruption() {
    let one = run(pair(), &settings(None, false, 1), &mut |_| ()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = Some(dir.path().to_owned());
    let more = run(pair(), &settings(at.clone(), false, 3), &mut |_| ()).unwrap();
    assert_eq!(figures(&one), figures(&more));
    let path = dir.path().join("records.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let kept: Vec<&str> = text.lines().take(3).collect();
    std::fs::write(&path, format!("{}\n{{\"fam", kept.join("\n"))).unwrap();
    let mut first = None;
    let resumed = run(pair(), &settings(at, true, 2), &mut |progress| {
        first.get_or_insert(progress.done);
    });
    assert_eq!(first, Some(2), "two records were kept");
    assert_eq!(figures(&one), figures(&resumed.unwrap()));
    let adaptive = one.row("vt-1", "cacheclip-adaptive", Some(0.1)).unwrap();
    assert!((0.05..=0.3).contains(&adaptive.realised_ratio), "{}", adaptive.realised_ratio);
    assert!(one.signals.iter().any(|row| row.signal == "scorer+probe" && row.n == 2));
    assert!(one.differences.iter().any(|it| it.best_rival), "ours are compared with the best rival");
}
