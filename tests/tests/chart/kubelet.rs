//! A kubelet's part in a pod's life, as far as the chart asks for it: probes, and the end.

use crate::helm::output;
use crate::rewrite::Rewrites;
use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// What a kubelet reaches of a container: its ports, and commands run inside of it.
#[derive(Clone, Debug)]
pub(crate) struct Inside {
    /// By container port: where that is on this machine.
    pub(crate) ports: BTreeMap<i32, SocketAddr>,
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) rewrites: Rewrites,
}

/// Asks once, with the probe's own timeout.
pub(crate) async fn passes(probe: &Probe, inside: &Inside) -> bool {
    let limit = Duration::from_secs(probe.timeout_seconds.unwrap_or(1) as u64);
    if let Some(grpc) = &probe.grpc {
        let service = grpc.service.as_deref().unwrap_or_default();
        return serving(inside.ports[&grpc.port], service, limit).await;
    }
    if let Some(socket) = &probe.tcp_socket {
        let IntOrString::Int(port) = &socket.port else { panic!("{socket:?}: not by number") };
        let connecting = tokio::net::TcpStream::connect(inside.ports[port]);
        return tokio::time::timeout(limit, connecting).await.is_ok_and(|connected| connected.is_ok());
    }
    let exec = probe.exec.as_ref().and_then(|exec| exec.command.as_ref());
    let words = exec.unwrap_or_else(|| panic!("the chart has no other kinds of probes: {probe:?}"));
    let words = words.iter().map(|word| inside.rewrites.apply(word)).collect::<Vec<_>>();
    output(Command::new(&words[0]).args(&words[1..]).env_clear().envs(&inside.environment)).status.success()
}

/// Whether `grpc.health.v1` says SERVING.
pub(crate) async fn serving(address: SocketAddr, service: &str, limit: Duration) -> bool {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an endpoint");
    let mut client = HealthClient::new(endpoint.connect_timeout(limit).connect_lazy());
    let asking = client.check(HealthCheckRequest { service: service.into() });
    let answer = tokio::time::timeout(limit, asking).await;
    matches!(answer, Ok(Ok(answer)) if answer.get_ref().status() == ServingStatus::Serving)
}

/// The probes of a container with their names, in the order in which they begin.
pub(crate) fn probes(container: &Container) -> Vec<(&'static str, &Probe)> {
    let all = [
        ("startup", &container.startup_probe),
        ("liveness", &container.liveness_probe),
        ("readiness", &container.readiness_probe),
    ];
    all.into_iter().filter_map(|(name, probe)| Some((name, probe.as_ref()?))).collect()
}
