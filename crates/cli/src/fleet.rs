//! All four services in this process, talking gRPC over loopback.

use anyhow::Context as _;
use cacheclip_rpc::v1::GetCapabilitiesRequest;
use cacheclip_rpc::v1::gateway_client::GatewayClient;
use cacheclip_service::{ConnectOptions, Running};
use std::path::Path;
use std::time::Duration;
use tonic::transport::Channel;

/// Longest wait for a gateway to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a fleet is made of. Endpoints between the services are filled in as they start.
#[derive(Clone, Debug)]
pub struct Options {
    /// The store.
    pub store: cacheclip_cache_store::Options,
    /// Endpoints of stores that run elsewhere, in place of one in this process.
    pub stores: Vec<String>,
    /// The scorer; absent: requests go down the ladder.
    pub scorer: Option<cacheclip_aux_scorer::Options>,
    /// The worker.
    pub worker: cacheclip_gpu_worker::Options,
    /// The gateway.
    pub gateway: cacheclip_gateway::Options,
}

impl Options {
    /// Models from `models/primary` and `models/aux`, the store in `data`, every port free-chosen.
    pub fn embedded(models: &Path, data: &Path) -> Self {
        let primary = models.join("primary");
        Self {
            store: cacheclip_cache_store::Options { data_dir: data.to_owned(), ..Default::default() },
            stores: Vec::new(),
            scorer: Some(cacheclip_aux_scorer::Options {
                model_dir: models.join("aux"),
                ..Default::default()
            }),
            worker: cacheclip_gpu_worker::Options { model_dir: primary.clone(), ..Default::default() },
            gateway: cacheclip_gateway::Options { model_dir: primary, ..Default::default() },
        }
    }
}

/// Running services; stopped front to back.
#[derive(Debug)]
pub struct Fleet {
    gateway: Running,
    worker: Running,
    scorer: Option<Running>,
    store: Option<Running>,
}

impl Fleet {
    /// Starts store, scorer, worker and gateway, each on a port of its own.
    ///
    /// # Errors
    /// Whatever keeps one of them from starting, under its name.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let Options { store, mut stores, mut scorer, mut worker, mut gateway } = options;
        let store = match stores.is_empty() {
            true => Some(cacheclip_cache_store::start(store).await.context("cache-store")?),
            false => None,
        };
        stores.extend(store.as_ref().map(Running::endpoint));
        if let Some(scorer) = &mut scorer {
            scorer.stores.clone_from(&stores);
        }
        let scorer = match scorer {
            Some(scorer) => Some(cacheclip_aux_scorer::start(scorer).await.context("aux-scorer")?),
            None => None,
        };
        worker.stores = stores;
        let worker = cacheclip_gpu_worker::start(worker).await.context("gpu-worker")?;
        gateway.workers = vec![worker.endpoint()];
        gateway.scorers = scorer.iter().map(Running::endpoint).collect();
        let gateway = cacheclip_gateway::start(gateway).await.context("gateway")?;
        Ok(Self { gateway, worker, scorer, store })
    }

    /// Where clients dial.
    pub fn endpoint(&self) -> String {
        self.gateway.endpoint()
    }

    /// The gateway's admin port.
    pub fn admin(&self) -> Option<std::net::SocketAddr> {
        self.gateway.admin()
    }

    /// A client of the gateway.
    ///
    /// # Errors
    /// The gateway does not answer.
    pub async fn client(&self) -> anyhow::Result<GatewayClient<Channel>> {
        connect(&self.endpoint()).await
    }

    /// Drains front to back, so that nothing in flight loses what it stands on.
    pub async fn drain(self) {
        self.gateway.drain().await;
        self.worker.drain().await;
        if let Some(scorer) = self.scorer {
            scorer.drain().await;
        }
        if let Some(store) = self.store {
            store.drain().await;
        }
    }
}

/// A client of a gateway that answers, within a bounded wait.
///
/// # Errors
/// An endpoint that cannot be dialled, or no answer.
pub async fn connect(endpoint: &str) -> anyhow::Result<GatewayClient<Channel>> {
    let channel = cacheclip_service::connect(endpoint, &ConnectOptions::default())?;
    let mut client = GatewayClient::new(channel);
    let answer = tokio::time::timeout(PATIENCE, client.get_capabilities(GetCapabilitiesRequest {}));
    answer
        .await
        .with_context(|| format!("no gateway answers at {endpoint}"))?
        .with_context(|| format!("gateway at {endpoint}"))?;
    Ok(client)
}
