//! Pods: what they may do on a node, how they are asked whether they are well, and how they go away.

use crate::helm::profiles;
use crate::objects::of_kind;
use crate::workload::{SERVICES, selects, workload, workloads};
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{Probe, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeSet;

#[test]
fn no_container_is_root_or_writes_where_it_should_not() {
    for (profile, objects) in profiles() {
        for workload in workloads(&objects) {
            let at = format!("{profile}: {}", workload.name);
            let pod = workload.pod.security_context.as_ref().expect("a security context");
            assert_eq!(pod.run_as_non_root, Some(true), "{at}");
            assert!(pod.run_as_user.is_some_and(|user| user > 0), "{at}");
            assert!(pod.fs_group.is_some_and(|group| group > 0), "{at}");
            let seccomp = pod.seccomp_profile.as_ref().expect("a seccomp profile");
            assert_eq!(seccomp.type_, "RuntimeDefault", "{at}");
            assert_eq!(workload.pod.automount_service_account_token, Some(false), "{at}");
            assert_eq!(
                (workload.pod.host_network, workload.pod.host_pid, workload.pod.host_ipc),
                (None, None, None),
                "{at}"
            );
            let volumes = workload.pod.volumes.iter().flatten().collect::<Vec<_>>();
            assert!(volumes.iter().all(|volume| volume.host_path.is_none()), "{at}");
            let containers = workload.pod.init_containers.iter().flatten().chain(&workload.pod.containers);
            for container in containers {
                let at = format!("{at}/{}", container.name);
                let security = container.security_context.as_ref().expect("a security context");
                assert_eq!(security.allow_privilege_escalation, Some(false), "{at}");
                assert_eq!(security.read_only_root_filesystem, Some(true), "{at}");
                assert_eq!((security.privileged, security.run_as_user), (None, None), "{at}");
                let capabilities = security.capabilities.as_ref().expect("capabilities");
                assert_eq!(
                    (&capabilities.drop, &capabilities.add),
                    (&Some(vec!["ALL".into()]), &None),
                    "{at}"
                );
                // What can be written has a limit: a claim, or a node-local volume with a size.
                for mount in
                    container.volume_mounts.iter().flatten().filter(|mount| mount.read_only != Some(true))
                {
                    let volume = volumes.iter().find(|volume| volume.name == mount.name);
                    let local = volume.and_then(|volume| volume.empty_dir.as_ref());
                    let limited = local.is_some_and(|local| local.size_limit.is_some());
                    assert!(limited || workload.claims.contains(&mount.name), "{at}: {}", mount.mount_path);
                }
            }
        }
    }
}

#[test]
fn no_pod_gets_variables_that_kubernetes_makes_up() {
    for (profile, objects) in profiles() {
        for workload in workloads(&objects) {
            assert_eq!(workload.pod.enable_service_links, Some(false), "{profile}: {}", workload.name);
        }
    }
}

#[test]
fn every_container_asks_for_what_it_needs_and_has_a_limit_of_memory() {
    for (profile, objects) in profiles() {
        for workload in workloads(&objects) {
            for container in workload.pod.init_containers.iter().flatten().chain(&workload.pod.containers) {
                let at = format!("{profile}: {}/{}", workload.name, container.name);
                let resources = container.resources.as_ref().expect("resources");
                let requests = resources.requests.as_ref().expect("requests");
                let limits = resources.limits.as_ref().expect("limits");
                assert!(
                    requests.contains_key("cpu") && requests.contains_key("memory"),
                    "{at}: {requests:?}"
                );
                assert!(limits.contains_key("memory") && !limits.contains_key("cpu"), "{at}: {limits:?}");
                let gpu = profile == "gpu"
                    && workload.component() == "gpu-worker"
                    && container.name == "gpu-worker";
                assert_eq!(limits.contains_key("nvidia.com/gpu"), gpu, "{at}: {limits:?}");
                let image = container.image.as_deref().expect("an image");
                assert!(image.contains(':') && !image.ends_with(":latest"), "{at}: {image}");
                assert_eq!(image.ends_with("-cuda"), gpu, "{at}: {image}");
            }
        }
    }
}

#[test]
fn probes_ask_the_grpc_port_and_liveness_depends_on_nothing_else() {
    for (profile, objects) in profiles() {
        for component in SERVICES {
            let at = format!("{profile}: {component}");
            let workload = workload(&objects, component);
            let container = workload.container();
            let ask = |probe: &Option<Probe>| {
                let probe = probe.as_ref().unwrap_or_else(|| panic!("{at}: a probe is missing"));
                let grpc = probe.grpc.as_ref().unwrap_or_else(|| panic!("{at}: a probe is not gRPC"));
                assert_eq!(grpc.port, workload.port("grpc"), "{at}");
                assert!(probe.timeout_seconds < probe.period_seconds, "{at}: {probe:?}");
                grpc.service.clone().unwrap_or_default()
            };
            assert_eq!(ask(&container.startup_probe), cacheclip_service::LIVENESS, "{at}");
            assert_eq!(ask(&container.liveness_probe), cacheclip_service::LIVENESS, "{at}");
            assert_eq!(ask(&container.readiness_probe), "", "{at}");
            let start = container.startup_probe.as_ref().expect("it was asked");
            let budget = start.period_seconds.unwrap_or(10) * start.failure_threshold.unwrap_or(3);
            assert!(budget >= 120, "{at}: a start may take {budget} s");
        }
    }
}

#[test]
fn a_pod_is_given_the_time_that_its_drain_takes() {
    for (profile, objects) in profiles() {
        for component in SERVICES {
            let at = format!("{profile}: {component}");
            let workload = workload(&objects, component);
            let config = workload.config(&objects).parse::<toml::Table>().expect("TOML");
            let seconds = |field: &str| match &config["service"][field] {
                toml::Value::Integer(value) => *value as f64,
                other => other.as_float().unwrap_or_else(|| panic!("{at}: {field} is {other}")),
            };
            let hook =
                workload.container().lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
            let asleep = hook.and_then(|hook| hook.sleep.as_ref()).expect("a preStop sleep").seconds as f64;
            let grace = workload.pod.termination_grace_period_seconds.expect("a grace period") as f64;
            assert!(asleep >= 1.0, "{at}");
            assert!(
                seconds("drain_seconds") >= seconds("request_timeout_seconds"),
                "{at}: requests are cut off"
            );
            assert!(grace > asleep + seconds("drain_seconds") + 1.0, "{at}: the drain is cut off");
        }
    }
}

#[test]
fn services_budgets_and_autoscalers_stand_for_exactly_one_workload() {
    for (profile, objects) in profiles() {
        let workloads = workloads(&objects);
        for workload in &workloads {
            assert!(
                selects(&workload.selector, &workload.labels),
                "{profile}: {} does not select its pods",
                workload.name
            );
        }
        for service in of_kind::<Service>(&objects, "Service") {
            let name = service.metadata.name.expect("a name");
            let spec = service.spec.expect("a spec");
            let selector = spec.selector.expect("a selector");
            let found =
                workloads.iter().filter(|workload| selects(&selector, &workload.labels)).collect::<Vec<_>>();
            let [workload] = found[..] else { panic!("{profile}: {name} selects {} workloads", found.len()) };
            for port in spec.ports.iter().flatten() {
                let Some(IntOrString::String(target)) = &port.target_port else { panic!("{name}: {port:?}") };
                assert_eq!(workload.port(target), port.port, "{profile}: {name}: {target}");
                // What callers are let in by must not lead to metrics.
                let open = spec.cluster_ip.as_deref() != Some("None");
                assert!(!open || target == "grpc", "{profile}: {name} opens {target}");
            }
        }
        let stateful = workloads.iter().filter_map(|workload| Some((workload, workload.headless.as_ref()?)));
        for (workload, headless) in stateful {
            let mut services = of_kind::<Service>(&objects, "Service").into_iter();
            let service = services.find(|service| service.metadata.name.as_ref() == Some(headless));
            let spec = service.and_then(|service| service.spec).expect("the headless service");
            assert_eq!(spec.cluster_ip.as_deref(), Some("None"), "{profile}: {headless}");
            assert!(selects(&spec.selector.expect("a selector"), &workload.labels), "{profile}: {headless}");
        }
        let mut budgeted = BTreeSet::new();
        for budget in of_kind::<PodDisruptionBudget>(&objects, "PodDisruptionBudget") {
            let spec = budget.spec.expect("a spec");
            assert!(spec.max_unavailable.is_some() && spec.min_available.is_none(), "{profile}: {spec:?}");
            let selector = spec.selector.and_then(|selector| selector.match_labels).expect("labels");
            let found =
                workloads.iter().filter(|workload| selects(&selector, &workload.labels)).collect::<Vec<_>>();
            let [workload] = found[..] else { panic!("{profile}: a budget for {} workloads", found.len()) };
            budgeted.insert(workload.name.clone());
        }
        let all = workloads.iter().map(|workload| workload.name.clone()).collect::<BTreeSet<_>>();
        assert!(budgeted == all || (profile == "minimal" && budgeted.is_empty()), "{profile}: {budgeted:?}");
        let mut scaled = BTreeSet::new();
        for scaler in of_kind::<HorizontalPodAutoscaler>(&objects, "HorizontalPodAutoscaler") {
            let target = scaler.spec.expect("a spec").scale_target_ref;
            assert_eq!(target.kind, "Deployment", "{profile}");
            assert!(all.contains(&target.name), "{profile}: {} is not there", target.name);
            scaled.insert(target.name);
        }
        assert_eq!(scaled.len(), if profile == "gpu" { 3 } else { 0 }, "{profile}: {scaled:?}");
        for workload in &workloads {
            // A number of replicas beside an autoscaler would undo its work with every upgrade.
            assert_eq!(
                workload.replicas.is_none(),
                scaled.contains(&workload.name),
                "{profile}: {}",
                workload.name
            );
        }
    }
}
