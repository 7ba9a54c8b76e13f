//! What the machine does without a store: a raw socket, a file that is written, a file that is read.

use anyhow::Context as _;
use bytes::Bytes;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::thread;
use std::time::Instant;

/// Bytes of one read or write.
const BLOCK: usize = 1 << 20;
/// What direct reads must be aligned to, in memory as on the disk.
const ALIGNED: usize = 4096;

/// A connection over loopback to a thread that sends bytes when it is asked. Ends with its connection.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: TcpStream,
    bytes: usize,
    buffer: Vec<u8>,
}

impl Socket {
    /// To a thread that sends `bytes` whenever it is asked.
    pub(crate) fn start(bytes: Bytes) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (mut accepted, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        accepted.set_nodelay(true)?;
        let length = bytes.len();
        thread::spawn(move || {
            let mut asked = [0];
            while accepted.read_exact(&mut asked).is_ok() && accepted.write_all(&bytes).is_ok() {}
        });
        Ok(Self { stream, bytes: length, buffer: vec![0; BLOCK] })
    }

    /// Seconds until all bytes have come. Blocking.
    pub(crate) fn read(&mut self) -> io::Result<f64> {
        let began = Instant::now();
        self.stream.write_all(&[1])?;
        let mut left = self.bytes;
        while left > 0 {
            match self.stream.read(&mut self.buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => left = left.saturating_sub(read),
            }
        }
        Ok(began.elapsed().as_secs_f64())
    }
}

/// Seconds to write bytes to a new file, in order, and to have them on the disk. The file is left. Blocking.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<f64> {
    let began = Instant::now();
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    bytes.chunks(BLOCK).try_for_each(|block| file.write_all(block))?;
    file.sync_all()?;
    Ok(began.elapsed().as_secs_f64())
}

/// Has the system forget what it keeps in memory of a file that is on the disk.
pub(crate) fn forget(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)
}

/// Seconds to read a file in order past the system's memory, or, where the file system knows no such reads, after the
/// system forgot it; and whether it was the former. Blocking.
pub(crate) fn read_direct(path: &Path) -> anyhow::Result<(f64, bool)> {
    forget(path)?;
    let length = std::fs::metadata(path)?.len() as usize;
    let mut room = vec![0; BLOCK + ALIGNED];
    let start = room.as_ptr().align_offset(ALIGNED);
    let block = &mut room[start..start + BLOCK];
    let began = Instant::now();
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let (mut file, direct) = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => (file, true),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => (File::open(path)?, false),
        Err(error) => return Err(error.into()),
    };
    let mut read = 0;
    while read < length {
        match file.read(block)? {
            0 => anyhow::bail!("{} is shorter than it was", path.display()),
            some => read += some,
        }
    }
    Ok((began.elapsed().as_secs_f64(), direct))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_a_socket_and_a_file_as_often_as_they_are_asked_for() {
        let bytes = Bytes::from(vec![7; 3 * BLOCK + 5]);
        let mut socket = Socket::start(bytes.clone()).expect("a port");
        for _ in 0..3 {
            assert!(socket.read().expect("the bytes") > 0.0);
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        assert!(write_synced(&path, &bytes).expect("room") > 0.0);
        assert!(write_synced(&path, &bytes).is_err(), "a file that is there is not written");
        assert!(read_direct(&path).expect("a file").0 > 0.0);
    }
}
