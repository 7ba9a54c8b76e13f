//! Receiving a container: written to a temporary file and verified as it comes, published when all of it was good.

use crate::catalogue::Record;
use crate::core::Core;
use crate::metrics;
use bytes::{Buf as _, Bytes, BytesMut};
use cacheclip_chunk::container::head::HEADER_LEN;
use cacheclip_chunk::container::parse_spans;
use cacheclip_chunk::{ChunkKey, ContainerHash, FormatError, Head, LayoutId, SegmentKind};
use std::io::{self, Seek, SeekFrom, Write};
use tokio::sync::mpsc;

/// What a writer announced.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Announced {
    pub(crate) layout: LayoutId,
    pub(crate) key: ChunkKey,
    pub(crate) bytes: u64,
}

/// How a put ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Stored(ContainerHash),
    Existed(ContainerHash),
    NoRoom,
}

/// Why a put failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    /// The writer's doing; the field to blame.
    #[error("{0}: {1}")]
    Invalid(&'static str, String),
    #[error("cannot be written: {0}")]
    Io(#[from] io::Error),
}

fn damaged(error: FormatError) -> Failed {
    metrics::verify_failed("put");
    Failed::Invalid("data", error.to_string())
}

impl Core {
    /// Takes a container's bytes until `frames` ends. Blocking.
    pub(crate) fn receive(
        &self,
        announced: Announced,
        mut frames: mpsc::Receiver<Bytes>,
    ) -> Result<Outcome, Failed> {
        if let Some(Record { hash, .. }) = self.catalogue.lock().record(&announced.key) {
            return Ok(Outcome::Existed(hash));
        }
        let Some(room) = Room::reserve(self, announced.bytes) else { return Ok(Outcome::NoRoom) };
        let mut temporary = self.disk.create()?;
        let mut verifier = Verifier::new(announced);
        let mut written = 0;
        while let Some(frame) = frames.blocking_recv() {
            verifier.push(&frame)?;
            let full = || self.free(announced.bytes);
            if !write_at(&mut temporary.file, written, &frame, full)? {
                return Ok(Outcome::NoRoom);
            }
            written += frame.len() as u64;
        }
        let head = verifier.finish()?;
        match temporary.file.sync_all() {
            Err(error) if error.kind() == io::ErrorKind::StorageFull => return Ok(Outcome::NoRoom),
            synced => synced?,
        }
        if self.publish(temporary, &head)? {
            room.keep();
            return Ok(Outcome::Stored(head.hash()));
        }
        let first = self.catalogue.lock().record(&announced.key);
        Ok(Outcome::Existed(first.map_or(head.hash(), |record| record.hash)))
    }
}

/// Reserved bytes, given back unless they are kept.
struct Room<'a> {
    core: &'a Core,
    bytes: u64,
}

impl<'a> Room<'a> {
    fn reserve(core: &'a Core, bytes: u64) -> Option<Self> {
        core.make_room(bytes).then(|| Self { core, bytes })
    }

    fn keep(mut self) {
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

/// Checks a container while it comes, holding one segment of it.
struct Verifier {
    announced: Announced,
    head: Option<Head>,
    /// The segment that comes next.
    index: usize,
    /// Bytes that are not checked yet, and where in the container they start.
    buffer: BytesMut,
    at: u64,
}

impl Verifier {
    fn new(announced: Announced) -> Self {
        Self { announced, head: None, index: 0, buffer: BytesMut::new(), at: 0 }
    }

    fn push(&mut self, frame: &[u8]) -> Result<(), Failed> {
        let received = self.at + self.buffer.len() as u64 + frame.len() as u64;
        if received > self.announced.bytes {
            let why = format!("{received} bytes came, {} were announced", self.announced.bytes);
            return Err(Failed::Invalid("data", why));
        }
        self.buffer.extend_from_slice(frame);
        while self.step()? {}
        Ok(())
    }

    /// Checks what can be checked; whether there may be more.
    fn step(&mut self) -> Result<bool, Failed> {
        let Some(head) = &self.head else { return self.step_head() };
        let Some(entry) = head.segments().get(self.index) else { return Ok(false) };
        let padding = (entry.offset - self.at).min(self.buffer.len() as u64) as usize;
        if padding > 0 {
            if let Some(at) = self.buffer[..padding].iter().position(|&byte| byte != 0) {
                return Err(damaged(FormatError::Padding { offset: self.at + at as u64 }));
            }
            self.advance(padding);
            return Ok(true);
        }
        let len = entry.stored_len as usize;
        if self.at < entry.offset || self.buffer.len() < len {
            return Ok(false);
        }
        let kind = entry.kind;
        let raw = head.decode_segment(self.index, &self.buffer[..len]).map_err(damaged)?;
        if kind == SegmentKind::Spans {
            parse_spans(self.index, &raw).map_err(damaged)?;
        }
        self.advance(len);
        self.index += 1;
        Ok(true)
    }

    fn step_head(&mut self) -> Result<bool, Failed> {
        if self.buffer.len() < HEADER_LEN {
            return Ok(false);
        }
        let len = Head::len_from_prefix(&self.buffer).map_err(damaged)?;
        if self.buffer.len() < len {
            return Ok(false);
        }
        let head = Head::parse(&self.buffer).map_err(damaged)?;
        let Announced { layout, key, bytes } = self.announced;
        if head.key() != key {
            return Err(Failed::Invalid("head.key", format!("the container holds {}", head.key())));
        }
        if head.layout() != layout {
            return Err(Failed::Invalid("head.layout", format!("the container holds {}", head.layout())));
        }
        if head.container_len() != bytes {
            let why = format!("the container has {} bytes", head.container_len());
            return Err(Failed::Invalid("head.bytes", why));
        }
        self.head = Some(head);
        self.advance(len);
        Ok(true)
    }

    fn advance(&mut self, bytes: usize) {
        self.buffer.advance(bytes);
        self.at += bytes as u64;
    }

    fn finish(self) -> Result<Head, Failed> {
        let (expected, found) = (self.announced.bytes, self.at + self.buffer.len() as u64);
        match self.head {
            Some(head) if self.index == head.segments().len() => Ok(head),
            // A writer that went away is no damage.
            _ => Err(Failed::Invalid("data", FormatError::Length { expected, found }.to_string())),
        }
    }
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
