//! A streamed answer whose frames can be taken back.
//!
//! Frames that wait for a client belong to the transport, which lets go of them when the client asks for more or goes
//! away. One that does neither would keep them for as long as its connection lives.

use cacheclip_rpc::v1::KvFrame;
use futures::Stream;
use parking_lot::Mutex;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use tokio::sync::mpsc;
use tonic::Status;

type Frame = Result<KvFrame, Status>;
type Waiting = Mutex<mpsc::Receiver<Frame>>;

/// Where frames are sent.
pub(crate) type Frames = mpsc::Sender<Frame>;

/// The frames of an answer, as the transport takes them.
#[derive(Debug)]
pub struct Answer(Arc<Waiting>);

impl Answer {
    /// An answer in which so many frames wait at most.
    pub(crate) fn new(ahead: usize) -> (Frames, Self, GivenUp) {
        let (frames, waiting) = mpsc::channel(ahead);
        let answer = Self(Arc::new(Mutex::new(waiting)));
        let given_up = GivenUp { frames: frames.clone(), waiting: Arc::downgrade(&answer.0) };
        (frames, answer, given_up)
    }
}

impl Stream for Answer {
    type Item = Frame;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Frame>> {
        self.0.lock().poll_recv(context)
    }
}

/// Ends an answer that nobody takes.
#[derive(Debug)]
pub(crate) struct GivenUp {
    frames: Frames,
    /// The answer itself is the transport's: that it is dropped says that the client is gone.
    waiting: Weak<Waiting>,
}

impl GivenUp {
    /// Waits until the client is gone.
    pub(crate) async fn gone(&self) {
        self.frames.closed().await;
    }

    /// Drops the frames that wait; a client that comes back finds an error instead of an end.
    pub(crate) fn take_back(self) {
        let Some(waiting) = self.waiting.upgrade() else { return };
        let mut waiting = waiting.lock();
        while waiting.try_recv().is_ok() {}
        let late = Status::deadline_exceeded("no frame was taken for too long; get again");
        // There is room now, unless another sender was faster, and then there is no end to report yet.
        let _ = self.frames.try_send(Err(late));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt as _;
    use tonic::Code;

    #[tokio::test]
    async fn frames_that_are_taken_back_are_dropped_though_their_client_stays() {
        let (frames, mut answer, given_up) = Answer::new(4);
        let data = bytes::Bytes::from(vec![7; 1000]);
        let frame = cacheclip_rpc::v1::kv_frame::Frame::Data(data.clone());
        for _ in 0..4 {
            let frame = KvFrame { frame: Some(frame.clone()), ..KvFrame::default() };
            frames.send(Ok(frame)).await.unwrap();
        }
        drop(frame);
        assert!(!data.is_unique());
        drop(frames);
        given_up.take_back();
        assert!(data.is_unique(), "nobody holds what waited");
        assert_eq!(answer.next().await.unwrap().unwrap_err().code(), Code::DeadlineExceeded);
        assert!(answer.next().await.is_none());
    }

    #[tokio::test]
    async fn an_answer_that_is_dropped_is_noticed() {
        let (frames, answer, given_up) = Answer::new(1);
        drop(answer);
        given_up.gone().await;
        assert!(frames.is_closed());
        given_up.take_back();
    }
}
