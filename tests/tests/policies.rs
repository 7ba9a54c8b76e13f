//! What a request may choose about reuse, and what it is told about what it got.

mod support;

use cacheclip_rpc::v1::GenerateRequest;
use support::{Answer, TestFleet, corpus, data, over, under};
use tonic::Code;

/// The four policies and the rung each ends on while the scorer answers.
const POLICIES: [(&str, &str); 4] =
    [("cacheclip", "scorer"), ("cacheclip-paper", "scorer"), ("stale", "none"), ("full", "none")];

/// What every record must fulfil, whatever the policy.
fn consistent(answer: &Answer) {
    let (explain, usage) = (answer.explain(), answer.usage());
    let rows = explain.rows_exact + explain.rows_repaired + explain.rows_stale;
    assert_eq!(rows, answer.chunk_tokens(), "every chunk row stands somehow: {explain:?}");
    let recomputed: u32 = answer.chunks().iter().map(|chunk| chunk.recomputed).sum();
    // A prompt computed in context reuses nothing, so nothing that was cached is recomputed.
    let in_context = explain.policy == "full" || explain.rung == "full-prefill";
    assert_eq!(usage.recomputed_tokens, if in_context { 0 } else { recomputed }, "{explain:?}");
    let realised = recomputed as f32 / answer.chunk_tokens() as f32;
    assert!((realised - explain.realised_ratio).abs() < 1e-6, "{realised}: {explain:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_policy_can_be_chosen_and_is_named_in_the_record() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(201, 1);
    fleet.ingest_corpus(&corpus).await;
    let request = over(&corpus, &corpus.questions[0]);
    for (policy, rung) in POLICIES {
        let answer = fleet.answer(under(&request, policy, None)).await;
        let explain = answer.explain();
        assert_eq!((explain.policy.as_str(), explain.rung.as_str()), (policy, rung));
        consistent(&answer);
        match policy {
            "stale" => assert_eq!((explain.realised_ratio, explain.rows_repaired), (0.0, 0)),
            "full" => assert_eq!((explain.rows_stale, answer.usage().cached_tokens), (0, 0)),
            _ => assert!(explain.realised_ratio > 0.0 && explain.realised_ratio < 1.0, "{explain:?}"),
        }
    }
    let default = fleet.answer(request.clone()).await;
    let named = fleet.answer(under(&request, "cacheclip", None)).await;
    assert_eq!(default.explain().policy, "cacheclip");
    assert_eq!((default.text(), default.recomputed()), (named.text(), named.recomputed()));
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_ratio_one_the_answer_is_full_prefills_and_at_ratio_zero_it_is_stale_reuses() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(202, 12);
    fleet.ingest_corpus(&corpus).await;
    let mut differ = 0;
    for question in &corpus.questions {
        let request = over(&corpus, question);
        let full = fleet.answer(under(&request, "full", None)).await;
        let stale = fleet.answer(under(&request, "stale", None)).await;
        let all = fleet.answer(under(&request, "cacheclip", Some(1.0))).await;
        let none = fleet.answer(under(&request, "cacheclip", Some(0.0))).await;
        assert_eq!((all.explain().rows_stale, all.explain().rows_repaired), (0, 0), "{:?}", all.explain());
        assert!(all.all_hit() && all.usage().recomputed_tokens > 0);
        assert_eq!(all.text(), full.text(), "{}", question.text);
        assert_eq!((none.explain().realised_ratio, none.usage().recomputed_tokens), (0.0, 0));
        assert_eq!(none.text(), stale.text(), "{}", question.text);
        differ += usize::from(full.text() != stale.text());
        [full, stale, all, none].iter().for_each(consistent);
    }
    assert!(differ > 0, "if stale reuse answered like full prefill throughout, this would prove nothing");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_prefix_of_its_own_a_prompt_at_ratio_one_recomputes_every_chunk_row() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(203, 1);
    let request = GenerateRequest {
        prefix: Some("Eight reports follow, and then a question.".into()),
        ..over(&corpus, &corpus.questions[0])
    };
    let all = fleet.answer(under(&request, "cacheclip", Some(1.0))).await;
    assert_eq!(all.explain().realised_ratio, 1.0);
    assert_eq!(all.explain().rows_exact, all.chunk_tokens(), "nothing stale is left to stand on");
    assert_eq!(all.text(), fleet.answer(under(&request, "full", None)).await.text());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ratio_is_a_budget_that_is_met_to_the_row() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(204, 2);
    fleet.ingest_corpus(&corpus).await;
    for question in &corpus.questions {
        for ratio in [0.05, 0.1, 0.25, 0.5] {
            let answer = fleet.answer(under(&over(&corpus, question), "cacheclip", Some(ratio))).await;
            consistent(&answer);
            assert_eq!(answer.explain().nominal_ratio, ratio);
            let budget = f64::from(ratio) * f64::from(answer.chunk_tokens());
            let recomputed = f64::from(answer.usage().recomputed_tokens);
            assert!((recomputed - budget).abs() <= 0.5, "{recomputed} rows at a budget of {budget}");
            for chunk in answer.chunks() {
                let text = &corpus.documents[question.chunks[chunk.index as usize]].text;
                let inside = |span: &cacheclip_rpc::v1::ByteSpan| {
                    span.start < span.end && text.get(span.start as usize..span.end as usize).is_some()
                };
                assert!(chunk.recomputed_spans.iter().all(inside), "ranges of the chunk's text: {chunk:?}");
            }
        }
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_scorer_a_strict_request_fails_and_any_other_goes_down_the_ladder() {
    let data = data();
    let fleet = TestFleet::with(data.path(), |options| options.scorer = None).await;
    let corpus = corpus(205, 1);
    fleet.ingest_corpus(&corpus).await;
    let request = over(&corpus, &corpus.questions[0]);
    let strict = |policy| GenerateRequest { strict: true, ..under(&request, policy, None) };
    for policy in ["cacheclip", "cacheclip-paper"] {
        let refused = fleet.ask(strict(policy)).await.expect_err(policy);
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        let why = refused.message();
        assert!(why.contains("strict") && why.contains("scorer"), "{why:?} says what is missing");
    }
    // What needs no scores misses none.
    for policy in ["stale", "full"] {
        assert_eq!(fleet.answer(strict(policy)).await.explain().rung, "none");
    }
    let full = fleet.answer(under(&request, "full", None)).await;
    let ranked = fleet.answer(request.clone()).await;
    assert_eq!(ranked.explain().rung, "static-rank");
    assert!(ranked.all_hit() && ranked.explain().rows_repaired > 0, "{:?}", ranked.explain());
    consistent(&ranked);
    // The published method has no rank to fall back on: the whole prompt is computed in context, and says so.
    let paper = fleet.answer(under(&request, "cacheclip-paper", None)).await;
    assert_eq!(paper.explain().rung, "full-prefill");
    assert_eq!((paper.explain().rows_stale, paper.usage().cached_tokens), (0, 0));
    consistent(&paper);
    assert_eq!(paper.text(), full.text());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strict_request_that_is_answered_got_what_it_asked_for() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(206, 2);
    for question in &corpus.questions {
        for (policy, rung) in POLICIES {
            let ratio = (rung == "scorer").then_some(0.15);
            let request = GenerateRequest { strict: true, ..under(&over(&corpus, question), policy, ratio) };
            let answer = fleet.answer(request).await;
            let explain = answer.explain();
            assert_eq!((explain.policy.as_str(), explain.rung.as_str()), (policy, rung));
            if let Some(ratio) = ratio {
                assert_eq!(explain.nominal_ratio, ratio);
            }
        }
    }
    fleet.stop().await;
}
