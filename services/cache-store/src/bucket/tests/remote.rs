//! An object store that hangs and refuses when it is told to.

use crate::testing::Chunk;
use futures::stream::BoxStream;
use futures::{StreamExt as _, stream};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt as _, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::sync::watch;

/// Lets calls through, or lets them wait.
#[derive(Debug)]
pub(super) struct Gate {
    open: watch::Sender<bool>,
    arrived: AtomicUsize,
}

impl Default for Gate {
    fn default() -> Self {
        Self { open: watch::Sender::new(true), arrived: AtomicUsize::new(0) }
    }
}

impl Gate {
    pub(super) fn set(&self, open: bool) {
        self.open.send_replace(open);
    }

    pub(super) fn arrived(&self) -> usize {
        self.arrived.load(Ordering::SeqCst)
    }

    async fn pass(&self) {
        self.arrived.fetch_add(1, Ordering::SeqCst);
        let mut open = self.open.subscribe();
        open.wait_for(|open| *open).await.unwrap();
    }
}

/// An object store in memory that can be told to refuse, and to wait.
#[derive(Debug, Default)]
pub(super) struct Remote {
    pub(super) inner: Arc<InMemory>,
    down: AtomicBool,
    pub(super) puts: Gate,
    pub(super) gets: Gate,
}

impl fmt::Display for Remote {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a bucket for tests")
    }
}

impl Remote {
    pub(super) fn down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    fn check(&self) -> Result<()> {
        match self.down.load(Ordering::SeqCst) {
            true => Err(object_store::Error::Generic { store: "test", source: "it is down".into() }),
            false => Ok(()),
        }
    }

    /// Names of what is there.
    pub(super) async fn names(&self) -> Vec<String> {
        let all = self.inner.list(None).map(|meta| meta.unwrap().location.filename().unwrap().to_owned());
        all.collect().await
    }

    pub(super) async fn has(&self, chunk: &Chunk) -> bool {
        self.names().await.contains(&format!("{}.kv", chunk.key))
    }

    pub(super) fn path(chunk: &Chunk) -> Path {
        let name = chunk.key.to_string();
        Path::from(format!("node/{}/{name}.kv", &name[..2]))
    }

    /// Changes what is there.
    pub(super) async fn damage(&self, chunk: &Chunk, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = chunk.bytes.to_vec();
        change(&mut bytes);
        self.inner.put(&Self::path(chunk), bytes.into()).await.unwrap();
    }
}

#[tonic::async_trait]
impl ObjectStore for Remote {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.puts.pass().await;
        self.check()?;
        self.inner.put_opts(at, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.check()?;
        self.inner.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.gets.pass().await;
        self.check()?;
        self.inner.get_opts(at, options).await
    }

    fn delete_stream(&self, at: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self.check() {
            Ok(()) => self.inner.delete_stream(at),
            Err(error) => stream::once(async { Err(error) }).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.check() {
            Ok(()) => self.inner.list(prefix),
            Err(error) => stream::once(async { Err(error) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
