//! Announcements of what a process holds in RAM and has to do, for those who choose where to send requests.
//!
//! Hints with a lease: an announcement that is late or wrong makes a request slower and never wrong, so nothing
//! here is retried, acknowledged or kept.

use crate::Running;
use cacheclip_rpc::v1::Residency;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Pause between two announcements.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// How long one is worth something: several heartbeats, because a busy machine may swallow a few.
const LEASE: Duration = Duration::from_secs(4);
/// Announcements that wait for a slow reader; more would be out of date when it reads them.
const AHEAD: usize = 2;
/// Most keys of one announcement (half a megabyte); what is beyond counts as not held.
const MOST_HELD: usize = 65_536;

/// What is held and has to be done at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// [`short`] of every key in RAM, in any order.
    pub held: Vec<u64>,
    /// Requests that wait.
    pub waiting: u32,
    /// Requests that run.
    pub running: u32,
}

/// The part of a key that announcements carry: a collision costs a badly chosen peer, nothing else.
pub fn short(key: &[u8; 32]) -> u64 {
    let (first, _) = key.split_at(8);
    first.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
}

/// Makes streams of announcements. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Announcer {
    name: String,
    draining: CancellationToken,
}

impl Announcer {
    /// `name` is how the speaker calls itself.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), draining: CancellationToken::new() }
    }

    /// Lets streams end when the server drains; without it they would hold the drain up.
    pub fn follow(&self, running: &Running) {
        let (shutdown, draining) = (running.shutdown(), self.draining.clone());
        tokio::spawn(async move {
            shutdown.cancelled().await;
            draining.cancel();
        });
    }

    /// A stream that begins with what `load` says now and goes on until the reader leaves or the server drains;
    /// its last message then says so.
    pub fn stream(
        &self,
        load: impl Fn() -> Load + Send + 'static,
    ) -> ReceiverStream<Result<Residency, Status>> {
        let (outbox, stream) = mpsc::channel(AHEAD);
        let Self { name, draining } = self.clone();
        tokio::spawn(async move {
            let mut known: Option<Vec<u64>> = None;
            loop {
                let Load { mut held, waiting, running } = load();
                held.sort_unstable();
                held.truncate(MOST_HELD);
                let changed = known.as_ref() != Some(&held);
                let message = Residency {
                    name: name.clone(),
                    lease_seconds: LEASE.as_secs_f64(),
                    changed,
                    held: if changed { held.clone() } else { Vec::new() },
                    waiting,
                    running,
                    draining: draining.is_cancelled(),
                };
                let last = message.draining;
                known = Some(held);
                if outbox.send(Ok(message)).await.is_err() || last {
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(HEARTBEAT) => {}
                    () = outbox.closed() => return,
                    () = draining.cancelled() => {}
                }
            }
        });
        ReceiverStream::new(stream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio_stream::StreamExt as _;

    #[tokio::test]
    async fn keys_are_sent_when_they_change_and_a_drain_is_the_last_word() {
        let held = Arc::new(Mutex::new(vec![3, 1]));
        let announcer = Announcer::new("worker");
        let source = Arc::clone(&held);
        let mut stream =
            announcer.stream(move || Load { held: source.lock().expect("held").clone(), ..Load::default() });
        let mut next = async || stream.next().await.map(|message| message.expect("a message"));
        let first = next().await.expect("at once");
        assert!(first.changed && first.held == [1, 3] && first.lease_seconds > 0.0, "{first:?}");
        // One may have been made before the change.
        held.lock().expect("held").push(2);
        let change = loop {
            let message = next().await.expect("a heartbeat");
            if message.changed {
                break message;
            }
        };
        assert_eq!(change.held, [1, 2, 3]);
        announcer.draining.cancel();
        let last = loop {
            let message = next().await.expect("a last word");
            if message.draining {
                break message;
            }
        };
        assert!(last.held.is_empty());
        assert!(next().await.is_none());
    }

    #[test]
    fn a_short_key_is_its_first_eight_bytes() {
        let mut key = [0xff; 32];
        key[..8].copy_from_slice(&0x0102_0304_0506_0708_u64.to_le_bytes());
        assert_eq!(short(&key), 0x0102_0304_0506_0708);
    }
}
