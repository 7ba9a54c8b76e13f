//! Where spans go: the services are told of the collector, and the policies let them go there.

use crate::helm::{NAMESPACE, rendered, rendered_with};
use crate::objects::of_kind;
use crate::workload::{SERVICES, selects, workload, workloads};
use cacheclip_service::telemetry::ENDPOINT;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;

const COLLECTOR: &str = "http://collector.observability.svc:4317";

/// Whether a component's pods may go to that port of any address.
fn leaves(objects: &[Value], component: &str, port: i32) -> bool {
    let labels = workload(objects, component).labels;
    let policies = of_kind::<NetworkPolicy>(objects, "NetworkPolicy").into_iter();
    let specs = policies.filter_map(|policy| policy.spec).filter(|spec| {
        let chosen = spec.pod_selector.as_ref().and_then(|selector| selector.match_labels.as_ref());
        chosen.is_none_or(|chosen| selects(chosen, &labels))
    });
    let mut rules = specs.flat_map(|spec| spec.egress.unwrap_or_default());
    rules.any(|rule| {
        let anywhere = rule.to.iter().flatten().any(|peer| peer.ip_block.is_some());
        let open = rule.ports.iter().flatten().any(|open| open.port == Some(IntOrString::Int(port)));
        anywhere && open
    })
}

#[test]
fn a_collector_is_named_to_the_four_services_and_open_to_them() {
    let Some(objects) = rendered_with("default", &[&format!("traces.endpoint={COLLECTOR}")]) else { return };
    for component in SERVICES {
        let workload = workload(&objects, component);
        let environment = workload.environment(&objects);
        assert_eq!(environment.get(ENDPOINT).map(String::as_str), Some(COLLECTOR), "{component}");
        let who = format!("service.instance.id={}-0,service.namespace={NAMESPACE}", workload.name);
        assert_eq!(environment.get("OTEL_RESOURCE_ATTRIBUTES"), Some(&who), "{component}");
        assert!(leaves(&objects, component, 4317), "{component}");
    }
    assert!(!leaves(&objects, "redis", 4317), "Redis has nothing to tell");
}

#[test]
fn without_a_collector_nobody_is_told_of_one_and_nothing_is_open() {
    let Some(objects) = rendered("default") else { return };
    for workload in workloads(&objects) {
        assert!(!workload.environment(&objects).contains_key(ENDPOINT), "{}", workload.name);
        assert!(!leaves(&objects, workload.component(), 4317), "{}", workload.name);
    }
}
