//! Taking a container from a client.

use super::Service;
use crate::upload::{Announced, Failed, Outcome, Writer};
use cacheclip_chunk::container::head::HEADER_LEN;
use cacheclip_rpc::convert::id;
use cacheclip_rpc::status::{invalid, unavailable};
use cacheclip_rpc::v1::{PutFrame, put_frame};
use futures::{Stream, StreamExt as _};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Frames that wait to be written to disk.
const PUT_FRAMES_AHEAD: usize = 4;

/// A client's frames as they come.
pub(crate) trait Incoming: Stream<Item = Result<PutFrame, Status>> + Unpin + Send {}

impl<S: Stream<Item = Result<PutFrame, Status>> + Unpin + Send> Incoming for S {}

impl Service {
    pub(super) async fn receive(&self, mut frames: impl Incoming) -> Result<Outcome, Status> {
        let first = self.next(&mut frames).await?.and_then(|frame| frame.frame);
        let Some(put_frame::Frame::Head(head)) = first else {
            return Err(invalid("head", "the first frame must announce layout, key and bytes"));
        };
        let begun = self.core.began(head.generation);
        let claim = match &head.hold {
            Some(hold) => Some(self.claim("head.hold", hold)?),
            None => None,
        };
        let writer = Writer { claim, begun };
        let announced = Announced {
            layout: id("head.layout", &head.layout)?,
            key: id("head.key", &head.key)?,
            bytes: head.bytes,
        };
        if !(HEADER_LEN as u64..=self.max_object_bytes).contains(&head.bytes) {
            let why = format!("is {}, must be {HEADER_LEN} to {}", head.bytes, self.max_object_bytes);
            return Err(invalid("head.bytes", why));
        }
        let _turn = self.puts.acquire().await.map_err(unavailable)?;
        let (queue, received) = mpsc::channel(PUT_FRAMES_AHEAD);
        let core = Arc::clone(&self.core);
        let mut queue = Some(queue);
        // Dropped before the queue: what is given up half-way must not look complete, though all bytes had come.
        let given_up = CancellationToken::new();
        let giving_up = given_up.clone().drop_guard();
        let receive = move || core.receive(announced, writer, received, &given_up);
        let mut writing = tokio::task::spawn_blocking(receive);
        let mut bytes = 0u64;
        // Also reads on when the outcome is known, so that the writer hears it instead of a broken stream.
        while let Some(frame) = self.next(&mut frames).await? {
            let Some(put_frame::Frame::Data(data)) = frame.frame else {
                return Err(invalid("frame", "only data may follow the head"));
            };
            bytes = bytes.saturating_add(data.len() as u64);
            if bytes > announced.bytes {
                return Err(invalid("data", format!("more than the {} bytes announced", announced.bytes)));
            }
            if let Some(waiting) = &queue
                && waiting.send(data).await.is_err()
            {
                queue = None;
            }
        }
        giving_up.disarm();
        drop(queue);
        match (&mut writing).await.map_err(unavailable)? {
            Ok(outcome) => Ok(outcome),
            Err(Failed::Invalid(field, why)) => Err(invalid(field, why)),
            Err(failed) => {
                tracing::error!(key = %announced.key, error = %failed, "put failed");
                Err(unavailable(failed))
            }
        }
    }

    async fn next(&self, frames: &mut impl Incoming) -> Result<Option<PutFrame>, Status> {
        match tokio::time::timeout(self.stall, frames.next()).await {
            Ok(frame) => frame.transpose(),
            Err(_) => Err(Status::deadline_exceeded("no frame came for too long; put again")),
        }
    }
}
