//! The rendered chart, running: the real binaries started from its files, arguments and environment, asked what a
//! kubelet, a Prometheus and a caller ask, and ended the way a pod ends. Where helm, redis-server or a binary is missing,
//! these say so and pass.
//!
//! Profile `gpu` is not started: its models come from images and addresses that do not exist.

use crate::helm::{PROFILES, RELEASE, rendered, rendered_with, root};
use crate::kubelet::serving;
use crate::metrics::{named, names};
use crate::monitoring::{PrometheusRule, ServiceMonitor};
use crate::objects::of_kind;
use crate::release::Release;
use crate::series::{Selector, grouped, has_label, selectors};
use crate::workload::SERVICES;
use cacheclip_bench::{Family, world};
use cacheclip_rpc::v1::GenerateRequest;
use cacheclip_tests::ask::{ask, client, ingest, request};
use cacheclip_tests::process::get;
use cacheclip_tests::until;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};
use tokio::sync::Mutex;

/// Two cores do not carry several releases at once.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
/// What the gRPC port of a component must serve, so that a port is not mistaken for another's.
const SERVED: [(&str, &str); 4] = [
    ("gateway", "cacheclip.v1.Gateway"),
    ("gpu-worker", "cacheclip.v1.Worker"),
    ("aux-scorer", "cacheclip.v1.Scorer"),
    ("cache-store", "cacheclip.v1.Cache"),
];
const LIMIT: Duration = Duration::from_secs(10);

/// Every port that a container declares leads to what it is named for.
async fn check_ports(release: &Release) {
    for pod in &release.pods {
        for (name, address) in pod.ports() {
            let at = format!("{}: port {name}", pod.process.name);
            match name {
                "grpc" => {
                    for (component, service) in SERVED {
                        let here = serving(address, service, LIMIT).await;
                        assert_eq!(here, component == pod.component, "{at}: {service}");
                    }
                }
                "metrics" => {
                    for path in ["/metrics", "/live", "/ready"] {
                        let answer = get(address, path).await.unwrap_or_default();
                        assert!(answer.starts_with("HTTP/1.1 200"), "{at}: {path}: {answer}");
                    }
                }
                "redis" => {
                    let mut stream = tokio::net::TcpStream::connect(address).await.expect("redis listens");
                    stream.write_all(b"PING\r\n").await.expect("it is sent");
                    let mut answer = String::new();
                    let mut lines = tokio::io::BufReader::new(stream);
                    let reading = tokio::time::timeout(LIMIT, lines.read_line(&mut answer)).await;
                    reading.expect("in time").expect("a line");
                    assert!(answer.starts_with("-NOAUTH"), "{at}: {answer}");
                }
                _ => panic!("{at}: nothing is known of it"),
            }
        }
    }
}

/// What is ingested through one gateway is found through every gateway, with the scorer's importance sets.
async fn check_answers(release: &Release) {
    let corpus = world::generate(51, 2, 1, &Family::ALL);
    let texts = corpus.documents.iter().map(|document| document.text.as_str()).collect::<Vec<_>>();
    let gateways = release.of("gateway").map(|pod| pod.process.endpoint()).collect::<Vec<_>>();
    let computed = ingest(&mut client(&gateways[0]), &texts).await.expect("an ingest");
    assert_eq!(computed as usize, texts.len(), "nothing was stored before");
    for gateway in &gateways {
        let request = request(&texts, &corpus.questions[0].text);
        // A busy machine may let scores come too late for once.
        until("a scored answer over chunks that are all there", async || {
            let answer = ask(&mut client(gateway), request.clone()).await.expect("an answer");
            assert_eq!(answer.hits(), texts.len(), "{:?}", answer.explain);
            assert!(!answer.text.is_empty(), "{:?}", answer.explain);
            answer.explain.rung == "scorer"
        })
        .await;
        let whole = GenerateRequest { policy: "full".into(), ..request };
        let whole = ask(&mut client(gateway), whole).await.expect("an answer");
        assert_eq!((whole.hits(), whole.usage.cached_tokens), (0, 0), "full prefill looks nothing up");
    }
}

/// Every store has told its index all that it has.
async fn check_index(release: &Release) {
    for pod in release.of("cache-store") {
        let store = &pod.process;
        until("the store reaches its index", async || store.metric("cacheclip_index_up").await == Some(1.0))
            .await;
        until("the index knows what the store has", async || {
            store.sum("cacheclip_index_blob_drift_objects", &[]).await == 0.0
        })
        .await;
    }
}

/// The end of every pod, front to back: the hook, then SIGTERM, then nothing is left to kill.
async fn end(release: &mut Release) {
    for component in ["gateway", "gpu-worker", "aux-scorer", "cache-store", "redis"] {
        for pod in release.pods.iter_mut().filter(|pod| pod.component == component) {
            let hook = pod.container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
            // The kubelet itself sleeps. A hook that ran a command would need a shell or a subcommand in the image,
            // and would have to be run here.
            let hook = hook
                .filter(|hook| hook.exec.is_some() || hook.http_get.is_some() || hook.tcp_socket.is_some());
            assert!(hook.is_none(), "{}: {hook:?} is to be run", pod.process.name);
            pod.process.signal("TERM");
            let status = pod.process.ended().await;
            assert!(status.success(), "{} ended with {status}:\n{}", pod.process.name, pod.process.log());
        }
    }
}

/// A profile's whole life; whether it could be started.
async fn lives(profile: &str) -> Option<Release> {
    let mut release = Release::start(profile).await?;
    release.passed().await;
    check_ports(&release).await;
    check_answers(&release).await;
    check_index(&release).await;
    // What they have been through did not make them unwell.
    release.passed().await;
    end(&mut release).await;
    Some(release)
}

#[tokio::test]
async fn the_chart_as_it_comes_starts_passes_its_probes_answers_and_ends() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(release) = lives("default").await else { return };
    let pods = |component| release.of(component).count();
    assert_eq!(SERVICES.map(pods), [2, 2, 2, 2], "every replica was started");
    assert_eq!(pods("redis"), 1);
}

#[tokio::test]
async fn the_smallest_profile_does_so_without_redis() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(release) = lives("minimal").await else { return };
    assert_eq!(release.pods.len(), SERVICES.len());
}

#[tokio::test]
async fn with_a_redis_cluster_behind_tls_the_documented_rights_are_enough() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(mut release) = Release::start("external-redis").await else { return };
    release.passed().await;
    check_ports(&release).await;
    check_answers(&release).await;
    check_index(&release).await;
    for pod in release.of("cache-store") {
        let refused = pod.process.sum("cacheclip_index_errors_total", &[]).await;
        assert_eq!(refused, 0.0, "{}:\n{}", pod.process.name, pod.process.log());
    }
    end(&mut release).await;
}

/// The page of every pod's admin port, by component, as Prometheus would read it.
async fn pages(release: &Release, path: &str) -> BTreeMap<String, Vec<String>> {
    let mut pages = BTreeMap::<String, Vec<String>>::new();
    for component in SERVICES {
        for pod in release.of(component) {
            let (_, address) = pod.ports().find(|(name, _)| *name == "metrics").expect("a port for metrics");
            let page = get(address, path).await.expect("a page");
            pages.entry(component.to_owned()).or_default().push(page);
        }
    }
    pages
}

#[tokio::test]
async fn every_metric_that_the_chart_names_is_on_the_page_of_the_service_that_is_asked_for_it() {
    let _alone = ONE_AT_A_TIME.lock().await;
    // The same pods, and what watches them.
    let watched = [
        "monitoring.rules.enabled=true",
        "monitoring.serviceMonitor.enabled=true",
        "gateway.autoscaling.enabled=true",
        "auxScorer.autoscaling.enabled=true",
        "gpuWorker.autoscaling.enabled=true",
    ];
    let Some(watching) = rendered_with("default", &watched) else { return };
    let Some(mut release) = Release::start("default").await else { return };
    release.passed().await;
    let monitors = of_kind::<ServiceMonitor>(&watching, "ServiceMonitor");
    let [endpoint] = &monitors[0].spec.endpoints[..] else { panic!("one endpoint") };
    assert_eq!(endpoint.port, "metrics");

    // An autoscaler reads pods that nobody has asked anything yet, and must find a number there.
    let idle = pages(&release, &endpoint.path).await;
    for scaler in of_kind::<HorizontalPodAutoscaler>(&watching, "HorizontalPodAutoscaler") {
        let spec = scaler.spec.expect("a spec");
        let component =
            spec.scale_target_ref.name.trim_start_matches(&format!("{RELEASE}-cacheclip-")).to_owned();
        for metric in spec.metrics.expect("metrics") {
            let name = metric.pods.expect("a metric of the pods").metric.name;
            for page in &idle[&component] {
                assert_eq!(Selector::bare(&name).missing(page), Ok(()), "an idle {component}");
            }
            for pod in release.of(&component) {
                // Who is connected is no work: counted, it would scale scorers by the number of gateways.
                until("an idle pod reads 0", async || pod.process.metric(&name).await == Some(0.0)).await;
            }
        }
    }

    check_answers(&release).await;
    let pages = pages(&release, &endpoint.path).await;
    for rule in of_kind::<PrometheusRule>(&watching, "PrometheusRule") {
        for rule in rule.spec.groups.into_iter().flat_map(|group| group.rules) {
            let asked = selectors(&rule.expr);
            for selector in &asked {
                let components = selector.components(&format!("{RELEASE}-cacheclip"));
                let there = components.iter().flat_map(|component| &pages[component]);
                let results = there.map(|page| selector.missing(page)).collect::<Vec<_>>();
                // One job: all its pods. Several: those of them that have the metric at all.
                let enough = match components.len() {
                    1 => results.iter().all(Result::is_ok),
                    _ => results.iter().any(Result::is_ok),
                };
                assert!(enough, "{}: {results:?}", rule.alert);
            }
            for label in grouped(&rule.expr) {
                let mut pages = pages.values().flatten();
                let found =
                    pages.any(|page| asked.iter().any(|asked| has_label(page, &asked.metric, &label)));
                assert!(found, "{}: nothing has a label {label}", rule.alert);
            }
        }
    }

    // Whatever else any profile or value may name: rules of other profiles, dashboards, other metrics to scale by.
    let schema = root().join("deploy/helm/cacheclip/values.schema.json");
    let mut all = names(&std::fs::read_to_string(schema).expect("the schema"));
    for profile in PROFILES {
        all.extend(named(&rendered(profile).expect("helm was there before")));
    }
    assert!(all.len() > 10, "{all:?}");
    for name in all {
        let found = pages.values().flatten().any(|page| Selector::bare(&name).missing(page).is_ok());
        assert!(found, "no live page has {name}");
    }
    end(&mut release).await;
}
