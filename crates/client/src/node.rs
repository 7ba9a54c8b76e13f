//! One store as a client knows it: its connections, and whether it answers.

use crate::placement::Seat;
use cacheclip_rpc::v1::cache_client::CacheClient;
use cacheclip_service::{ConnectOptions, connect};
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tonic::transport::Channel;

/// Largest message a store may send: a frame is at most 1 MiB, a head somewhat less.
pub(crate) const MAX_MESSAGE: usize = 4 << 20;
/// How long a store that fails again and again is left alone although it says that it is there: the first time,
/// doubled each time, and at most.
const FIRST_BAR: Duration = Duration::from_secs(1);
const LONGEST_BAR: Duration = Duration::from_secs(30);

/// What is known of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It answers.
    Live,
    /// It answers, serves what it has and takes nothing new.
    Leaving,
    /// It refused a call, or did not finish one in time; it has not answered since.
    Lost,
    /// It does not say that it is there either: whoever waits for it waits in vain.
    Silent,
}

/// A store. Bulk reads and writes have a connection of their own, so that a lookup never waits behind them.
#[derive(Debug)]
pub(crate) struct Node {
    seat: Seat,
    endpoint: String,
    at_home: bool,
    pub(crate) control: CacheClient<Channel>,
    pub(crate) bulk: Channel,
    standing: watch::Sender<Standing>,
    slow: Mutex<Slow>,
    /// Its count of deletions as it was last heard; 0 before.
    generation: AtomicU64,
}

/// A store that answers small questions and finishes no call: a disk that hangs, say.
#[derive(Debug, Default)]
struct Slow {
    /// Calls in a row that it did not finish in time.
    times: u32,
    barred: Option<Instant>,
}

/// A client on a channel of its own to `endpoint`.
pub(crate) fn dial(
    endpoint: &str,
    options: &ConnectOptions,
) -> Result<CacheClient<Channel>, cacheclip_service::Error> {
    Ok(CacheClient::new(connect(endpoint, options)?).max_decoding_message_size(MAX_MESSAGE))
}

impl Node {
    /// A store that has just answered to `name`. `at_home`: at the endpoint that it names itself.
    pub(crate) fn new(
        name: &str,
        endpoint: &str,
        at_home: bool,
        control: CacheClient<Channel>,
        bulk: Channel,
    ) -> Self {
        let standing = watch::Sender::new(Standing::Lost);
        let seat = Seat::new(name);
        let (endpoint, slow) = (endpoint.to_owned(), Mutex::default());
        Self { seat, endpoint, at_home, control, bulk, standing, slow, generation: AtomicU64::new(0) }
    }

    pub(crate) fn seat(&self) -> &Seat {
        &self.seat
    }

    pub(crate) fn name(&self) -> &str {
        self.seat.name()
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(crate) fn at_home(&self) -> bool {
        self.at_home
    }

    /// Its count of deletions as it was last heard; 0 where it was not.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// It said its count of deletions. Words that overtake one another may lower it: that refuses more, never less.
    pub(crate) fn counts(&self, generation: u64) {
        if generation > 0 {
            self.generation.store(generation, Ordering::Relaxed);
        }
    }

    pub(crate) fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    pub(crate) fn is_live(&self) -> bool {
        matches!(self.standing(), Standing::Live | Standing::Leaving)
    }

    /// It said that it is there; whether that changed anything.
    pub(crate) fn answered(&self, draining: bool, now: Instant) -> bool {
        if self.slow.lock().barred.is_some_and(|until| now < until) {
            return false;
        }
        self.set(if draining { Standing::Leaving } else { Standing::Live })
    }

    /// It refused a call; whether it was live until now.
    pub(crate) fn refused(&self) -> bool {
        self.is_live() && self.set(Standing::Lost)
    }

    /// It did not finish a call in time; whether it was live until now. Calls that were under way together count
    /// once.
    pub(crate) fn overdue(&self, now: Instant) -> bool {
        let lost = self.refused();
        if lost {
            let mut slow = self.slow.lock();
            slow.times += 1;
            if let Some(doublings) = slow.times.checked_sub(2) {
                let pause = FIRST_BAR.saturating_mul(1 << doublings.min(8)).min(LONGEST_BAR);
                slow.barred = Some(now + pause);
            }
        }
        lost
    }

    /// It does not say that it is there; whether it was live until now.
    pub(crate) fn unanswered(&self) -> bool {
        let was_live = self.is_live();
        self.set(Standing::Silent);
        was_live
    }

    /// It finished a bulk call.
    pub(crate) fn sound(&self) {
        let mut slow = self.slow.lock();
        if slow.times > 0 {
            *slow = Slow::default();
        }
    }

    /// Completes when there is no point in waiting for this store any longer.
    pub(crate) async fn silent(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.standing.subscribe().wait_for(|standing| *standing == Standing::Silent).await;
    }

    fn set(&self, to: Standing) -> bool {
        self.standing.send_if_modified(|standing| std::mem::replace(standing, to) != to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    fn node() -> Node {
        let (endpoint, options) = ("http://127.0.0.1:9", ConnectOptions::default());
        let control = dial(endpoint, &options).expect("a sound endpoint");
        let bulk = connect(endpoint, &options).expect("a sound endpoint");
        Node::new("store", endpoint, true, control, bulk)
    }

    #[tokio::test]
    async fn a_store_that_finishes_nothing_is_left_alone_for_longer_each_time() {
        let node = node();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..8 {
            let began = now;
            while !node.answered(false, now) {
                now += Duration::from_millis(100);
            }
            waits.push((now - began).as_secs());
            // Three calls that were under way together.
            assert_eq!([node.overdue(now), node.overdue(now), node.overdue(now)], [true, false, false]);
        }
        assert_eq!(waits, [0, 0, 1, 2, 4, 8, 16, 30]);
        now += LONGEST_BAR;
        assert!(node.answered(false, now));
        node.sound();
        assert!(node.overdue(now) && node.answered(false, now), "one that has finished a call starts anew");
    }

    #[tokio::test]
    async fn only_a_store_that_does_not_say_it_is_there_is_not_waited_for() {
        let node = node();
        let waits = |node: &Node| node.silent().now_or_never().is_none();
        node.answered(false, Instant::now());
        assert!(node.refused() && waits(&node));
        assert!(!node.unanswered() && !waits(&node), "it was lost before it fell silent");
        assert!(node.answered(true, Instant::now()) && waits(&node));
        assert!(node.standing() == Standing::Leaving && node.is_live());
    }
}
