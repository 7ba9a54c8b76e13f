//! Every rendered object in the typed form of its kind.
//!
//! Kubernetes' types pass over fields that they do not know and fill in required ones that are missing. So each object is
//! decoded and encoded again, and both must be the same: what was passed over or filled in shows as a difference.

use crate::helm::profiles;
use crate::monitoring;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Objects of one kind, decoded.
pub(crate) fn of_kind<T: DeserializeOwned>(objects: &[Value], kind: &str) -> Vec<T> {
    let decode = |object: &Value| {
        serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{kind}: {error}: {object}"))
    };
    objects.iter().filter(|object| object["kind"] == kind).map(decode).collect()
}

fn there_and_back<T: DeserializeOwned + Serialize>(object: &Value) -> Result<(), String> {
    let decoded: T = serde_json::from_value(object.clone()).map_err(|error| error.to_string())?;
    let again = serde_json::to_value(decoded).map_err(|error| error.to_string())?;
    difference(object, &again, "").map_or(Ok(()), Err)
}

/// Where two values differ first.
fn difference(one: &Value, other: &Value, path: &str) -> Option<String> {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            let keys = one.keys().chain(other.keys()).collect::<BTreeSet<_>>();
            keys.into_iter().find_map(|key| match (one.get(key), other.get(key)) {
                (Some(one), Some(other)) => difference(one, other, &format!("{path}.{key}")),
                (Some(_), None) => Some(format!("{path}.{key} is no field")),
                (None, _) => Some(format!("{path}.{key} is missing")),
            })
        }
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => {
            let mut pairs = one.iter().zip(other).enumerate();
            pairs.find_map(|(at, (one, other))| difference(one, other, &format!("{path}[{at}]")))
        }
        _ => (one != other).then(|| format!("{path} is {one} and would be read as {other}")),
    }
}

fn check(object: &Value) -> Result<(), String> {
    match (object["apiVersion"].as_str().unwrap_or(""), object["kind"].as_str().unwrap_or("")) {
        ("v1", "ConfigMap") => there_and_back::<ConfigMap>(object),
        ("v1", "Secret") => there_and_back::<Secret>(object),
        ("v1", "Service") => there_and_back::<Service>(object),
        ("v1", "ServiceAccount") => there_and_back::<ServiceAccount>(object),
        ("apps/v1", "Deployment") => there_and_back::<Deployment>(object),
        ("apps/v1", "StatefulSet") => there_and_back::<StatefulSet>(object),
        ("autoscaling/v2", "HorizontalPodAutoscaler") => there_and_back::<HorizontalPodAutoscaler>(object),
        ("policy/v1", "PodDisruptionBudget") => there_and_back::<PodDisruptionBudget>(object),
        ("networking.k8s.io/v1", "NetworkPolicy") => there_and_back::<NetworkPolicy>(object),
        ("monitoring.coreos.com/v1", "ServiceMonitor") => {
            there_and_back::<monitoring::ServiceMonitor>(object)
        }
        ("monitoring.coreos.com/v1", "PrometheusRule") => {
            there_and_back::<monitoring::PrometheusRule>(object)
        }
        (version, kind) => Err(format!("{version} {kind} has no typed form here")),
    }
}

#[test]
fn every_object_is_what_its_kind_says() {
    let mut kinds = BTreeSet::new();
    let mut any = false;
    for (profile, objects) in profiles() {
        any = true;
        for object in &objects {
            kinds.insert(object["kind"].as_str().unwrap_or_default().to_owned());
            let name = &object["metadata"]["name"];
            check(object).unwrap_or_else(|error| panic!("{profile}: {} {name}: {error}", object["kind"]));
        }
    }
    // What no profile renders was not looked at.
    assert!(!any || kinds.len() == 11, "kinds seen: {kinds:?}");
}

#[test]
fn a_misspelled_a_missing_and_a_misread_field_are_found() {
    let sound = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "a" },
        "spec": { "ports": [{ "name": "grpc", "port": 1, "targetPort": "grpc" }] },
    });
    assert_eq!(check(&sound), Ok(()));
    let changed = |path: &str, value: Value| {
        let mut object = sound.clone();
        *object.pointer_mut(path).expect("a path") = value;
        check(&object).expect_err("it is wrong")
    };
    assert_eq!(changed("/spec", json!({ "clusterIp": "None" })), ".spec.clusterIp is no field");
    assert_eq!(changed("/spec/ports/0", json!({ "name": "grpc" })), ".spec.ports[0].port is missing");
    assert!(changed("/spec/ports/0/port", json!("1")).contains("invalid type"));
    assert!(changed("/kind", json!("Servise")).contains("no typed form"));
    let rule = json!({
        "apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": { "name": "a" },
        "spec": { "groups": [{ "name": "a", "rules": [{ "alert": "A", "expr": "1", "fore": "5m" }] }] },
    });
    assert!(check(&rule).expect_err("a typo").contains("fore"));
}
