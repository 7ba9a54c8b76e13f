//! Documents over several stores: claimed where their chunks are, deleted everywhere, and what is deleted stays so.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod faulty;

use cacheclip_chunk::DocumentId;
use cacheclip_client::placement::{Seat, owner};
use cacheclip_client::{Hold, Outcome, StoreClient, Terms};
use cacheclip_rpc::v1::MissReason;
use cacheclip_service::Running;
use faulty::{Fault, Faulty, Index, LAYOUT, client, container, key, read, until};
use std::sync::atomic::Ordering;

const DOCUMENT: DocumentId = DocumentId::from_bytes([0xd1; 32]);
const OTHER: DocumentId = DocumentId::from_bytes([0xd2; 32]);

fn hold(document: &DocumentId) -> Hold {
    Hold { document: document.as_bytes().to_vec().into(), ttl_seconds: 0 }
}

/// Puts a chunk for a document, as a request that begins now.
async fn put(client: &StoreClient, n: u8, document: &DocumentId) -> Outcome {
    let client = client.begin();
    client.lookup(LAYOUT, &[key(n)]).await;
    let terms = Terms { hold: Some(hold(document)), since: client.since() };
    client.put_on(container(n).bytes().clone(), &terms).await.unwrap()
}

struct Two {
    stores: [Faulty; 2],
    running: Vec<Running>,
    client: StoreClient,
}

impl Two {
    async fn start() -> Self {
        let index = Index::default();
        let stores = ["store-0", "store-1"].map(|name| Faulty::named(name, &index));
        let mut running = Vec::new();
        for store in &stores {
            running.push(store.start().await);
        }
        let client = client(&[running[0].endpoint()]);
        let fleet = Self { stores, running, client };
        let of_second = (1..).find(|n| fleet.places(*n).0.name == "store-1").unwrap();
        // The second is heard of from the first, and then answers for itself.
        until("the second store is known", async || {
            fleet.client.lookup(LAYOUT, &[key(of_second)]).await;
            fleet.stores[1].calls.load(Ordering::SeqCst) > 0
        })
        .await;
        fleet
    }

    /// The store that keeps a chunk, and the other one.
    fn places(&self, n: u8) -> (&Faulty, &Faulty) {
        let seated = self.stores.iter().map(|store| (Seat::new(&store.name), store));
        let keeper = owner(seated, |(seat, _)| seat, &key(n)).unwrap().1;
        (keeper, self.stores.iter().find(|store| store.name != keeper.name).unwrap())
    }
}

#[tokio::test]
async fn what_was_computed_before_a_deletion_is_refused_and_what_is_computed_after_it_is_stored() {
    let (_running, client) = Faulty::named("store", &Index::default()).serve().await;
    assert_eq!(put(&client, 9, &DOCUMENT).await, Outcome::Stored);
    // Both learn that a chunk is missing: by a lookup, and by a read.
    let (looked, reading) = (client.begin(), client.begin());
    client.hold(LAYOUT, &[key(1)], &hold(&DOCUMENT)).await.unwrap();
    looked.lookup(LAYOUT, &[key(1)]).await;
    assert_eq!(read(&reading, &[1]).await[0].missing, Some(MissReason::NeverSeen));
    let deletion = client.delete_document(&DOCUMENT).await;
    assert_eq!((deletion.keys, deletion.pending), (vec![key(1), key(9)], vec![]));
    // A request that comes later hears the new count; that is not theirs.
    let later = client.begin();
    later.lookup(LAYOUT, &[key(1)]).await;
    for before in [looked, reading] {
        assert_eq!(before.put(container(1).bytes().clone()).await.unwrap(), Outcome::Deleted);
    }
    assert_eq!(later.put(container(1).bytes().clone()).await.unwrap(), Outcome::Stored);
}

#[tokio::test]
async fn a_document_goes_from_all_stores_and_a_chunk_that_another_one_holds_stays() {
    let fleet = Two::start().await;
    for n in 1..=8 {
        assert_eq!(put(&fleet.client, n, &DOCUMENT).await, Outcome::Stored);
    }
    assert_eq!(put(&fleet.client, 9, &OTHER).await, Outcome::Stored);
    fleet.client.hold(LAYOUT, &[key(1)], &hold(&OTHER)).await.unwrap();
    assert!(fleet.stores.iter().all(|store| (1..=8).any(|n| store.holds(n))), "each keeps a share");
    let deletion = fleet.client.delete_document(&DOCUMENT).await;
    let went: Vec<_> = (2..=8).map(key).collect();
    assert_eq!((&deletion.keys, deletion.kept, &deletion.pending), (&went, 1, &vec![]));
    assert_eq!(deletion.tiers.iter().map(|tier| tier.objects).collect::<Vec<_>>(), [7]);
    for n in 1..=9 {
        let here = fleet.stores.iter().any(|store| store.holds(n));
        assert_eq!(here, [1, 9].contains(&n), "chunk {n}");
    }
    let again = fleet.client.delete_document(&DOCUMENT).await;
    assert!(again.generation > deletion.generation, "a write may have begun meanwhile");
    assert_eq!((again.keys, again.tiers), (deletion.keys, deletion.tiers), "and else it says the same");
}

#[tokio::test]
async fn a_copy_that_came_to_a_store_without_the_documents_claim_goes_too() {
    let fleet = Two::start().await;
    put(&fleet.client, 1, &DOCUMENT).await;
    let (keeper, other) = fleet.places(1);
    assert!(keeper.holds(1));
    other.hold(container(1));
    fleet.client.delete_document(&DOCUMENT).await;
    assert!(!keeper.holds(1) && !other.holds(1));
    for store in [keeper, other] {
        let gone = store.documents.lock().unwrap().gone.contains_key(&key(1).as_bytes()[..]);
        assert!(gone, "{}: a copy that is under way is refused", store.name);
    }
}

#[tokio::test]
async fn a_store_that_is_away_is_pending_until_it_is_back_and_asked_again() {
    let mut fleet = Two::start().await;
    for n in 1..=8 {
        put(&fleet.client, n, &DOCUMENT).await;
    }
    let address = fleet.running[1].grpc().to_string();
    fleet.running.remove(1).drain().await;
    let deletion = fleet.client.delete_document(&DOCUMENT).await;
    assert_eq!(deletion.pending, ["store-1"]);
    assert!((1..=8).any(|n| fleet.stores[1].holds(n)), "it still has what it had");
    let _back = fleet.stores[1].serve_at(&address).await;
    until("nothing is pending", async || fleet.client.delete_document(&DOCUMENT).await.pending.is_empty())
        .await;
    let all = fleet.client.delete_document(&DOCUMENT).await;
    assert_eq!(all.keys, (1..=8).map(key).collect::<Vec<_>>());
    assert!((1..=8).all(|n| fleet.stores.iter().all(|store| !store.holds(n))));
}

#[tokio::test]
async fn a_store_that_hangs_or_never_answered_is_pending_too() {
    let hung = Faulty::with(Fault::None);
    let running = hung.start().await;
    // Bound and closed at once: nobody listens there.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let client = client(&[running.endpoint(), format!("http://{nobody}")]);
    let deletion = client.delete_document(&DOCUMENT).await;
    assert_eq!(deletion.pending, [format!("http://{nobody}")]);
    hung.set(Fault::Frozen);
    until("the store that hangs is given up", async || {
        client.delete_document(&DOCUMENT).await.pending == ["faulty".to_owned(), format!("http://{nobody}")]
    })
    .await;
}

#[tokio::test]
async fn a_claim_that_no_store_records_is_an_error_and_pins_say_what_they_found() {
    let store = Faulty::with(Fault::None);
    let (running, client) = store.serve().await;
    assert_eq!(client.pin(LAYOUT, &[key(1), key(2), key(9)], 60).await.unwrap(), 2);
    assert_eq!(client.unpin(LAYOUT, &[key(2), key(9)]).await.unwrap(), 1);
    client.hold(LAYOUT, &[], &hold(&DOCUMENT)).await.unwrap();
    running.drain().await;
    until("nobody records it", async || client.hold(LAYOUT, &[key(1)], &hold(&DOCUMENT)).await.is_err())
        .await;
}
