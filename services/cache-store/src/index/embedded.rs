//! The index of a single store: a database file beside its objects.

use super::{Again, Answer, Entry, Holder, Index, PACKED, Renewal, Unavailable};
use crate::disk::volume;
use crate::error::Error;
use cacheclip_chunk::ChunkKey;
use redb::{Database, Durability, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const CHUNKS: TableDefinition<'_, &[u8; 32], &[u8; PACKED]> = TableDefinition::new("chunks v1");

/// The embedded index. It knows one node, which needs no lease.
#[derive(Clone, Debug)]
pub struct Embedded {
    node: String,
    file: Arc<Opened>,
}

/// Dropped in this order: whoever gets the lock may open the database.
#[derive(Debug)]
struct Opened {
    database: Database,
    _lock: Option<Arc<File>>,
}

impl Embedded {
    /// Opens the file and makes it say what `catalogue` says; a missing or damaged file is made anew. `lock` is
    /// held for as long as the file is open.
    ///
    /// # Errors
    /// A file that can neither be opened nor replaced.
    pub async fn open(
        path: PathBuf,
        node: &str,
        catalogue: Vec<(ChunkKey, Entry)>,
        lock: Option<Arc<File>>,
    ) -> Result<Self, Error> {
        let failed = |reason: String| Error::Index { path: path.clone(), reason };
        let database = match try_open(&path, &catalogue).await {
            Ok(database) => database,
            Err(reason) => {
                tracing::warn!(path = %path.display(), reason, "index is damaged: making it anew");
                crate::disk::remove(&path).map_err(|error| failed(error.to_string()))?;
                try_open(&path, &catalogue).await.map_err(failed)?
            }
        };
        Ok(Self { node: node.into(), file: Arc::new(Opened { database, _lock: lock }) })
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, Unavailable> {
        let file = Arc::clone(&self.file);
        let done = tokio::task::spawn_blocking(move || work(&file.database)).await;
        done.map_err(|error| Unavailable(error.to_string()))?.map_err(|error| Unavailable(error.to_string()))
    }
}

async fn try_open(path: &Path, catalogue: &[(ChunkKey, Entry)]) -> Result<Database, String> {
    let (path, catalogue) = (path.to_owned(), catalogue.to_vec());
    // A damaged file may even make the database panic, which is caught here as the task's error.
    let opening = tokio::task::spawn_blocking(move || {
        let database = volume::database(&path).map_err(|error| error.to_string())?;
        reconcile(&database, catalogue).map_err(|error| error.to_string())?;
        Ok(database)
    });
    opening.await.map_err(|error| error.to_string())?
}

impl Index for Embedded {
    fn locate<'a>(&'a self, keys: &'a [ChunkKey]) -> Answer<'a, Vec<Vec<Holder>>> {
        let (keys, node) = (keys.to_vec(), self.node.clone());
        Box::pin(self.run(move |database| {
            let table = database.begin_read()?.open_table(CHUNKS)?;
            let holder = |stored: &[u8; PACKED]| Holder { node: node.clone(), entry: Entry::unpack(stored) };
            let mut found = Vec::with_capacity(keys.len());
            for key in &keys {
                found.push(table.get(key.as_bytes())?.iter().map(|stored| holder(stored.value())).collect());
            }
            Ok(found)
        }))
    }

    fn publish<'a>(&'a self, entries: &'a [(ChunkKey, Entry)]) -> Answer<'a, ()> {
        let entries = entries.to_vec();
        Box::pin(self.run(move |database| write(database, Durability::None, &entries, &[])))
    }

    fn withdraw<'a>(&'a self, keys: &'a [ChunkKey]) -> Answer<'a, ()> {
        let keys = keys.to_vec();
        Box::pin(self.run(move |database| write(database, Durability::None, &[], &keys)))
    }

    fn clear(&self) -> Answer<'_, ()> {
        Box::pin(self.run(|database| {
            let mut transaction = database.begin_write()?;
            transaction.set_durability(Durability::None)?;
            transaction.open_table(CHUNKS)?.retain(|_, _| false)?;
            Ok(transaction.commit()?)
        }))
    }

    fn renew<'a>(&'a self, _endpoint: &'a str) -> Answer<'a, Renewal> {
        // Opening has announced everything already, and nobody else can lose it.
        Box::pin(async { Ok(Renewal { peers: Vec::new(), again: Again::No, twin: None }) })
    }

    fn leave(&self) -> Answer<'_, ()> {
        Box::pin(async { Ok(()) })
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
            table.insert(key.as_bytes(), &entry.pack())?;
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
                Some(entry) if *entry == Entry::unpack(stored.value()) => {
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
