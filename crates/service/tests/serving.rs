//! What a server promises on the wire: real servers, loopback sockets.

use cacheclip_rpc::status;
use cacheclip_rpc::v1::gateway_client::GatewayClient;
use cacheclip_rpc::v1::gateway_server::{Gateway, GatewayServer};
use cacheclip_rpc::v1::{
    GenerateEvent, GenerateRequest, GetCapabilitiesRequest, GetCapabilitiesResponse, IngestProgress,
    IngestRequest, Token, generate_event::Event,
};
use cacheclip_service::{ConnectOptions, LIVENESS, Options, Running, Server, connect, request_id};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

const NAME: &str = "cacheclip.v1.Gateway";
const PATIENCE: Duration = Duration::from_secs(10);

/// Streams what the test sends; says the current request id as its version.
struct Puppet {
    tokens: Mutex<Option<mpsc::Receiver<Result<GenerateEvent, Status>>>>,
}

#[tonic::async_trait]
impl Gateway for Puppet {
    type GenerateStream = ReceiverStream<Result<GenerateEvent, Status>>;
    type IngestStream = ReceiverStream<Result<IngestProgress, Status>>;

    async fn generate(&self, _: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let tokens = self.tokens.lock().await.take().ok_or_else(|| Status::internal("one stream only"))?;
        Ok(Response::new(ReceiverStream::new(tokens)))
    }

    async fn ingest(
        &self,
        _: Request<Streaming<IngestRequest>>,
    ) -> Result<Response<Self::IngestStream>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn delete_document(
        &self,
        _: Request<cacheclip_rpc::v1::DeleteIngestedRequest>,
    ) -> Result<Response<cacheclip_rpc::v1::DeletionReceipt>, Status> {
        Err(Status::unimplemented("not here"))
    }

    async fn get_capabilities(
        &self,
        _: Request<GetCapabilitiesRequest>,
    ) -> Result<Response<GetCapabilitiesResponse>, Status> {
        let version = request_id::current().map(|id| id.to_string()).unwrap_or_default();
        Ok(Response::new(GetCapabilitiesResponse { version, ..Default::default() }))
    }
}

struct Fixture {
    running: Running,
    tokens: mpsc::Sender<Result<GenerateEvent, Status>>,
    channel: Channel,
}

async fn start(options: Options) -> Fixture {
    let (tokens, receiver) = mpsc::channel(1);
    let puppet = Puppet { tokens: Mutex::new(Some(receiver)) };
    let routes = Routes::new(GatewayServer::from_arc(Arc::new(puppet)));
    let running = Server::new("puppet", options).serve(routes, &[NAME]).await.expect("a server");
    let channel = connect(&running.endpoint(), &ConnectOptions::default()).expect("a channel");
    Fixture { running, tokens, channel }
}

impl Fixture {
    fn gateway(&self) -> GatewayClient<Channel> {
        GatewayClient::new(self.channel.clone())
    }

    /// Opens the stream and reads its first token, so that it is surely in flight.
    async fn open_stream(&self) -> Streaming<GenerateEvent> {
        self.tokens.send(Ok(token("first"))).await.expect("room");
        let mut stream =
            self.gateway().generate(GenerateRequest::default()).await.expect("a stream").into_inner();
        assert_eq!(text(stream.message().await.expect("no error")), Some("first".into()));
        stream
    }
}

fn token(text: &str) -> GenerateEvent {
    GenerateEvent { event: Some(Event::Token(Token { text: text.into(), index: 0 })) }
}

fn text(event: Option<GenerateEvent>) -> Option<String> {
    match event?.event? {
        Event::Token(token) => Some(token.text),
        _ => None,
    }
}

async fn health(channel: &Channel, service: &str) -> Result<ServingStatus, Code> {
    let request = HealthCheckRequest { service: service.into() };
    let answer = HealthClient::new(channel.clone()).check(request).await;
    answer.map(|reply| reply.into_inner().status()).map_err(|status| status.code())
}

async fn http_get(running: &Running, path: &str) -> String {
    let mut socket =
        tokio::net::TcpStream::connect(running.admin().expect("an admin port")).await.expect("a socket");
    let request = format!("GET {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.expect("a request");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.expect("an answer");
    answer
}

#[tokio::test]
async fn health_follows_readiness_and_liveness_does_not() {
    let fixture = start(Options::default()).await;
    for service in ["", NAME] {
        assert_eq!(
            health(&fixture.channel, service).await,
            Ok(ServingStatus::NotServing),
            "{service:?} at the start"
        );
    }
    assert_eq!(health(&fixture.channel, LIVENESS).await, Ok(ServingStatus::Serving));
    assert_eq!(health(&fixture.channel, "no.such.Service").await, Err(Code::NotFound));
    fixture.running.readiness().set(true, "");
    for service in ["", NAME, LIVENESS] {
        assert_eq!(
            health(&fixture.channel, service).await,
            Ok(ServingStatus::Serving),
            "{service:?} when ready"
        );
    }
}

#[tokio::test]
async fn a_drain_flips_health_first_and_lets_the_stream_in_flight_finish() {
    let fixture = start(Options::default()).await;
    fixture.running.readiness().set(true, "");
    let mut watch = HealthClient::new(fixture.channel.clone())
        .watch(HealthCheckRequest { service: NAME.into() })
        .await
        .expect("a watch")
        .into_inner();
    let serving = |update: Option<HealthCheckResponse>| update.map(|update| update.status());
    assert_eq!(serving(watch.message().await.expect("no error")), Some(ServingStatus::Serving));
    let mut stream = fixture.open_stream().await;
    let mut gateway = fixture.gateway();
    let Fixture { running, tokens, channel } = fixture;
    let readiness = running.readiness();
    let shutdown = running.shutdown();
    let drain = tokio::spawn(running.drain());

    assert_eq!(serving(watch.message().await.expect("no error")), Some(ServingStatus::NotServing));
    assert!(shutdown.is_cancelled(), "background work hears of the drain");
    assert!(!readiness.is_ready());
    assert_eq!(health(&channel, "").await, Ok(ServingStatus::NotServing), "the connection is still open");
    let refused = gateway.get_capabilities(GetCapabilitiesRequest {}).await.expect_err("refused");
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("draining"), "{refused}");

    tokens.send(Ok(token("last"))).await.expect("room");
    assert_eq!(text(stream.message().await.expect("no error")), Some("last".into()));
    assert!(!drain.is_finished(), "the stream has not ended");
    drop(tokens);
    assert!(stream.message().await.expect("a clean end").is_none());
    let drained = tokio::time::timeout(PATIENCE, drain).await.expect("in time").expect("no panic");
    assert_eq!(drained.abandoned, 0);
    assert_eq!(serving(watch.message().await.unwrap_or_default()), None, "the watch has ended");
}

#[tokio::test]
async fn a_drain_gives_up_on_a_stream_that_never_ends() {
    let fixture = start(Options { drain_seconds: 0.05, ..Default::default() }).await;
    let _stream = fixture.open_stream().await;
    let drained = tokio::time::timeout(PATIENCE, fixture.running.drain()).await.expect("in time");
    assert_eq!(drained.abandoned, 1);
}

#[tokio::test]
async fn overload_is_refused_with_a_hint_while_health_still_answers() {
    let fixture = start(Options { max_concurrent_requests: 1, ..Default::default() }).await;
    let stream = fixture.open_stream().await;
    // Another connection: the limit is the server's and not a connection's.
    let other = connect(&fixture.running.endpoint(), &ConnectOptions::default()).expect("a channel");
    let mut second = GatewayClient::new(other.clone());
    let refused = second.get_capabilities(GetCapabilitiesRequest {}).await.expect_err("full");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(status::retry_after(&refused).is_some_and(|after| after > Duration::ZERO), "{refused:?}");
    assert!(refused.metadata().get(request_id::HEADER).is_some(), "a refusal can be found in the log");
    assert_eq!(health(&other, LIVENESS).await, Ok(ServingStatus::Serving));

    // The permit comes back when the streamed answer has ended, not when it began.
    drop(stream);
    drop(fixture.tokens);
    let free = async {
        while second.get_capabilities(GetCapabilitiesRequest {}).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, free).await.expect("the permit came back");
}

#[tokio::test]
async fn a_request_that_takes_too_long_ends_with_deadline_exceeded() {
    let fixture = start(Options { request_timeout_seconds: 0.2, ..Default::default() }).await;
    let mut stream = fixture.open_stream().await;
    let late =
        tokio::time::timeout(PATIENCE, stream.message()).await.expect("in time").expect_err("too late");
    assert_eq!(late.code(), Code::DeadlineExceeded);
    fixture.tokens.closed().await;
}

#[tokio::test]
async fn the_request_id_reaches_the_handler_and_comes_back() {
    let fixture = start(Options::default()).await;
    let mut request = Request::new(GetCapabilitiesRequest {});
    request.metadata_mut().insert(request_id::HEADER, "ask-42".parse().expect("ascii"));
    let answer = fixture.gateway().get_capabilities(request).await.expect("an answer");
    assert_eq!(answer.metadata().get(request_id::HEADER).expect("echoed"), "ask-42");
    assert_eq!(answer.into_inner().version, "ask-42");

    let made = fixture.gateway().get_capabilities(GetCapabilitiesRequest {}).await.expect("an answer");
    let echoed = made.metadata().get(request_id::HEADER).expect("made").to_str().expect("text").to_owned();
    assert_eq!(made.into_inner().version, echoed);
    assert!(!echoed.is_empty());
}

#[tokio::test]
async fn the_admin_port_tells_metrics_liveness_and_why_it_is_not_ready() {
    let fixture = start(Options { admin_listen: Some("127.0.0.1:0".into()), ..Default::default() }).await;
    fixture.running.readiness().set(false, "loading weights");
    let not_ready = http_get(&fixture.running, "/ready").await;
    assert!(not_ready.starts_with("HTTP/1.1 503") && not_ready.contains("loading weights"), "{not_ready}");
    assert!(http_get(&fixture.running, "/live").await.starts_with("HTTP/1.1 200"));
    fixture.running.readiness().set(true, "");
    assert!(http_get(&fixture.running, "/ready").await.starts_with("HTTP/1.1 200"));

    fixture.gateway().get_capabilities(GetCapabilitiesRequest {}).await.expect("an answer");
    let line = "cacheclip_rpc_requests_total{method=\"cacheclip.v1.Gateway/GetCapabilities\",code=\"OK\"}";
    // The request is counted once its answer has left, which may be after the client read it.
    let counted = async {
        loop {
            let metrics = http_get(&fixture.running, "/metrics").await;
            if metrics.contains(line) {
                return metrics;
            }
        }
    };
    let metrics = tokio::time::timeout(PATIENCE, counted).await.expect("the request is counted");
    assert!(metrics.contains("cacheclip_rpc_seconds_bucket"), "{metrics}");
}

#[tokio::test]
async fn reflection_lists_the_service() {
    let fixture = start(Options::default()).await;
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(fixture.channel.clone());
    let asked = client.server_reflection_info(tokio_stream::once(ask)).await.expect("reflection");
    let reply: ServerReflectionResponse =
        asked.into_inner().message().await.expect("no error").expect("a reply");
    let Some(MessageResponse::ListServicesResponse(list)) = reply.message_response else {
        panic!("not a list: {reply:?}")
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.iter().any(|name| name == NAME), "{names:?}");
    assert!(names.iter().any(|name| name == "grpc.health.v1.Health"), "{names:?}");
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let fixture = start(Options::default()).await;
    let listen = fixture.running.grpc().to_string();
    let error = Server::new("second", Options { listen: listen.clone(), ..Default::default() })
        .serve(Routes::default(), &[])
        .await
        .expect_err("in use");
    assert!(error.to_string().contains(&listen), "{error}");
}
