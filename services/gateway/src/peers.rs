//! The workers or scorers behind a gateway: found by name, watched, chosen by what they hold and have to do.
//!
//! Everything known about a peer is a hint with a lease. Two gateways that hear the same announcements choose
//! alike without knowing of each other; one that hears nothing still has peers to try.

use cacheclip_rpc::v1::{Residency, TokenSection};
use cacheclip_service::residency::short;
use cacheclip_service::{ConnectOptions, connect, resolve, seconds};
use futures::future::BoxFuture;
use parking_lot::RwLock;
use std::collections::{BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// Pause between two looks at who is there.
const REFRESH: Duration = Duration::from_secs(3);
/// Longest wait for a watch to open.
const ATTEMPT: Duration = Duration::from_secs(3);
/// Pause before a broken watch is opened again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// What a request that waits or runs costs a new one, as a share of the new one's tokens: about what a request
/// with everything resident recomputes.
const QUEUED_SHARE: f64 = 0.25;

/// Opens a peer's stream of announcements.
pub(crate) type Watch = fn(Channel) -> BoxFuture<'static, Result<Streaming<Residency>, Status>>;

/// One worker or scorer.
#[derive(Debug)]
pub(crate) struct Peer {
    endpoint: String,
    channel: Channel,
    heard: RwLock<Heard>,
    /// Requests of this gateway that are with the peer.
    in_flight: AtomicU32,
}

/// What a peer said last.
#[derive(Debug, Default)]
struct Heard {
    /// Until when it is worth something; `None` before the first word.
    lease: Option<Instant>,
    held: HashSet<u64>,
    load: u32,
    draining: bool,
}

impl Peer {
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    fn take(&self, residency: Residency) -> Duration {
        let lease = seconds(residency.lease_seconds);
        let mut heard = self.heard.write();
        heard.lease = Some(Instant::now() + lease);
        heard.load = residency.waiting.saturating_add(residency.running);
        heard.draining = residency.draining;
        if residency.changed {
            heard.held = residency.held.into_iter().collect();
        }
        lease
    }

    /// The watch broke and cannot be opened: whoever waits for this peer hears of it now and not when the lease
    /// runs out.
    fn expire(&self) {
        let mut heard = self.heard.write();
        if heard.lease.is_some() {
            heard.lease = Some(Instant::now());
        }
    }

    fn standing(&self) -> Standing {
        let heard = self.heard.read();
        match heard.lease {
            _ if heard.draining => Standing::Leaving,
            Some(until) if until > Instant::now() => Standing::Live,
            Some(_) => Standing::Silent,
            None => Standing::Unheard,
        }
    }

    /// Completes when a peer that was live falls silent; never for one that was not, or that has said it is
    /// leaving: that one finishes what it has, and announces nothing meanwhile.
    pub(crate) async fn lost(&self) {
        let mut live = false;
        loop {
            match self.standing() {
                // Looked at more often than leases end, because a broken watch ends one early.
                Standing::Live => sleep(FIRST_PAUSE).await,
                Standing::Silent if live => return,
                Standing::Silent | Standing::Unheard | Standing::Leaving => std::future::pending().await,
            }
            live = true;
        }
    }

    /// Tokens that a request waits for here: what is not resident, and its turn.
    fn cost(&self, wanted: &[(u64, u32)]) -> f64 {
        let heard = self.heard.read();
        let total: u32 = wanted.iter().map(|(_, tokens)| tokens).sum();
        let missing: u32 =
            wanted.iter().filter(|(key, _)| !heard.held.contains(key)).map(|(_, tokens)| tokens).sum();
        // What this gateway sent a moment ago is not announced yet, and must not be counted twice once it is.
        let ahead = heard.load.max(self.in_flight.load(Ordering::Relaxed));
        f64::from(missing) + f64::from(ahead) * f64::from(total.max(1)) * QUEUED_SHARE
    }
}

/// Short keys and tokens of sections that may be resident somewhere: what a peer is chosen by.
pub(crate) fn wanted<'a>(sections: impl IntoIterator<Item = &'a TokenSection>) -> Vec<(u64, u32)> {
    let one = |section: &TokenSection| {
        Some((short(section.key.as_ref().try_into().ok()?), section.ids.len() as u32))
    };
    sections.into_iter().filter_map(one).collect()
}

/// Best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    Live,
    /// It may be there; nothing was heard yet.
    Unheard,
    /// It was there.
    Silent,
    /// It takes nothing new.
    Leaving,
}

/// A peer that was chosen for a request; counts it until it is dropped.
#[derive(Debug)]
pub(crate) struct Chosen(Arc<Peer>);

impl std::ops::Deref for Chosen {
    type Target = Peer;

    fn deref(&self) -> &Peer {
        &self.0
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All peers of one kind. Cheap to clone; watching ends with the last clone.
#[derive(Clone, Debug)]
pub(crate) struct Peers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    what: &'static str,
    seeds: Vec<String>,
    connect: ConnectOptions,
    watch: Watch,
    peers: RwLock<Vec<Arc<Peer>>>,
}

impl Peers {
    /// Peers at `seeds` (`http://…`, or `dns+http://…` for every address of a name), watched from now on.
    ///
    /// # Errors
    /// An endpoint that cannot be dialled.
    pub(crate) fn start(
        what: &'static str,
        seeds: &[String],
        options: &ConnectOptions,
        watch: Watch,
    ) -> Result<Self, cacheclip_service::Error> {
        let inner =
            Inner { what, seeds: seeds.to_vec(), connect: options.clone(), watch, peers: RwLock::default() };
        let peers = Self(Arc::new(inner));
        // Plain endpoints are there at once, and wrong ones are an error of the start.
        for seed in seeds.iter().filter(|seed| !seed.starts_with("dns+")) {
            peers.0.add(seed)?;
        }
        tokio::spawn(refresh(Arc::downgrade(&peers.0)));
        Ok(peers)
    }

    /// The best peer for sections of `wanted` (short key and tokens), leaving out those already tried.
    pub(crate) fn choose(&self, wanted: &[(u64, u32)], tried: &[String]) -> Option<Chosen> {
        let (known, live) = self.count();
        crate::metrics::peers(self.0.what, known, live);
        let peers = self.0.peers.read();
        let open = peers.iter().filter(|peer| !tried.iter().any(|tried| tried == peer.endpoint()));
        let best = open
            .map(|peer| (peer.standing(), peer.cost(wanted), tie(peer.endpoint(), wanted), peer))
            .min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)));
        best.map(|(_, _, _, peer)| {
            peer.in_flight.fetch_add(1, Ordering::Relaxed);
            Chosen(Arc::clone(peer))
        })
    }

    /// All of them, heard of or not, and the names among `seeds` behind which nobody has been found yet.
    pub(crate) fn all(&self) -> (Vec<Arc<Peer>>, Vec<String>) {
        let peers = self.0.peers.read().clone();
        let named = self.0.seeds.iter().filter(|seed| seed.starts_with("dns+"));
        let unknown = named.filter(|_| peers.is_empty()).cloned().collect();
        (peers, unknown)
    }

    /// How many there are, and how many of them are live.
    fn count(&self) -> (usize, usize) {
        let peers = self.0.peers.read();
        (peers.len(), peers.iter().filter(|peer| peer.standing() == Standing::Live).count())
    }
}

/// Sends equally good peers' requests apart by what is asked for, and alike from every gateway.
fn tie(endpoint: &str, wanted: &[(u64, u32)]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (endpoint, wanted.first()).hash(&mut hasher);
    hasher.finish()
}

impl Inner {
    fn add(&self, endpoint: &str) -> Result<(), cacheclip_service::Error> {
        let channel = connect(endpoint, &self.connect)?;
        let peer = Arc::new(Peer {
            endpoint: endpoint.to_owned(),
            channel,
            heard: RwLock::default(),
            in_flight: AtomicU32::new(0),
        });
        tokio::spawn(watch(Arc::downgrade(&peer), self.watch));
        self.peers.write().push(peer);
        Ok(())
    }

    /// Looks names up again; peers that are gone are dropped, and with them their watches.
    async fn refresh(&self) {
        let mut found = BTreeSet::new();
        for seed in &self.seeds {
            match resolve::expand(seed).await {
                Ok(endpoints) => found.extend(endpoints),
                Err(error) => {
                    // A name server that does not answer takes nobody away.
                    tracing::debug!(seed, %error, "{} cannot be looked up", self.what);
                    return;
                }
            }
        }
        let known: BTreeSet<String> = self.peers.read().iter().map(|peer| peer.endpoint.clone()).collect();
        for endpoint in found.difference(&known) {
            match self.add(endpoint) {
                Ok(()) => tracing::info!(endpoint, "a {} was found", self.what),
                Err(error) => tracing::warn!(endpoint, %error, "a {} cannot be dialled", self.what),
            }
        }
        self.peers.write().retain(|peer| found.contains(&peer.endpoint));
    }
}

async fn refresh(inner: Weak<Inner>) {
    loop {
        let Some(peers) = inner.upgrade() else { return };
        peers.refresh().await;
        let moving = peers.seeds.iter().any(|seed| seed.starts_with("dns+"));
        drop(peers);
        if !moving {
            return;
        }
        sleep(REFRESH).await;
    }
}

/// Follows one peer's announcements until the peer is dropped.
async fn watch(peer: Weak<Peer>, open: Watch) {
    let mut pause = FIRST_PAUSE;
    loop {
        let Some(channel) = peer.upgrade().map(|peer| peer.channel()) else { return };
        match timeout(ATTEMPT, open(channel)).await {
            Ok(Ok(mut stream)) => {
                let mut patience = ATTEMPT;
                while let Ok(Ok(Some(residency))) = timeout(patience, stream.message()).await {
                    let Some(peer) = peer.upgrade() else { return };
                    patience = peer.take(residency);
                    pause = FIRST_PAUSE;
                }
            }
            _ => {
                let Some(peer) = peer.upgrade() else { return };
                peer.expire();
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nobody(_: Channel) -> BoxFuture<'static, Result<Streaming<Residency>, Status>> {
        Box::pin(std::future::pending())
    }

    fn peers(count: u16) -> Peers {
        let seeds: Vec<String> = (0..count).map(|i| format!("http://127.0.0.1:{}", 9 + i)).collect();
        Peers::start("worker", &seeds, &ConnectOptions::default(), nobody).expect("sound endpoints")
    }

    fn say(peers: &Peers, index: usize, held: &[u64], waiting: u32) {
        say_for(60.0, peers, index, held, waiting);
    }

    fn say_for(lease_seconds: f64, peers: &Peers, index: usize, held: &[u64], waiting: u32) {
        let residency =
            Residency { lease_seconds, changed: true, held: held.to_vec(), waiting, ..Default::default() };
        peers.0.peers.read()[index].take(residency);
    }

    fn chosen(peers: &Peers, wanted: &[(u64, u32)]) -> String {
        peers.choose(wanted, &[]).expect("a peer").endpoint().to_owned()
    }

    const WANTED: [(u64, u32); 2] = [(1, 100), (2, 100)];

    #[tokio::test]
    async fn the_peer_that_holds_most_is_chosen_until_its_queue_costs_more() {
        let peers = peers(2);
        say(&peers, 0, &[1], 0);
        say(&peers, 1, &[1, 2], 0);
        assert_eq!(chosen(&peers, &WANTED), "http://127.0.0.1:10");
        say(&peers, 1, &[1, 2], 3);
        assert_eq!(chosen(&peers, &WANTED), "http://127.0.0.1:9", "three in the queue cost 150 tokens");
    }

    #[tokio::test]
    async fn requests_that_were_just_sent_count_before_they_are_announced() {
        let peers = peers(2);
        (0..2).for_each(|index| say(&peers, index, &[], 0));
        let first = peers.choose(&WANTED, &[]).expect("a peer");
        assert_ne!(first.endpoint(), chosen(&peers, &WANTED));
        let again = first.endpoint().to_owned();
        drop(first);
        assert_eq!(again, chosen(&peers, &WANTED), "an ended request no longer counts");
    }

    #[tokio::test]
    async fn a_silent_peer_is_the_last_resort_and_is_known_to_be_lost() {
        let peers = peers(2);
        say_for(0.05, &peers, 0, &[1, 2], 0);
        let peer = peers.choose(&WANTED, &[]).expect("a peer");
        // Nothing is heard for longer than the lease.
        peer.lost().await;
        say(&peers, 1, &[], 0);
        assert_eq!(chosen(&peers, &WANTED), "http://127.0.0.1:10");
        let tried = ["http://127.0.0.1:10".to_owned()];
        assert_eq!(peers.choose(&WANTED, &tried).expect("the other").endpoint(), "http://127.0.0.1:9");
        assert_eq!(peers.count(), (2, 1));
    }

    #[tokio::test]
    async fn two_gateways_with_the_same_announcements_choose_alike() {
        let (one, other) = (peers(5), peers(5));
        for gateway in [&one, &other] {
            (0..5).for_each(|index| say(gateway, index, &[], 0));
        }
        let choices = |peers: &Peers| (0..50).map(|key| chosen(peers, &[(key, 10)])).collect::<Vec<_>>();
        assert_eq!(choices(&one), choices(&other));
        assert!(choices(&one).iter().collect::<HashSet<_>>().len() > 2, "new chunks spread out");
    }

    #[tokio::test]
    async fn a_peer_that_leaves_is_not_lost_to_those_it_still_serves() {
        let peers = peers(1);
        say_for(0.2, &peers, 0, &[], 0);
        let peer = peers.choose(&WANTED, &[]).expect("a peer");
        let leaving = Residency { lease_seconds: 0.01, draining: true, ..Default::default() };
        let waited = timeout(Duration::from_millis(500), async {
            tokio::join!(peer.lost(), async { peers.0.peers.read()[0].take(leaving) })
        });
        assert!(waited.await.is_err(), "it said that it goes away and finishes what it has");
    }

    #[tokio::test]
    async fn a_leaving_peer_gets_nothing_while_another_one_is_there() {
        let peers = peers(2);
        say(&peers, 0, &[], 9);
        let leaving = Residency { lease_seconds: 60.0, draining: true, ..Default::default() };
        peers.0.peers.read()[1].take(leaving);
        assert_eq!(chosen(&peers, &WANTED), "http://127.0.0.1:9");
    }
}
