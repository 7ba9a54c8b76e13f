//! What stands for the exporter of traces in a build without it: no spans, and a word about that to whoever asked.
//!
//! The build with it is in `otlp.rs`; both have the same functions.

use crate::Error;
use crate::telemetry::Layer;
use crate::trace::TraceContext;
use tonic::Code;
use tracing::Span;

/// An endpoint that nothing will be sent to.
pub(crate) struct Exporter {
    endpoint: String,
}

impl Exporter {
    /// Takes any endpoint. A refusal would keep a fleet from starting for the sake of a variable that a cluster may set
    /// for everybody.
    pub(crate) fn start(_service: &str, endpoint: &str) -> Result<Self, Error> {
        Ok(Self { endpoint: endpoint.to_owned() })
    }

    pub(crate) fn layer(&self) -> Option<Layer> {
        None
    }

    pub(crate) fn installed(self) {
        // An error and not a warning, so that the usual filters of the command line let it through.
        tracing::error!(
            endpoint = self.endpoint,
            "spans are NOT exported: this build has no exporter; build with --features otlp, or leave the endpoint out"
        );
    }
}

pub(crate) fn continued(_span: &Span, _parent: Option<TraceContext>) -> Option<TraceContext> {
    None
}

pub(crate) fn current() -> Option<TraceContext> {
    None
}

pub(crate) fn ended(_span: &Span, _code: Code) {}

pub(crate) async fn flush() {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("lines").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_build_without_the_exporter_says_so_to_whoever_names_a_collector() {
        let lines = Lines::default();
        let writer = lines.clone();
        let filtered = tracing_subscriber::fmt().with_max_level(tracing::Level::ERROR);
        let subscriber = filtered.with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            Exporter::start("s", "http://collector:4317").expect("it serves").installed();
        });
        let text = String::from_utf8(lines.0.lock().expect("lines").clone()).expect("text");
        assert!(text.contains("NOT exported") && text.contains("http://collector:4317"), "{text}");
    }
}
