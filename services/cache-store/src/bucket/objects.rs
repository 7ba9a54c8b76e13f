//! Calls of an object store, each with a deadline.

use crate::inspect::Source;
use bytes::Bytes;
use cacheclip_chunk::ChunkKey;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    ClientConfigKey, ObjectMeta, ObjectStore, ObjectStoreExt as _, ObjectStoreScheme, RetryConfig,
};
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use url::Url;

/// Bytes that are sent at once; a larger object goes in parts. S3 takes none that is smaller than 5 MiB, and no more
/// than 10,000 of them.
const PART: u64 = 8 << 20;
/// Times a request is sent again within its deadline.
const RETRIES: usize = 3;

/// Why a call of the bucket failed.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// There is no such object.
    #[error("it has no such object")]
    Missing,
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// It cannot be reached, or refused.
    #[error("{0}")]
    Refused(String),
}

/// An object as it was listed.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) key: ChunkKey,
    pub(crate) bytes: u64,
    /// When it was uploaded, in seconds since 1970.
    pub(crate) modified: u64,
}

/// The objects below a prefix. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Objects {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    timeout: Duration,
    runtime: Handle,
    /// When the last call failed, if it did.
    failed: Arc<Mutex<Option<Instant>>>,
}

impl Objects {
    /// The objects that a URL means. To be called where a runtime is.
    pub(crate) fn open(url: &str, timeout: Duration) -> Result<Self, String> {
        let example = "write s3://NAME/PREFIX, file:///DIRECTORY or memory:///";
        let url = Url::parse(url).map_err(|why| format!("{url}: {why}; {example}"))?;
        let (scheme, prefix) =
            ObjectStoreScheme::parse(&url).map_err(|why| format!("{url}: {why}; {example}"))?;
        let store: Arc<dyn ObjectStore> = match scheme {
            ObjectStoreScheme::Local => Arc::new(LocalFileSystem::new()),
            ObjectStoreScheme::Memory => Arc::new(InMemory::new()),
            ObjectStoreScheme::AmazonS3 => {
                Arc::new(s3(&url, timeout).map_err(|why| format!("{url}: {why}"))?)
            }
            _ => return Err(format!("{url}: no such kind of bucket; {example}")),
        };
        Ok(Self::of(store, prefix, timeout))
    }

    pub(super) fn of(store: Arc<dyn ObjectStore>, prefix: Path, timeout: Duration) -> Self {
        Self { store, prefix, timeout, runtime: Handle::current(), failed: Arc::default() }
    }

    /// The objects below a part of these.
    pub(super) fn below(self, part: &str) -> Self {
        Self { prefix: self.prefix.join(part), ..self }
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Whether the last call failed, and not long ago: readers must not wait for a deadline each.
    pub(super) fn is_down(&self) -> bool {
        self.failed.lock().is_some_and(|at| at.elapsed() < self.timeout)
    }

    /// What a call brings, on a thread that may block.
    pub(super) fn wait<T>(&self, call: impl Future<Output = T>) -> T {
        self.runtime.block_on(call)
    }

    pub(super) async fn within<T>(
        &self,
        call: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, Failure> {
        let failure = match tokio::time::timeout(self.timeout, call).await {
            Ok(Ok(done)) => {
                self.answered(true);
                return Ok(done);
            }
            Ok(Err(object_store::Error::NotFound { .. })) => {
                self.answered(true);
                return Err(Failure::Missing);
            }
            Ok(Err(error)) => Failure::Refused(error.to_string()),
            Err(_) => Failure::Timeout(self.timeout),
        };
        self.answered(false);
        Err(failure)
    }

    fn answered(&self, well: bool) {
        let before = std::mem::replace(&mut *self.failed.lock(), (!well).then(Instant::now));
        match (before.is_some(), well) {
            (false, false) => tracing::warn!("the bucket does not answer: what it alone holds is missing"),
            (true, true) => tracing::info!("the bucket answers again"),
            _ => {}
        }
    }

    fn path(&self, key: &ChunkKey) -> Path {
        let name = key.to_string();
        self.prefix.clone().join(&name[..2]).join(format!("{name}.kv"))
    }

    /// An object's path below the prefix.
    fn relative(&self, location: &Path) -> PathBuf {
        location.prefix_match(&self.prefix).map_or_else(
            || PathBuf::from(location.as_ref()),
            |parts| parts.map(|part| part.as_ref().to_owned()).collect(),
        )
    }

    /// Everything below the prefix: paths from there, and bytes.
    pub(crate) async fn files(&self) -> Result<Vec<(PathBuf, u64)>, Failure> {
        let mut found = Vec::new();
        let mut listed = self.list_all();
        while let Some(meta) = self.within(listed.try_next()).await? {
            found.push((self.relative(&meta.location), meta.size));
        }
        Ok(found)
    }

    fn list_all(&self) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.store.list(Some(&self.prefix))
    }

    /// The objects that a store put there; what else there is is nobody's business.
    pub(super) async fn list(&self) -> Result<Vec<Listed>, Failure> {
        let mut found = Vec::new();
        let mut listed = self.list_all();
        while let Some(meta) = self.within(listed.try_next()).await? {
            let name = meta.location.filename().and_then(|name| name.strip_suffix(".kv")?.parse().ok());
            let Some(key) = name.filter(|key| self.path(key) == meta.location) else { continue };
            let modified = u64::try_from(meta.last_modified.timestamp()).unwrap_or_default();
            found.push(Listed { key, bytes: meta.size, modified });
        }
        Ok(found)
    }

    /// Removes objects, there or not. Others are removed though one cannot be.
    pub(super) async fn remove(&self, keys: &[ChunkKey]) -> Result<(), Failure> {
        let paths: Vec<_> = keys.iter().map(|key| Ok(self.path(key))).collect();
        let mut removed = self.store.delete_stream(stream::iter(paths).boxed());
        let mut all = Ok(());
        loop {
            match self.within(removed.try_next()).await {
                Ok(None) => return all,
                Ok(Some(_)) | Err(Failure::Missing) => {}
                // One deadline is enough to wait for.
                Err(Failure::Timeout(after)) => return Err(Failure::Timeout(after)),
                Err(refused) => all = Err(refused),
            }
        }
    }

    /// Sends a file of so many bytes; false where `wanted` said in between that nobody wants it there any more.
    pub(super) async fn send(
        &self,
        key: &ChunkKey,
        file: File,
        bytes: u64,
        wanted: impl Fn() -> bool,
    ) -> Result<bool, Failure> {
        let (path, file) = (self.path(key), Arc::new(file));
        if bytes <= PART {
            let whole = part(&file, 0, bytes).await?;
            self.within(self.store.put(&path, whole.into())).await?;
            return Ok(true);
        }
        let mut upload = self.within(self.store.put_multipart(&path)).await?;
        let mut sent = Ok(true);
        for offset in (0..bytes).step_by(PART as usize) {
            sent = match wanted() {
                true => match part(&file, offset, PART.min(bytes - offset)).await {
                    Ok(next) => self.within(upload.put_part(next.into())).await.map(|()| true),
                    Err(failure) => Err(failure),
                },
                false => Ok(false),
            };
            if !matches!(sent, Ok(true)) {
                break;
            }
        }
        if matches!(sent, Ok(true)) {
            sent = self.within(upload.complete()).await.map(|_| true);
        }
        if !matches!(sent, Ok(true)) {
            // Parts that stay cost room until the bucket's own rules remove them.
            let _ = self.within(upload.abort()).await;
        }
        sent
    }

    /// An object's bytes. Blocking.
    pub(super) fn fetch(&self, key: &ChunkKey) -> Result<Frames<'_>, Failure> {
        let path = self.path(key);
        let found = self.wait(self.within(self.store.get(&path)))?;
        Ok(Frames { objects: self, stream: found.into_stream() })
    }

    /// An object to read parts of, by its path below the prefix.
    pub(crate) fn object(&self, path: &std::path::Path) -> Object {
        let parts = path.iter().map(|part| part.to_string_lossy().into_owned());
        let path = parts.fold(self.prefix.clone(), |path, part| path.join(part));
        Object { objects: self.clone(), path }
    }

    pub(super) fn object_of(&self, key: &ChunkKey) -> Object {
        Object { objects: self.clone(), path: self.path(key) }
    }
}

async fn part(file: &Arc<File>, offset: u64, len: u64) -> Result<Bytes, Failure> {
    let file = Arc::clone(file);
    let read = tokio::task::spawn_blocking(move || file.part(offset, len as usize)).await;
    let read = read.map_err(io::Error::other).and_then(|read| read);
    read.map_err(|error| Failure::Refused(format!("the file to be sent cannot be read: {error}")))
}

/// An object's bytes as they come.
#[allow(missing_debug_implementations, reason = "a stream has none")]
pub(super) struct Frames<'a> {
    objects: &'a Objects,
    stream: BoxStream<'static, object_store::Result<Bytes>>,
}

impl Frames<'_> {
    /// The next ones; nothing at the end. Blocking.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        self.objects.wait(self.objects.within(self.stream.try_next()))
    }
}

/// One object, read in parts on a thread that may block.
#[derive(Debug)]
pub(crate) struct Object {
    objects: Objects,
    path: Path,
}

impl Source for Object {
    fn part(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        let range = offset..offset + len as u64;
        let read = self.objects.wait(self.objects.within(self.objects.store.get_range(&self.path, range)));
        let read = read.map_err(|failure| match failure {
            Failure::Missing => io::Error::new(io::ErrorKind::NotFound, failure),
            _ => io::Error::other(failure),
        })?;
        if read.len() == len { Ok(read) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

fn s3(url: &Url, timeout: Duration) -> object_store::Result<object_store::aws::AmazonS3> {
    // An error says that this process has chosen a provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let retry = RetryConfig { max_retries: RETRIES, retry_timeout: timeout, ..RetryConfig::default() };
    let deadline = format!("{} s", timeout.as_secs().max(1));
    AmazonS3Builder::from_env()
        .with_url(url.as_str())
        .with_config(AmazonS3ConfigKey::Client(ClientConfigKey::Timeout), deadline)
        .with_retry(retry)
        .build()
}
