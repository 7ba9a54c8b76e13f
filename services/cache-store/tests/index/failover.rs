//! One server of a cluster dies: its replica takes over, or nobody does. Stores go on without, and what they have is
//! in the index again afterwards, whatever the dead server had not passed on.

use crate::common::{Calls, LAYOUT, container, key};
use crate::failures::{MISSING, UP, errors};
use crate::process::Process;
use crate::servers::{Server, chunk, cluster, installed, replica};
use crate::until;
use cacheclip_rpc::v1::put_response::Outcome;
use std::io::Write as _;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait of a store for the index; tens of calls without it must stay far below their sum.
const TIMEOUT: f64 = 0.5;

/// Two stores of the cluster that have heard of each other.
async fn pair(servers: &[Server], dir: &Path) -> [Process; 2] {
    let settings = [
        "index.kind=redis".to_owned(),
        "index.cluster=true".to_owned(),
        format!("index.urls={:?}", servers.iter().map(Server::url).collect::<Vec<_>>()),
        "index.lease_seconds=3.0".to_owned(),
        format!("index.timeout_seconds={TIMEOUT}"),
    ];
    let stores = ["a", "b"].map(|node| Process::start(&dir.join(node), node, &settings));
    until("they hear of each other", async || {
        stores[0].members().await.peers.len() == 1 && stores[1].members().await.peers.len() == 1
    })
    .await;
    stores
}

/// Sets an option of a running server.
fn set(server: &Server, option: &str, value: &str) {
    assert_eq!(server.cli(&["CONFIG", "SET", option, value]), "OK");
}

/// Whether a server has a record, as a master or as a replica.
fn has(server: &Server, n: u32) -> bool {
    server.cli(&["--scan", "--pattern", &chunk(n)]) == chunk(n)
}

/// Has redis-cli give the slots of dead masters to the others. It asks before it does.
fn give_slots_away(server: &Server) {
    let mut fix = Command::new("redis-cli");
    fix.args([
        "--cluster",
        "fix",
        &format!("127.0.0.1:{}", server.port),
        "--cluster-fix-with-unreachable-masters",
    ]);
    let mut fix = fix.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    fix.stdin.take().unwrap().write_all(b"yes\n").unwrap();
    fix.wait().unwrap();
}

async fn put(store: &Process, chunks: Range<u32>) {
    for n in chunks {
        assert_eq!(store.put(container(n, 5)).await, Outcome::Stored);
    }
}

/// Nodes that a store names for each chunk.
async fn named(store: &Process, chunks: Range<u32>) -> Vec<Vec<String>> {
    let keys: Vec<_> = chunks.map(key).collect();
    store.lookup_elsewhere(LAYOUT, &keys).await.into_iter().map(|entry| entry.nodes).collect()
}

/// Whether `store` is sent to a for all of these chunks.
async fn finds(store: &Process, chunks: Range<u32>) -> bool {
    named(store, chunks).await.iter().all(|nodes| *nodes == ["a"])
}

fn all_errors(store: &Process) -> f64 {
    ["lease", "publish", "withdraw", "locate"].map(|op| errors(store, op)).iter().sum()
}

/// Ten rounds of everything that stores are asked to do take as long as they take without an index, give or take the
/// calls that find out: `a` gets `new` chunks, and `b` looks for all of them.
async fn nothing_waits([a, b]: &[Process; 2], new: Range<u32>) {
    assert_eq!(new.len(), 10);
    let started = Instant::now();
    for n in new {
        assert_eq!(a.put(container(n, 5)).await, Outcome::Stored);
        assert_eq!(a.get(n).await.unwrap(), container(n, 5));
        assert!(a.lookup_elsewhere(LAYOUT, &[key(n)]).await[0].found, "the file is there");
        for nodes in named(b, 0..n).await {
            assert!(nodes.is_empty() || nodes == ["a"], "what is not known is not named: {nodes:?}");
        }
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(10), "ten puts, reads and lookups took {took:?}");
}

/// The stores say that the index is gone, and why, and count it.
async fn all_is_said(stores: &[Process; 2], before: [f64; 2]) {
    for (store, before) in stores.iter().zip(before) {
        until("it says that the index is gone", async || store.metric(UP) == 0.0).await;
        until("it says why", async || {
            // That a deadline has passed is no reason.
            let ready = store.http("/ready");
            ready.contains("index: redis://") && !ready.contains("timed out") && !ready.contains("within")
        })
        .await;
        assert!(store.members().await.index_unavailable.contains("redis://"));
        assert!(store.is_ready(), "the files are there");
        assert!(all_errors(store) > before, "it is counted");
    }
}

/// Nothing is left to be said.
async fn all_is_well(stores: &[Process; 2]) {
    for store in stores {
        until("the index is up", async || store.metric(UP) == 1.0).await;
        until("nothing is wrong", async || store.members().await.index_unavailable.is_empty()).await;
        until("nothing is reported", async || !store.http("/ready").contains("index: ")).await;
        until("nothing is missing", async || store.metric(MISSING) == 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_replica_is_told_what_its_master_had_not_passed_on() {
    if !installed() {
        return;
    }
    let (servers, dir) = (cluster(), tempfile::tempdir().unwrap());
    let heir = replica(&servers, &servers[0]);
    for server in servers.iter().chain([&heir]) {
        set(server, "cluster-node-timeout", "1000");
    }
    // It takes over however long it has heard nothing, and not before the test lets it: the outage has an end that
    // no call below can have waited for.
    set(&heir, "cluster-replica-validity-factor", "0");
    set(&heir, "cluster-replica-no-failover", "yes");
    let stores = pair(&servers, dir.path()).await;
    let [a, b] = &stores;
    put(a, 0..30).await;
    until("b knows what a has", async || finds(b, 0..30).await).await;
    let of_master = |chunks: Range<u32>| chunks.filter(|n| has(&servers[0], *n)).collect::<Vec<_>>();
    let passed = of_master(0..30);
    assert!((2..29).contains(&passed.len()), "all shards have some: {passed:?}");
    until("the replica has its shard's", async || passed.iter().all(|n| has(&heir, *n))).await;

    // A password that the master does not have keeps the replica away from it.
    set(&heir, "masterauth", "wrong");
    assert_ne!(servers[0].cli(&["CLIENT", "KILL", "TYPE", "replica"]), "0");
    put(a, 30..60).await;
    until("b knows of the later ones", async || finds(b, 30..60).await).await;
    let late = of_master(30..60);
    assert!(!late.is_empty() && !late.iter().any(|n| has(&heir, *n)), "not passed on: {late:?}");

    let (before, epochs) = (stores.each_ref().map(all_errors), errors(a, "epoch"));
    servers[0].kill();
    nothing_waits(&stores, 60..70).await;
    assert_eq!(a.delete(LAYOUT, &[key(passed[0])]).await.objects, 1);
    all_is_said(&stores, before).await;
    assert!(heir.cli(&["ROLE"]).starts_with("slave"), "nobody had taken over");

    set(&heir, "cluster-replica-no-failover", "no");
    until("it takes over", async || heir.cli(&["ROLE"]).starts_with("master")).await;
    until("it is told what it had not heard of", async || late.iter().all(|n| heir.names(*n, "a"))).await;
    until("b finds everything again", async || {
        finds(b, passed[0] + 1..70).await && finds(b, 0..passed[0]).await
    })
    .await;
    until("but what went meanwhile", async || !heir.names(passed[0], "a")).await;
    assert_eq!(named(b, passed[0]..passed[0] + 1).await, [[""; 0]]);
    all_is_well(&stores).await;
    assert_eq!(errors(a, "epoch"), epochs, "the replica knew the markers: it is the outage that told a");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_is_lost_for_good_delays_nobody_and_its_slots_are_filled_where_they_go() {
    if !installed() {
        return;
    }
    let (servers, dir) = (cluster(), tempfile::tempdir().unwrap());
    for server in &servers {
        set(server, "cluster-node-timeout", "1000");
        // The harder case: the other shards go on answering.
        set(server, "cluster-require-full-coverage", "no");
    }
    let stores = pair(&servers, dir.path()).await;
    let [a, b] = &stores;
    put(a, 0..30).await;
    until("b knows what a has", async || finds(b, 0..30).await).await;
    let lost: Vec<_> = (0..30).filter(|n| has(&servers[0], *n)).collect();
    assert!((1..29).contains(&lost.len()), "all shards have some: {lost:?}");

    let before = stores.each_ref().map(all_errors);
    servers[0].kill();
    nothing_waits(&stores, 60..70).await;
    all_is_said(&stores, before).await;
    until("the others know that it is dead", async || {
        servers[1..].iter().all(|it| it.cli(&["CLUSTER", "NODES"]).contains("master,fail "))
    })
    .await;
    nothing_waits(&stores, 70..80).await;
    for n in (0..30).chain(60..80) {
        assert_eq!(a.get(n).await.unwrap(), container(n, 5), "the store that keeps it needs no index");
    }
    let nodes = named(b, 0..30).await;
    assert!(nodes.iter().all(Vec::is_empty), "an answer that lacks a shard is none: {nodes:?}");

    // What an operator does: the dead server's slots go to those that live.
    give_slots_away(&servers[1]);
    until("all slots have a server", async || {
        servers[1..].iter().all(|it| it.cli(&["CLUSTER", "INFO"]).contains("cluster_slots_ok:16384"))
    })
    .await;
    let told = |n: &u32| servers[1..].iter().any(|it| it.names(*n, "a"));
    until("their servers are told", async || lost.iter().all(told)).await;
    until("b finds everything again", async || finds(b, 0..30).await && finds(b, 60..80).await).await;
    assert!(errors(a, "epoch") >= 1.0, "it is counted that records were lost");
    all_is_well(&stores).await;
}
