//! Both ends of a stream of KV, which `frames` cuts and joins without copying it.
//!
//! A server answers `Cache.Get` and `Cache.GetLayers` with [`answer`], a client asks with [`get`] and [`get_layers`].
//! What a client sends with [`put`] a server takes by [`messages`] and answers with [`reply`].

use crate::frames::{Cut, Reader, framed};
use crate::v1::{GetLayersRequest, GetRequest, KvFrame, PutFrame, PutResponse};
use bytes::Bytes;
use http_body::{Body as _, Frame};
use http_body_util::Full;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tonic::body::Body;
use tonic::codec::Streaming;
use tonic::codegen::http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, TE};
use tonic::codegen::http::{self, Method, Version};
use tonic::codegen::tokio_stream::{self, Stream};
use tonic::codegen::{BoxFuture, Service as _};
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstDecoder;

/// Path of `Cache.Get`.
pub const GET: &str = "/cacheclip.v1.Cache/Get";
/// Path of `Cache.GetLayers`.
pub const GET_LAYERS: &str = "/cacheclip.v1.Cache/GetLayers";
/// Path of `Cache.Put`.
pub const PUT: &str = "/cacheclip.v1.Cache/Put";

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// A client's request, of at most `most` bytes.
///
/// # Errors
/// Bytes that are no such message, or too many.
pub async fn read<M: prost::Message + Default + 'static>(
    request: http::Request<Body>,
    most: usize,
) -> Result<Request<M>, Status> {
    let (parts, body) = request.into_parts();
    let mut messages = Streaming::new_request(ProstDecoder::<M>::default(), body, None, Some(most));
    let message = messages.message().await?.ok_or_else(|| Status::internal("the request has no message"))?;
    Ok(Request::from_parts(MetadataMap::from_headers(parts.headers), parts.extensions, message))
}

/// The messages of a client's request, each of at most `most` bytes.
pub fn messages<M: prost::Message + Default>(request: http::Request<Body>, most: usize) -> Messages<M> {
    Messages { body: request.into_body(), reader: Reader::new(most), has_status: false, ended: false }
}

/// Runs a handler that streams frames, as a service's future.
pub fn answer<S>(
    handler: impl Future<Output = Result<Response<S>, Status>> + Send + 'static,
) -> BoxFuture<http::Response<Body>, Infallible>
where
    S: Stream<Item = Result<KvFrame, Status>> + Unpin + Send + 'static,
{
    Box::pin(async move { Ok(response(handler.await)) })
}

/// Runs a handler that ends with one message, as a service's future.
pub fn reply(
    handler: impl Future<Output = Result<Response<PutResponse>, Status>> + Send + 'static,
) -> BoxFuture<http::Response<Body>, Infallible> {
    Box::pin(async move {
        let answer = handler.await;
        Ok(response(answer.map(|answer| answer.map(|message| tokio_stream::once(Ok(message))))))
    })
}

fn response<S, M>(answer: Result<Response<S>, Status>) -> http::Response<Body>
where
    S: Stream<Item = Result<M, Status>> + Unpin + Send + 'static,
    M: Cut + 'static,
{
    match answer {
        Ok(answer) => {
            let (metadata, frames, extensions) = answer.into_parts();
            let mut response = http::Response::new(Body::new(Outgoing::of(frames, true)));
            *response.headers_mut() = metadata.into_headers();
            *response.extensions_mut() = extensions;
            response.headers_mut().insert(CONTENT_TYPE, GRPC);
            response
        }
        Err(status) => status.into_http(),
    }
}

/// Each message as two pieces, and behind the last one of an answer its status.
struct Outgoing<S> {
    messages: S,
    /// The second piece of the message whose first one was sent.
    kv: Option<Bytes>,
    has_status: bool,
    ended: bool,
}

impl<S> Outgoing<S> {
    fn of(messages: S, has_status: bool) -> Self {
        Self { messages, kv: None, has_status, ended: false }
    }
}

impl<S: Stream<Item = Result<M, Status>> + Unpin, M: Cut> http_body::Body for Outgoing<S> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(kv) = self.kv.take() {
            return Poll::Ready(Some(Ok(Frame::data(kv))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let status = match ready!(Pin::new(&mut self.messages).poll_next(cx)) {
            Some(Ok(message)) => {
                let (before, kv) = message.cut();
                self.kv = (!kv.is_empty()).then_some(kv);
                return Poll::Ready(Some(Ok(Frame::data(before))));
            }
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        self.ended = true;
        if !self.has_status {
            return Poll::Ready(None);
        }
        let mut trailers = HeaderMap::new();
        Poll::Ready(Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

/// Asks for a whole container; frames of more than `most` bytes are refused.
///
/// # Errors
/// The server's status, or why it cannot be reached.
pub async fn get(
    channel: Channel,
    request: Request<GetRequest>,
    most: usize,
) -> Result<Response<Frames>, Status> {
    ask(channel, GET, request.map(|message| Body::new(Full::new(framed(&message)))), most).await
}

/// Asks for layers; frames of more than `most` bytes are refused.
///
/// # Errors
/// The server's status, or why it cannot be reached.
pub async fn get_layers(
    channel: Channel,
    request: Request<GetLayersRequest>,
    most: usize,
) -> Result<Response<Frames>, Status> {
    ask(channel, GET_LAYERS, request.map(|message| Body::new(Full::new(framed(&message)))), most).await
}

/// Sends a container's frames; an answer of more than `most` bytes is refused.
///
/// # Errors
/// The server's status, or why it cannot be reached.
pub async fn put(
    channel: Channel,
    request: Request<impl Iterator<Item = PutFrame> + Send + 'static>,
    most: usize,
) -> Result<Response<PutResponse>, Status> {
    let request = request.map(|frames| Body::new(Outgoing::of(tokio_stream::iter(sound(frames)), false)));
    let answer = ask::<PutResponse>(channel, PUT, request, most).await?;
    let (metadata, mut messages, extensions) = answer.into_parts();
    let message = messages.message().await?.ok_or_else(|| Status::internal("the answer has no message"))?;
    Ok(Response::from_parts(metadata, message, extensions))
}

fn sound<M>(messages: impl Iterator<Item = M>) -> impl Iterator<Item = Result<M, Status>> {
    messages.map(Ok)
}

async fn ask<M: prost::Message + Default>(
    mut channel: Channel,
    path: &'static str,
    request: Request<Body>,
    most: usize,
) -> Result<Response<Messages<M>>, Status> {
    let (metadata, extensions, body) = request.into_parts();
    let mut request = http::Request::new(body);
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = http::Uri::from_static(path);
    *request.headers_mut() = metadata.into_headers();
    *request.extensions_mut() = extensions;
    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    request.headers_mut().insert(CONTENT_TYPE, GRPC);
    let failed = |error: tonic::transport::Error| Status::from_error(error.into());
    poll_fn(|cx| channel.poll_ready(cx)).await.map_err(failed)?;
    let response = channel.call(request).await.map_err(failed)?;
    let ended = match Status::from_header_map(response.headers()) {
        Some(status) if status.code() == Code::Ok => true,
        Some(status) => return Err(status),
        None if response.status() != http::StatusCode::OK => {
            let status = response.status();
            return Err(Status::unavailable(format!("what answers is no store: HTTP status {status}")));
        }
        None => false,
    };
    let (parts, body) = response.into_parts();
    let messages = Messages { body, reader: Reader::new(most), has_status: true, ended };
    Ok(Response::from_parts(MetadataMap::from_headers(parts.headers), messages, parts.extensions))
}

/// The other end's messages as they come.
#[derive(Debug)]
pub struct Messages<M> {
    body: Body,
    reader: Reader<M>,
    /// An answer ends with a status, a request with its last message.
    has_status: bool,
    ended: bool,
}

/// A server's frames as they come.
pub type Frames = Messages<KvFrame>;

impl<M: prost::Message + Default> Messages<M> {
    /// The next message; `None` after the last one. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The status that the answer ended with, a connection that broke, bytes that are no messages.
    pub async fn message(&mut self) -> Result<Option<M>, Status> {
        poll_fn(|cx| self.poll_message(cx)).await
    }

    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<M>, Status>> {
        loop {
            if let Some(message) = self.reader.next()? {
                return Poll::Ready(Ok(Some(message)));
            }
            if self.ended {
                return Poll::Ready(Ok(None));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.reader.push(data),
                    Err(frame) => self.end(frame.trailers_ref())?,
                },
                Some(Err(status)) => {
                    self.ended = true;
                    return Poll::Ready(Err(status));
                }
                None => self.end(None)?,
            }
        }
    }

    /// The stream is over: with which status?
    fn end(&mut self, trailers: Option<&HeaderMap>) -> Result<(), Status> {
        self.ended = true;
        match trailers.and_then(Status::from_header_map) {
            Some(status) if status.code() != Code::Ok => Err(status),
            None if self.has_status => Err(Status::unknown("the answer ended without a status")),
            _ if self.reader.is_empty() => Ok(()),
            _ => Err(Status::internal("the stream ended within a message")),
        }
    }
}

impl<M: prost::Message + Default> Stream for Messages<M> {
    type Item = Result<M, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_message(cx).map(Result::transpose)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{PutHead, kv_frame, put_frame, put_response};

    fn frame(length: usize) -> KvFrame {
        KvFrame { frame: Some(kv_frame::Frame::Data(vec![7; length].into())), ..KvFrame::default() }
    }

    async fn answered(frames: Vec<Result<KvFrame, Status>>) -> http::Response<Body> {
        let handler = async { Ok(Response::new(tokio_stream::iter(frames))) };
        answer(handler).await.expect("answers always come")
    }

    async fn all(mut frames: Frames) -> (Vec<KvFrame>, Result<(), Status>) {
        let mut came = Vec::new();
        loop {
            match frames.message().await {
                Ok(Some(frame)) => came.push(frame),
                Ok(None) => return (came, Ok(())),
                Err(status) => return (came, Err(status)),
            }
        }
    }

    fn received(response: http::Response<Body>) -> Frames {
        Messages { body: response.into_body(), reader: Reader::new(1 << 20), has_status: true, ended: false }
    }

    #[tokio::test]
    async fn frames_come_as_they_were_sent_and_then_the_status() {
        let sent = vec![frame(0), frame(3), frame(100_000)];
        let response = answered(sent.iter().cloned().map(Ok).collect()).await;
        assert_eq!(response.headers()[CONTENT_TYPE], "application/grpc");
        let (came, ended) = all(received(response)).await;
        assert!(came == sent && ended.is_ok());
        let response = answered(vec![Ok(frame(1)), Err(Status::data_loss("damaged: compute it"))]).await;
        let (came, ended) = all(received(response)).await;
        let status = ended.expect_err("a status");
        assert_eq!((came.len(), status.code(), status.message()), (1, Code::DataLoss, "damaged: compute it"));
    }

    #[tokio::test]
    async fn generated_code_reads_what_is_answered() {
        let sent = vec![frame(5), frame(70_000)];
        let response = answered(sent.iter().cloned().map(Ok).collect()).await;
        let (parts, body) = response.into_parts();
        let decoder = ProstDecoder::<KvFrame>::default();
        let mut stream = Streaming::new_response(decoder, body, parts.status, None, None);
        for expected in sent {
            assert_eq!(stream.message().await.expect("sound"), Some(expected));
        }
        assert_eq!(stream.message().await.expect("status OK"), None);
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_is_an_error() {
        let whole = framed(&frame(10));
        for (bytes, code) in [(whole.clone(), Code::Unknown), (whole.slice(..8), Code::Unknown)] {
            let response = http::Response::new(Body::new(Full::new(bytes)));
            let (_, ended) = all(received(response)).await;
            assert_eq!(ended.expect_err("no status came").code(), code);
        }
    }

    #[tokio::test]
    async fn a_request_is_read_with_its_metadata() {
        let message = GetRequest { layout: vec![1; 32].into(), key: vec![2; 32].into() };
        let mut request = http::Request::new(Body::new(Full::new(framed(&message))));
        request.headers_mut().insert("x-request-id", HeaderValue::from_static("seven"));
        let read = read::<GetRequest>(request, 1000).await.expect("a request");
        assert_eq!(read.metadata().get("x-request-id").expect("kept"), "seven");
        assert_eq!(read.into_inner(), message);
        let long = http::Request::new(Body::new(Full::new(framed(&message))));
        assert_eq!(super::read::<GetRequest>(long, 10).await.expect_err("too long").code(), Code::OutOfRange);
    }

    #[tokio::test]
    async fn a_request_of_many_messages_ends_with_its_last_one() {
        let data = |length| put_frame::Frame::Data(vec![7; length].into());
        let sent = [put_frame::Frame::Head(PutHead::default()), data(3), data(70_000)];
        let sent = sent.map(|frame| PutFrame { frame: Some(frame) });
        let body = |frames: Vec<PutFrame>| {
            Body::new(Outgoing::of(tokio_stream::iter(sound(frames.into_iter())), false))
        };
        let mut came = messages::<PutFrame>(http::Request::new(body(sent.to_vec())), 1 << 20);
        for expected in sent {
            assert_eq!(came.message().await.expect("sound"), Some(expected));
        }
        assert_eq!(came.message().await.expect("the end"), None);
        let cut = framed(&PutFrame { frame: Some(data(10)) }).slice(..8);
        let mut came = messages::<PutFrame>(http::Request::new(Body::new(Full::new(cut))), 1 << 20);
        assert_eq!(came.message().await.expect_err("half of a message").code(), Code::Internal);
    }

    #[tokio::test]
    async fn a_reply_is_what_generated_code_reads() {
        let message =
            PutResponse { outcome: put_response::Outcome::Existed.into(), ..PutResponse::default() };
        let sent = message.clone();
        let response = reply(async { Ok(Response::new(sent)) }).await.expect("answers always come");
        let (parts, body) = response.into_parts();
        let decoder = ProstDecoder::<PutResponse>::default();
        let mut stream = Streaming::new_response(decoder, body, parts.status, None, None);
        assert_eq!(stream.message().await.expect("sound"), Some(message));
        assert_eq!(stream.message().await.expect("status OK"), None);
    }

    #[test]
    fn paths_are_those_of_the_service() {
        struct Nobody;
        let name = <crate::v1::cache_server::CacheServer<Nobody> as tonic::server::NamedService>::NAME;
        let expected = ["Get", "GetLayers", "Put"].map(|method| format!("/{name}/{method}"));
        assert_eq!([GET, GET_LAYERS, PUT].map(str::to_owned), expected);
    }
}
