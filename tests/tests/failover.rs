//! What the fleet promises when its processes die, pause or are told to stop. Real processes, a real redis-server,
//! a client that knows the proto files only.

use cacheclip_bench::{Corpus, Family, Question, world};
use cacheclip_rpc::v1::gateway_client::GatewayClient;
use cacheclip_rpc::v1::generate_event::Event;
use cacheclip_rpc::v1::{ChunkReport, GenerateEvent, GenerateRequest, MissReason, Tier};
use cacheclip_tests::ask::{Answer, ask, client, finish, ingest, long_request, open, request};
use cacheclip_tests::fleet::{Fleet, Shape};
use cacheclip_tests::until;
use tokio::sync::{Mutex, MutexGuard};
use tonic::transport::Channel;
use tonic::{Code, Streaming};

/// Questions that a scorer has scored.
const SCORED: &str = "cacheclip_scorer_latency_seconds_count";

/// Two cores do not carry several fleets at once: deadlines would measure the machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

struct Scene {
    fleet: Fleet,
    corpus: Corpus,
    _alone: MutexGuard<'static, ()>,
}

/// A fleet that has ingested a corpus; `None` where it cannot be started here.
async fn scene(shape: Shape) -> Option<Scene> {
    let alone = ONE_AT_A_TIME.lock().await;
    let fleet = Fleet::start(shape).await?;
    let corpus = world::generate(31, 4, 12, &Family::ALL);
    let texts: Vec<&str> = corpus.documents.iter().map(|document| document.text.as_str()).collect();
    let mut gateway = client(&fleet.gateway.endpoint());
    let computed = ingest(&mut gateway, &texts).await.expect("ingested");
    assert_eq!(computed as usize, texts.len(), "nothing was stored before");
    Some(Scene { fleet, corpus, _alone: alone })
}

impl Scene {
    /// A question's reports in its order, and its text.
    fn prompt(&self, question: usize) -> (Vec<&str>, &str) {
        let Question { chunks, text, .. } = &self.corpus.questions[question];
        (chunks.iter().map(|&index| self.corpus.documents[index].text.as_str()).collect(), text)
    }

    fn request(&self, question: usize) -> GenerateRequest {
        let (chunks, question) = self.prompt(question);
        request(&chunks, question)
    }

    async fn ask(&self, question: usize) -> Answer {
        ask(&mut client(&self.fleet.gateway.endpoint()), self.request(question)).await.expect("an answer")
    }

    /// One question over all sixteen reports, so that each store has some of them.
    async fn ask_over_everything(&self) -> Answer {
        let chunks: Vec<&str> = self.corpus.documents.iter().map(|document| document.text.as_str()).collect();
        let request = request(&chunks, &self.corpus.questions[0].text);
        ask(&mut client(&self.fleet.gateway.endpoint()), request).await.expect("an answer")
    }

    fn long(&self, question: usize) -> GenerateRequest {
        let (chunks, question) = self.prompt(question);
        long_request(&chunks, question, 400)
    }
}

/// A stream that has begun to bring tokens, and how many it has brought.
async fn under_way(
    gateway: &mut GatewayClient<Channel>,
    request: GenerateRequest,
) -> (Streaming<GenerateEvent>, usize) {
    let mut stream = open(gateway, request).await.expect("a stream");
    let mut seen = 0;
    while seen < 2 {
        let event = stream.message().await.expect("an event").expect("more to come");
        seen += usize::from(matches!(event.event, Some(Event::Token(_))));
    }
    (stream, seen)
}

/// For a given selection hits and misses give the same answer, whatever is up or down.
fn same(undisturbed: &Answer, now: &Answer) {
    if undisturbed.selection() == now.selection() {
        assert_eq!(undisturbed.text, now.text);
    } else {
        assert_ne!(
            (&now.explain.rung, now.explain.realised_ratio),
            (&undisturbed.explain.rung, undisturbed.explain.realised_ratio),
            "another selection on the same rung is not reported"
        );
    }
}

#[tokio::test]
async fn a_worker_killed_between_two_questions_changes_no_answer() {
    let Some(mut scene) = scene(Shape::default()).await else { return };
    let before = scene.ask(0).await;
    assert_eq!(before.hits(), before.explain.chunks.len(), "the corpus was ingested");
    scene.fleet.workers[0].kill();
    for _ in 0..3 {
        same(&before, &scene.ask(0).await);
    }
    scene.fleet.workers[0].restart();
    scene.fleet.workers[0].ready().await;
    scene.fleet.workers[1].kill();
    same(&before, &scene.ask(0).await);
}

#[tokio::test]
async fn a_worker_killed_during_a_stream_ends_it_with_unavailable_and_the_next_question_is_answered() {
    let Some(mut scene) = scene(Shape::default()).await else { return };
    let before = scene.ask(0).await;
    let mut gateway = client(&scene.fleet.gateway.endpoint());
    let (stream, seen) = under_way(&mut gateway, scene.long(1)).await;
    // Whichever of the two it is.
    scene.fleet.workers.iter_mut().for_each(|worker| worker.kill());
    let ended = finish(stream, seen).await.expect_err("no worker is left");
    assert_eq!(ended.code(), Code::Unavailable, "{ended}");
    scene.fleet.workers[1].restart();
    scene.fleet.workers[1].ready().await;
    same(&before, &scene.ask(0).await);
}

#[tokio::test]
async fn a_store_killed_costs_its_chunks_recomputation_and_nothing_else() {
    let Some(mut scene) = scene(Shape::default()).await else { return };
    let before = scene.ask_over_everything().await;
    scene.fleet.stores[0].kill();
    let after = scene.ask_over_everything().await;
    same(&before, &after);
    let lost: Vec<_> = after.explain.chunks.iter().filter(|chunk| !chunk.hit).collect();
    assert!(lost.len() < after.explain.chunks.len(), "the other store's share is still there: {lost:?}");
    for chunk in &lost {
        assert_ne!(chunk.reason(), MissReason::Corrupt, "{chunk:?}");
    }
    // What was recomputed is stored on the store that is left, behind the request.
    until("the lost chunks are stored again", || async {
        let again = scene.ask_over_everything().await;
        same(&before, &again);
        again.hits() == again.explain.chunks.len()
    })
    .await;
    scene.fleet.stores[0].restart();
    scene.fleet.stores[0].ready().await;
    same(&before, &scene.ask_over_everything().await);
}

#[tokio::test]
async fn without_its_scorer_the_fleet_answers_on_a_lower_rung_and_says_so() {
    let Some(mut scene) = scene(Shape { workers: 1, ..Shape::default() }).await else { return };
    let before = scene.ask(0).await;
    assert_eq!(before.explain.rung, "scorer");
    scene.fleet.scorers[0].kill();
    let again = scene.ask(0).await;
    assert_eq!(again.explain.rung, "cached-set", "the one worker remembers the question");
    assert_eq!((&again.text, again.selection()), (&before.text, before.selection()));
    assert_eq!(scene.ask(1).await.explain.rung, "static-rank");
    let strict = GenerateRequest { strict: true, ..scene.request(2) };
    let refused = ask(&mut client(&scene.fleet.gateway.endpoint()), strict).await.expect_err("strict");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    scene.fleet.scorers[0].restart();
    scene.fleet.scorers[0].ready().await;
    until("the scorer is used again", || async { scene.ask(2).await.explain.rung == "scorer" }).await;
}

#[tokio::test]
async fn without_redis_answers_are_the_same_and_readiness_says_why() {
    let Some(mut scene) = scene(Shape::default()).await else { return };
    let before = scene.ask(0).await;
    scene.fleet.redis.kill();
    same(&before, &scene.ask(0).await);
    let store = &scene.fleet.stores[0];
    until("the store says that its index is away", || async { store.why().await.contains("index") }).await;
    until("a metric says so", || async { store.metric("cacheclip_index_up").await == Some(0.0) }).await;
    let after = scene.ask(0).await;
    same(&before, &after);
    assert_eq!(after.hits(), after.explain.chunks.len(), "the chunks are where they were");
    scene.fleet.redis.restart();
    let store = &scene.fleet.stores[0];
    until("the store says that it is back", || async { store.why().await == "ready" }).await;
}

#[tokio::test]
async fn either_of_two_scorers_is_enough_for_every_question_to_be_scored() {
    // Patience for a busy machine: a scorer that is slow is not what is looked at here.
    let shape = Shape { scorers: 2, score_timeout_seconds: 15.0, ..Shape::default() };
    let Some(mut scene) = scene(shape).await else { return };
    let mut before = Vec::new();
    for question in 0..scene.corpus.questions.len() {
        before.push(scene.ask(question).await);
    }
    for killed in [0, 1] {
        scene.fleet.scorers[killed].kill();
        let left = &scene.fleet.scorers[1 - killed];
        let scored = left.sum(SCORED, &[]).await;
        for (question, before) in before.iter().enumerate() {
            // Strict: an answer without scores, or with those of an earlier question, would be refused.
            let strict = GenerateRequest { strict: true, ..scene.request(question) };
            let gateway = &mut client(&scene.fleet.gateway.endpoint());
            let answer = ask(gateway, strict).await.expect("the other scorer's sets");
            assert_eq!(answer.explain.rung, "scorer");
            assert_eq!(
                (&answer.text, answer.selection()),
                (&before.text, before.selection()),
                "both scorers judge alike"
            );
        }
        let now = left.sum(SCORED, &[]).await;
        assert_eq!(now - scored, before.len() as f64, "every question was scored by the one that is left");
        scene.fleet.scorers[killed].restart();
        scene.fleet.scorers[killed].ready().await;
    }
    let fallbacks = scene.fleet.gateway.sum("cacheclip_scorer_fallback_total", &[]).await;
    assert_eq!(fallbacks, 0.0, "no request did without");
    // The control: without both there are none.
    scene.fleet.scorers.iter_mut().for_each(|scorer| scorer.kill());
    let strict = GenerateRequest { strict: true, ..scene.request(0) };
    let refused = ask(&mut client(&scene.fleet.gateway.endpoint()), strict).await.expect_err("strict");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
}

#[tokio::test]
async fn whatever_is_paused_every_request_ends_within_its_deadline() {
    let Some(scene) = scene(Shape::default()).await else { return };
    let before = scene.ask(0).await;
    let Fleet { workers, scorers, stores, redis, .. } = &scene.fleet;
    for process in [&workers[0], &stores[0], &scorers[0], redis] {
        process.signal("STOP");
        for _ in 0..2 {
            // `ask` fails the test where the deadline passes.
            match ask(&mut client(&scene.fleet.gateway.endpoint()), scene.request(0)).await {
                Ok(answer) => same(&before, &answer),
                Err(ended) => assert!(
                    matches!(ended.code(), Code::Unavailable | Code::DeadlineExceeded),
                    "{} paused: {ended}",
                    process.name
                ),
            }
        }
        process.signal("CONT");
        until("the fleet answers as before", || async {
            let answer = ask(&mut client(&scene.fleet.gateway.endpoint()), scene.request(0)).await;
            answer.is_ok_and(|answer| answer.explain.rung == "scorer" && answer.text == before.text)
        })
        .await;
    }
}

#[tokio::test]
async fn sigterm_loses_no_request_in_flight_and_readiness_flips_first() {
    let Some(mut scene) = scene(Shape { workers: 1, ..Shape::default() }).await else { return };
    let mut gateway = client(&scene.fleet.gateway.endpoint());
    for back_to_front in [true, false] {
        let (stream, seen) = under_way(&mut gateway, scene.long(1)).await;
        let process = if back_to_front { &mut scene.fleet.workers[0] } else { &mut scene.fleet.gateway };
        process.signal("TERM");
        let answer = finish(stream, seen).await.expect("the answer that was under way");
        assert!(answer.tokens > 10, "the whole of it: {} tokens", answer.tokens);
        let status = process.ended().await;
        assert!(status.success(), "{} ended with {status}", process.name);
        if back_to_front {
            process.restart();
            process.ready().await;
        }
    }
}

#[tokio::test]
async fn two_gateways_send_requests_to_workers_that_hold_their_chunks_without_sharing_state() {
    let Some(scene) = scene(Shape { worker_ram: 1 << 30, ..Shape::default() }).await else { return };
    let second = scene.fleet.another_gateway().await;
    let first = scene.ask(0).await;
    until(
        "the second gateway finds the chunks in the RAM of the worker that the first one chose",
        || async {
            let answer = ask(&mut client(&second.endpoint()), scene.request(0)).await.expect("an answer");
            same(&first, &answer);
            answer.explain.chunks.iter().all(|chunk| chunk.tier() == Tier::WorkerRam)
        },
    )
    .await;
    // Which worker it is may differ where both hold the chunks: announcements of load are half a second old.
    for _ in 0..3 {
        for endpoint in [scene.fleet.gateway.endpoint(), second.endpoint()] {
            let answer = ask(&mut client(&endpoint), scene.request(0)).await.expect("an answer");
            let resident = |chunk: &ChunkReport| chunk.tier() == Tier::WorkerRam;
            assert!(answer.explain.chunks.iter().all(resident), "{endpoint}: {:?}", answer.explain.chunks);
        }
    }
}

/// What a caller does that knows several gateways: the next one where one is away.
async fn ask_one_of(gateways: &[String], request: &GenerateRequest) -> Answer {
    for endpoint in gateways {
        match ask(&mut client(endpoint), request.clone()).await {
            Ok(answer) => return answer,
            Err(away) => assert_eq!(away.code(), Code::Unavailable, "{endpoint}: {away}"),
        }
    }
    panic!("none of {gateways:?} answers");
}

#[tokio::test]
async fn a_gateway_killed_costs_a_caller_that_knows_another_neither_answers_nor_hits() {
    let Some(mut scene) = scene(Shape::default()).await else { return };
    let mut second = scene.fleet.another_gateway().await;
    let gateways = [scene.fleet.gateway.endpoint(), second.endpoint()];
    // What is ingested through one gateway is found through the other: they share no state, and need none.
    let first = scene.ask(0).await;
    let mut undisturbed = first.clone();
    until("the prefix, which the first request computed, is a hit, too", async || {
        undisturbed = ask(&mut client(&gateways[1]), scene.request(0)).await.expect("an answer");
        undisturbed.usage.cached_tokens > first.usage.cached_tokens
    })
    .await;
    assert_eq!(undisturbed.hits(), undisturbed.explain.chunks.len(), "ingested through the first");
    for killed in [0, 1] {
        let gone = if killed == 0 { &mut scene.fleet.gateway } else { &mut second };
        gone.kill();
        let refused = ask(&mut client(&gateways[killed]), scene.request(0)).await.expect_err("it is gone");
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        // Asked first where nobody is.
        let known = [gateways[killed].clone(), gateways[1 - killed].clone()];
        let answer = ask_one_of(&known, &scene.request(0)).await;
        same(&undisturbed, &answer);
        assert_eq!(answer.hits(), undisturbed.hits());
        assert_eq!(
            answer.usage.cached_tokens, undisturbed.usage.cached_tokens,
            "hits are the same, to the token"
        );
        let gone = if killed == 0 { &mut scene.fleet.gateway } else { &mut second };
        gone.restart();
        gone.ready().await;
    }
    same(&undisturbed, &scene.ask(0).await);
}

#[tokio::test]
async fn a_gateway_killed_during_a_stream_ends_it_and_what_stood_behind_it() {
    let Some(mut scene) = scene(Shape { workers: 1, ..Shape::default() }).await else { return };
    let second = scene.fleet.another_gateway().await;
    let before = scene.ask(0).await;
    let mut first = client(&scene.fleet.gateway.endpoint());
    let (stream, seen) = under_way(&mut first, scene.long(1)).await;
    scene.fleet.gateway.kill();
    // The transport's own words: nobody is left to send a status.
    finish(stream, seen).await.expect_err("the gateway is gone");
    let worker = &scene.fleet.workers[0];
    let answered = ask_one_of(&[scene.fleet.gateway.endpoint(), second.endpoint()], &scene.request(0)).await;
    same(&before, &answered);
    let dropped = ["method=\"cacheclip.v1.Worker/Generate\"", "code=\"CANCELLED\""];
    until("the worker has dropped the answer that nobody hears", async || {
        worker.sum("cacheclip_rpc_requests_total", &dropped).await == 1.0
    })
    .await;
}
