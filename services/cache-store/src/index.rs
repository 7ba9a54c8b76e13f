//! Who has which chunk: a cache of the stores' catalogues that many processes may ask.
//!
//! Every answer may be out of date; a store that is asked for what it no longer has says so, and that costs a
//! round trip. All calls take many keys, because one call may be one round trip.

use crate::error::Error;
use cacheclip_chunk::{ChunkKey, ContainerHash, LayoutId};
use futures::future::BoxFuture;
use redb::{Database, Durability, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What the index knows of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Layout of its KV.
    pub layout: LayoutId,
    /// Hash of its container.
    pub container: ContainerHash,
    /// Bytes of its container.
    pub bytes: u64,
}

/// An index that could not be asked or told; whoever gets this goes on without it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("index: {0}")]
pub struct Unavailable(pub String);

/// The index. Implementations are checked by one conformance suite.
pub trait Index: Send + Sync + std::fmt::Debug {
    /// What is known of these keys, in their order.
    fn locate<'a>(&'a self, keys: &'a [ChunkKey]) -> BoxFuture<'a, Result<Vec<Option<Entry>>, Unavailable>>;

    /// Makes chunks known; a later entry of a key replaces an earlier one.
    fn publish<'a>(&'a self, entries: &'a [(ChunkKey, Entry)]) -> BoxFuture<'a, Result<(), Unavailable>>;

    /// Makes chunks unknown; unknown ones are fine.
    fn withdraw<'a>(&'a self, keys: &'a [ChunkKey]) -> BoxFuture<'a, Result<(), Unavailable>>;
}

/// Layout (32), container hash (32), bytes (8, little-endian).
type Stored = [u8; 72];
const CHUNKS: TableDefinition<'_, &[u8; 32], &Stored> = TableDefinition::new("chunks v1");

fn pack(entry: &Entry) -> Stored {
    let mut stored = [0; 72];
    stored[..32].copy_from_slice(entry.layout.as_bytes());
    stored[32..64].copy_from_slice(entry.container.as_bytes());
    stored[64..].copy_from_slice(&entry.bytes.to_le_bytes());
    stored
}

fn unpack(stored: &Stored) -> Entry {
    let id = |at: usize| std::array::from_fn(|i| stored[at + i]);
    Entry {
        layout: LayoutId::from_bytes(id(0)),
        container: ContainerHash::from_bytes(id(32)),
        bytes: u64::from_le_bytes(std::array::from_fn(|i| stored[64 + i])),
    }
}

/// The index of a single store: a database file beside its objects.
#[derive(Clone, Debug)]
pub struct Embedded {
    database: Arc<Database>,
}

impl Embedded {
    /// Opens the file and makes it say what `catalogue` says; a missing or damaged file is made anew.
    ///
    /// # Errors
    /// A file that can neither be opened nor replaced.
    pub async fn open(path: PathBuf, catalogue: Vec<(ChunkKey, Entry)>) -> Result<Self, Error> {
        let failed = |reason: String| Error::Index { path: path.clone(), reason };
        let first = Self::try_open(&path, &catalogue).await;
        let Err(reason) = first else { return first.map_err(failed) };
        tracing::warn!(path = %path.display(), reason, "index is damaged: making it anew");
        crate::disk::remove(&path).map_err(|error| failed(error.to_string()))?;
        Self::try_open(&path, &catalogue).await.map_err(failed)
    }

    async fn try_open(path: &Path, catalogue: &[(ChunkKey, Entry)]) -> Result<Self, String> {
        let (path, catalogue) = (path.to_owned(), catalogue.to_vec());
        // A damaged file may even make the database panic, which is caught here as the task's error.
        let opening = tokio::task::spawn_blocking(move || {
            let database = Database::create(path).map_err(|error| error.to_string())?;
            reconcile(&database, catalogue).map_err(|error| error.to_string())?;
            Ok(Self { database: Arc::new(database) })
        });
        opening.await.map_err(|error| error.to_string())?
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, Unavailable> {
        let database = Arc::clone(&self.database);
        let done = tokio::task::spawn_blocking(move || work(&database)).await;
        done.map_err(|error| Unavailable(error.to_string()))?.map_err(|error| Unavailable(error.to_string()))
    }
}

impl Index for Embedded {
    fn locate<'a>(&'a self, keys: &'a [ChunkKey]) -> BoxFuture<'a, Result<Vec<Option<Entry>>, Unavailable>> {
        let keys = keys.to_vec();
        Box::pin(self.run(move |database| {
            let table = database.begin_read()?.open_table(CHUNKS)?;
            let mut found = Vec::with_capacity(keys.len());
            for key in &keys {
                found.push(table.get(key.as_bytes())?.map(|stored| unpack(stored.value())));
            }
            Ok(found)
        }))
    }

    fn publish<'a>(&'a self, entries: &'a [(ChunkKey, Entry)]) -> BoxFuture<'a, Result<(), Unavailable>> {
        let entries = entries.to_vec();
        Box::pin(self.run(move |database| write(database, Durability::None, &entries, &[])))
    }

    fn withdraw<'a>(&'a self, keys: &'a [ChunkKey]) -> BoxFuture<'a, Result<(), Unavailable>> {
        let keys = keys.to_vec();
        Box::pin(self.run(move |database| write(database, Durability::None, &[], &keys)))
    }
}

/// Not durable in operation: after a crash the file is reconciled with the objects anyway.
fn write(
    database: &Database,
    durability: Durability,
    publish: &[(ChunkKey, Entry)],
    withdraw: &[ChunkKey],
) -> Result<(), redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(durability)?;
    {
        let mut table = transaction.open_table(CHUNKS)?;
        for (key, entry) in publish {
            table.insert(key.as_bytes(), &pack(entry))?;
        }
        for key in withdraw {
            table.remove(key.as_bytes())?;
        }
    }
    Ok(transaction.commit()?)
}

/// Writes only what differs: a restart with an intact index costs one pass over it.
fn reconcile(database: &Database, catalogue: Vec<(ChunkKey, Entry)>) -> Result<(), redb::Error> {
    let mut missing: HashMap<ChunkKey, Entry> = catalogue.into_iter().collect();
    let mut stale = Vec::new();
    {
        let transaction = database.begin_write()?;
        transaction.open_table(CHUNKS)?;
        transaction.commit()?;
        let table = database.begin_read()?.open_table(CHUNKS)?;
        for row in table.iter()? {
            let (key, stored) = row?;
            let key = ChunkKey::from_bytes(*key.value());
            match missing.get(&key) {
                Some(entry) if *entry == unpack(stored.value()) => {
                    missing.remove(&key);
                }
                // Published again below, with what the file says.
                Some(_) => {}
                None => stale.push(key),
            }
        }
    }
    if missing.is_empty() && stale.is_empty() {
        return Ok(());
    }
    write(database, Durability::Immediate, &missing.into_iter().collect::<Vec<_>>(), &stale)
}
