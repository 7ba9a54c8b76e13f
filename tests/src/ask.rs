//! A client that knows the proto files and nothing else of the fleet.

use cacheclip_rpc::v1::gateway_client::GatewayClient;
use cacheclip_rpc::v1::generate_event::Event;
use cacheclip_rpc::v1::{self, Explain, GenerateRequest, IngestRequest, Sampling, Usage};
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

/// The deadline of every request: what is promised is that it ends by then, whatever is down.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// An answer as it came.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The whole text.
    pub text: String,
    /// Token events that brought it.
    pub tokens: usize,
    /// Why it cost what it cost.
    pub explain: Explain,
    /// Tokens counted.
    pub usage: Usage,
}

impl Answer {
    /// Byte spans that were recomputed, per chunk: the selection.
    pub fn selection(&self) -> Vec<Vec<(u32, u32)>> {
        let spans = |chunk: &v1::ChunkReport| {
            chunk.recomputed_spans.iter().map(|span| (span.start, span.end)).collect()
        };
        self.explain.chunks.iter().map(spans).collect()
    }

    /// Chunks that came from a cache.
    pub fn hits(&self) -> usize {
        self.explain.chunks.iter().filter(|chunk| chunk.hit).count()
    }
}

/// A client of a gateway; connects with its first call.
///
/// # Panics
/// When the endpoint is none.
pub fn client(endpoint: &str) -> GatewayClient<Channel> {
    let endpoint = Endpoint::from_shared(endpoint.to_owned()).expect("an endpoint");
    GatewayClient::new(endpoint.connect_timeout(Duration::from_secs(5)).connect_lazy())
}

/// A greedy request over chunks.
pub fn request(chunks: &[&str], question: &str) -> GenerateRequest {
    GenerateRequest {
        chunks: chunks
            .iter()
            .map(|text| v1::Chunk { text: (*text).to_owned(), ..Default::default() })
            .collect(),
        question: question.to_owned(),
        sampling: Some(Sampling { max_tokens: 16, ..Default::default() }),
        ..Default::default()
    }
}

/// The same with an answer as long and as random as can be, for tests that need a stream to be under way.
pub fn long_request(chunks: &[&str], question: &str, max_tokens: u32) -> GenerateRequest {
    let sampling = Sampling {
        temperature: 100.0,
        seed: 7,
        max_tokens,
        stop: vec!["\u{1}".into()],
        ..Default::default()
    };
    GenerateRequest { sampling: Some(sampling), ..request(chunks, question) }
}

/// Sends a request with a deadline and opens its stream.
///
/// # Errors
/// The status it ended with.
pub async fn open(
    client: &mut GatewayClient<Channel>,
    request: GenerateRequest,
) -> Result<Streaming<v1::GenerateEvent>, Status> {
    let mut request = Request::new(request);
    request.set_timeout(DEADLINE);
    Ok(client.generate(request).await?.into_inner())
}

/// Reads a stream to its end. The test fails where that takes longer than the deadline and a little.
///
/// # Errors
/// The status it ended with.
///
/// # Panics
/// When the deadline is not kept.
pub async fn finish(mut stream: Streaming<v1::GenerateEvent>, mut tokens: usize) -> Result<Answer, Status> {
    let reading = async {
        while let Some(event) = stream.message().await? {
            match event.event {
                Some(Event::Token(_)) => tokens += 1,
                Some(Event::Done(done)) => {
                    let (explain, usage) = (done.explain.unwrap_or_default(), done.usage.unwrap_or_default());
                    return Ok(Answer { text: done.text, tokens, explain, usage });
                }
                _ => {}
            }
        }
        Err(Status::unknown("the stream ended without its final message"))
    };
    tokio::time::timeout(DEADLINE + Duration::from_secs(3), reading)
        .await
        .expect("every request ends in time")
}

/// Asks and waits for the end.
///
/// # Errors
/// The status it ended with.
pub async fn ask(client: &mut GatewayClient<Channel>, request: GenerateRequest) -> Result<Answer, Status> {
    let stream = open(client, request).await?;
    finish(stream, 0).await
}

/// Ingests chunks as one document; how many were computed now.
///
/// # Errors
/// The status it ended with.
pub async fn ingest(client: &mut GatewayClient<Channel>, chunks: &[&str]) -> Result<u32, Status> {
    let chunks =
        chunks.iter().map(|text| v1::Chunk { text: (*text).to_owned(), ..Default::default() }).collect();
    let document = IngestRequest { document: "test".into(), chunks, ..Default::default() };
    let mut request = Request::new(tokio_stream::iter([document]));
    request.set_timeout(DEADLINE);
    let mut progress = client.ingest(request).await?.into_inner();
    let mut computed = 0;
    while let Some(message) = progress.message().await? {
        computed = message.chunks_computed;
    }
    Ok(computed)
}
