//! What a gateway promises about one generation.

mod support;

use cacheclip_gateway::Error;
use cacheclip_rpc::status::{exhausted, invalid_field, retry_after};
use cacheclip_rpc::v1::{self, generate_event::Event};
use std::time::Duration;
use support::{Answer, Fake, Fleet, MAX_TOKENS, MODEL, ask, options, soon, start_scorer, start_worker};
use tonic::{Code, Request, Status};

const A: &str = "Belmon keeps the sunny bell near the library.";
const B: &str = "Orton holds the misty badger near the wall.";

#[tokio::test]
async fn events_come_in_order_and_the_worker_gets_keyed_sections_and_scores() {
    let fleet = Fleet::start().await;
    let answer = fleet.generate(ask(&[A, B])).await.expect("an answer");
    assert_eq!(answer.order, ["started", "token", "token", "done"]);
    assert_eq!(answer.tokens.concat(), answer.done.text);
    assert_eq!(answer.started.model, MODEL);
    assert_eq!(answer.done.finish_reason(), v1::FinishReason::Stop);
    assert_eq!(
        answer.stages(),
        ["tokenize", "score", "aux_question", "decode"],
        "the gateway's stages come first"
    );

    let state = fleet.fake.state();
    let sections = &state.sections[0];
    assert_eq!(sections.policy, "cacheclip");
    let all = sections.chunks.iter().chain(&sections.prefix);
    for section in all {
        assert_eq!(section.key.len(), 32);
        assert_eq!(section.spans.len(), 2 * section.ids.len());
    }
    assert_eq!(*sections.chunks[0].spans.last().expect("spans"), A.len() as u32);
    assert!(sections.question.as_ref().is_some_and(|question| question.key.is_empty()));
    let sampling = sections.sampling.as_ref().expect("sampling");
    assert_eq!(
        (sampling.max_tokens, sampling.stop.as_slice()),
        (64, &["\n".to_string()][..]),
        "defaults are filled in"
    );
    let importance = &state.importance[0];
    assert!(importance.unavailable.is_empty());
    assert_eq!(importance.sets.len(), 2);
}

#[tokio::test]
async fn every_bad_input_names_its_field() {
    let fleet = Fleet::start().await;
    let sampling = |change: fn(&mut v1::Sampling)| {
        let mut sampling = v1::Sampling::default();
        change(&mut sampling);
        v1::GenerateRequest { sampling: Some(sampling), ..ask(&[A]) }
    };
    let long = "word ".repeat(MAX_TOKENS as usize);
    let part = long[..long.len() / 3].to_owned();
    let cases = [
        ("chunks[1].text", ask(&[A, "", B])),
        ("question", v1::GenerateRequest { question: String::new(), ..ask(&[A]) }),
        ("question", v1::GenerateRequest { question: long.clone(), ..ask(&[]) }),
        ("ratio", v1::GenerateRequest { ratio: Some(1.5), ..ask(&[A]) }),
        ("ratio", v1::GenerateRequest { ratio: Some(-0.1), ..ask(&[A]) }),
        ("ratio", v1::GenerateRequest { ratio: Some(f32::NAN), ..ask(&[A]) }),
        ("model", v1::GenerateRequest { model: "other".into(), ..ask(&[A]) }),
        ("policy", v1::GenerateRequest { policy: "fastest".into(), ..ask(&[A]) }),
        ("salt", v1::GenerateRequest { salt: "x".repeat(257), ..ask(&[A]) }),
        ("chunks[0].text", ask(&[&long])),
        ("chunks", ask(&[&part, &part])),
        ("sampling.max_tokens", sampling(|sampling| sampling.max_tokens = MAX_TOKENS)),
        ("sampling.temperature", sampling(|sampling| sampling.temperature = -1.0)),
        ("sampling.temperature", sampling(|sampling| sampling.temperature = f32::NAN)),
        ("sampling.top_p", sampling(|sampling| sampling.top_p = 1.1)),
        ("sampling.top_p", sampling(|sampling| sampling.top_p = f32::NAN)),
        ("sampling.stop[1]", sampling(|sampling| sampling.stop = vec!["x".into(), String::new()])),
    ];
    for (field, request) in cases {
        let refused = fleet.generate(request.clone()).await.expect_err(field);
        assert_eq!(refused.code(), Code::InvalidArgument, "{field}: {refused}");
        assert_eq!(invalid_field(&refused).as_deref(), Some(field), "{refused}");
    }
    assert!(fleet.fake.state().sections.is_empty(), "none of them reached the worker");
}

#[tokio::test]
async fn without_a_scorer_the_worker_is_told_why_and_the_answer_still_comes() {
    // Gone, silent, and none at all.
    let mut gone = Fleet::start().await;
    drop(gone.scorer.take());
    let silent = Fleet::with(|options| options.score_timeout_seconds = 0.1).await;
    silent.fake.state().silent = true;
    let none = Fleet::with(|options| options.scorers.clear()).await;
    for (fleet, reason) in
        [(gone, "UNAVAILABLE"), (silent, "DEADLINE_EXCEEDED"), (none, "no scorer is configured")]
    {
        let answer = fleet.generate(ask(&[A, B])).await.expect(reason);
        assert_eq!(answer.done.text, "sunny bell");
        let state = fleet.fake.state();
        assert!(state.importance[0].unavailable.starts_with(reason), "{:?}", state.importance);
        assert!(state.importance[0].sets.is_empty());
    }
}

#[tokio::test]
async fn texts_travel_to_the_scorer_once_and_only_where_it_asks() {
    let fleet = Fleet::start().await;
    for chunks in [[A, B], [B, A]] {
        fleet.generate(ask(&chunks)).await.expect("an answer");
    }
    let state = fleet.fake.state();
    let texts: Vec<Vec<_>> = state
        .asked
        .iter()
        .map(|asked| asked.chunks.iter().map(|chunk| chunk.text.as_deref()).collect())
        .collect();
    assert_eq!(texts, [vec![None, None], vec![Some(A), Some(B)], vec![None, None]]);
    assert!(state.importance.iter().all(|importance| importance.unavailable.is_empty()));
}

#[tokio::test]
async fn a_scorer_that_asks_for_text_twice_is_given_up() {
    let fleet = Fleet::start().await;
    fleet.fake.state().forgetful = true;
    fleet.generate(ask(&[A])).await.expect("an answer");
    let state = fleet.fake.state();
    assert_eq!(state.asked.len(), 2);
    assert!(state.importance[0].unavailable.contains("asked for text twice"), "{:?}", state.importance);
}

#[tokio::test]
async fn the_policy_decides_what_the_scorer_is_asked() {
    let fleet = Fleet::start().await;
    for (policy, mode) in [
        ("cacheclip", Some(v1::ScoreMode::Joint)),
        ("cacheclip-paper", Some(v1::ScoreMode::Paper)),
        ("stale", None),
        ("full", None),
    ] {
        fleet.fake.state().asked.clear();
        let request = v1::GenerateRequest { policy: policy.into(), ..ask(&[A]) };
        fleet.generate(request).await.expect(policy);
        let state = fleet.fake.state();
        assert_eq!(state.sections.last().expect("sections").policy, policy);
        assert_eq!(state.asked.first().map(v1::ScoreRequest::mode), mode, "{policy}");
    }
    // No chunks are an ordinary prefill: there is nothing to score.
    fleet.fake.state().asked.clear();
    let answer = fleet.generate(ask(&[])).await.expect("an answer");
    assert_eq!(answer.stages(), ["tokenize", "decode"]);
    let state = fleet.fake.state();
    assert!(state.asked.is_empty());
    assert_eq!(state.ended_without, 3, "the request stream ends instead");
}

#[tokio::test]
async fn the_callers_request_id_crosses_to_worker_and_scorer() {
    let fleet = Fleet::start().await;
    let mut request = Request::new(ask(&[A]));
    request.metadata_mut().insert("x-request-id", "ask-7".parse().expect("ascii"));
    let answer = soon(Answer::read(fleet.client.clone(), request)).await.expect("an answer");
    assert_eq!(answer.started.request_id, "ask-7");
    let state = fleet.fake.state();
    assert_eq!(state.request_ids.len(), 3, "a generation and two questions to the scorer");
    assert!(state.request_ids.iter().all(|id| id == "ask-7"), "{:?}", state.request_ids);
}

#[tokio::test]
async fn a_duplicate_chunk_is_placed_twice_under_one_key() {
    let fleet = Fleet::start().await;
    fleet.generate(ask(&[A, B, A])).await.expect("an answer");
    let state = fleet.fake.state();
    let chunks = &state.sections[0].chunks;
    assert_eq!(chunks.len(), 3);
    assert_eq!(chunks[0], chunks[2]);
    assert_ne!(chunks[0].key, chunks[1].key);
    assert_eq!(state.importance[0].sets.len(), 3);
}

#[tokio::test]
async fn keys_are_shared_within_a_scope_and_never_across() {
    let fleet = Fleet::start().await;
    let key = async |tenant: Option<&'static str>, corpus: &str, salt: &str| {
        let mut request = ask(&[A]);
        request.chunks[0].corpus = corpus.into();
        request.salt = salt.into();
        let mut request = Request::new(request);
        if let Some(tenant) = tenant {
            request.metadata_mut().insert("x-tenant", tenant.parse().expect("ascii"));
        }
        soon(Answer::read(fleet.client.clone(), request)).await.expect("an answer");
        fleet.fake.state().sections.last().expect("sections").chunks[0].key.clone()
    };
    let own = key(Some("ann"), "", "").await;
    assert_eq!(key(Some("ann"), "", "").await, own);
    assert_ne!(key(Some("bob"), "", "").await, own);
    assert_ne!(key(Some("ann"), "", "pepper").await, own);
    assert_eq!(key(None, "", "").await, key(Some("default"), "", "").await);
    let shared = key(Some("ann"), "handbook", "").await;
    assert_eq!(key(Some("bob"), "handbook", "").await, shared);
    assert_ne!(shared, own);
}

#[tokio::test]
async fn a_caller_that_goes_away_stops_the_worker() {
    let fleet = Fleet::start().await;
    fleet.fake.state().hang = true;
    let mut client = fleet.client.clone();
    let mut stream = client.generate(ask(&[A])).await.expect("a stream").into_inner();
    let token = async {
        while let Some(event) = stream.message().await.expect("no error") {
            if matches!(event.event, Some(Event::Token(_))) {
                return;
            }
        }
    };
    soon(token).await;
    drop(stream);
    soon(fleet.fake.dropped.notified()).await;
}

#[tokio::test]
async fn a_workers_refusal_keeps_its_code_and_hint() {
    let fleet = Fleet::start().await;
    fleet.fake.state().refuse = Some(exhausted("the worker's queue", Duration::from_millis(500)));
    let refused = fleet.generate(ask(&[A])).await.expect_err("refused");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(retry_after(&refused), Some(Duration::from_millis(500)));
}

#[tokio::test]
async fn a_lost_worker_is_unavailable_and_nothing_else() {
    let mut cut = Fleet::start().await;
    cut.fake.state().cut = true;
    let refused = cut.generate(ask(&[A])).await.expect_err("cut");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");

    cut.worker.take().expect("a worker").drain().await;
    let refused = cut.generate(ask(&[A])).await.expect_err("gone");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(refused.message().contains("worker cannot be reached"), "{refused}");
}

#[tokio::test]
async fn a_silent_worker_ends_the_request_in_time() {
    let fleet = Fleet::with(|options| options.worker_timeout_seconds = 0.2).await;
    fleet.fake.state().hang = true;
    let refused = fleet.generate(ask(&[A])).await.expect_err("silent");
    assert_eq!(refused.code(), Code::DeadlineExceeded, "{refused}");
    soon(fleet.fake.dropped.notified()).await;
}

#[tokio::test]
async fn a_worker_with_a_new_layout_is_learned_again() {
    let fleet = Fleet::start().await;
    {
        let mut state = fleet.fake.state();
        state.layout = 5;
        state.refuse = Some(Status::failed_precondition("layout: another one"));
    }
    let refused = fleet.generate(ask(&[A])).await.expect_err("another layout");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    fleet.fake.state().refuse = None;
    fleet.generate(ask(&[A])).await.expect("an answer");
    assert_eq!(fleet.fake.state().sections[0].layout, vec![5; 32]);
}

#[tokio::test]
async fn a_gateway_waits_for_its_worker_and_refuses_a_foreign_one() {
    let fake = Fake::default();
    let scorer = start_scorer(&fake).await;
    let worker = start_worker(&fake, "127.0.0.1:0").await;
    let (options, address) = (options(&worker, Some(&scorer)), worker.grpc().to_string());
    worker.drain().await;

    // The worker comes back at its address while the gateway is already asking.
    let (gateway, worker) = soon(async {
        tokio::join!(cacheclip_gateway::start(options.clone()), start_worker(&fake, &address))
    })
    .await;
    assert!(gateway.expect("a gateway").readiness().is_ready());

    fake.state().other_tokenizer = true;
    let error = soon(cacheclip_gateway::start(options.clone())).await.expect_err("a foreign worker");
    assert!(matches!(error, Error::Mismatch { what: "tokenizer" }), "{error}");
    assert!(error.to_string().contains("model_dir"), "{error}");

    worker.drain().await;
    let options = cacheclip_gateway::Options { describe_timeout_seconds: 0.2, ..options };
    let error = soon(cacheclip_gateway::start(options)).await.expect_err("no worker");
    assert!(matches!(error, Error::Worker { .. }), "{error}");
}
