//! The service as connections see it: streams of KV by [`cacheclip_rpc::stream`], which copies none of it, and
//! everything else by generated code.

use crate::grpc::Service;
use cacheclip_rpc::stream;
use cacheclip_rpc::v1::PutFrame;
use cacheclip_rpc::v1::cache_server::{Cache, CacheServer};
use std::convert::Infallible;
use std::task::{Context, Poll};
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;

/// The tonic service. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Surface {
    service: Service,
    generated: CacheServer<Service>,
    message_bytes: usize,
}

impl Surface {
    /// Messages of more than `message_bytes` bytes are refused.
    pub(crate) fn new(service: Service, message_bytes: usize) -> Self {
        let generated = CacheServer::new(service.clone())
            .max_decoding_message_size(message_bytes)
            .max_encoding_message_size(message_bytes);
        Self { service, generated, message_bytes }
    }
}

impl NamedService for Surface {
    const NAME: &'static str = <CacheServer<Service> as NamedService>::NAME;
}

impl tonic::codegen::Service<Request<Body>> for Surface {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Response<Body>, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (service, most) = (self.service.clone(), self.message_bytes);
        match request.uri().path() {
            stream::GET => {
                stream::answer(async move { service.get(stream::read(request, most).await?).await })
            }
            stream::GET_LAYERS => {
                stream::answer(async move { service.get_layers(stream::read(request, most).await?).await })
            }
            stream::PUT => {
                stream::reply(
                    async move { service.put_frames(stream::messages::<PutFrame>(request, most)).await },
                )
            }
            _ => self.generated.call(request),
        }
    }
}
