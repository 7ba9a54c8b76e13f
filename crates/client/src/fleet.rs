//! The stores a client knows, which of them are live, and which one keeps what.

use crate::membership;
use crate::node::{Node, Standing};
use crate::placement;
use crate::{Error, Options, metrics};
use cacheclip_chunk::ChunkKey;
use cacheclip_rpc::v1;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_service::{ConnectOptions, connect, endpoint, seconds};
use parking_lot::{Mutex, RwLock};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// All stores. Cheap to clone; asking who is there ends with the last clone.
#[derive(Clone, Debug)]
pub(crate) struct Fleet(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) seeds: Vec<String>,
    pub(crate) connect: ConnectOptions,
    pub(crate) refresh: Duration,
    pub(crate) patience: Duration,
    /// Ascending by name.
    nodes: RwLock<Vec<Arc<Node>>>,
    /// Endpoints that are asked, and names that could never be looked up; whether a store has ever answered there.
    asked: Mutex<BTreeMap<String, bool>>,
    /// Whether every store has been asked once.
    met: watch::Sender<bool>,
    /// Starts the next round of asking soon.
    pub(crate) wake: Arc<Notify>,
}

impl Fleet {
    /// Knows `seeds` and whom they name, from now on.
    ///
    /// # Errors
    /// No seed, or one that cannot be dialled.
    pub(crate) fn start(
        seeds: &[impl AsRef<str>],
        connect: &ConnectOptions,
        options: &Options,
    ) -> Result<Self, Error> {
        let seeds: Vec<String> = seeds.iter().map(|seed| normal(seed.as_ref())).collect();
        if seeds.is_empty() {
            return Err(Error::NoSeeds);
        }
        for seed in &seeds {
            endpoint(seed.strip_prefix("dns+").unwrap_or(seed), connect)?;
        }
        let inner = Arc::new(Inner {
            seeds,
            connect: connect.clone(),
            refresh: seconds(options.refresh_seconds),
            patience: seconds(options.members_timeout_seconds),
            nodes: RwLock::default(),
            asked: Mutex::default(),
            met: watch::Sender::new(false),
            wake: Arc::default(),
        });
        tokio::spawn(membership::run(Arc::downgrade(&inner)));
        Ok(Self(inner))
    }

    /// Waits until every store has been asked once, but not for longer than this.
    pub(crate) async fn met(&self, patience: Duration) {
        if *self.0.met.borrow() {
            return;
        }
        // Too long: whoever has answered by now is live.
        let _ = tokio::time::timeout(patience, self.0.met.subscribe().wait_for(|met| *met)).await;
    }

    /// Waits until a store is live, but not for longer than this: stores may be starting beside who asks.
    pub(crate) async fn one_live(&self, patience: Duration) {
        // The end of every round is told.
        let live = async { self.0.met.subscribe().wait_for(|_| self.0.any_live()).await.is_ok() };
        // Too long: who goes on finds none.
        let _ = tokio::time::timeout(patience, live).await;
    }

    /// The live stores at this moment.
    pub(crate) fn view(&self) -> View {
        let nodes = self.0.nodes.read();
        let of = |wanted| nodes.iter().filter(|node| node.standing() == wanted).map(Arc::clone).collect();
        View { keepers: of(Standing::Live), leaving: of(Standing::Leaving) }
    }

    /// All stores that are known, live or not.
    pub(crate) fn known(&self) -> Vec<Arc<Node>> {
        self.0.nodes.read().clone()
    }

    /// Where stores should be and none has ever answered.
    pub(crate) fn unheard(&self) -> Vec<String> {
        let asked = self.0.asked.lock();
        asked.iter().filter(|(_, answered)| !**answered).map(|(endpoint, _)| endpoint.clone()).collect()
    }

    /// How many stores are known that are not live.
    pub(crate) fn absent(&self) -> usize {
        self.0.nodes.read().iter().filter(|node| !node.is_live()).count()
    }

    /// A call at a store, within its time. One that is refused as unavailable or is not finished in time costs the
    /// store its liveness, until it says again that it is there.
    pub(crate) async fn call<T>(
        &self,
        node: &Node,
        method: &'static str,
        timeout: f64,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        let started = Instant::now();
        let answer = tokio::select! {
            answer = tokio::time::timeout(seconds(timeout), call) => answer.ok(),
            () = node.silent() => None,
        };
        metrics::call_ended(method, started.elapsed().as_secs_f64());
        match answer {
            Some(Ok(answer)) => Ok(answer.into_inner()),
            Some(Err(status)) => {
                self.judge(node, &status);
                Err(Box::new(status).into())
            }
            None => {
                self.overdue(node);
                Err(Error::Timeout { seconds: timeout })
            }
        }
    }

    /// Takes note of how a call ended.
    pub(crate) fn judge(&self, node: &Node, status: &Status) {
        if status.code() == Code::Unavailable && node.refused() {
            self.lost(node, status.message());
        }
    }

    /// Takes note of a call that was not finished in time.
    pub(crate) fn overdue(&self, node: &Node) {
        if node.overdue(Instant::now()) {
            self.lost(node, "a call was not finished in time");
        }
    }

    fn lost(&self, node: &Node, why: &str) {
        tracing::info!(store = node.name(), endpoint = node.endpoint(), why, "a store is not live any more");
        self.0.count();
        self.0.wake.notify_one();
    }
}

impl Inner {
    /// Every store has been asked.
    pub(crate) fn round_ended(&self) {
        self.count();
        self.met.send_replace(true);
    }

    pub(crate) fn any_live(&self) -> bool {
        self.nodes.read().iter().any(|node| node.is_live())
    }

    /// Whether the store that was last heard at this endpoint is live.
    pub(crate) fn is_live_at(&self, endpoint: &str) -> bool {
        self.nodes.read().iter().any(|node| node.endpoint() == endpoint && node.is_live())
    }

    /// A store may be at this endpoint.
    pub(crate) fn asks(&self, endpoint: &str) {
        self.asked.lock().entry(endpoint.to_owned()).or_default();
    }

    /// Whether the addresses of a seed are known.
    pub(crate) fn looked_up(&self, seed: &str, known: bool) {
        let mut asked = self.asked.lock();
        if known {
            asked.remove(seed);
        } else {
            asked.insert(seed.to_owned(), false);
        }
    }

    /// A store said how many deletions it counts.
    pub(crate) fn counts(&self, name: &str, generation: u64) {
        if let Some(node) = self.nodes.read().iter().find(|node| node.name() == name) {
            node.counts(generation);
        }
    }

    /// A store said at `endpoint`, which `control` dials, that it is there.
    pub(crate) fn answered(&self, endpoint: &str, told: &v1::Node, control: &CacheClient<Channel>) {
        let home = normal(&told.endpoint);
        let at_home = home == endpoint;
        {
            // Who answers here need not be reachable at home.
            let mut asked = self.asked.lock();
            asked.insert(endpoint.to_owned(), true);
            asked.insert(home, true);
        }
        let mut nodes = self.nodes.write();
        // An endpoint speaks for one store at a time: the one that was there before is there no longer.
        nodes.iter().filter(|it| it.endpoint() == endpoint && it.name() != told.name).for_each(|it| {
            it.refused();
        });
        let place = nodes.binary_search_by(|node| node.name().cmp(&told.name));
        if let Ok(at) = place {
            let known = &nodes[at];
            if known.endpoint() == endpoint {
                if known.answered(told.draining, Instant::now()) {
                    tracing::info!(store = told.name, endpoint, standing = ?known.standing(), "a store answers");
                }
                return;
            }
            if known.is_live() && (known.at_home() || !at_home) {
                if known.at_home() && at_home {
                    let (store, other) = (&told.name, known.endpoint());
                    tracing::warn!(
                        store,
                        endpoint,
                        other,
                        "two stores have one name; give each `node` of its own"
                    );
                }
                return;
            }
        }
        let bulk = match connect(endpoint, &self.connect) {
            Ok(bulk) => bulk,
            Err(error) => return tracing::warn!(endpoint, %error, "a store cannot be dialled"),
        };
        let node = Arc::new(Node::new(&told.name, endpoint, at_home, control.clone(), bulk));
        node.answered(told.draining, Instant::now());
        tracing::info!(store = told.name, endpoint, standing = ?node.standing(), "a store was found");
        match place {
            Ok(at) => nodes[at] = node,
            Err(at) => nodes.insert(at, node),
        }
    }

    /// Whoever was at `endpoint` refuses to say that it is there.
    pub(crate) fn refused(&self, endpoint: &str, why: &str) {
        for node in self.nodes.read().iter().filter(|node| node.endpoint() == endpoint && node.refused()) {
            tracing::info!(store = node.name(), endpoint, why, "a store is not live any more");
        }
    }

    /// Whoever was at `endpoint` says nothing.
    pub(crate) fn silent(&self, endpoint: &str) {
        for node in self.nodes.read().iter().filter(|node| node.endpoint() == endpoint && node.unanswered()) {
            tracing::info!(store = node.name(), endpoint, "a store fell silent");
        }
    }

    /// Forgets stores whose endpoints are not asked any more.
    pub(crate) fn retain(&self, asked: impl Fn(&str) -> bool) {
        self.nodes.write().retain(|node| asked(node.endpoint()));
        self.asked.lock().retain(|endpoint, _| asked(endpoint) || self.seeds.contains(endpoint));
    }

    fn count(&self) {
        let nodes = self.nodes.read();
        metrics::stores(nodes.iter().filter(|node| node.is_live()).count(), nodes.len());
    }
}

/// An endpoint as it is compared: with its scheme, without a slash at its end.
pub(crate) fn normal(endpoint: &str) -> String {
    let endpoint = endpoint.strip_suffix('/').filter(|rest| !rest.ends_with('/')).unwrap_or(endpoint);
    if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") }
}

/// The live stores at one moment.
#[derive(Debug)]
pub(crate) struct View {
    /// Those that take new chunks.
    keepers: Vec<Arc<Node>>,
    /// Those that only serve what they have.
    leaving: Vec<Arc<Node>>,
}

impl View {
    /// How many stores are live.
    pub(crate) fn len(&self) -> usize {
        self.keepers.len() + self.leaving.len()
    }

    /// All of them.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.keepers.iter().chain(&self.leaving)
    }

    /// The store that a new chunk is put to.
    pub(crate) fn keeper(&self, key: &ChunkKey) -> Option<&Arc<Node>> {
        placement::owner(&self.keepers, |node| node.seat(), key)
    }

    /// The store that is asked for a chunk.
    pub(crate) fn owner(&self, key: &ChunkKey) -> Option<&Arc<Node>> {
        self.keeper(key).or_else(|| placement::owner(&self.leaving, |node| node.seat(), key))
    }

    /// Where to look for a chunk that `owner` does not have: a live store that the index names, else the leaving
    /// store that kept the chunk until it began to leave.
    pub(crate) fn elsewhere(&self, owner: &Node, key: &ChunkKey, entry: &v1::Entry) -> Option<&Arc<Node>> {
        let named = entry.nodes.iter().find_map(|name| self.all().find(|node| node.name() == name));
        let former = || {
            let before = placement::owner(self.all(), |node| node.seat(), key)?;
            (before.standing() == Standing::Leaving).then_some(before)
        };
        named.or_else(former).filter(|node| node.name() != owner.name())
    }
}

/// Keys by the store they belong to; indices into what was counted.
pub(crate) fn grouped(placed: impl IntoIterator<Item = (usize, Arc<Node>)>) -> Vec<(Arc<Node>, Vec<usize>)> {
    let mut groups: Vec<(Arc<Node>, Vec<usize>)> = Vec::new();
    for (index, node) in placed {
        match groups.iter_mut().find(|(known, _)| known.name() == node.name()) {
            Some((_, members)) => members.push(index),
            None => groups.push((node, vec![index])),
        }
    }
    groups
}
