//! The handle to the stores: every call goes to the stores that placement names, side by side, and comes back as
//! one answer.

use crate::fetch::{Fetch, start};
use crate::find::Finder;
use crate::fleet::Fleet;
use crate::moves::Mover;
use crate::since::Since;
use crate::whole::{self, Containers};
use crate::{Error, LayerStream, Options, Outcome};
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, ContainerHash, Head, LayoutId};
use cacheclip_rpc::v1::{Hold, MissReason, Tier};
use cacheclip_service::{ConnectOptions, seconds};
use futures::future::join_all;
use std::ops::Range;
use std::sync::Arc;

/// Handle to the stores. Cheap to clone; connects with its first call and again after a loss.
#[derive(Clone, Debug)]
pub struct StoreClient {
    pub(crate) fleet: Fleet,
    mover: Mover,
    pub(crate) options: Arc<Options>,
    pub(crate) since: Since,
}

/// What a put comes with, besides the container.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// The document that brought the chunk.
    pub hold: Option<Hold>,
    /// What the stores had deleted when the chunk's computing began: what was deleted since is refused.
    pub since: Since,
}

/// Where a lookup found a chunk, or why it did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Located {
    /// A store has it.
    Found {
        /// Hash of the container it has.
        container: ContainerHash,
        /// Bytes of that container.
        bytes: u64,
        /// Where in the store.
        tier: Tier,
    },
    /// No store has it, or the one that should could not be asked.
    Missing(MissReason),
}

/// What a delete removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deleted {
    /// Containers.
    pub objects: u32,
    /// Their bytes.
    pub bytes: u64,
    /// Stores that are known and not live: they may still have the chunks.
    pub unreached: u32,
}

impl StoreClient {
    /// A client of the stores at `seeds` and of all that these name: each `http://host:port`, or
    /// `dns+http://host:port` for every address of a name. Needs a tokio runtime; the first call waits for the
    /// stores' first word.
    ///
    /// # Errors
    /// No seed, or one that cannot be dialled.
    pub fn connect(seeds: &[impl AsRef<str>], connect: &ConnectOptions) -> Result<Self, Error> {
        Self::connect_with(seeds, connect, Options::default())
    }

    /// The same with another patience.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn connect_with(
        seeds: &[impl AsRef<str>],
        connect: &ConnectOptions,
        options: Options,
    ) -> Result<Self, Error> {
        let options = Arc::new(options);
        let fleet = Fleet::start(seeds, connect, &options)?;
        let mover = Mover::start(fleet.clone(), Arc::clone(&options));
        Ok(Self { fleet, mover, options, since: Since::default() })
    }

    /// This client for one request, which begins now: what stores say of their deletions when they lack something is
    /// kept for what the request writes.
    #[must_use]
    pub fn begin(&self) -> Self {
        Self { since: Since::now(&self.fleet), ..self.clone() }
    }

    /// What the stores had deleted, as this request knows it: belongs to the [`Terms`] of what it writes.
    pub fn since(&self) -> Since {
        self.since.clone()
    }

    /// Which of `keys` the stores have, in their order. Where the store that keeps a chunk cannot be asked, the
    /// chunk is missing, by the reason UNAVAILABLE or TIMEOUT.
    pub async fn lookup(&self, layout: LayoutId, keys: &[ChunkKey]) -> Vec<Located> {
        let mut located = vec![Located::Missing(MissReason::Unavailable); keys.len()];
        if keys.is_empty() {
            return located;
        }
        self.met().await;
        let finder = Finder::new(&self.fleet, &self.options, layout, keys, &self.since);
        let groups = finder.groups();
        let found = join_all(groups.iter().map(|(owner, indices)| finder.locate(owner, indices))).await;
        for (index, found) in found.into_iter().flatten() {
            located[index] = match found {
                Ok(at) => Located::Found { container: at.container, bytes: at.bytes, tier: at.tier },
                Err(reason) => Located::Missing(reason),
            };
        }
        located
    }

    /// Layers `range` of several chunks. What one store has comes layer-major: its chunks' first layer, then their
    /// second; stores come side by side. Chunks are named by their index in `keys`. Every layer that comes out is
    /// verified and decoded; every chunk ends with its last layer or with [`Item::Missing`](crate::Item::Missing).
    /// Dropping the stream stops the stores' work.
    pub fn get_layers(&self, layout: LayoutId, keys: &[ChunkKey], range: Range<u32>) -> LayerStream {
        start(Fetch {
            fleet: self.fleet.clone(),
            mover: self.mover.clone(),
            layout,
            keys: keys.to_vec(),
            range,
            options: Arc::clone(&self.options),
            since: self.since.or_now(&self.fleet),
        })
    }

    /// Whole containers of several chunks, as they come, or why they do not: for a reader that wants all of a chunk
    /// and has no use for one layer before the others. Heads are checked; segments are verified when they are read
    /// from the container. Dropping the stream stops the stores' work.
    pub fn get(&self, layout: LayoutId, keys: &[ChunkKey]) -> Containers {
        let (fleet, mover, options) = (self.fleet.clone(), self.mover.clone(), Arc::clone(&self.options));
        whole::start(fleet, mover, options, self.since.or_now(&self.fleet), layout, keys.to_vec())
    }

    /// Stores a container. The first writer of a key wins; a later one is told [`Outcome::Existed`].
    ///
    /// # Errors
    /// Bytes that are not a container, no live store, a store that refuses it or cannot be reached in time.
    pub async fn put(&self, container: Bytes) -> Result<Outcome, Error> {
        self.put_on(container, &Terms { hold: None, since: self.since() }).await
    }

    /// The same on terms. A chunk that was deleted since its computing began is refused, which is
    /// [`Outcome::Deleted`] and no error: nothing is to be done about it.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn put_on(&self, container: Bytes, terms: &Terms) -> Result<Outcome, Error> {
        let head = Head::parse(&container)?;
        self.met().await;
        let mut lost = None;
        loop {
            let Some(node) = self.fleet.view().keeper(&head.key()).map(Arc::clone) else {
                return Err(lost.unwrap_or(Error::NoStore));
            };
            match self.fleet.put(&node, &head, container.clone(), (&self.options, terms)).await {
                // Another store keeps the chunk from now on.
                Err(error) if lost.is_none() && !node.is_live() => lost = Some(error),
                answer => return answer,
            }
        }
    }

    /// Removes chunks from all live stores: which of them hold copies is not known.
    ///
    /// # Errors
    /// No live store, or one that refuses or cannot be reached in time: the chunks may then still be there.
    pub async fn delete(&self, layout: LayoutId, keys: &[ChunkKey]) -> Result<Deleted, Error> {
        if keys.is_empty() {
            return Ok(Deleted::default());
        }
        self.met().await;
        let view = self.fleet.view();
        if view.len() == 0 {
            return Err(Error::NoStore);
        }
        let mut sum = Deleted { unreached: self.fleet.absent() as u32, ..Deleted::default() };
        let calls = view.all().map(|node| self.fleet.delete(node, layout, keys, &self.options));
        // All of them are waited for: one that fails must not keep another from deleting.
        for deleted in join_all(calls).await {
            let deleted = deleted?;
            sum.objects += deleted.objects;
            sum.bytes += deleted.bytes;
        }
        Ok(sum)
    }

    pub(crate) async fn met(&self) {
        self.fleet.met(seconds(self.options.call_timeout_seconds)).await;
    }
}
