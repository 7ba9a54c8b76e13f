//! Who may talk to whom: the policies, applied the way Kubernetes does, to the addresses that the configurations name.

use crate::helm::{profiles, rendered};
use crate::objects::of_kind;
use crate::workload::{Labels, SERVICES, resolve, selects, workload, workloads};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;

/// A pod as a policy sees it.
#[derive(Clone, Debug)]
struct Pod {
    labels: Labels,
    /// The labels of its namespace, when that is not the release's own.
    elsewhere: Option<Labels>,
}

impl Pod {
    fn of(labels: &[(&str, &str)]) -> Self {
        Self {
            labels: labels.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
            elsewhere: None,
        }
    }

    fn in_namespace(self, name: &str) -> Self {
        let labels = Labels::from([("kubernetes.io/metadata.name".into(), name.into())]);
        Self { elsewhere: Some(labels), ..self }
    }
}

fn matches(selector: &LabelSelector, labels: &Labels) -> bool {
    assert!(selector.match_expressions.is_none(), "the chart selects by labels alone");
    selector.match_labels.as_ref().is_none_or(|wanted| selects(wanted, labels))
}

fn is_peer(peer: &NetworkPolicyPeer, pod: &Pod) -> bool {
    let namespace = match (&peer.namespace_selector, &pod.elsewhere) {
        (None, elsewhere) => elsewhere.is_none(),
        (Some(selector), Some(labels)) => matches(selector, labels),
        // The release's own namespace, whose labels are its name alone.
        (Some(selector), None) => selector.match_labels.is_none(),
    };
    let chosen = peer.pod_selector.as_ref().is_none_or(|selector| matches(selector, &pod.labels));
    peer.ip_block.is_none() && namespace && chosen
}

fn opens(ports: &Option<Vec<NetworkPolicyPort>>, port: i32) -> bool {
    let one = |open: &NetworkPolicyPort| {
        open.port == Some(IntOrString::Int(port)) && open.protocol.as_deref() == Some("TCP")
    };
    ports.as_ref().is_none_or(|ports| ports.iter().any(one))
}

struct Policies(Vec<NetworkPolicySpec>);

impl Policies {
    fn of(objects: &[Value]) -> Self {
        let policies = of_kind::<NetworkPolicy>(objects, "NetworkPolicy").into_iter();
        Self(policies.map(|policy| policy.spec.expect("a spec")).collect())
    }

    /// The policies of a direction that hold for a pod; pods elsewhere are not the release's to restrict.
    fn holding<'a>(&'a self, direction: &'a str, pod: &'a Pod) -> Vec<&'a NetworkPolicySpec> {
        let holds = |policy: &&NetworkPolicySpec| {
            let directed = policy.policy_types.iter().flatten().any(|each| each == direction);
            let selected = policy.pod_selector.as_ref().is_none_or(|selector| matches(selector, &pod.labels));
            directed && selected && pod.elsewhere.is_none()
        };
        self.0.iter().filter(holds).collect()
    }

    /// Whether the caller's side lets a connection out.
    fn leaves(&self, from: &Pod, to: &Pod, port: i32) -> bool {
        let holding = self.holding("Egress", from);
        let mut rules = holding.iter().flat_map(|policy| policy.egress.iter().flatten());
        let peer = |peers: &Vec<NetworkPolicyPeer>| peers.iter().any(|peer| is_peer(peer, to));
        holding.is_empty() || rules.any(|rule| opens(&rule.ports, port) && rule.to.as_ref().is_none_or(peer))
    }

    /// Whether the other side lets it in.
    fn enters(&self, from: &Pod, to: &Pod, port: i32) -> bool {
        let holding = self.holding("Ingress", to);
        let mut rules = holding.iter().flat_map(|policy| policy.ingress.iter().flatten());
        let peer = |peers: &Vec<NetworkPolicyPeer>| peers.iter().any(|peer| is_peer(peer, from));
        holding.is_empty()
            || rules.any(|rule| opens(&rule.ports, port) && rule.from.as_ref().is_none_or(peer))
    }

    fn allow(&self, from: &Pod, to: &Pod, port: i32) -> bool {
        self.leaves(from, to, port) && self.enters(from, to, port)
    }
}

/// The addresses of other services in a configuration, without their schemes.
fn addresses(config: &toml::Table) -> Vec<String> {
    let lists = [
        config.get("workers"),
        config.get("scorers"),
        config.get("stores"),
        config.get("index").and_then(|index| index.get("urls")),
    ];
    let texts = lists.into_iter().flatten().flat_map(|list| list.as_array().expect("a list"));
    texts
        .map(|text| text.as_str().and_then(|text| text.split_once("://")).expect("an address").1.to_owned())
        .collect()
}

#[test]
fn every_address_in_a_configuration_leads_to_a_ready_port_and_may_be_reached() {
    for (profile, objects) in profiles() {
        let policies = Policies::of(&objects);
        let mut edges = Vec::new();
        for component in SERVICES {
            let caller = workload(&objects, component);
            let config = caller.config(&objects).parse::<toml::Table>().expect("TOML");
            for address in addresses(&config).into_iter().filter(|address| !address.contains("example.com")) {
                let (service, callee, port) = resolve(&objects, &address);
                let spec = service.spec.expect("a spec");
                // A name with an address of its own would hide the peers behind it.
                assert_eq!(spec.cluster_ip.as_deref(), Some("None"), "{profile}: {address}");
                assert!(spec.ports.iter().flatten().any(|each| each.port == port), "{profile}: {address}");
                let pod = |labels: &Labels| Pod { labels: labels.clone(), elsewhere: None };
                let allowed = policies.allow(&pod(&caller.labels), &pod(&callee.labels), port);
                assert!(allowed, "{profile}: {component} may not reach {address}");
                edges.push(format!("{component} {}", callee.component()));
            }
        }
        let mut expected = vec![
            "gateway gpu-worker",
            "gateway aux-scorer",
            "gpu-worker cache-store",
            "aux-scorer cache-store",
        ];
        if matches!(profile, "default" | "gpu") {
            expected.push("cache-store redis");
        }
        assert_eq!(edges, expected, "{profile}");
    }
}

#[test]
fn nobody_reaches_what_is_not_theirs() {
    let Some(objects) = rendered("default") else { return };
    let policies = Policies::of(&objects);
    let pods = workloads(&objects).into_iter().map(|workload| {
        let port =
            if workload.component() == "redis" { workload.port("redis") } else { workload.port("grpc") };
        (workload.component().to_owned(), Pod { labels: workload.labels.clone(), elsewhere: None }, port)
    });
    let pods = pods.collect::<Vec<_>>();
    let allowed = [
        ("gateway", "gpu-worker"),
        ("gateway", "aux-scorer"),
        ("gpu-worker", "cache-store"),
        ("aux-scorer", "cache-store"),
        ("cache-store", "redis"),
    ];
    for (from, caller, _) in &pods {
        for (to, callee, port) in &pods {
            // Each side by itself: where one plugin or policy fails, the other still holds.
            let expected = allowed.contains(&(from.as_str(), to.as_str()));
            assert_eq!(policies.leaves(caller, callee, *port), expected, "out of {from}, to {to}");
            let open = to == "gateway";
            assert_eq!(policies.enters(caller, callee, *port), expected || open, "into {to}, from {from}");
        }
    }
    let stranger = Pod::of(&[("app", "other")]);
    let foreign = stranger.clone().in_namespace("elsewhere");
    let prometheus = Pod::of(&[("app.kubernetes.io/name", "prometheus")]).in_namespace("monitoring");
    for (to, callee, port) in &pods {
        // In the namespace: the gateway alone. From elsewhere: nothing. Metrics: Prometheus, and not Redis.
        assert_eq!(policies.allow(&stranger, callee, *port), to == "gateway", "a stranger to {to}");
        assert!(!policies.allow(&foreign, callee, *port), "a pod of another namespace to {to}");
        assert!(!policies.allow(&foreign, callee, 9090), "a pod of another namespace to {to}'s metrics");
        assert_eq!(policies.allow(&prometheus, callee, 9090), to != "redis", "prometheus to {to}");
        assert!(!policies.allow(&prometheus, callee, *port), "prometheus to {to}");
        // And out of the release: nowhere.
        assert!(!policies.allow(callee, &foreign, 443), "{to} to another namespace");
    }
    let mut dns = Pod::of(&[("k8s-app", "kube-dns")]).in_namespace("kube-system");
    assert!(policies.allow(&pods[0].1, &dns, 53), "nobody can ask DNS");
    dns.elsewhere = Some(Labels::new());
    assert!(!policies.allow(&pods[0].1, &dns, 53), "anybody may play DNS");
}

#[test]
fn without_policies_everybody_reaches_everything() {
    // The control of the two above: it is the policies that keep callers away, and not the way they are applied here.
    let nobody = Policies(Vec::new());
    assert!(nobody.allow(&Pod::of(&[("app", "other")]), &Pod::of(&[("app", "any")]), 7073));
}
