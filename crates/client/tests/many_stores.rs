//! Several stores: every chunk has one that keeps it, and joining, leaving, dying and pausing cost what they must.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod faulty;

use cacheclip_client::placement::{Seat, owner};
use cacheclip_client::{Located, StoreClient};
use cacheclip_rpc::v1::MissReason;
use cacheclip_service::Running;
use faulty::{Fault, Faulty, Index, LAYOUT, client, container, got, key, read, read_in_order, until, whole};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const CHUNKS: std::ops::RangeInclusive<u8> = 1..=40;

fn chunks() -> Vec<u8> {
    CHUNKS.collect()
}

/// Which of these stores keeps a chunk.
fn keeper<'a>(stores: &'a [&Faulty], n: u8) -> &'a Faulty {
    let seated = stores.iter().map(|store| (Seat::new(&store.name), *store));
    owner(seated, |(seat, _)| seat, &key(n)).unwrap().1
}

async fn put_all(client: &StoreClient) {
    for n in CHUNKS {
        client.put(container(n).bytes().clone()).await.unwrap();
    }
}

struct Three {
    index: Index,
    stores: [Faulty; 3],
    running: Vec<Option<Running>>,
    client: StoreClient,
}

impl Three {
    /// Three stores of which the client is told one.
    async fn start() -> Self {
        let index = Index::default();
        let stores = ["store-0", "store-1", "store-2"].map(|name| Faulty::named(name, &index));
        let mut running = Vec::new();
        for store in &stores {
            running.push(Some(store.start().await));
        }
        let client = client(&[running[1].as_ref().unwrap().endpoint()]);
        Self { index, stores, running, client }
    }

    fn all(&self) -> Vec<&Faulty> {
        self.stores.iter().collect()
    }

    fn kept_by(&self, at: usize) -> Vec<u8> {
        let all = self.all();
        CHUNKS.filter(|n| keeper(&all, *n).name == self.stores[at].name).collect()
    }
}

#[tokio::test]
async fn chunks_spread_over_the_stores_and_come_back_from_all_of_them() {
    let fleet = Three::start().await;
    put_all(&fleet.client).await;
    for n in CHUNKS {
        let holders: Vec<_> = fleet.stores.iter().filter(|it| it.holds(n)).map(|it| &it.name).collect();
        assert_eq!(holders, [&keeper(&fleet.all(), n).name], "chunk {n}");
    }
    assert!((0..3).all(|at| fleet.kept_by(at).len() >= 5), "each keeps a share");
    let keys: Vec<_> = CHUNKS.map(key).collect();
    let located = fleet.client.lookup(LAYOUT, &keys).await;
    for (n, located) in CHUNKS.zip(&located) {
        let hash = container(n).hash();
        assert!(
            matches!(located, Located::Found { container, .. } if *container == hash),
            "{n}: {located:?}"
        );
    }
    let got = got(&fleet.client, &chunks()).await;
    assert!(got.iter().zip(CHUNKS).all(|(got, n)| got.as_ref().unwrap().bytes() == container(n).bytes()));
    let (came, order) = read_in_order(&fleet.client, &chunks()).await;
    assert!(came.iter().all(|it| *it == whole()), "{came:?}");
    // What one store has comes layer by layer, all chunks' first layer first.
    let (all, mut last) = (fleet.all(), HashMap::<&str, u32>::new());
    for (chunk, layer) in order {
        let store = &keeper(&all, chunk as u8 + 1).name;
        let before = last.insert(store, layer).unwrap_or_default();
        assert!(before <= layer, "{store}: layer {layer} after {before}");
    }
}

#[tokio::test]
async fn a_name_may_stand_for_the_stores() {
    let store = Faulty::with(Fault::None);
    let running = store.start().await;
    let client = client(&[format!("dns+http://localhost:{}", running.grpc().port())]);
    assert_eq!(read(&client, &[1]).await, [whole()]);
}

#[tokio::test]
async fn a_store_that_joins_gets_its_share_when_it_is_read_and_nothing_else_moves() {
    let index = Index::default();
    let stores = ["store-0", "store-1", "store-2"].map(|name| Faulty::named(name, &index));
    let (first, second) = (stores[0].start().await, stores[1].start().await);
    let client = client(&[first.endpoint()]);
    put_all(&client).await;
    let third = stores[2].start().await;
    until("the client hears of the third store", async || {
        client.lookup(LAYOUT, &CHUNKS.map(key).collect::<Vec<_>>()).await;
        stores[2].calls.load(Ordering::SeqCst) > 0
    })
    .await;
    let came = read(&client, &chunks()).await;
    assert!(came.iter().all(|it| *it == whole()), "a join costs no chunk: {came:?}");
    let all: Vec<&Faulty> = stores.iter().collect();
    let share: Vec<u8> = CHUNKS.filter(|n| keeper(&all, *n).name == "store-2").collect();
    assert!(share.len() >= 5);
    until("its share is copied", async || share.iter().all(|n| stores[2].holds(*n))).await;
    assert_eq!(stores[2].held.lock().unwrap().len(), share.len(), "only its share");
    assert!(counted("cacheclip_client_moves_total{outcome=\"stored\"}") >= share.len() as f64);
    // Without an index only the keepers are asked.
    index.holders.lock().unwrap().clear();
    assert!(read(&client, &chunks()).await.iter().all(|it| *it == whole()));
    drop((first, second, third));
}

fn counted(series: &str) -> f64 {
    let text = cacheclip_service::telemetry::render();
    let value = text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok());
    value.unwrap_or_else(|| panic!("no {series} in {text}"))
}

#[tokio::test]
async fn the_death_of_a_store_costs_its_chunks_and_nothing_else() {
    let mut fleet = Three::start().await;
    put_all(&fleet.client).await;
    let lost = fleet.kept_by(2);
    let address = fleet.running[2].as_ref().unwrap().grpc().to_string();
    fleet.running[2].take().unwrap().drain().await;
    for _ in 0..3 {
        let came = read(&fleet.client, &chunks()).await;
        for (n, came) in CHUNKS.zip(came) {
            if lost.contains(&n) {
                let reason = came.missing.unwrap();
                assert!(matches!(reason, MissReason::Unavailable | MissReason::NeverSeen), "{n}: {reason:?}");
            } else {
                assert_eq!(came, whole(), "{n}");
            }
        }
    }
    // Computed again, they are kept by the two others.
    for &n in &lost {
        fleet.client.put(container(n).bytes().clone()).await.unwrap();
    }
    assert!(read(&fleet.client, &chunks()).await.iter().all(|it| *it == whole()));
    assert!(lost.iter().all(|n| fleet.stores[0].holds(*n) || fleet.stores[1].holds(*n)));

    let calls = fleet.stores[2].calls.load(Ordering::SeqCst);
    let _back = fleet.stores[2].serve_at(&address).await;
    until("the store is asked again", async || {
        let came = read(&fleet.client, &chunks()).await;
        assert!(came.iter().all(|it| *it == whole()), "a return costs no chunk: {came:?}");
        fleet.stores[2].calls.load(Ordering::SeqCst) > calls
    })
    .await;
}

#[tokio::test]
async fn a_paused_store_costs_one_silence_and_then_nothing() {
    let fleet = Three::start().await;
    put_all(&fleet.client).await;
    let lost = fleet.kept_by(0);
    fleet.stores[0].set(Fault::Frozen);
    let began = Instant::now();
    let came = read(&fleet.client, &chunks()).await;
    for (n, came) in CHUNKS.zip(came) {
        let missing = lost.contains(&n).then_some(MissReason::Timeout);
        assert_eq!(came.missing, missing, "{n}");
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let calls = fleet.stores[0].calls.load(Ordering::SeqCst);
    for _ in 0..5 {
        let came = read(&fleet.client, &chunks()).await;
        for (n, came) in CHUNKS.zip(came) {
            let missing = lost.contains(&n).then_some(MissReason::NeverSeen);
            assert_eq!(came.missing, missing, "{n}: another store keeps it now");
        }
    }
    assert_eq!(fleet.stores[0].calls.load(Ordering::SeqCst), calls, "it is not asked any more");
    fleet.stores[0].set(Fault::None);
    until("the store is back with what it had", async || {
        read(&fleet.client, &chunks()).await.iter().all(|it| *it == whole())
    })
    .await;
}

#[tokio::test]
async fn without_a_live_store_everything_is_missing_at_once() {
    let mut fleet = Three::start().await;
    put_all(&fleet.client).await;
    for running in &mut fleet.running {
        running.take().unwrap().drain().await;
    }
    until("no store is live", async || {
        let located = fleet.client.lookup(LAYOUT, &[key(1)]).await;
        located == [Located::Missing(MissReason::Unavailable)]
    })
    .await;
    let began = Instant::now();
    for came in read(&fleet.client, &chunks()).await {
        assert_eq!(came.missing, Some(MissReason::Unavailable));
    }
    let error = fleet.client.put(container(1).bytes().clone()).await.unwrap_err().to_string();
    assert!(error.contains("try again"), "{error}");
    assert!(fleet.client.delete(LAYOUT, &[key(1)]).await.is_err());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert!(counted("cacheclip_load_skipped_total{reason=\"breaker\"}") >= 40.0);
}

#[tokio::test]
async fn a_chunk_that_another_store_has_is_read_there_and_copied_to_its_keeper() {
    let fleet = Three::start().await;
    let all = fleet.all();
    let (keeper, other) = (keeper(&all, 1), all.iter().find(|it| it.name != keeper(&all, 1).name).unwrap());
    other.hold(container(1));
    assert_eq!(read(&fleet.client, &[1]).await[0].missing, Some(MissReason::NeverSeen), "nobody names it");
    fleet.index.add(1, "store-that-left");
    assert_eq!(
        read(&fleet.client, &[1]).await[0].missing,
        Some(MissReason::NeverSeen),
        "no live one is named"
    );
    fleet.index.add(1, &other.name);
    let located = fleet.client.lookup(LAYOUT, &[key(1)]).await;
    assert!(matches!(located[0], Located::Found { .. }), "{located:?}");
    assert!(!keeper.holds(1), "a lookup copies nothing");
    assert_eq!(
        read(&fleet.client, &[1, 2]).await.iter().map(|it| it.missing).collect::<Vec<_>>(),
        [None, Some(MissReason::NeverSeen)]
    );
    until("it is copied", async || keeper.holds(1)).await;
    let asked = other.asked.lock().unwrap().len();
    assert_eq!(read(&fleet.client, &[1]).await, [whole()]);
    assert_eq!(other.asked.lock().unwrap().len(), asked, "now its keeper has it");
    // An index that is wrong is believed once per read.
    other.held.lock().unwrap().clear();
    keeper.held.lock().unwrap().clear();
    assert_eq!(read(&fleet.client, &[1]).await[0].missing, Some(MissReason::NeverSeen));
    assert_eq!(other.asked.lock().unwrap().len(), asked + 1);
}

#[tokio::test]
async fn a_leaving_store_serves_what_it_has_and_takes_nothing_new() {
    let fleet = Three::start().await;
    put_all(&fleet.client).await;
    // No index: placement itself says where the chunks of a leaving store were.
    fleet.index.holders.lock().unwrap().clear();
    let share = fleet.kept_by(1);
    let before = fleet.stores[1].held.lock().unwrap().len();
    fleet.stores[1].draining.store(true, Ordering::SeqCst);
    let rest = [&fleet.stores[0], &fleet.stores[2]];
    until("its chunks are copied to the others as they are read", async || {
        fleet.index.holders.lock().unwrap().clear();
        let came = read(&fleet.client, &chunks()).await;
        assert!(came.iter().all(|it| *it == whole()), "a leaving store costs no chunk: {came:?}");
        share.iter().all(|n| keeper(&rest, *n).holds(*n))
    })
    .await;
    for n in 41..=60 {
        fleet.client.put(container(n).bytes().clone()).await.unwrap();
        assert!(keeper(&rest, n).holds(n));
    }
    assert_eq!(fleet.stores[1].held.lock().unwrap().len(), before);
}

#[tokio::test]
async fn a_delete_reaches_every_live_store_and_tells_of_the_others() {
    let mut fleet = Three::start().await;
    for store in &fleet.stores {
        store.hold(container(1));
    }
    let deleted = fleet.client.delete(LAYOUT, &[key(1), key(2)]).await.unwrap();
    assert_eq!((deleted.objects, deleted.unreached), (3, 0));
    fleet.running[2].take().unwrap().drain().await;
    until("two of three are live", async || {
        fleet.client.delete(LAYOUT, &[key(1)]).await.is_ok_and(|it| it.unreached == 1)
    })
    .await;
    assert!(fleet.stores.iter().all(|store| store.deletes.load(Ordering::SeqCst) > 0));
}

#[tokio::test]
async fn seeds_that_cannot_be_dialled_are_named() {
    let connect = |seed: &str| StoreClient::connect(&[seed], &Default::default()).unwrap_err().to_string();
    for bad in ["ftp://store:1", "two words", "dns+http://"] {
        assert!(connect(bad).contains("stores: "), "{}", connect(bad));
    }
    let none: [&str; 0] = [];
    assert!(StoreClient::connect(&none, &Default::default()).is_err());
}
