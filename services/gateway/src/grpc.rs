//! The `Gateway` service.

use crate::deletion::Deletion;
use crate::generate::{self, Relay};
use crate::ingest::Ingest;
use crate::request::{Generation, tenant};
use crate::sections::Sections;
use crate::{blocking, metrics};
use cacheclip_plan::Policy;
use cacheclip_rpc::v1;
use cacheclip_service::request_id;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Events that may wait for a slow caller.
const EVENTS: usize = 32;

/// Everything the service needs; one per process.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) relay: Relay,
    pub(crate) ingest: Ingest,
    pub(crate) deletion: Deletion,
    pub(crate) sections: Sections,
    pub(crate) tenant_header: String,
    pub(crate) default_answer: u32,
    pub(crate) default_stop: Vec<String>,
}

/// The gRPC service. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Service(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl v1::gateway_server::Gateway for Service {
    type GenerateStream = ReceiverStream<Result<v1::GenerateEvent, Status>>;
    type IngestStream = ReceiverStream<Result<v1::IngestProgress, Status>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        // An unknown name must not become a label.
        let policy = request.get_ref().policy.parse().map_or("unknown", |policy: Policy| policy.name());
        let stream = self.0.generate(request).await;
        stream.map(Response::new).inspect_err(|status| metrics::request(policy, status.code()))
    }

    async fn ingest(
        &self,
        request: Request<Streaming<v1::IngestRequest>>,
    ) -> Result<Response<Self::IngestStream>, Status> {
        let tenant = tenant(request.metadata(), &self.0.tenant_header)?;
        let (progress, stream) = mpsc::channel(EVENTS);
        let shared = Arc::clone(&self.0);
        request_id::spawn(async move { shared.ingest.run(tenant, request.into_inner(), progress).await });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn delete_document(
        &self,
        request: Request<v1::DeleteIngestedRequest>,
    ) -> Result<Response<v1::DeletionReceipt>, Status> {
        let tenant = tenant(request.metadata(), &self.0.tenant_header)?;
        // A caller that goes away must not leave the fleet asked by halves.
        let deletion = self.0.deletion.clone();
        let running = request_id::spawn(async move { deletion.run(&tenant, request.into_inner()).await });
        let receipt = running.await.map_err(|error| Status::internal(format!("deleting failed: {error}")))?;
        receipt.map(Response::new)
    }

    async fn get_capabilities(
        &self,
        _: Request<v1::GetCapabilitiesRequest>,
    ) -> Result<Response<v1::GetCapabilitiesResponse>, Status> {
        let described = self.0.relay.workers.described()?;
        let model = v1::ModelInfo {
            name: described.model.clone(),
            layout: Some(described.layout.clone()),
            max_tokens: u32::try_from(described.max_tokens).unwrap_or(u32::MAX),
        };
        Ok(Response::new(v1::GetCapabilitiesResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            proto: "cacheclip.v1".into(),
            key_spec: cacheclip_chunk::KEY_SPEC,
            models: vec![model],
            policies: described.policies.clone(),
        }))
    }
}

impl Shared {
    async fn generate(
        self: &Arc<Self>,
        request: Request<v1::GenerateRequest>,
    ) -> Result<ReceiverStream<Result<v1::GenerateEvent, Status>>, Status> {
        let began = Instant::now();
        let described = self.relay.workers.described()?;
        let tenant = tenant(request.metadata(), &self.tenant_header)?;
        let mut request = Generation::check(
            request.into_inner(),
            tenant,
            &described,
            self.default_answer,
            &self.default_stop,
        )?;
        let (sections, model) = (self.sections.clone(), described.model.clone());
        let (request, prompt) = blocking(move || {
            let prompt = sections.prompt(&mut request, &described)?;
            Ok::<_, Status>((request, prompt))
        })
        .await??;
        let tokenize = began.elapsed().as_secs_f64();
        metrics::stage("tokenize", tokenize);

        let (events, stream) = mpsc::channel(EVENTS);
        let id = request_id::current().map(|id| id.to_string()).unwrap_or_default();
        let started = v1::Started { request_id: id, model };
        generate::send(&events, v1::generate_event::Event::Started(started)).await;
        let shared = Arc::clone(self);
        request_id::spawn(async move { shared.relay.run(request, prompt, tokenize, events).await });
        Ok(ReceiverStream::new(stream))
    }
}
