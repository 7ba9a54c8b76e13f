use super::*;
use crate::catalogue::Record;
use crate::changes::Changes;
use crate::clock::Clock;
use crate::index::{Answer, Holder, Index, Peer};
use cacheclip_chunk::{ContainerHash, LayoutId};
use cacheclip_rpc::v1::MissReason;
use futures::FutureExt as _;
use std::collections::HashSet;
use tokio::task::JoinHandle;

/// An index that can be taken down, and that shows what it was told.
#[derive(Debug, Default)]
struct Fake(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    down: bool,
    lost: bool,
    known: HashSet<ChunkKey>,
    largest: usize,
    clears: usize,
    renewals: usize,
    left: bool,
}

impl Fake {
    fn told(&self, change: impl FnOnce(&mut Told)) -> Answer<'_, ()> {
        let mut told = self.0.lock();
        let done = if told.down {
            Err(Unavailable("it is down".into()))
        } else {
            change(&mut told);
            Ok(())
        };
        async { done }.boxed()
    }
}

impl Index for Fake {
    fn locate<'a>(&'a self, keys: &'a [ChunkKey]) -> Answer<'a, Vec<Vec<Holder>>> {
        let located = self.told(|_| ());
        async move { located.await.map(|()| vec![Vec::new(); keys.len()]) }.boxed()
    }

    fn publish<'a>(&'a self, entries: &'a [(ChunkKey, Entry)]) -> Answer<'a, ()> {
        self.told(|told| {
            told.largest = told.largest.max(entries.len());
            told.known.extend(entries.iter().map(|(key, _)| key));
        })
    }

    fn withdraw<'a>(&'a self, keys: &'a [ChunkKey]) -> Answer<'a, ()> {
        self.told(|told| told.known.retain(|key| !keys.contains(key)))
    }

    fn clear(&self) -> Answer<'_, ()> {
        self.told(|told| {
            told.known.clear();
            told.clears += 1;
        })
    }

    fn renew<'a>(&'a self, endpoint: &'a str) -> Answer<'a, Renewal> {
        let mut again = Again::No;
        let renewed = self.told(|told| {
            again = if std::mem::take(&mut told.lost) { Again::Lost } else { Again::No };
            told.renewals += 1;
        });
        let peer = Peer { name: "peer".into(), endpoint: endpoint.into(), lease: Duration::from_secs(60) };
        async move { renewed.await.map(|()| Renewal { peers: vec![peer], again, twin: None }) }.boxed()
    }

    fn leave(&self) -> Answer<'_, ()> {
        self.told(|told| told.left = true)
    }
}

struct Kept {
    index: Arc<Fake>,
    changes: Arc<Changes>,
    fleet: Arc<Fleet>,
    catalogue: Arc<Mutex<Catalogue>>,
    said: Arc<Mutex<String>>,
    draining: CancellationToken,
    closed: CancellationToken,
    task: JoinHandle<()>,
}

/// Most changes that the kept store remembers.
const MOST: usize = 8;

fn keep(every: Duration) -> Kept {
    let (index, changes, said) = (Arc::new(Fake::default()), Arc::new(Changes::new(MOST)), Arc::default());
    let shared: Arc<dyn Index> = Arc::<Fake>::clone(&index);
    let fleet = Arc::new(Fleet::new("me", shared, Arc::clone(&changes), Duration::from_secs(1)));
    let catalogue = Arc::new(Mutex::new(Catalogue::new(u64::MAX, Clock::system())));
    let (draining, closed) = (CancellationToken::new(), CancellationToken::new());
    let words = Arc::<Mutex<String>>::clone(&said);
    let keeper = Keeper {
        fleet: Arc::clone(&fleet),
        catalogue: Arc::clone(&catalogue),
        every,
        report: Box::new(move |report| *words.lock() = report.to_owned()),
        draining: draining.clone(),
        closed: closed.clone(),
    };
    let task = tokio::spawn(keeper.run(oneshot::channel().0));
    Kept { index, changes, fleet, catalogue, said, draining, closed, task }
}

impl Kept {
    /// As a store does it: the catalogue first.
    fn comes(&self, n: u32) {
        let record = Record {
            layout: LayoutId::from_bytes([1; 32]),
            hash: ContainerHash::from_bytes([2; 32]),
            bytes: 1,
            head_len: 1,
        };
        self.catalogue.lock().insert(key(n), record);
        self.changes.tell(key(n), true);
    }

    fn goes(&self, n: u32) {
        self.catalogue.lock().take(&key(n), MissReason::Deleted).expect("it is there");
        self.changes.tell(key(n), false);
    }

    fn knows(&self, expected: impl IntoIterator<Item = u32>) -> bool {
        self.index.0.lock().known == expected.into_iter().map(key).collect()
    }
}

fn key(n: u32) -> ChunkKey {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    ChunkKey::from_bytes(bytes)
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "not within ten seconds: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

const OFTEN: Duration = Duration::from_millis(20);
const NEVER: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn what_comes_and_goes_is_announced_at_once() {
    let kept = keep(NEVER);
    kept.comes(1);
    kept.comes(2);
    until("both are known", || kept.knows([1, 2])).await;
    kept.goes(1);
    until("one is withdrawn", || kept.knows([2])).await;
    assert_eq!(*kept.said.lock(), "");
    assert_eq!(kept.fleet.members().peers[0].name, "peer");
}

#[tokio::test]
async fn what_changes_during_an_outage_is_announced_after_it() {
    let kept = keep(OFTEN);
    kept.comes(1);
    until("it is known", || kept.knows([1])).await;
    kept.index.0.lock().down = true;
    until("the outage is reported", || kept.said.lock().contains("it is down")).await;
    kept.goes(1);
    kept.comes(2);
    assert_eq!(kept.fleet.members().index_unavailable, "it is down");
    assert_eq!(kept.fleet.members().peers.len(), 1, "a lease outlives an outage");
    kept.index.0.lock().down = false;
    until("both changes are known", || kept.knows([2])).await;
    until("all is well", || kept.said.lock().is_empty()).await;
    assert_eq!(kept.fleet.members().index_unavailable, "");
}

#[tokio::test]
async fn an_index_that_lost_everything_is_told_everything_in_batches() {
    let kept = keep(OFTEN);
    until("it is asked", || kept.index.0.lock().renewals > 0).await;
    for n in 0..600 {
        kept.comes(n);
    }
    until("all are known", || kept.knows(0..600)).await;
    {
        let mut told = kept.index.0.lock();
        told.known.clear();
        told.largest = 0;
        told.lost = true;
    }
    until("all are known again", || kept.knows(0..600)).await;
    assert_eq!(kept.index.0.lock().largest, BATCH);
}

#[tokio::test]
async fn after_too_many_changes_everything_is_announced_anew() {
    let kept = keep(OFTEN);
    for n in 0..4 {
        kept.comes(n);
    }
    until("all are known", || kept.knows(0..4)).await;
    kept.index.0.lock().down = true;
    until("the outage is reported", || !kept.said.lock().is_empty()).await;
    for n in 0..4 {
        kept.goes(n);
    }
    for n in 10..30 {
        kept.comes(n);
    }
    assert!(kept.changes.waiting().overflowed);
    kept.index.0.lock().down = false;
    until("what went is forgotten and what came is known", || kept.knows(10..30)).await;
    assert_eq!(kept.index.0.lock().clears, 1);
}

#[tokio::test]
async fn a_doubted_index_is_looked_after_before_its_time() {
    let kept = keep(NEVER);
    until("it is asked", || kept.index.0.lock().renewals == 1).await;
    kept.index.0.lock().down = true;
    let nobody = kept.fleet.elsewhere(LayoutId::from_bytes([1; 32]), &[key(1)]).await;
    assert_eq!(nobody, [Vec::<String>::new()]);
    until("the outage is reported", || kept.said.lock().contains("it is down")).await;
    kept.index.0.lock().down = false;
    until("it is asked again", || kept.index.0.lock().renewals == 2).await;
}

#[tokio::test]
async fn a_drain_takes_the_lease_back_and_a_close_says_what_is_left_to_say() {
    let kept = keep(NEVER);
    until("it is asked", || kept.index.0.lock().renewals == 1).await;
    assert!(!kept.fleet.members().node.expect("a node").draining);
    kept.draining.cancel();
    until("it left", || kept.index.0.lock().left).await;
    assert!(kept.fleet.members().node.expect("a node").draining);
    // No await in between: the keeper sees both at once.
    kept.comes(5);
    kept.closed.cancel();
    kept.task.await.expect("no panic");
    assert_eq!(kept.index.0.lock().known, HashSet::from([key(5)]));
}
