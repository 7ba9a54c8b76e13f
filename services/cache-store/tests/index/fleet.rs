//! Stores that share an index know of each other.

use crate::common::{Calls, LAYOUT, container, key};
use crate::failures::settings;
use crate::process::Process;
use crate::servers::{Flavour, Server, installed};
use crate::until;
use cacheclip_chunk::LayoutId;

/// Names and endpoints of the other stores.
async fn peers(store: &Process) -> Vec<(String, String)> {
    let members = store.members().await;
    members.peers.into_iter().map(|node| (node.name, node.endpoint)).collect()
}

async fn nodes(store: &Process, layout: LayoutId, n: u32) -> Vec<String> {
    store.lookup_elsewhere(layout, &[key(n)]).await.remove(0).nodes
}

/// Two stores that have heard of each other.
async fn pair(redis: &Server, dir: &std::path::Path, lease: f64) -> (Process, Process) {
    let [a, b] =
        ["a", "b"].map(|node| Process::start(&dir.join(node), node, &settings(redis, lease, lease.min(2.0))));
    until("a hears of b", async || peers(&a).await == [("b".into(), b.endpoint.clone())]).await;
    until("b hears of a", async || peers(&b).await == [("a".into(), a.endpoint.clone())]).await;
    (a, b)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stores_see_each_other_and_who_has_what_they_have_not() {
    if !installed() {
        return;
    }
    let (redis, dir) = (Server::start(Flavour::default()), tempfile::tempdir().unwrap());
    let (a, b) = pair(&redis, dir.path(), 3.0).await;
    let node = a.members().await.node.unwrap();
    assert_eq!((node.name.as_str(), &node.endpoint, node.draining), ("a", &a.endpoint, false));

    a.put(container(1, 5)).await;
    a.put(container(2, 5)).await;
    b.put(container(2, 5)).await;
    until("b knows that a has it", async || nodes(&b, LAYOUT, 1).await == ["a"]).await;
    let entries = b.lookup_elsewhere(LAYOUT, &[key(9), key(2), key(1)]).await;
    assert_eq!(entries.iter().map(|it| it.found).collect::<Vec<_>>(), [false, true, false]);
    let named: Vec<_> = entries.iter().map(|it| it.nodes.clone()).collect();
    assert_eq!(named, [vec![], vec![], vec!["a".to_owned()]], "only what is not here is asked for");
    assert!(b.lookup(LAYOUT, &[key(1)]).await[0].nodes.is_empty(), "nobody asked for it");
    assert_eq!(nodes(&b, LayoutId::from_bytes([9; 32]), 1).await, [""; 0], "another layout's KV");

    a.delete(LAYOUT, &[key(1)]).await;
    until("b knows that a has it no more", async || nodes(&b, LAYOUT, 1).await.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_store_is_no_member_before_its_lease_ends() {
    if !installed() {
        return;
    }
    let (redis, dir) = (Server::start(Flavour::default()), tempfile::tempdir().unwrap());
    // Long enough that nothing below can be the lease's end.
    let (a, b) = pair(&redis, dir.path(), 12.0).await;
    a.put(container(1, 5)).await;
    until("b knows that a has it", async || nodes(&b, LAYOUT, 1).await == ["a"]).await;
    let lease = || redis.cli(&["PTTL", "cacheclip:v1:node:a"]).parse::<i64>().unwrap();
    let left = lease();
    assert!(left > 0);
    let started = std::time::Instant::now();
    assert!(a.terminate().success());
    let millis = i64::try_from(started.elapsed().as_millis()).unwrap();
    assert_eq!(lease(), -2, "its lease is withdrawn");
    assert!(millis < left, "the lease ran out on its own: this proves nothing");
    until("b hears of it", async || peers(&b).await.is_empty()).await;
    assert!(nodes(&b, LAYOUT, 1).await.is_empty(), "nobody is sent to a store that left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_store_is_no_member_after_its_lease() {
    if !installed() {
        return;
    }
    let (redis, dir) = (Server::start(Flavour::default()), tempfile::tempdir().unwrap());
    let (a, b) = pair(&redis, dir.path(), 3.0).await;
    a.put(container(1, 5)).await;
    until("b knows that a has it", async || nodes(&b, LAYOUT, 1).await == ["a"]).await;
    a.kill();
    until("b counts it out", async || peers(&b).await.is_empty()).await;
    assert!(nodes(&b, LAYOUT, 1).await.is_empty());
    assert!(redis.names(1, "a"), "its records are there still, and not believed");
    until("its name is forgotten", async || redis.cli(&["SMEMBERS", "cacheclip:v1:nodes"]) == "b").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_comes_back_without_its_disk_is_not_believed_to_have_what_it_had() {
    if !installed() {
        return;
    }
    let (redis, dir) = (Server::start(Flavour::default()), tempfile::tempdir().unwrap());
    let (a, b) = pair(&redis, dir.path(), 3.0).await;
    a.put(container(1, 5)).await;
    until("b knows that a has it", async || nodes(&b, LAYOUT, 1).await == ["a"]).await;
    a.kill();
    std::fs::remove_dir_all(dir.path().join("a")).unwrap();
    let a = Process::start(&dir.path().join("a"), "a", &settings(&redis, 3.0, 2.0));
    until("b hears of the new one", async || peers(&b).await == [("a".into(), a.endpoint.clone())]).await;
    assert!(redis.names(1, "a"), "the record of its last life");
    assert!(nodes(&b, LAYOUT, 1).await.is_empty());
    a.put(container(1, 5)).await;
    until("b knows that a has it again", async || nodes(&b, LAYOUT, 1).await == ["a"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stores_that_use_one_name_are_told() {
    if !installed() {
        return;
    }
    let (redis, dir) = (Server::start(Flavour::default()), tempfile::tempdir().unwrap());
    let [one, other] =
        ["1", "2"].map(|data| Process::start(&dir.path().join(data), "store", &settings(&redis, 3.0, 2.0)));
    for (store, twin) in [(&one, &other), (&other, &one)] {
        until("the clash is logged", async || {
            let log = store.log();
            log.contains("give each its own `node`") && log.contains(&twin.endpoint)
        })
        .await;
        assert!(store.is_ready());
    }
}
