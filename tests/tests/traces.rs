//! What the fleet tells a collector of traces, and that nobody waits for a collector. Real processes, and a collector
//! that knows OTLP and nothing of the fleet.

use cacheclip_bench::{Corpus, Family, world};
use cacheclip_service::telemetry::ENDPOINT;
use cacheclip_tests::ask::{Answer, DEADLINE, client, finish, ingest, request};
use cacheclip_tests::process::{Process, Program, binary, free_port};
use cacheclip_tests::until;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, Span, span::SpanKind};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Two cores do not carry several fleets at once.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const SERVICES: [&str; 4] =
    ["cacheclip-gateway", "cacheclip-gpu-worker", "cacheclip-aux-scorer", "cacheclip-cache-store"];
/// A caller's place in a trace that it has recorded, and in one that it has not.
const RECORDED: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const UNRECORDED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

fn trace_of(place: &str) -> &str {
    place.split('-').nth(1).expect("a trace id")
}

fn span_of(place: &str) -> &str {
    place.split('-').nth(2).expect("a span id")
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A span and the service that sent it.
#[derive(Clone, Debug)]
struct Seen {
    service: String,
    span: Span,
}

/// Keeps what it is sent.
#[derive(Clone, Debug, Default)]
struct Collector {
    seen: Arc<Mutex<Vec<Seen>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut seen = self.seen.lock().expect("spans");
        for sent in request.into_inner().resource_spans {
            let service = service_name(&sent);
            let spans = sent.scope_spans.into_iter().flat_map(|scope| scope.spans);
            seen.extend(spans.map(|span| Seen { service: service.clone(), span }));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn service_name(sent: &ResourceSpans) -> String {
    let attributes = sent.resource.iter().flat_map(|resource| &resource.attributes);
    let name = attributes.filter(|attribute| attribute.key == "service.name");
    let mut names = name.filter_map(|name| match name.value.as_ref()?.value.as_ref()? {
        Value::StringValue(name) => Some(name.clone()),
        _ => None,
    });
    names.next().expect("a resource has a service's name")
}

impl Collector {
    /// A collector on a free port, and its endpoint.
    async fn start() -> (Self, String) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let collector = Self::default();
        let service = TraceServiceServer::new(collector.clone());
        let serving = Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(serving);
        (collector, format!("http://{address}"))
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("spans").clone()
    }
}

/// One of each service, with a corpus that was ingested.
struct Fleet {
    gateway: Process,
    behind: [Process; 3],
    corpus: Corpus,
    _dir: TempDir,
}

/// A service that sees these variables and no others.
fn service(name: &str, dir: &TempDir, settings: &[String], variables: &[(&str, &str)]) -> Process {
    let [grpc, admin] = [free_port(), free_port()].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let ports = [format!("service.listen={grpc}"), format!("service.admin_listen={admin}")];
    let arguments = ports.iter().chain(settings).flat_map(|set| ["--set".to_owned(), set.clone()]);
    let environment: BTreeMap<String, String> =
        variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let program =
        Program { environment: Some(environment), ..Program::new(binary(name), arguments.collect()) };
    Process::start(name, program, dir.path(), grpc, admin)
}

impl Fleet {
    async fn start(variables: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let data = format!("data_dir={}", dir.path().join("store").display());
        let store = service("cacheclip-cache-store", &dir, &[data], variables);
        let stores = format!("stores=[\"{}\"]", store.endpoint());
        let scorer = service("cacheclip-aux-scorer", &dir, std::slice::from_ref(&stores), variables);
        // No chunk stays in the worker's RAM, so that every request reads from the store. A busy machine must not
        // decide on which rung a request ends.
        let settings = [
            stores,
            "ram_bytes=1".into(),
            "importance_timeout_seconds=15.0".into(),
            "loading=\"always\"".into(),
        ];
        let worker = service("cacheclip-gpu-worker", &dir, &settings, variables);
        let settings = [
            format!("workers=[\"{}\"]", worker.endpoint()),
            format!("scorers=[\"{}\"]", scorer.endpoint()),
            "score_timeout_seconds=10.0".into(),
        ];
        let mut gateway = service("cacheclip-gateway", &dir, &settings, variables);
        let mut behind = [worker, scorer, store];
        for process in behind.iter_mut().chain([&mut gateway]) {
            process.ready().await;
        }
        let corpus = world::generate(53, 2, 4, &Family::ALL);
        let fleet = Self { gateway, behind, corpus, _dir: dir };
        let mut caller = client(&fleet.gateway.endpoint());
        let computed = ingest(&mut caller, &fleet.texts()).await.expect("ingested");
        assert_eq!(computed as usize, fleet.texts().len(), "nothing was stored before");
        fleet
    }

    fn texts(&self) -> Vec<&str> {
        self.corpus.documents.iter().map(|document| document.text.as_str()).collect()
    }

    /// One question over everything, from a caller that is at `place` in a trace; it ends by its deadline.
    async fn ask(&self, place: &str) -> Answer {
        let mut call = Request::new(request(&self.texts(), &self.corpus.questions[0].text));
        call.set_timeout(DEADLINE);
        call.metadata_mut().insert("traceparent", place.parse().expect("ascii"));
        let opened = client(&self.gateway.endpoint()).generate(call).await.expect("a stream");
        let answer = finish(opened.into_inner(), 0).await.expect("an answer");
        assert_eq!(answer.hits(), self.texts().len(), "the corpus was ingested");
        answer
    }

    /// All processes, front to back.
    fn processes(&mut self) -> impl Iterator<Item = &mut Process> {
        std::iter::once(&mut self.gateway).chain(&mut self.behind)
    }

    /// Drains everything, front to back.
    async fn drain(&mut self) {
        for process in self.processes() {
            process.signal("TERM");
            assert!(process.ended().await.success(), "{}:\n{}", process.name, process.log());
        }
    }
}

#[tokio::test]
async fn a_request_is_one_tree_of_spans_from_the_callers_span_to_the_stores() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let (collector, endpoint) = Collector::start().await;
    // The timer does not come while this runs: what arrives was sent by a drain.
    let mut fleet = Fleet::start(&[(ENDPOINT, &endpoint), ("OTEL_BSP_SCHEDULE_DELAY", "3600000")]).await;
    let unrecorded = fleet.ask(UNRECORDED).await;
    let recorded = fleet.ask(RECORDED).await;
    assert_eq!(recorded.text, unrecorded.text);
    fleet.drain().await;

    let all = collector.seen();
    let (ours, others): (Vec<Seen>, Vec<Seen>) =
        all.into_iter().partition(|seen| hex(&seen.span.trace_id) == trace_of(RECORDED));
    let services: BTreeSet<&str> = ours.iter().map(|seen| seen.service.as_str()).collect();
    assert_eq!(services, SERVICES.into(), "{ours:?}");

    // Every span has one parent in the trace, and following parents leads to the caller's span.
    let parents: BTreeMap<String, String> =
        ours.iter().map(|seen| (hex(&seen.span.span_id), hex(&seen.span.parent_span_id))).collect();
    assert_eq!(parents.len(), ours.len(), "two spans have one id: {ours:?}");
    for start in parents.keys() {
        let (mut at, mut steps) = (start, 0);
        while at != span_of(RECORDED) {
            at = parents.get(at).unwrap_or_else(|| panic!("{start}: {at} was not sent: {ours:?}"));
            steps += 1;
            assert!(steps <= parents.len(), "{start} is its own ancestor");
        }
    }
    let named = |service: &str| ours.iter().filter(|seen| seen.service == service).collect::<Vec<_>>();
    let [root] = named("cacheclip-gateway")[..] else { panic!("one span for one request: {ours:?}") };
    assert_eq!(root.span.name, "cacheclip.v1.Gateway/Generate");
    assert_eq!(hex(&root.span.parent_span_id), span_of(RECORDED));
    let [worker] = named("cacheclip-gpu-worker")[..] else { panic!("{ours:?}") };
    assert_eq!(worker.span.name, "cacheclip.v1.Worker/Generate");
    assert_eq!(worker.span.parent_span_id, root.span.span_id);
    for store in named("cacheclip-cache-store") {
        assert!(store.span.name.starts_with("cacheclip.v1.Cache/"), "{store:?}");
    }
    for Seen { span, .. } in &ours {
        assert_eq!(span.kind(), SpanKind::Server);
        assert!(span.start_time_unix_nano < span.end_time_unix_nano, "{span:?}");
    }

    // What the caller did not record is not sent, and neither is what services ask of each other and probes of them.
    for Seen { service, span } in &others {
        assert_ne!(hex(&span.trace_id), trace_of(UNRECORDED), "{service}: {span:?}");
        let housekeeping = ["/Watch", "/Describe", "/Members", "grpc.health"];
        assert!(!housekeeping.iter().any(|name| span.name.contains(name)), "{service}: {span:?}");
    }
    // Logs name both traces, recorded or not.
    for process in fleet.processes() {
        let log = process.log();
        for place in [RECORDED, UNRECORDED] {
            assert!(log.contains(trace_of(place)), "{}: {place}:\n{log}", process.name);
        }
    }
}

#[tokio::test]
async fn a_collector_that_is_away_or_silent_changes_no_answer_and_its_lost_spans_are_counted() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let undisturbed = Fleet::start(&[]).await.ask(RECORDED).await;
    let away = format!("http://127.0.0.1:{}", free_port());
    // Connections are taken by the system, and nobody ever speaks.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = format!("http://{}", listener.local_addr().expect("its address"));
    for endpoint in [away, silent] {
        let mut fleet = Fleet::start(&[(ENDPOINT, &endpoint), ("OTEL_BSP_SCHEDULE_DELAY", "50")]).await;
        for _ in 0..3 {
            let answer = fleet.ask(RECORDED).await;
            assert_eq!((&answer.text, answer.selection()), (&undisturbed.text, undisturbed.selection()));
        }
        let lost =
            async |gateway: &Process| gateway.sum("cacheclip_trace_spans_total", &["outcome=\"lost\""]).await;
        let gateway = &fleet.gateway;
        until("lost spans are counted", async || lost(gateway).await > 0.0).await;
        let before = lost(gateway).await;
        assert_eq!(fleet.ask(RECORDED).await.text, undisturbed.text);
        until("and the next ones", async || lost(gateway).await > before).await;
        assert_eq!(gateway.sum("cacheclip_trace_spans_total", &["outcome=\"sent\""]).await, 0.0);

        let started = Instant::now();
        fleet.gateway.signal("TERM");
        assert!(fleet.gateway.ended().await.success());
        // Nothing is in flight: a second for connections and two for spans, and a busy machine.
        assert!(started.elapsed() < Duration::from_secs(10), "the drain took {:?}", started.elapsed());
        let log = fleet.gateway.log();
        assert_eq!(log.matches("spans cannot be sent").count(), 1, "said once:\n{log}");
    }
}
