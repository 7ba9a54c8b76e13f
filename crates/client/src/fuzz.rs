//! For fuzzing: what a store sends meets these decoders first, and they cannot be reached from outside.

use crate::chunk::Arrival;
use crate::layers::decode;
use cacheclip_chunk::{ChunkKey, LayoutId};
use cacheclip_rpc::v1::{KvFrame, kv_frame};

/// Takes frames as the read of one chunk with two layers does.
pub fn frames(layout: LayoutId, key: ChunkKey, frames: &[KvFrame]) {
    let mut arrival = Arrival::new(key, 0..2);
    for frame in frames {
        match &frame.frame {
            Some(kv_frame::Frame::Head(bytes)) => drop(arrival.head(layout, bytes)),
            Some(kv_frame::Frame::Segment(segment)) => {
                if let Ok(Some(whole)) = arrival.segment(segment.clone()) {
                    drop(decode(0, whole));
                }
            }
            _ => {}
        }
        if arrival.over {
            return;
        }
    }
}
