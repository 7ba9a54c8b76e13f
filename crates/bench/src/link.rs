//! A link of bounded bandwidth in front of a server on loopback: what a slow network is to its clients.
//!
//! ```text
//! client ── requests, as they come ──────────────► server
//! client ◄── delay ◄── token bucket, one for all connections ── server
//! ```
//!
//! Connections take turns piece by piece, so that a short answer does not wait behind all of a bulk transfer on
//! another connection.

use parking_lot::Mutex;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

/// Most bytes that a connection sends in its turn.
const PIECE: usize = 64 << 10;
/// What an idle line saves up: timers are as coarse as a millisecond, and what they oversleep must not be lost.
const BURST: Duration = Duration::from_millis(10);
/// Pieces of a connection that may be on their way to its client: 4 MiB, more than any sensible rate times delay.
const ON_THE_WAY: usize = 64;

/// What a link does to the bytes that a server sends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// All connections together; infinity: nothing is held back.
    pub bytes_per_second: f64,
    /// Added to every byte, one way.
    pub delay: Duration,
}

impl Shape {
    /// A line that holds nothing back.
    pub const OPEN: Self = Self { bytes_per_second: f64::INFINITY, delay: Duration::ZERO };

    /// So many millions of bytes per second, without delay.
    pub fn megabytes(per_second: f64) -> Self {
        Self { bytes_per_second: per_second * 1e6, delay: Duration::ZERO }
    }
}

/// A listening link; dropping it closes its connections.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    line: Arc<Line>,
    task: JoinHandle<()>,
}

impl Link {
    /// Listens on a free port of loopback and dials `server` for each connection. The server need not listen yet.
    ///
    /// # Errors
    /// No port is free.
    pub async fn start(server: SocketAddr, shape: Shape) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let line = Arc::new(Line::new(shape));
        let task = tokio::spawn(accept(listener, server, Arc::clone(&line)));
        Ok(Self { address, line, task })
    }

    /// Where clients dial instead of the server.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The shape from now on, for open connections, too.
    pub fn set(&self, shape: Shape) {
        self.line.0.lock().shape = shape;
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends, and closes everything, when it is aborted.
async fn accept(listener: TcpListener, server: SocketAddr, line: Arc<Line>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => { connections.spawn(connect(client, server, Arc::clone(&line))); }
                // Out of descriptors: the next attempt succeeds when a connection has ended.
                Err(_) => tokio::time::sleep(BURST).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection, until both ends have closed or one has failed.
async fn connect(client: TcpStream, server: SocketAddr, line: Arc<Line>) -> io::Result<()> {
    let server = TcpStream::connect(server).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (mut from_client, to_client) = client.into_split();
    let (from_server, mut to_server) = server.into_split();
    let requests = async {
        tokio::io::copy(&mut from_client, &mut to_server).await?;
        to_server.shutdown().await
    };
    tokio::try_join!(requests, answers(from_server, to_client, &line))?;
    Ok(())
}

async fn answers(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, line: &Line) -> io::Result<()> {
    let (pieces, mut arriving) = mpsc::channel(ON_THE_WAY);
    let send = async move {
        loop {
            let mut piece = vec![0; PIECE];
            let length = from.read(&mut piece).await?;
            piece.truncate(length);
            let arrives = line.send(length).await;
            if length == 0 || pieces.send((arrives, piece)).await.is_err() {
                return io::Result::Ok(());
            }
        }
    };
    let receive = async {
        while let Some((arrives, piece)) = arriving.recv().await {
            sleep_until(arrives).await;
            to.write_all(&piece).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(send, receive)?;
    Ok(())
}

/// The line that all connections share.
#[derive(Debug)]
struct Line(Mutex<State>);

#[derive(Debug)]
struct State {
    shape: Shape,
    /// When everything that was taken has left.
    free: Instant,
}

impl Line {
    fn new(shape: Shape) -> Self {
        Self(Mutex::new(State { shape, free: Instant::now() }))
    }

    /// Returns when `bytes` have left, with the time when they arrive.
    async fn send(&self, bytes: usize) -> Instant {
        let (leave, delay) = {
            let mut state = self.0.lock();
            (state.take(Instant::now(), bytes), state.shape.delay)
        };
        sleep_until(leave).await;
        leave + delay
    }
}

impl State {
    /// When `bytes` that are there at `now` have left.
    fn take(&mut self, now: Instant, bytes: usize) -> Instant {
        let saved = now.checked_sub(BURST).unwrap_or(now);
        let time = Duration::from_secs_f64(bytes as f64 / self.shape.bytes_per_second);
        self.free = self.free.max(saved) + time;
        self.free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The clock is the line's own: nothing waits.
    #[test]
    fn a_second_of_sending_carries_the_rate_however_late_the_sender_wakes() {
        for (rate, overslept) in [(25e6, 0), (50e6, 1), (200e6, 2)] {
            let start = Instant::now();
            let mut line = State { shape: Shape { bytes_per_second: rate, ..Shape::OPEN }, free: start };
            let (mut now, mut sent) = (start, 0);
            while now < start + Duration::from_secs(1) {
                let left = line.take(now, PIECE);
                if left > now {
                    now = left + Duration::from_millis(overslept);
                }
                sent += PIECE;
            }
            let share = sent as f64 / rate;
            assert!((0.99..1.02).contains(&share), "{share} of {rate} bytes");
        }
    }

    #[test]
    fn an_idle_line_saves_up_no_more_than_its_burst() {
        let start = Instant::now();
        let mut line = State { shape: Shape::megabytes(1.0), free: start };
        let later = start + Duration::from_secs(60);
        let left = line.take(later, 1_000_000);
        assert_eq!(left, later + Duration::from_secs(1) - BURST);
        // The next to come waits for what is ahead of it.
        assert_eq!(line.take(later, 500_000), left + Duration::from_millis(500));
    }

    #[tokio::test]
    async fn bytes_pass_unchanged_both_ways_and_each_end_hears_the_other_close() {
        let data = |seed: u64, length: u64| -> Vec<u8> {
            (0..length).map(|i| (i.wrapping_mul(seed) >> 7) as u8).collect()
        };
        let (question, answer) = (data(0x9E37_79B9, 300_000), data(0x85EB_CA6B, 3_000_000));
        let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let shape = Shape { bytes_per_second: 300e6, delay: Duration::from_millis(1) };
        let link = Link::start(server.local_addr().expect("bound"), shape).await.expect("a link");
        let serve = async {
            let (mut stream, _) = server.accept().await.expect("a connection");
            let mut asked = Vec::new();
            stream.read_to_end(&mut asked).await.expect("the question");
            stream.write_all(&answer).await.expect("room");
            asked
        };
        let ask = async {
            let mut stream = TcpStream::connect(link.address).await.expect("it listens");
            stream.write_all(&question).await.expect("room");
            stream.shutdown().await.expect("open until now");
            let mut answered = Vec::new();
            stream.read_to_end(&mut answered).await.expect("the answer");
            answered
        };
        let both = async { tokio::join!(serve, ask) };
        let (asked, answered) =
            tokio::time::timeout(Duration::from_secs(30), both).await.expect("both ends closed");
        assert!(asked == question && answered == answer);
    }

    #[tokio::test]
    async fn a_dropped_link_takes_its_connections_with_it() {
        let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let link = Link::start(server.local_addr().expect("bound"), Shape::OPEN).await.expect("a link");
        let mut stream = TcpStream::connect(link.address).await.expect("it listens");
        let (_accepted, _) = server.accept().await.expect("dialled");
        drop(link);
        let end = tokio::time::timeout(Duration::from_secs(30), stream.read(&mut [0; 1])).await;
        assert!(matches!(end.expect("in time"), Ok(0) | Err(_)));
    }
}
