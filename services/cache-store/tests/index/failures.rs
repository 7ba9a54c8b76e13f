//! Whatever the index does, a store answers the same, in time, and says what is wrong.

use crate::common::{Calls, LAYOUT, container, key};
use crate::process::Process;
use crate::servers::{Flavour, Server, free_port, installed};
use crate::until;
use cacheclip_rpc::v1::MissReason;
use cacheclip_rpc::v1::put_response::Outcome;
use std::time::{Duration, Instant};

pub(crate) const UP: &str = "cacheclip_index_up";
pub(crate) const MISSING: &str = "cacheclip_index_blob_drift_objects{kind=\"missing\"}";
const STALE: &str = "cacheclip_index_blob_drift_objects{kind=\"stale\"}";

/// An index that is renewed often and given up soon.
pub(crate) fn settings(server: &Server, lease: f64, timeout: f64) -> Vec<String> {
    vec![
        "index.kind=redis".into(),
        format!("index.urls=[{:?}]", server.url()),
        format!("index.lease_seconds={lease}"),
        format!("index.timeout_seconds={timeout}"),
    ]
}

pub(crate) fn errors(store: &Process, op: &str) -> f64 {
    store.metric(&format!("cacheclip_index_errors_total{{op=\"{op}\"}}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flushed_index_comes_back_by_announcement() {
    if !installed() {
        return;
    }
    let (redis, dir) = (Server::start(Flavour::default()), tempfile::tempdir().unwrap());
    let store = Process::start(dir.path(), "store-0", &settings(&redis, 3.0, 2.0));
    for n in 0..20 {
        assert_eq!(store.put(container(n, 5)).await, Outcome::Stored);
    }
    let all_named = async || (0..20).all(|n| redis.names(n, "store-0"));
    until("all chunks are announced", all_named).await;
    let before = errors(&store, "epoch");
    assert_eq!(redis.cli(&["FLUSHALL"]), "OK");
    assert!(!redis.names(7, "store-0"));
    until("all chunks are announced again", all_named).await;
    assert_eq!(errors(&store, "epoch"), before + 1.0);
    until("nothing is missing", async || store.metric(MISSING) == 0.0).await;
    assert_eq!(store.metric(UP), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_died_and_came_back_empty_is_filled_with_what_changed_meanwhile() {
    if !installed() {
        return;
    }
    let (redis, dir) = (Server::start(Flavour::default()), tempfile::tempdir().unwrap());
    let store = Process::start(dir.path(), "store-0", &settings(&redis, 3.0, 2.0));
    for n in 0..3 {
        store.put(container(n, 5)).await;
    }
    until("all chunks are announced", async || (0..3).all(|n| redis.names(n, "store-0"))).await;
    redis.kill();
    // Nothing that is done to the store needs the index.
    assert_eq!(store.put(container(3, 5)).await, Outcome::Stored);
    assert_eq!(store.delete(LAYOUT, &[key(0)]).await.objects, 1);
    assert_eq!(store.get(1).await.unwrap(), container(1, 5));
    assert_eq!(store.reason(9).await, MissReason::NeverSeen);
    until("the store says that the index is gone", async || store.metric(UP) == 0.0).await;
    until("it says why", async || !store.members().await.index_unavailable.is_empty()).await;
    until("it counts what came", async || store.metric(MISSING) >= 1.0).await;
    until("it counts what went", async || store.metric(STALE) == 1.0).await;
    assert!(store.is_ready(), "the files are there");

    assert!(redis.launch(), "the same port");
    until("it is filled again", async || (1..4).all(|n| redis.names(n, "store-0"))).await;
    until("nothing is waiting", async || store.metric(MISSING) + store.metric(STALE) == 0.0).await;
    assert!(!redis.names(0, "store-0"), "deleted while the index was away");
    assert_eq!(store.metric(UP), 1.0);
    assert_eq!(store.members().await.index_unavailable, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_hangs_delays_nobody_and_heals() {
    if !installed() {
        return;
    }
    let (redis, dir) = (Server::start(Flavour::default()), tempfile::tempdir().unwrap());
    let store = Process::start(dir.path(), "store-0", &settings(&redis, 3.0, 0.3));
    store.put(container(1, 5)).await;
    until("it is announced", async || redis.names(1, "store-0")).await;
    redis.signal("STOP");
    // Without a deadline every one of these would take until the server goes on, which is never.
    let started = Instant::now();
    for n in 2..12 {
        assert_eq!(store.put(container(n, 5)).await, Outcome::Stored);
        assert_eq!(store.get(n).await.unwrap(), container(n, 5));
        let entries = store.lookup_elsewhere(LAYOUT, &[key(n), key(100 + n), key(200 + n)]).await;
        assert_eq!(entries.iter().map(|it| it.found).collect::<Vec<_>>(), [true, false, false]);
        assert!(entries.iter().all(|it| it.nodes.is_empty()));
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(10), "ten puts, reads and lookups took {took:?}");
    until("the store says that the index is gone", async || store.metric(UP) == 0.0).await;
    until("it says why", async || store.members().await.index_unavailable.contains("within")).await;
    assert!(errors(&store, "locate") >= 1.0);
    let ready = store.http("/ready");
    assert!(store.is_ready() && ready.contains("index: ") && ready.contains("within"), "{ready}");

    redis.signal("CONT");
    until("all chunks are announced", async || (1..12).all(|n| redis.names(n, "store-0"))).await;
    until("the index is up", async || store.metric(UP) == 1.0).await;
    until("nothing is wrong", async || store.members().await.index_unavailable.is_empty()).await;
    until("and nothing is reported", async || !store.http("/ready").contains("index: ")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_starts_without_its_index_and_joins_it_later() {
    if !installed() {
        return;
    }
    let (redis, dir) = (Server::at(free_port(), Flavour::default()), tempfile::tempdir().unwrap());
    let store = Process::start(dir.path(), "store-0", &settings(&redis, 3.0, 2.0));
    assert_eq!(store.put(container(1, 5)).await, Outcome::Stored);
    until("it says why", async || store.members().await.index_unavailable.contains("refused")).await;
    let why = store.members().await.index_unavailable;
    assert!(why.contains(&redis.url()), "{why}");
    assert_eq!(store.metric(UP), 0.0);
    assert!(redis.launch());
    until("the chunk is announced", async || redis.names(1, "store-0")).await;
    until("the index is up", async || store.metric(UP) == 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_wrongly_names_a_store_is_taken_back_when_that_store_is_asked() {
    if !installed() {
        return;
    }
    let (redis, dir) = (Server::start(Flavour::default()), tempfile::tempdir().unwrap());
    let store = Process::start(dir.path(), "store-0", &settings(&redis, 3.0, 2.0));
    store.put(container(1, 5)).await;
    until("it is announced", async || redis.names(1, "store-0")).await;
    let (from, to) = (crate::servers::chunk(1), crate::servers::chunk(2));
    assert_eq!(redis.cli(&["COPY", &from, &to]), "1");
    assert!(redis.names(2, "store-0"), "a lie");
    until("it is taken back", async || {
        let entries = store.lookup_elsewhere(LAYOUT, &[key(2)]).await;
        assert!(!entries[0].found && entries[0].nodes.is_empty(), "a store never names itself");
        !redis.names(2, "store-0")
    })
    .await;
    assert!(redis.names(1, "store-0"), "the truth stays");
}
