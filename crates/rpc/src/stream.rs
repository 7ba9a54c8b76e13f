//! Both ends of a stream of KV frames, which `frames` cuts and joins without copying KV.
//!
//! A server answers `Cache.Get` and `Cache.GetLayers` with [`answer`], a client asks with [`get`] and [`get_layers`].

use crate::frames::{Reader, cut, framed};
use crate::v1::{GetLayersRequest, GetRequest, KvFrame};
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
use tonic::codegen::tokio_stream::Stream;
use tonic::codegen::{BoxFuture, Service as _};
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstDecoder;

/// Path of `Cache.Get`.
pub const GET: &str = "/cacheclip.v1.Cache/Get";
/// Path of `Cache.GetLayers`.
pub const GET_LAYERS: &str = "/cacheclip.v1.Cache/GetLayers";

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

/// Runs a handler that streams frames, as a service's future.
pub fn answer<S>(
    handler: impl Future<Output = Result<Response<S>, Status>> + Send + 'static,
) -> BoxFuture<http::Response<Body>, Infallible>
where
    S: Stream<Item = Result<KvFrame, Status>> + Unpin + Send + 'static,
{
    Box::pin(async move {
        Ok(match handler.await {
            Ok(answer) => {
                let (metadata, frames, extensions) = answer.into_parts();
                let mut response = http::Response::new(Body::new(Answer { frames, kv: None, ended: false }));
                *response.headers_mut() = metadata.into_headers();
                *response.extensions_mut() = extensions;
                response.headers_mut().insert(CONTENT_TYPE, GRPC);
                response
            }
            Err(status) => status.into_http(),
        })
    })
}

/// Each frame as two pieces, then the status.
struct Answer<S> {
    frames: S,
    /// The second piece of the frame whose first one was sent.
    kv: Option<Bytes>,
    ended: bool,
}

impl<S: Stream<Item = Result<KvFrame, Status>> + Unpin> http_body::Body for Answer<S> {
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
        let status = match ready!(Pin::new(&mut self.frames).poll_next(cx)) {
            Some(Ok(frame)) => {
                let (before, kv) = cut(frame);
                self.kv = (!kv.is_empty()).then_some(kv);
                return Poll::Ready(Some(Ok(Frame::data(before))));
            }
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        self.ended = true;
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
    ask(channel, GET, request, most).await
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
    ask(channel, GET_LAYERS, request, most).await
}

async fn ask<M: prost::Message>(
    mut channel: Channel,
    path: &'static str,
    request: Request<M>,
    most: usize,
) -> Result<Response<Frames>, Status> {
    let (metadata, extensions, message) = request.into_parts();
    let mut request = http::Request::new(Body::new(Full::new(framed(&message))));
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
    let frames = Frames { body, reader: Reader::new(most), ended };
    Ok(Response::from_parts(MetadataMap::from_headers(parts.headers), frames, parts.extensions))
}

/// A server's frames as they come.
#[derive(Debug)]
pub struct Frames {
    body: Body,
    reader: Reader,
    ended: bool,
}

impl Frames {
    /// The next frame; `None` after the last one. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The status that the answer ended with, a connection that broke, bytes that are no frames.
    pub async fn message(&mut self) -> Result<Option<KvFrame>, Status> {
        loop {
            if let Some(frame) = self.reader.next()? {
                return Ok(Some(frame));
            }
            if self.ended {
                return Ok(None);
            }
            let body = &mut self.body;
            match poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.reader.push(data),
                    Err(frame) => self.end(frame.trailers_ref())?,
                },
                Some(Err(status)) => {
                    self.ended = true;
                    return Err(status);
                }
                None => self.end(None)?,
            }
        }
    }

    /// The answer is over: with which status?
    fn end(&mut self, trailers: Option<&HeaderMap>) -> Result<(), Status> {
        self.ended = true;
        match trailers.and_then(Status::from_header_map) {
            Some(status) if status.code() != Code::Ok => Err(status),
            Some(_) if self.reader.is_empty() => Ok(()),
            Some(_) => Err(Status::internal("the answer ended within a message")),
            None => Err(Status::unknown("the answer ended without a status")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::kv_frame;
    use tonic::codegen::tokio_stream;

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
        Frames { body: response.into_body(), reader: Reader::new(1 << 20), ended: false }
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

    #[test]
    fn paths_are_those_of_the_service() {
        struct Nobody;
        let name = <crate::v1::cache_server::CacheServer<Nobody> as tonic::server::NamedService>::NAME;
        assert_eq!((GET, GET_LAYERS), (&*format!("/{name}/Get"), &*format!("/{name}/GetLayers")));
    }
}
