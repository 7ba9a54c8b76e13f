//! What a worker holds of chunk KV that is not placed yet stays within `load_bytes`, however large requests are: with a
//! real store, on the tiny models.

mod support;

use cacheclip_rpc::v1::generate_event::Event;
use cacheclip_rpc::v1::{GenerateRequest, Tier};
use cacheclip_tests::until;
use support::{TestFleet, corpus, data, over, reordered, soon, under};
use tokio::sync::Mutex;

/// f32 keys and values of a token in all layers of the tiny primary.
const TOKEN: u64 = 5 * 2 * 2 * 32 * 4;
/// Less than a fifth of what the prompts of these tests take.
const LOAD: u64 = 192 << 10;

/// The figures are the process's.
static ALONE: Mutex<()> = Mutex::const_new(());

/// A worker without ample room, and without RAM of its own.
async fn narrow(data: &std::path::Path) -> TestFleet {
    TestFleet::with(data, |options| {
        (options.worker.load_bytes, options.worker.ram_bytes) = (LOAD, 0);
    })
    .await
}

fn figure(name: &str) -> u64 {
    let metrics = cacheclip_service::telemetry::render();
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("the worker reports {name}")).parse::<f64>().expect("a number") as u64
}

fn unplaced() -> u64 {
    figure("cacheclip_worker_unplaced_bytes")
}

/// The most since the last worker began.
fn peak() -> u64 {
    figure("cacheclip_worker_unplaced_peak_bytes")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_many_times_load_bytes_is_answered_within_it_and_so_are_two_at_once() {
    let _alone = ALONE.lock().await;
    let data = data();
    let corpus = corpus(301, 1);
    let request = over(&corpus, &corpus.questions[0]);
    let orders: Vec<GenerateRequest> = (0..3).map(|turn| reordered(&request, turn)).collect();
    let fleet = TestFleet::with(data.path(), |options| options.worker.ram_bytes = 0).await;
    fleet.ingest_corpus(&corpus).await;
    let mut expected = Vec::new();
    for order in &orders {
        expected.push(fleet.answer(order.clone()).await);
    }
    let tokens = u64::from(expected[0].chunk_tokens());
    assert!(tokens * TOKEN > 5 * LOAD, "{tokens} tokens are no large request");
    fleet.stop().await;

    let fleet = narrow(data.path()).await;
    assert_eq!(peak(), 0, "another worker");
    let first = fleet.answer(orders[0].clone()).await;
    let both = tokio::join!(fleet.answer(orders[1].clone()), fleet.answer(orders[2].clone()));
    for (answer, expected) in [first, both.0, both.1].iter().zip(&expected) {
        assert!(answer.all_hit(), "{:?}", answer.chunks());
        assert_eq!(answer.text(), expected.text());
        assert_eq!(answer.recomputed(), expected.recomputed());
    }
    let most = peak();
    assert!(most > LOAD / 2 && most <= LOAD, "{most} bytes of {LOAD}");
    assert_eq!(unplaced(), 0);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_be_computed_passes_through_the_same_bound() {
    let _alone = ALONE.lock().await;
    let corpus = corpus(302, 1);
    let request = over(&corpus, &corpus.questions[0]);
    let (ample, little) = (data(), data());
    let fleet = TestFleet::with(ample.path(), |options| options.worker.ram_bytes = 0).await;
    let expected = fleet.answer(request.clone()).await;
    fleet.stop().await;

    let fleet = narrow(little.path()).await;
    let answer = fleet.answer(request.clone()).await;
    assert!(expected.all_missed() && answer.all_missed(), "{:?}", answer.chunks());
    assert_eq!((answer.text(), answer.recomputed()), (expected.text(), expected.recomputed()));
    // Half of it is there, the other half has to be computed.
    let half =
        GenerateRequest { chunks: request.chunks[..4].to_vec(), salt: "half".into(), ..request.clone() };
    fleet.answer(half.clone()).await;
    let whole = GenerateRequest { salt: half.salt, ..request };
    let answer = fleet.answer(whole).await;
    assert_eq!(answer.text(), expected.text());
    // A chunk that is computed cannot be cut.
    let largest = expected.chunks().iter().map(|chunk| u64::from(chunk.tokens) * TOKEN).max();
    let (most, bound) = (peak(), LOAD.max(largest.expect("chunks")));
    assert!(most > 0 && most <= bound, "{most} bytes of {bound}");
    assert_eq!(unplaced(), 0);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn larger_requests_come_to_be_answered_from_the_workers_ram() {
    let _alone = ALONE.lock().await;
    let data = data();
    let corpus = corpus(303, 1);
    let request = over(&corpus, &corpus.questions[0]);
    let fleet = TestFleet::start(data.path()).await;
    fleet.ingest_corpus(&corpus).await;
    let expected = fleet.answer(request.clone()).await;
    fleet.stop().await;

    let load = 2 * LOAD;
    let fleet = TestFleet::with(data.path(), |options| options.worker.load_bytes = load).await;
    let mut from_ram = Vec::new();
    // Each time some more of it is kept.
    for _ in 0..=expected.chunks().len() {
        let answer = fleet.answer(request.clone()).await;
        assert_eq!(answer.text(), expected.text());
        from_ram.push(answer.chunks().iter().filter(|chunk| chunk.tier() == Tier::WorkerRam).count());
    }
    assert!(from_ram.is_sorted() && from_ram[0] == 0, "{from_ram:?}");
    assert_eq!(from_ram.last(), Some(&expected.chunks().len()), "{from_ram:?}");
    assert!(peak() <= load, "{} bytes of {load}", peak());
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_and_who_is_computed_in_context_hold_nothing() {
    let _alone = ALONE.lock().await;
    let data = data();
    let corpus = corpus(304, 1);
    let request = over(&corpus, &corpus.questions[0]);
    let fleet = narrow(data.path()).await;
    fleet.ingest_corpus(&corpus).await;
    let mut client = fleet.client();
    for _ in 0..4 {
        let mut events = soon(client.generate(request.clone())).await.expect("an answer begins").into_inner();
        let first = soon(events.message()).await.expect("an event").and_then(|it| it.event);
        assert!(matches!(first, Some(Event::Started(_))), "{first:?}");
        drop(events);
    }
    until("all that was asked for has been let go of", async || unplaced() == 0).await;
    fleet.answer(request.clone()).await;
    fleet.stop().await;

    // Without a scorer the published method computes the prompt in context.
    let fleet = TestFleet::with(data.path(), |options| {
        (options.worker.load_bytes, options.worker.ram_bytes) = (LOAD, 0);
        options.scorer = None;
        options.worker.importance_timeout_seconds = 0.1;
    })
    .await;
    let answer = fleet.answer(under(&request, "cacheclip-paper", None)).await;
    assert_eq!(answer.explain().rung, "full-prefill");
    assert!(peak() <= LOAD);
    assert_eq!(unplaced(), 0);
    fleet.stop().await;
}
