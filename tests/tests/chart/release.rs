//! A rendered release as processes of this machine: every pod the real binary, with its rendered files, arguments and
//! environment. Hosts become loopback, ports free ones, and mounts temporary directories; nothing else differs.

use crate::helm::{NAMESPACE, RELEASE, binary, rendered, root};
use crate::kubelet::{Inside, passes, probes};
use crate::objects::of_kind;
use crate::outside::{self, External};
use crate::rewrite::{Rewrites, changed};
use crate::workload::{SERVICES, Workload, workload, workloads};
use cacheclip_tests::fleet::redis_server;
use cacheclip_tests::process::{Process, Program, free_port};
use k8s_openapi::api::core::v1::{ConfigMap, Container, Volume};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Where the images keep the bundled models: deploy/docker copies them there.
const BUNDLED: &str = "/usr/share/cacheclip/models/tiny";
/// What a configuration may differ in from the rendered one.
const ELSEWHERE: [&str; 9] = [
    "service.listen",
    "service.admin_listen",
    "model_dir",
    "workers",
    "scorers",
    "stores",
    "data_dir",
    "index.urls",
    "index.ca_file",
];

/// A pod of one container.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) component: String,
    pub(crate) container: Container,
    pub(crate) inside: Inside,
    pub(crate) process: Process,
}

impl Pod {
    /// Its container's ports by name.
    pub(crate) fn ports(&self) -> impl Iterator<Item = (&str, SocketAddr)> {
        let ports = self.container.ports.iter().flatten();
        ports.map(|port| (port.name.as_deref().expect("a name"), self.inside.ports[&port.container_port]))
    }
}

/// All pods of a release; they end with it.
#[derive(Debug)]
pub(crate) struct Release {
    pub(crate) pods: Vec<Pod>,
    /// What the release uses and does not bring.
    _external: Option<External>,
    _dir: TempDir,
}

/// What is known of a pod before anything has started.
struct Planned {
    workload: usize,
    name: String,
    ports: BTreeMap<i32, SocketAddr>,
}

impl Release {
    /// Starts what a profile renders, in no order that anything could rely on; `None` where helm, a binary or Redis is
    /// missing.
    pub(crate) async fn start(profile: &str) -> Option<Self> {
        let objects = rendered(profile)?;
        SERVICES.iter().try_for_each(|name| binary(&format!("cacheclip-{name}")).map(drop))?;
        let dir = tempfile::tempdir().expect("a directory");
        let store = workload(&objects, "cache-store").config(&objects);
        let index = &store.parse::<toml::Table>().expect("TOML")["index"];
        if index["kind"].as_str() == Some("redis") {
            redis_server()?;
        }
        let external = outside::start(index, dir.path()).await;

        let workloads = workloads(&objects);
        let plans = planned(&workloads);
        let mut shared = addresses(&workloads, &plans);
        shared.add(BUNDLED, root().join("models/tiny").display().to_string());
        for (rendered, here) in external.iter().flat_map(|external| &external.urls) {
            shared.add(rendered, here);
        }
        let ca = external.as_ref().map(|external| external.ca.as_str());
        let start = |plan: &Planned| {
            let workload = &workloads[plan.workload];
            let own = dir.path().join(&plan.name);
            let mut rewrites = shared.clone();
            listens(plan, &mut rewrites);
            let mounts = mounts(workload, &own, &mut rewrites);
            for (volume, here) in &mounts {
                fill(workload, *volume, here, &objects, &rewrites, ca);
            }
            pod(workload, plan, &objects, rewrites, &own)
        };
        let pods = plans.iter().map(start).collect();
        Some(Self { pods, _external: external, _dir: dir })
    }

    /// The pods of a component.
    pub(crate) fn of(&self, component: &str) -> impl Iterator<Item = &Pod> {
        self.pods.iter().filter(move |pod| pod.component == component)
    }

    /// Waits until every probe of every container has passed: the one of the start first, as a kubelet does.
    pub(crate) async fn passed(&mut self) {
        for Pod { container, inside, process, .. } in &mut self.pods {
            for (name, probe) in probes(container) {
                process
                    .until(&format!("passing its {name} probe"), async || passes(probe, inside).await)
                    .await;
            }
        }
    }
}

/// One pod for every replica, with a free port for every port of its container.
fn planned(workloads: &[Workload]) -> Vec<Planned> {
    let mut plans = Vec::new();
    for (at, workload) in workloads.iter().enumerate() {
        for replica in 0..workload.replicas.unwrap_or(1) {
            let ports = workload.container().ports.iter().flatten();
            let here = |port: i32| (port, SocketAddr::from(([127, 0, 0, 1], free_port())));
            plans.push(Planned {
                workload: at,
                name: format!("{}-{replica}", workload.name),
                ports: ports.map(|port| here(port.container_port)).collect(),
            });
        }
    }
    plans
}

/// What the cluster's name server would say: a headless name is all of its pods, and every pod of a StatefulSet has a
/// name of its own.
fn addresses(workloads: &[Workload], plans: &[Planned]) -> Rewrites {
    let mut rewrites = Rewrites::default();
    for (at, workload) in workloads.iter().enumerate() {
        let name = &workload.name;
        let pods = plans.iter().filter(|plan| plan.workload == at).collect::<Vec<_>>();
        for port in workload.container().ports.iter().flatten().map(|port| port.container_port) {
            let many = pods.iter().map(|pod| format!("\"dns+http://{}\"", pod.ports[&port]));
            let many = many.collect::<Vec<_>>().join(", ");
            rewrites.add(format!("\"dns+http://{name}.{NAMESPACE}.svc:{port}\""), many);
            for pod in &pods {
                rewrites.add(
                    format!("http://{}.{name}.{NAMESPACE}.svc:{port}", pod.name),
                    format!("http://{}", pod.ports[&port]),
                );
                rewrites.add(
                    format!("redis://{name}.{NAMESPACE}.svc:{port}"),
                    format!("redis://{}", pod.ports[&port]),
                );
            }
        }
    }
    rewrites
}

/// The pod's own ports, in every form in which one is written down.
fn listens(plan: &Planned, rewrites: &mut Rewrites) {
    for (port, here) in &plan.ports {
        rewrites.add(format!("0.0.0.0:{port}"), here.to_string());
        // Redis' file, and its probe.
        rewrites.add(format!("port {port}"), format!("port {}", here.port()));
        rewrites.add(format!("-p {port}"), format!("-p {}", here.port()));
    }
    rewrites.add("bind * -::*", "bind 127.0.0.1");
}

/// A directory for every mount, with the volume behind it; a StatefulSet's own claim is none of the pod's volumes.
fn mounts<'a>(
    workload: &'a Workload,
    own: &Path,
    rewrites: &mut Rewrites,
) -> Vec<(Option<&'a Volume>, PathBuf)> {
    let mut found = Vec::new();
    for mount in workload.container().volume_mounts.iter().flatten() {
        let volume = workload.pod.volumes.iter().flatten().find(|volume| volume.name == mount.name);
        // A claim of the operator's is the models' volume: the fleet's small models stand for it.
        let here = match volume.and_then(|volume| volume.persistent_volume_claim.as_ref()) {
            Some(_) => root().join("models/tiny").join(model_of(workload)),
            None => own.join(&mount.name),
        };
        std::fs::create_dir_all(&here).expect("a directory");
        rewrites.add(&mount.mount_path, here.display().to_string());
        found.push((volume, here));
    }
    found
}

fn model_of(workload: &Workload) -> &'static str {
    if workload.component() == "aux-scorer" { "aux" } else { "primary" }
}

/// Writes what a volume holds: files of a ConfigMap, a certificate, or nothing.
fn fill(
    workload: &Workload,
    volume: Option<&Volume>,
    here: &Path,
    objects: &[Value],
    rewrites: &Rewrites,
    ca: Option<&str>,
) {
    let Some(volume) = volume else { return };
    if let Some(map) = &volume.config_map {
        let maps = of_kind::<ConfigMap>(objects, "ConfigMap");
        let map = maps.into_iter().find(|found| found.metadata.name.as_ref() == Some(&map.name));
        for (name, text) in map.and_then(|map| map.data).expect("the ConfigMap's files") {
            let written = rewrites.apply(&text);
            if name == "config.toml" {
                let allowed = ELSEWHERE.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
                let changed = changed(&text, &written);
                assert!(changed.is_subset(&allowed), "{}: {changed:?}", workload.name);
                for cluster in
                    [".svc:", "0.0.0.0", "example.com", "/var/lib", "/usr/share", "\"/models", "\"/etc"]
                {
                    assert!(!written.contains(cluster), "{}: {cluster} in {written}", workload.name);
                }
            }
            std::fs::write(here.join(name), written).expect("a write");
        }
    }
    if let Some(secret) = &volume.secret {
        for item in secret.items.iter().flatten() {
            std::fs::write(here.join(&item.path), ca.expect("the only secret file is a CA"))
                .expect("a write");
        }
    }
}

/// Starts a pod's container: the image's entry point, or the container's own command.
fn pod(workload: &Workload, plan: &Planned, objects: &[Value], rewrites: Rewrites, own: &Path) -> Pod {
    let container = workload.container().clone();
    let rewritten = |words: &Option<Vec<String>>| {
        words.iter().flatten().map(|word| rewrites.apply(word)).collect::<Vec<_>>()
    };
    let mut environment = workload.environment_of(objects, &plan.name);
    environment.values_mut().for_each(|value| *value = rewrites.apply(value));
    let mut words = rewritten(&container.command);
    words.extend(rewritten(&container.args));
    let path = if container.command.is_some() {
        // Its image has a shell and a path; the services' have neither.
        environment.insert("PATH".into(), std::env::var("PATH").expect("a path"));
        PathBuf::from(words.remove(0))
    } else {
        binary(&format!("cacheclip-{}", workload.component())).expect("it was looked for before")
    };
    // Empty: a default that names a directory beside the process would find nothing, as in the image.
    let directory = own.join("empty");
    std::fs::create_dir_all(&directory).expect("a directory");
    let named = |name: &str| {
        let mut ports = container.ports.iter().flatten();
        let port = ports.find(|port| port.name.as_deref() == Some(name));
        port.map(|port| plan.ports[&port.container_port])
    };
    let first = named("grpc").or_else(|| named("redis")).expect("a port");
    let admin = named("metrics").unwrap_or(first);
    let program = Program { path, arguments: words, environment: Some(environment.clone()), directory };
    let process = Process::start(&plan.name, program, own, first, admin);
    let inside = Inside { ports: plan.ports.clone(), environment, rewrites };
    assert!(plan.name.starts_with(RELEASE), "{}", plan.name);
    Pod { component: workload.component().to_owned(), container, inside, process }
}
