//! Receiving a container: written to a temporary file and verified as it comes, published when all of it was good.

use crate::bucket::Failure;
use crate::catalogue::Record;
use crate::core::{Core, Published};
use crate::disk::Temporary;
use crate::journal::Claim;
use crate::metrics;
use crate::verifier::Verifier;
use bytes::Bytes;
use cacheclip_chunk::{ChunkKey, ContainerHash, FormatError, Head, LayoutId};
use std::io::{self, Seek, SeekFrom, Write};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Bytes after which the system is asked to begin writing them to the disk: the end of an object then waits for its
/// last bytes alone.
const WRITE_BACK: u64 = 1 << 20;

/// What a writer announced.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Announced {
    pub(crate) layout: LayoutId,
    pub(crate) key: ChunkKey,
    pub(crate) bytes: u64,
}

/// For whom a writer writes, and since when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Writer {
    pub(crate) claim: Option<Claim>,
    /// The generation at which it began.
    pub(crate) begun: u64,
}

/// How a put ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Stored(ContainerHash),
    Existed(ContainerHash),
    NoRoom,
    /// The key or the document was deleted after the writer began.
    Deleted,
}

/// Why a put failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    /// The writer's doing; the field to blame.
    #[error("{0}: {1}")]
    Invalid(&'static str, String),
    /// The bytes are not what their head says.
    #[error("data: {0}")]
    Damaged(FormatError),
    #[error("the bucket: {0}")]
    Bucket(#[from] Failure),
    #[error("cannot be written: {0}")]
    Io(#[from] io::Error),
}

impl Core {
    /// Takes a container's bytes until `frames` ends, unless the writer has given up. Blocking.
    pub(crate) fn receive(
        &self,
        announced: Announced,
        writer: Writer,
        mut frames: mpsc::Receiver<Bytes>,
        given_up: &CancellationToken,
    ) -> Result<Outcome, Failed> {
        let (key, begun) = (announced.key, writer.begun);
        // Before its bytes: from now on the document's deletion finds it.
        if let Some(claim) = writer.claim
            && !self.hold(announced.layout, &[key], claim, begun)?
        {
            return Ok(Outcome::Deleted);
        }
        if self.catalogue.lock().has_expired(&key) {
            let _changes = self.changes.lock();
            self.remove_expired(&[key], false)?;
        }
        // What is in the bucket alone is taken anew: who brings it could not have it from there.
        if let Some(Record { hash, .. }) = self.catalogue.lock().on_disk(&key) {
            return Ok(Outcome::Existed(hash));
        }
        // The key's deletion may have broken off in the bucket.
        self.clear_doomed(&[key])?;
        let Some(room) = Room::reserve(self, announced.bytes) else { return Ok(Outcome::NoRoom) };
        let next = || match frames.blocking_recv() {
            None if given_up.is_cancelled() => {
                Err(Failed::Invalid("data", "the put was given up; put again".into()))
            }
            frame => Ok(frame),
        };
        let written = self.write(announced, next).map_err(|failed| match failed {
            Failed::Damaged(error) => {
                metrics::verify_failed("put");
                Failed::Invalid("data", error.to_string())
            }
            other => other,
        });
        let Some((temporary, head)) = written? else { return Ok(Outcome::NoRoom) };
        let document = writer.claim.map(|claim| claim.document);
        match self.publish(temporary, &head, begun, document)? {
            Published::Stored => {
                room.keep();
                Ok(Outcome::Stored(head.hash()))
            }
            Published::Existed(first) => Ok(Outcome::Existed(first)),
            Published::Deleted => Ok(Outcome::Deleted),
        }
    }

    /// Writes a container that `next` brings to a file, verified to its last byte and synced; nothing where the volume
    /// is full. Its room must be reserved. Blocking.
    pub(crate) fn write(
        &self,
        announced: Announced,
        mut next: impl FnMut() -> Result<Option<Bytes>, Failed>,
    ) -> Result<Option<(Temporary, Head)>, Failed> {
        let mut temporary = self.disk.create()?;
        let mut verifier = Verifier::new(announced);
        let (mut written, mut begun_to) = (0, 0);
        while let Some(frame) = next()? {
            verifier.expects(frame.len())?;
            let full = || self.free(announced.bytes);
            if !write_at(&mut temporary.file, written, &frame, full)? {
                return Ok(None);
            }
            written += frame.len() as u64;
            if written - begun_to >= WRITE_BACK {
                temporary.file.write_back(begun_to, written - begun_to);
                begun_to = written;
            }
            // Beside the disk, which is busy with them.
            verifier.push(&frame)?;
        }
        let head = verifier.finish()?;
        match temporary.file.sync_all() {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(None),
            synced => synced.map(|()| Some((temporary, head))).map_err(Failed::Io),
        }
    }
}

/// Reserved bytes, given back unless they are kept.
pub(crate) struct Room<'a> {
    core: &'a Core,
    bytes: u64,
}

impl<'a> Room<'a> {
    pub(crate) fn reserve(core: &'a Core, bytes: u64) -> Option<Self> {
        core.make_room(bytes).then(|| Self { core, bytes })
    }

    pub(crate) fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.core.catalogue.lock().release(self.bytes);
        self.core.gauge();
    }
}

/// Writes a frame; where the volume is full, makes room and tries once more. False where that was not enough.
fn write_at(
    file: &mut (impl Write + Seek),
    offset: u64,
    frame: &[u8],
    make_room: impl FnOnce(),
) -> io::Result<bool> {
    match file.write_all(frame) {
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {}
        other => return other.map(|()| true),
    }
    make_room();
    // Part of the frame may have been written.
    file.seek(SeekFrom::Start(offset))?;
    match file.write_all(frame) {
        Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(false),
        other => other.map(|()| true),
    }
}

/// Whether a container is taken that comes in these frames.
pub(crate) fn takes<'a>(announced: Announced, mut frames: impl Iterator<Item = &'a [u8]>) -> bool {
    let mut verifier = Verifier::new(announced);
    frames.all(|frame| verifier.push(frame).is_ok()) && verifier.finish().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file on a volume with so many bytes left.
    struct Volume {
        bytes: Vec<u8>,
        room: usize,
    }

    impl Write for Volume {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            let len = data.len().min(self.room - self.bytes.len());
            if len == 0 && !data.is_empty() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.bytes.extend_from_slice(&data[..len]);
            Ok(len)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Volume {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            let SeekFrom::Start(at) = to else { return Err(io::ErrorKind::Unsupported.into()) };
            self.bytes.truncate(at as usize);
            Ok(at)
        }
    }

    #[test]
    fn a_full_volume_is_tried_once_more_from_the_frames_start() {
        let mut volume = Volume { bytes: vec![1, 2], room: 4 };
        let mut asked = 0;
        assert!(!write_at(&mut volume, 2, &[3, 4, 5], || asked += 1).unwrap());
        assert_eq!((asked, &volume.bytes[..]), (1, &[1, 2, 3, 4][..]));
        volume.bytes.truncate(2);
        volume.room = 5;
        assert!(write_at(&mut volume, 2, &[3, 4, 5], || asked += 1).unwrap());
        assert_eq!((asked, &volume.bytes[..]), (1, &[1, 2, 3, 4, 5][..]));
    }
}
