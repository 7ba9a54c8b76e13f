//! Files: one per object, published by rename, plainly read.
//!
//! ```text
//! data_dir/lock                      held while a store uses the directory
//! data_dir/index.redb                cache of the catalogue
//! data_dir/objects/<2 hex>/<key>.kv  published containers
//! data_dir/temporary/<n>             being received; removed at start
//! data_dir/quarantine/<key>.<n>      damaged containers, first to go when room is needed
//! ```

use crate::error::Error;
use bytes::Bytes;
use cacheclip_chunk::ChunkKey;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The data directory, locked.
#[derive(Debug)]
pub(crate) struct Disk {
    root: PathBuf,
    serial: AtomicU64,
    lock: Arc<File>,
}

/// A file being written; removed unless it is published.
#[derive(Debug)]
pub(crate) struct Temporary {
    path: PathBuf,
    pub(crate) file: File,
    published: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published {
            // What cannot be removed now is removed at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Disk {
    /// Makes what is missing of the directory, locks it, shows that it can be written, removes leftovers.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |reason| Error::DataDir { path, reason }
        };
        for folder in ["objects", "temporary", "quarantine"] {
            fs::create_dir_all(root.join(folder)).map_err(failed(root))?;
        }
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(root.join("lock"));
        let lock = lock.map_err(failed(root))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: root.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(failed(root)(source)),
        }
        let disk = Self { root: root.to_owned(), serial: AtomicU64::new(0), lock: Arc::new(lock) };
        for (path, _) in files(&disk.temporary()).map_err(failed(root))? {
            fs::remove_file(&path).map_err(failed(&path))?;
        }
        drop(disk.create().map_err(failed(&disk.temporary()))?);
        Ok(disk)
    }

    /// The directory's lock, for whoever else keeps files in it open.
    pub(crate) fn lock(&self) -> Arc<File> {
        Arc::clone(&self.lock)
    }

    fn temporary(&self) -> PathBuf {
        self.root.join("temporary")
    }

    fn object(&self, key: &ChunkKey) -> PathBuf {
        let name = key.to_string();
        self.root.join("objects").join(&name[..2]).join(format!("{name}.kv"))
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.root.join("index.redb")
    }

    /// A new, empty file.
    pub(crate) fn create(&self) -> io::Result<Temporary> {
        let path = self.temporary().join(self.serial.fetch_add(1, Ordering::Relaxed).to_string());
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(Temporary { path, file, published: false })
    }

    /// Gives a file that has been synced its key's name, durably.
    pub(crate) fn publish(&self, mut temporary: Temporary, key: &ChunkKey) -> io::Result<()> {
        let path = self.object(key);
        let folder = path.parent().unwrap_or(&self.root);
        if !folder.exists() {
            fs::create_dir_all(folder)?;
            File::open(self.root.join("objects"))?.sync_all()?;
        }
        fs::rename(&temporary.path, &path)?;
        temporary.published = true;
        File::open(folder)?.sync_all()
    }

    /// Bytes of an object's file. [`io::ErrorKind::UnexpectedEof`] where it is shorter.
    pub(crate) fn read(&self, key: &ChunkKey, offset: u64, len: usize) -> io::Result<Bytes> {
        let file = File::open(self.object(key))?;
        // The file bounds what is allocated, not the table.
        if file.metadata()?.len() < offset.saturating_add(len as u64) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes.into())
    }

    /// Removes an object's file; that it is gone already is fine.
    pub(crate) fn remove(&self, key: &ChunkKey) -> io::Result<()> {
        remove(&self.object(key))
    }

    /// Moves a damaged file out of the way; its new path and its bytes.
    pub(crate) fn quarantine(&self, path: &Path) -> io::Result<(PathBuf, u64)> {
        let bytes = fs::metadata(path)?.len();
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let free = (0u64..).map(|n| self.root.join("quarantine").join(format!("{stem}.{n}")));
        let Some(target) = free.into_iter().find(|target| !target.exists()) else {
            return Err(io::ErrorKind::AlreadyExists.into());
        };
        fs::rename(path, &target)?;
        Ok((target, bytes))
    }

    pub(crate) fn quarantine_object(&self, key: &ChunkKey) -> io::Result<(PathBuf, u64)> {
        self.quarantine(&self.object(key))
    }

    /// Damaged files that are kept, with their bytes.
    pub(crate) fn quarantined(&self) -> io::Result<Vec<(PathBuf, u64)>> {
        files(&self.root.join("quarantine"))
    }

    /// Object files, the least recently written first, with their bytes.
    pub(crate) fn objects(&self) -> io::Result<Vec<(PathBuf, u64)>> {
        let mut found = Vec::new();
        for folder in fs::read_dir(self.root.join("objects"))? {
            let folder = folder?;
            if folder.file_type()?.is_dir() {
                for (path, bytes) in files(&folder.path())? {
                    found.push((fs::metadata(&path)?.modified()?, path, bytes));
                }
            }
        }
        found.sort();
        Ok(found.into_iter().map(|(_, path, bytes)| (path, bytes)).collect())
    }
}

/// Removes a file; that it is gone already is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn files(folder: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_file() {
            found.push((entry.path(), metadata.len()));
        }
    }
    Ok(found)
}
