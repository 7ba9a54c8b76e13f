//! What the whole fleet promises about reuse, on the tiny models: real services, real gRPC, one process.

mod support;

use cacheclip_rpc::v1::{Chunk, FinishReason, GenerateRequest, IngestRequest, MissReason, Sampling, Tier};
use cacheclip_tests::until;
use std::collections::HashSet;
use support::{
    Ingested, NEVER, TestFleet, chunk, containers, containers_of, corpus, data, over, reordered, under,
};
use tonic::Request;

#[tokio::test(flavor = "multi_thread")]
async fn after_its_first_request_a_chunk_is_a_hit_in_every_new_order() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(101, 1);
    let request = over(&corpus, &corpus.questions[0]);
    let cold = fleet.answer(request.clone()).await;
    for chunk in cold.chunks() {
        let how = (chunk.hit, chunk.tier(), chunk.reason());
        assert_eq!(how, (false, Tier::Computed, MissReason::NeverSeen), "{chunk:?}");
    }
    assert_eq!(cold.usage().cached_tokens, 0);
    let sorted = |mut keys: Vec<String>| {
        keys.sort();
        keys
    };
    let mut orders = HashSet::from([cold.keys()]);
    for turn in 1..=6 {
        let warm = fleet.answer(reordered(&request, turn)).await;
        assert!(orders.insert(warm.keys()), "an order that was not asked before");
        assert_eq!(sorted(warm.keys()), sorted(cold.keys()), "keys do not depend on the order");
        for chunk in warm.chunks() {
            let how = (chunk.hit, chunk.tier(), chunk.reason());
            assert_eq!(how, (true, Tier::WorkerRam, MissReason::Unspecified), "{chunk:?}");
        }
        let (usage, explain) = (warm.usage(), warm.explain());
        assert!(usage.cached_tokens >= warm.chunk_tokens() && warm.chunk_tokens() > 0, "{usage:?}");
        assert_eq!(usage.cached_tokens + explain.rows_question, usage.prompt_tokens, "all but the question");
        assert_eq!(explain.rows_exact + explain.rows_repaired + explain.rows_stale, warm.chunk_tokens());
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hits_and_misses_select_the_same_text_and_give_the_same_answer() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(102, 4);
    fleet.ingest_corpus(&corpus).await;
    let drawn = Sampling {
        temperature: 2.0,
        seed: 5,
        max_tokens: 32,
        stop: vec![NEVER.into()],
        ..Default::default()
    };
    let mut answers = HashSet::new();
    for (index, question) in corpus.questions.iter().enumerate() {
        let greedy = over(&corpus, question);
        // Drawn at a high temperature, a text hangs on every logit and not only on the largest.
        let drawn = GenerateRequest { sampling: Some(drawn.clone()), ..greedy.clone() };
        for (way, request) in [("greedy", greedy), ("drawn", drawn)] {
            let warm = fleet.answer(request.clone()).await;
            // A salt of its own narrows reuse to this request: nothing of it is known.
            let cold = fleet.answer(GenerateRequest { salt: format!("{way} {index}"), ..request }).await;
            assert!(warm.all_hit() && cold.all_missed(), "{way}: {:?} {:?}", warm.explain(), cold.explain());
            assert_eq!(warm.recomputed(), cold.recomputed(), "{way}: {}", question.text);
            assert_eq!(warm.text(), cold.text(), "{way}: {}", question.text);
            answers.insert(warm.text().to_owned());
        }
    }
    assert!(answers.len() > 4, "answers that are all alike would prove nothing: {answers:?}");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_chunks_come_from_the_store_with_the_same_answer() {
    let data = data();
    let corpus = corpus(103, 1);
    let request = over(&corpus, &corpus.questions[0]);
    let fleet = TestFleet::start(data.path()).await;
    let ingested = fleet.ingest_corpus(&corpus).await;
    let before = fleet.answer(request.clone()).await;
    fleet.stop().await;

    let fleet = TestFleet::start(data.path()).await;
    let after = fleet.answer(request.clone()).await;
    for chunk in after.chunks() {
        assert!(chunk.hit && matches!(chunk.tier(), Tier::StoreDisk | Tier::StoreRam), "{chunk:?}");
        assert!(chunk.bytes > 0, "a stored chunk has a size: {chunk:?}");
    }
    assert_eq!(after.text(), before.text());
    assert_eq!(after.recomputed(), before.recomputed());
    let again = fleet.answer(request).await;
    assert!(again.chunks().iter().all(|chunk| chunk.hit && chunk.tier() == Tier::WorkerRam), "{again:?}");
    assert_eq!(again.text(), before.text());
    assert_eq!(fleet.ingest_corpus(&corpus).await, Ingested { computed: 0, ..ingested });
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_ram_of_its_own_is_served_by_the_stores_disk_and_then_its_ram() {
    let data = data();
    let corpus = corpus(104, 1);
    let request = over(&corpus, &corpus.questions[0]);
    let fleet = TestFleet::start(data.path()).await;
    fleet.ingest_corpus(&corpus).await;
    let expected = fleet.answer(request.clone()).await;
    fleet.stop().await;

    let fleet = TestFleet::with(data.path(), |options| options.worker.ram_bytes = 0).await;
    for tier in [Tier::StoreDisk, Tier::StoreRam] {
        let answer = fleet.answer(request.clone()).await;
        assert!(answer.chunks().iter().all(|it| it.hit && it.tier() == tier), "{tier:?}: {answer:?}");
        assert_eq!(answer.text(), expected.text());
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_chunks_a_request_is_ordinary_prefill_with_its_prefix_reused() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(105, 1);
    let request = GenerateRequest { chunks: Vec::new(), ..over(&corpus, &corpus.questions[0]) };
    let first = fleet.answer(request.clone()).await;
    let again = fleet.answer(request.clone()).await;
    for answer in [&first, &again] {
        let explain = answer.explain();
        assert!(explain.chunks.is_empty() && explain.realised_ratio == 0.0, "{explain:?}");
        assert_eq!((explain.rows_exact, explain.rows_repaired, explain.rows_stale), (0, 0, 0));
        assert_eq!(answer.usage().recomputed_tokens, 0);
        assert!(answer.usage().completion_tokens > 0);
    }
    assert_eq!(first.usage().cached_tokens, 0);
    let prefix = again.usage().prompt_tokens - again.explain().rows_question;
    assert!(prefix > 0 && again.usage().cached_tokens == prefix, "{:?}", again.usage());
    assert_eq!(again.text(), first.text());
    assert_eq!(again.text(), fleet.answer(under(&request, "full", None)).await.text());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_chunk_twice_is_computed_once_and_placed_twice() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(106, 1);
    let request = over(&corpus, &corpus.questions[0]);
    let (a, b) = (request.chunks[0].clone(), request.chunks[1].clone());
    let once = GenerateRequest { chunks: vec![a.clone(), b.clone()], ..request.clone() };
    let once = fleet.answer(once).await;
    // Under another salt nothing is known yet.
    let twice = GenerateRequest { chunks: vec![a.clone(), b, a], salt: "twice".into(), ..request };
    for hit in [false, true] {
        let answer = fleet.answer(twice.clone()).await;
        let [first, between, second] = answer.chunks() else { panic!("three reports: {answer:?}") };
        assert_eq!((first.index, second.index, &first.key), (0, 2, &second.key));
        assert_ne!(first.key, between.key);
        assert_eq!(first.tokens, second.tokens);
        assert_eq!([first.hit, between.hit, second.hit], [hit; 3]);
        assert_eq!(answer.usage().prompt_tokens, once.usage().prompt_tokens + first.tokens);
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repaired_kv_is_never_stored() {
    let corpus = corpus(107, 20);
    let canonical = data();
    let fleet = TestFleet::start(canonical.path()).await;
    let layout = fleet.layout().await;
    fleet.ingest_corpus(&corpus).await;
    fleet.stop().await;
    let canonical = containers_of(canonical.path(), &layout);
    assert!(canonical.len() >= corpus.documents.len());

    // The second fleet meets every chunk inside of a prompt, behind others.
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let first = fleet.answer(over(&corpus, &corpus.questions[0])).await;
    let keys = first.keys();
    let stored = || containers(data.path());
    until("what the first request computed is stored", async || {
        keys.iter().all(|key| stored().contains_key(key))
    })
    .await;
    for (turn, question) in (1..).zip(&corpus.questions) {
        let answer = fleet.answer(reordered(&over(&corpus, question), turn)).await;
        assert!(answer.all_hit() && answer.explain().rows_repaired > 0, "{:?}", answer.explain());
    }
    // Chunks are written in turn: when this one is stored, so is whatever was offered before it.
    let last = IngestRequest { chunks: vec![chunk("Report from nowhere.")], ..Default::default() };
    fleet.ingest(vec![last]).await.expect("an ingest");
    let again = fleet.answer(over(&corpus, &corpus.questions[0])).await;
    assert_eq!(
        (again.text(), again.recomputed()),
        (first.text(), first.recomputed()),
        "reuse does not decay"
    );
    fleet.stop().await;

    let stored = containers_of(data.path(), &layout);
    let most = keys.len() + 2;
    assert!(
        (keys.len() + 1..=most).contains(&stored.len()),
        "chunks, the prefix and the last: {:?}",
        stored.keys()
    );
    for key in &keys {
        assert!(stored[key] == canonical[key], "{key}: not the bytes that ingest alone gives");
    }
    // The scorer's KV, where it is stored, is one container per chunk, too.
    let auxiliary = containers(data.path()).len() - stored.len();
    assert!(auxiliary <= most, "{auxiliary} more containers");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tokens_of_a_stream_joined_are_the_text_of_its_final_message() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(108, 4);
    let mut ids = HashSet::new();
    for question in &corpus.questions {
        let answer = fleet.answer(over(&corpus, question)).await;
        let joined: String = answer.tokens.iter().map(|token| token.text.as_str()).collect();
        assert_eq!(joined, answer.text());
        assert!(answer.tokens.len() > 1, "an answer comes in pieces: {answer:?}");
        let indices: Vec<u32> = answer.tokens.iter().map(|token| token.index).collect();
        assert_eq!(indices, (0..answer.tokens.len() as u32).collect::<Vec<_>>());
        assert!(!answer.started.model.is_empty());
        assert!(ids.insert(answer.started.request_id), "every request has an id of its own");
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_ends_at_its_length_or_before_its_stop_text() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(109, 1);
    let ended = |max_tokens, stop: &str| GenerateRequest {
        sampling: Some(Sampling { max_tokens, stop: vec![stop.into()], ..Default::default() }),
        ..over(&corpus, &corpus.questions[0])
    };
    let whole = fleet.answer(ended(12, NEVER)).await;
    let text = whole.text();
    assert!(text.chars().count() >= 6, "long enough to be cut: {text:?}");
    for length in [1, 2] {
        let cut = fleet.answer(ended(length, NEVER)).await;
        assert_eq!((cut.done.finish_reason(), cut.usage().completion_tokens), (FinishReason::Length, length));
        assert!(
            text.starts_with(cut.text()) && cut.text().len() < text.len(),
            "{:?} of {text:?}",
            cut.text()
        );
    }
    // Three characters from the middle: the stop text may start inside of one token and end in another.
    let middle: Vec<char> = text.chars().skip(text.chars().count() / 2 - 1).take(3).collect();
    let stop: String = middle.into_iter().collect();
    let stopped = fleet.answer(ended(12, &stop)).await;
    let expected = &text[..text.find(&stop).expect("it stands there")];
    assert_eq!((stopped.text(), stopped.done.finish_reason()), (expected, FinishReason::Stop));
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drawing_with_the_same_seed_gives_the_same_text() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(110, 1);
    let drawn = |seed| GenerateRequest {
        sampling: Some(Sampling {
            temperature: 3.0,
            seed,
            max_tokens: 12,
            stop: vec![NEVER.into()],
            ..Default::default()
        }),
        ..over(&corpus, &corpus.questions[0])
    };
    let mut texts = HashSet::new();
    for seed in 1..=4 {
        let first = fleet.answer(drawn(seed)).await;
        let second = fleet.answer(drawn(seed)).await;
        assert_eq!(first.text(), second.text(), "seed {seed}");
        texts.insert(first.done.text);
    }
    assert!(texts.len() > 1, "another seed gives another text: {texts:?}");
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_the_same_time_get_the_answers_they_get_one_after_another() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(111, 6);
    let requests: Vec<_> = corpus.questions.iter().map(|question| over(&corpus, question)).collect();
    let together = futures::future::join_all(requests.iter().cloned().map(|it| fleet.answer(it))).await;
    for (request, together) in requests.into_iter().zip(together) {
        let alone = fleet.answer(request).await;
        assert_eq!((alone.text(), alone.recomputed()), (together.text(), together.recomputed()));
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ingesting_twice_computes_nothing_the_second_time() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(112, 1);
    let all = corpus.documents.len() as u32;
    let first = fleet.ingest_corpus(&corpus).await;
    assert_eq!((first.chunks, first.computed), (all, all));
    assert!(first.tokens > 0);
    let stored = containers(data.path());
    assert_eq!(fleet.ingest_corpus(&corpus).await, Ingested { computed: 0, ..first });
    assert_eq!(containers(data.path()), stored);
    let answer = fleet.answer(over(&corpus, &corpus.questions[0])).await;
    assert!(answer.all_hit(), "what was ingested is a hit at once: {:?}", answer.explain());
    assert_eq!(u64::from(answer.chunk_tokens()), first.tokens);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_chunks_are_its_own_and_a_shared_corpus_is_everybodys() {
    let data = data();
    let fleet = TestFleet::start(data.path()).await;
    let corpus = corpus(113, 1);
    let own = over(&corpus, &corpus.questions[0]);
    let mut shared = own.clone();
    shared.chunks = own.chunks.iter().map(|it| Chunk { corpus: "reports".into(), ..it.clone() }).collect();
    let ask = |tenant: &'static str, request: &GenerateRequest| {
        let mut request = Request::new(request.clone());
        request.metadata_mut().insert("x-tenant", tenant.parse().expect("ASCII"));
        fleet.ask(request)
    };
    let first = ask("one", &own).await.expect("an answer");
    assert!(ask("one", &own).await.expect("an answer").all_hit());
    let foreign = ask("two", &own).await.expect("an answer");
    assert!(foreign.all_missed(), "another tenant's chunks are as if they had never been: {foreign:?}");
    assert!(foreign.chunks().iter().all(|chunk| chunk.reason() == MissReason::NeverSeen));
    assert!(first.keys().iter().all(|key| !foreign.keys().contains(key)));
    assert_eq!(foreign.text(), first.text());
    assert!(ask("one", &shared).await.expect("an answer").all_missed());
    assert!(ask("two", &shared).await.expect("an answer").all_hit());
    fleet.stop().await;
}
