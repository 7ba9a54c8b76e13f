//! Export of spans by OTLP over gRPC, for builds with the feature `otlp` that are told of a collector.
//!
//! `tracing` spans become spans of OpenTelemetry's SDK, wait in its bounded queue and are sent in batches by a thread of
//! its own, so that nothing that serves a request ever waits for a collector. Sending has a deadline that the SDK does
//! not give it, and what is lost is counted and said once.
//!
//! The standard's variables that the SDK reads by itself hold: `OTEL_TRACES_SAMPLER`, `OTEL_BSP_*` for queue and batches,
//! `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`, `OTEL_EXPORTER_OTLP_HEADERS`.

use crate::telemetry::Layer;
use crate::trace::TraceContext;
use crate::{ConnectOptions, Error, connect, front, metrics};
use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState,
    TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::Handle;
use tonic::Code;
use tracing::{Level, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, filter_fn};

/// How long a batch may take, connecting and every repetition included; then its spans are lost. The queue has room
/// for what comes meanwhile.
const SEND: Duration = Duration::from_secs(5);
/// How long the end of a process may be put off by the spans that still wait.
const FLUSH: Duration = Duration::from_secs(2);
/// What the names of our modules begin with: spans and events of libraries are not exported.
const OURS: &str = "cacheclip";
/// How the SDK calls a process that nobody named.
const NAMELESS: &str = "unknown_service";

/// The exporter that was installed, for the last flush.
static INSTALLED: OnceLock<SdkTracerProvider> = OnceLock::new();

/// An exporter that has a collector's endpoint. It connects with its first batch and again after a loss.
pub(crate) struct Exporter {
    provider: SdkTracerProvider,
    endpoint: String,
}

impl Exporter {
    pub(crate) fn start(service: &str, endpoint: &str) -> Result<Self, Error> {
        let wrong = |why: String| Error::Telemetry(format!("OTLP endpoint {endpoint:?}: {why}"));
        let runtime = Handle::try_current().map_err(|error| wrong(error.to_string()))?;
        // Collectors hang up on whoever pings an idle connection. While a batch is under way pings tell a dead one.
        let pings =
            ConnectOptions { keepalive_seconds: 2.0, keepalive_timeout_seconds: 2.0, ..Default::default() };
        let dialled = connect::endpoint(endpoint, &pings).map_err(|error| wrong(error.to_string()))?;
        let channel = dialled.keep_alive_while_idle(false).connect_lazy();
        let sender = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_channel(channel)
            .with_timeout(SEND)
            .build()
            .map_err(|error| wrong(error.to_string()))?;
        let provider = SdkTracerProvider::builder()
            .with_resource(resource(service))
            .with_batch_exporter(Bounded::new(sender, runtime, SEND))
            .build();
        Ok(Self { provider, endpoint: endpoint.to_owned() })
    }

    pub(crate) fn layer(&self) -> Option<Layer> {
        Some(layer(&self.provider))
    }

    /// Keeps the exporter until [`flush`].
    pub(crate) fn installed(self) {
        tracing::info!(endpoint = self.endpoint, "spans are exported");
        // A second one was refused with its logger.
        let _ = INSTALLED.set(self.provider);
    }
}

/// Who is speaking.
fn resource(service: &str) -> Resource {
    let told = Resource::builder().build();
    let name = told.get(&"service.name".into()).map(|name| name.as_str().into_owned());
    let named = name.filter(|name| !name.starts_with(NAMELESS)).unwrap_or_else(|| service.to_owned());
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    Resource::builder().with_service_name(named).with_attribute(version).build()
}

/// What turns spans of `tracing` into the provider's.
fn layer(provider: &SdkTracerProvider) -> Layer {
    let ours = filter_fn(|about| *about.level() <= Level::INFO && about.target().starts_with(OURS));
    tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(OURS))
        // Which source line and thread it was tells nothing about a request.
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_level(false)
        .with_tracked_inactivity(false)
        // `tracing` knows the current span; nobody asks OpenTelemetry for it.
        .with_context_activation(false)
        .with_filter(ours.with_max_level_hint(LevelFilter::INFO))
        .boxed()
}

/// Puts `span` below `parent`, or at the root of a new trace. The place it then has; `None` where nobody exports it.
pub(crate) fn continued(span: &Span, parent: Option<TraceContext>) -> Option<TraceContext> {
    let above = match parent {
        Some(parent) => Context::new().with_remote_span_context(remote(parent)),
        None => Context::new(),
    };
    // Fails where no exporter looks at the span.
    span.set_parent(above).ok()?;
    place(&span.context())
}

/// The place of the innermost exported span that is entered.
pub(crate) fn current() -> Option<TraceContext> {
    place(&Span::current().context())
}

/// Notes how a request ended.
pub(crate) fn ended(span: &Span, code: Code) {
    let name = metrics::code_name(code);
    span.set_attribute("rpc.response.status_code", name);
    if is_fault(code) {
        span.set_status(Status::error(name));
    }
}

/// Codes that are a server's fault and not its caller's, as the standard's conventions for gRPC servers have it.
fn is_fault(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

fn remote(at: TraceContext) -> SpanContext {
    let TraceContext { trace, span, flags } = at;
    let flags = TraceFlags::new(flags);
    SpanContext::new(TraceId::from(trace), SpanId::from(span), flags, true, TraceState::default())
}

fn place(context: &Context) -> Option<TraceContext> {
    let span = context.span();
    let at = span.span_context();
    at.is_valid().then(|| TraceContext {
        trace: u128::from_be_bytes(at.trace_id().to_bytes()),
        span: u64::from_be_bytes(at.span_id().to_bytes()),
        flags: at.trace_flags().to_u8(),
    })
}

/// Sends what still waits, and ends the exporter.
pub(crate) async fn flush() {
    let Some(provider) = INSTALLED.get().cloned() else { return };
    // It waits with its thread.
    let ending = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(FLUSH));
    match ending.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the last spans were not sent in time and are lost"),
        Err(error) => tracing::warn!(%error, "the exporter of spans did not end well"),
    }
}

/// Sends batches with a deadline, counts them, and says when a collector goes away and when it is back.
#[derive(Debug)]
struct Bounded<E> {
    sender: Arc<E>,
    runtime: Handle,
    limit: Duration,
    /// Whether the last batch was lost.
    losing: AtomicBool,
}

impl<E: SpanExporter> Bounded<E> {
    fn new(sender: E, runtime: Handle, limit: Duration) -> Self {
        Self { sender: Arc::new(sender), runtime, limit, losing: AtomicBool::new(false) }
    }

    fn sent(&self, spans: usize) {
        metrics::spans(true, spans);
        if self.losing.swap(false, Ordering::Relaxed) {
            tracing::info!("the collector takes spans again");
        }
    }

    fn lost(&self, spans: usize, why: &str) {
        metrics::spans(false, spans);
        if !self.losing.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                why,
                "spans cannot be sent and are lost until the collector takes them; requests do not wait"
            );
        }
    }
}

impl<E: SpanExporter + 'static> SpanExporter for Bounded<E> {
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        batch.iter_mut().for_each(describe);
        let (sender, limit) = (Arc::clone(&self.sender), self.limit);
        // On the runtime, because the SDK's thread has no timer.
        let sending =
            self.runtime.spawn(async move { tokio::time::timeout(limit, sender.export(batch)).await });
        match sending.await {
            Ok(Ok(Ok(()))) => self.sent(spans),
            Ok(Ok(Err(error))) => self.lost(spans, &error.to_string()),
            Ok(Err(_)) => self.lost(spans, "the collector does not answer"),
            Err(_) => self.lost(spans, "the process is ending"),
        }
        // What went wrong has been said: the SDK would say it with every batch.
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.sender.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        // Asked for before the first batch, when nobody else has the sender.
        if let Some(sender) = Arc::get_mut(&mut self.sender) {
            sender.set_resource(resource);
        }
    }
}

/// Names a request's span as the standard wants it. Here, because fields of `tracing` spans that said so would be in
/// every log line.
fn describe(span: &mut SpanData) {
    if span.name != front::SPAN {
        return;
    }
    span.span_kind = SpanKind::Server;
    // The span has it already.
    span.attributes.retain(|attribute| attribute.key.as_str() != "trace_id");
    span.attributes.push(KeyValue::new("rpc.system.name", "grpc"));
    if let Some(method) = span.attributes.iter_mut().find(|attribute| attribute.key.as_str() == "method") {
        method.key = "rpc.method".into();
        span.name = method.value.as_str().into_owned().into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace;
    use opentelemetry_sdk::error::OTelSdkError;
    use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};
    use std::sync::Mutex;
    use std::time::SystemTime;
    use tracing_subscriber::layer::SubscriberExt as _;

    /// A collector that keeps what it is sent, refuses it, or never answers.
    #[derive(Clone, Debug, Default)]
    struct Collector {
        spans: Arc<Mutex<Vec<SpanData>>>,
        refuses: bool,
        hangs: bool,
    }

    impl SpanExporter for Collector {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            if self.hangs {
                std::future::pending::<()>().await;
            }
            if self.refuses {
                return Err(OTelSdkError::InternalFailure("no".into()));
            }
            self.spans.lock().expect("spans").extend(batch);
            Ok(())
        }
    }

    /// Runs `work` where spans go to a collector, and gives what came.
    fn exported(work: impl FnOnce()) -> Vec<SpanData> {
        let collector = Collector::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(collector.clone()).build();
        let subscriber = tracing_subscriber::registry().with(vec![layer(&provider)]);
        tracing::subscriber::with_default(subscriber, work);
        std::mem::take(&mut *collector.spans.lock().expect("spans"))
    }

    fn request() -> Span {
        tracing::info_span!(front::SPAN, request_id = "r", trace_id = tracing::field::Empty, method = "a.B/C")
    }

    fn given(flags: u8) -> TraceContext {
        let text = format!("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{flags:02x}");
        TraceContext::parse(&text).expect("the specification's example")
    }

    #[test]
    fn the_exported_span_is_the_one_that_logs_and_calls_name() {
        let mut seen = None;
        let spans = exported(|| {
            let span = request();
            let place = trace::enter(&span, Some(given(1)), false);
            let inner = span.in_scope(|| {
                assert_eq!(trace::of_call(place), place, "a call from the request itself");
                let step = tracing::info_span!("step");
                step.in_scope(|| trace::of_call(place))
            });
            ended(&span, Code::Internal);
            seen = Some((place, inner));
        });
        let (place, inner) = seen.expect("it ran");
        assert_eq!(place.trace, given(1).trace);
        let ids = |span: &SpanData| {
            let (own, above) = (span.span_context.span_id().to_bytes(), span.parent_span_id.to_bytes());
            (u64::from_be_bytes(own), u64::from_be_bytes(above))
        };
        let [step, request] = &spans[..] else { panic!("{spans:?}") };
        assert_eq!(ids(request), (place.span, given(1).span));
        assert_eq!(ids(step), (inner.span, place.span), "a call from a step is below the step");
        assert_eq!(request.status, Status::error("INTERNAL"));
    }

    #[test]
    fn the_callers_sampling_decision_holds_and_housekeeping_begins_no_trace() {
        let mut places = Vec::new();
        let spans = exported(|| {
            for (caller, may_begin) in [(Some(given(0)), true), (None, false), (None, true)] {
                places.push(trace::enter(&request(), caller, may_begin));
            }
        });
        assert_eq!((places[0].trace, places[0].flags), (given(0).trace, 0), "passed on as it came");
        assert_ne!(places[0].span, given(0).span);
        assert_eq!((places[1].flags, places[2].flags), (0, 1));
        assert_eq!(spans.len(), 1, "{spans:?}");
        assert_eq!(spans[0].span_context.trace_id(), TraceId::from(places[2].trace));
    }

    fn ended_span() -> SpanData {
        SpanData {
            span_context: remote(given(1)),
            parent_span_id: SpanId::from(1),
            parent_span_is_remote: true,
            span_kind: SpanKind::Internal,
            name: front::SPAN.into(),
            start_time: SystemTime::UNIX_EPOCH,
            end_time: SystemTime::UNIX_EPOCH,
            attributes: vec![KeyValue::new("method", "a.B/C"), KeyValue::new("trace_id", "4b")],
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: Default::default(),
        }
    }

    #[tokio::test]
    async fn a_requests_span_is_a_servers_and_has_its_methods_name() {
        let collector = Collector::default();
        let exporter = bounded(collector.clone());
        exporter.export(vec![ended_span()]).await.expect("sent");
        let spans = collector.spans.lock().expect("spans");
        assert_eq!((spans[0].name.as_ref(), &spans[0].span_kind), ("a.B/C", &SpanKind::Server));
        let keys: Vec<&str> = spans[0].attributes.iter().map(|attribute| attribute.key.as_str()).collect();
        assert_eq!(keys, ["rpc.method", "rpc.system.name"]);
    }

    fn bounded(collector: Collector) -> Bounded<Collector> {
        Bounded::new(collector, Handle::current(), Duration::from_millis(50))
    }

    #[tokio::test]
    async fn a_collector_that_refuses_or_hangs_loses_spans_and_holds_nobody_up() {
        for (refuses, hangs) in [(true, false), (false, true)] {
            let exporter = bounded(Collector { refuses, hangs, ..Default::default() });
            let export = exporter.export(vec![ended_span()]);
            let ended = tokio::time::timeout(SEND, export).await.expect("within its limit");
            assert!(ended.is_ok(), "it is nobody's failure");
            assert!(exporter.losing.load(Ordering::Relaxed));
        }
        let exporter = bounded(Collector::default());
        exporter.losing.store(true, Ordering::Relaxed);
        exporter.export(vec![ended_span()]).await.expect("sent");
        assert!(!exporter.losing.load(Ordering::Relaxed), "the collector is back");
    }

    #[tokio::test]
    async fn an_endpoint_that_cannot_be_dialled_is_refused_by_name() {
        for bad in ["https://collector:4317", "two words", "http://"] {
            let error = Exporter::start("s", bad).err().expect(bad).to_string();
            assert!(error.contains(bad) && error.contains("http://host:port"), "{error}");
        }
        assert!(Exporter::start("s", "http://127.0.0.1:4317").is_ok());
    }
}
