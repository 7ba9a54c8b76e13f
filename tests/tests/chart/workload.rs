//! Deployments and StatefulSets under one roof, and what goes with a pod of theirs.

use crate::helm::{NAMESPACE, RELEASE};
use crate::objects::of_kind;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{ConfigMap, Container, PodSpec, PodTemplateSpec, Secret, Service};
use serde_json::Value;
use std::collections::BTreeMap;

pub(crate) type Labels = BTreeMap<String, String>;

/// The four services, in the words of labels and names.
pub(crate) const SERVICES: [&str; 4] = ["gateway", "gpu-worker", "aux-scorer", "cache-store"];

/// What stands for a password of the operator's, whose Secret is not the chart's.
pub(crate) const SECRET_SAMPLE: &str = "a-password";

/// One Deployment or StatefulSet.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) name: String,
    pub(crate) replicas: Option<i32>,
    pub(crate) selector: Labels,
    pub(crate) labels: Labels,
    pub(crate) pod: PodSpec,
    /// A StatefulSet's headless service.
    pub(crate) headless: Option<String>,
    /// Names of a StatefulSet's claims.
    pub(crate) claims: Vec<String>,
}

impl Workload {
    fn new(
        name: Option<String>,
        replicas: Option<i32>,
        selector: Option<Labels>,
        pod: PodTemplateSpec,
    ) -> Self {
        Self {
            name: name.expect("a name"),
            replicas,
            selector: selector.expect("labels to select by"),
            labels: pod.metadata.and_then(|metadata| metadata.labels).unwrap_or_default(),
            pod: pod.spec.expect("a pod"),
            headless: None,
            claims: Vec::new(),
        }
    }

    /// The component's name: "gateway", …, "redis".
    pub(crate) fn component(&self) -> &str {
        &self.labels["app.kubernetes.io/component"]
    }

    /// The service's container: the one that is no init container.
    pub(crate) fn container(&self) -> &Container {
        assert_eq!(self.pod.containers.len(), 1, "{}", self.name);
        &self.pod.containers[0]
    }

    /// Its container port of a name.
    pub(crate) fn port(&self, name: &str) -> i32 {
        let mut ports = self.container().ports.iter().flatten();
        let port = ports.find(|port| port.name.as_deref() == Some(name));
        port.unwrap_or_else(|| panic!("{}: no port {name}", self.name)).container_port
    }

    /// The text of its configuration file, by way of the volume that it is mounted from.
    pub(crate) fn config(&self, objects: &[Value]) -> String {
        let mut mounts = self.container().volume_mounts.iter().flatten();
        let mount = mounts.find(|mount| mount.mount_path == "/etc/cacheclip").expect("the configuration");
        let mut volumes = self.pod.volumes.iter().flatten();
        let volume = volumes.find(|volume| volume.name == mount.name).expect("the mount's volume");
        let name = &volume.config_map.as_ref().expect("a ConfigMap").name;
        let maps = of_kind::<ConfigMap>(objects, "ConfigMap");
        let map =
            maps.into_iter().find(|map| map.metadata.name.as_ref() == Some(name)).expect("that ConfigMap");
        map.data.expect("data").remove("config.toml").expect("config.toml")
    }

    /// The environment of its container in the first pod, with references looked up or, where they lead out of the
    /// chart, replaced by samples.
    pub(crate) fn environment(&self, objects: &[Value]) -> Labels {
        self.environment_of(objects, &format!("{}-0", self.name))
    }

    /// The same in the pod of a name.
    pub(crate) fn environment_of(&self, objects: &[Value], pod: &str) -> Labels {
        let mut environment = Labels::new();
        for variable in self.container().env.iter().flatten() {
            let value = match (&variable.value, &variable.value_from) {
                (Some(value), None) => {
                    let expand = |text: String, (name, value): (&String, &String)| {
                        text.replace(&format!("$({name})"), value)
                    };
                    environment.iter().fold(value.clone(), expand)
                }
                (None, Some(from)) => {
                    if let Some(field) = &from.field_ref {
                        assert_eq!(field.field_path, "metadata.name", "{}", variable.name);
                        pod.to_owned()
                    } else if let Some(field) = &from.resource_field_ref {
                        assert_eq!(field.resource, "requests.cpu", "{}", variable.name);
                        "2".into()
                    } else {
                        let secret = from.secret_key_ref.as_ref().expect("a secret");
                        secret_value(objects, &secret.name, &secret.key)
                    }
                }
                both => panic!("{}: {both:?}", variable.name),
            };
            environment.insert(variable.name.clone(), value);
        }
        environment
    }
}

fn secret_value(objects: &[Value], name: &str, key: &str) -> String {
    let secrets = of_kind::<Secret>(objects, "Secret");
    match secrets.into_iter().find(|secret| secret.metadata.name.as_deref() == Some(name)) {
        Some(secret) => {
            let data =
                secret.data.expect("data").remove(key).unwrap_or_else(|| panic!("{name} has no {key}"));
            String::from_utf8(data.0).expect("text")
        }
        None if key == "scope-secret" => "0123456789abcdef".repeat(4),
        None => SECRET_SAMPLE.into(),
    }
}

/// Every workload of the rendered objects.
pub(crate) fn workloads(objects: &[Value]) -> Vec<Workload> {
    let deployments = of_kind::<Deployment>(objects, "Deployment").into_iter().map(|object| {
        let spec = object.spec.expect("a spec");
        Workload::new(object.metadata.name, spec.replicas, spec.selector.match_labels, spec.template)
    });
    let stateful = of_kind::<StatefulSet>(objects, "StatefulSet").into_iter().map(|object| {
        let spec = object.spec.expect("a spec");
        let claims =
            spec.volume_claim_templates.into_iter().flatten().filter_map(|claim| claim.metadata.name);
        Workload {
            headless: spec.service_name,
            claims: claims.collect(),
            ..Workload::new(object.metadata.name, spec.replicas, spec.selector.match_labels, spec.template)
        }
    });
    deployments.chain(stateful).collect()
}

/// The workload of a component.
pub(crate) fn workload(objects: &[Value], component: &str) -> Workload {
    let mut found = workloads(objects).into_iter().filter(|workload| workload.component() == component);
    let workload = found.next().unwrap_or_else(|| panic!("no workload {component}"));
    assert!(found.next().is_none(), "two workloads {component}");
    workload
}

/// Whether a selector's labels are all among an object's.
pub(crate) fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(name, value)| labels.get(name) == Some(value))
}

/// A host name and port of the configuration, `NAME.NAMESPACE.svc:PORT`, as the service and its workload.
pub(crate) fn resolve(objects: &[Value], address: &str) -> (Service, Workload, i32) {
    let (host, port) = address.rsplit_once(':').expect("host:port");
    let name = host
        .strip_suffix(&format!(".{NAMESPACE}.svc"))
        .unwrap_or_else(|| panic!("{address}: not in {NAMESPACE}"));
    assert!(name.starts_with(RELEASE), "{address}");
    let mut services = of_kind::<Service>(objects, "Service").into_iter();
    let service = services.find(|service| service.metadata.name.as_deref() == Some(name));
    let service = service.unwrap_or_else(|| panic!("{address}: no service {name}"));
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.clone()).expect("a selector");
    let mut found = workloads(objects).into_iter().filter(|workload| selects(&selector, &workload.labels));
    let workload = found.next().unwrap_or_else(|| panic!("{name} selects no pod"));
    assert!(found.next().is_none(), "{name} selects pods of two workloads");
    (service, workload, port.parse().expect("a port"))
}
