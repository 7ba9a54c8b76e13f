//! Events that are used again, and what must live until one has happened.

use crate::cuda::error::DeviceError;
use crate::cuda::machine::{Event, Machine, Stream};
use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Most that may be held for a stream before the host waits for it.
const MOST_HELD: usize = 1024;

/// A machine's events, with a list of those that nobody has.
#[derive(Debug)]
pub(super) struct Events {
    machine: Arc<dyn Machine>,
    free: Mutex<Vec<Event>>,
}

/// An event that goes back to the list when it is dropped: who waits for it has been told so already.
#[derive(Debug)]
pub(super) struct Ticket {
    events: Arc<Events>,
    event: Event,
}

impl Events {
    pub(super) fn new(machine: Arc<dyn Machine>) -> Arc<Self> {
        Arc::new(Self { machine, free: Mutex::default() })
    }

    /// An event, recorded now.
    pub(super) fn record(self: &Arc<Self>, stream: Stream) -> Result<Ticket, DeviceError> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let event = free.map_or_else(|| self.machine.event(), Ok)?;
        let ticket = Ticket { events: Arc::clone(self), event };
        ticket.again(stream)?;
        Ok(ticket)
    }
}

impl Ticket {
    /// Records the event anew.
    pub(super) fn again(&self, stream: Stream) -> Result<(), DeviceError> {
        self.events.machine.record(self.event, stream)
    }

    /// Has a stream wait for it.
    pub(super) fn hold(&self, stream: Stream) -> Result<(), DeviceError> {
        self.events.machine.wait(stream, self.event)
    }

    fn happened(&self) -> Result<bool, DeviceError> {
        self.events.machine.happened(self.event)
    }

    /// Milliseconds from `earlier` to this; both have happened.
    pub(super) fn since(&self, earlier: &Self) -> Result<f32, DeviceError> {
        self.events.machine.elapsed(earlier.event, self.event)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.events.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.event);
    }
}

/// What queued work reads on the host, until it has been read.
#[derive(Default)]
pub(super) struct InUse(VecDeque<(Ticket, Box<dyn Any + Send>)>);

impl fmt::Debug for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in use", self.0.len())
    }
}

impl InUse {
    /// Keeps `what` until `stream` has come as far as it is now, and lets go of what it has come past.
    pub(super) fn keep(
        &mut self,
        events: &Arc<Events>,
        stream: Stream,
        what: Box<dyn Any + Send>,
    ) -> Result<(), DeviceError> {
        let recorded = events.record(stream);
        if recorded.is_err() || self.0.len() >= MOST_HELD {
            // Behind this nothing is in use any more, or the device is lost.
            events.machine.finish(stream)?;
            self.0.clear();
        }
        self.0.push_back((recorded?, what));
        while let Some((ticket, _)) = self.0.front() {
            if !ticket.happened()? {
                break;
            }
            self.0.pop_front();
        }
        Ok(())
    }
}

/// A piece of work by the device's clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noted {
    /// What was done: `place` (copies included), `scatter` or `attend`.
    pub what: &'static str,
    /// In which layer.
    pub layer: usize,
    /// Milliseconds since noting began.
    pub start: f32,
    /// As `start`.
    pub end: f32,
}

/// Work that is noted.
#[derive(Debug)]
pub(super) struct Notes {
    begin: Ticket,
    noted: Vec<(&'static str, usize, Ticket, Ticket)>,
}

impl Notes {
    pub(super) fn new(begin: Ticket) -> Self {
        Self { begin, noted: Vec::new() }
    }

    pub(super) fn add(&mut self, what: &'static str, layer: usize, start: Ticket, end: Ticket) {
        self.noted.push((what, layer, start, end));
    }

    /// Both streams must be empty.
    pub(super) fn read(&self) -> Result<Vec<Noted>, DeviceError> {
        let read = |(what, layer, start, end): &(&'static str, usize, Ticket, Ticket)| {
            let (start, end) = (start.since(&self.begin)?, end.since(&self.begin)?);
            Ok(Noted { what, layer: *layer, start, end })
        };
        self.noted.iter().map(read).collect()
    }
}
