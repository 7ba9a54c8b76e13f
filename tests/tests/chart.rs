//! The Helm chart, rendered by the real helm for every profile: each object in its typed form, each configuration file
//! through the real binary, each address, port, policy and metric name against what it stands for; and running.
//!
//! helm is the one of `$HELM`, of `PATH`, or of `target/tools/bin`, where `tests/chart/run.sh` installs it. The binaries
//! are those beside this test's executable. A test that lacks one of them says so and passes.

#[path = "chart/config.rs"]
mod config;
#[path = "chart/helm.rs"]
mod helm;
#[path = "chart/kubelet.rs"]
mod kubelet;
#[path = "chart/live.rs"]
mod live;
#[path = "chart/metrics.rs"]
mod metrics;
#[path = "chart/monitoring.rs"]
mod monitoring;
#[path = "chart/network.rs"]
mod network;
#[path = "chart/objects.rs"]
mod objects;
#[path = "chart/outside.rs"]
mod outside;
#[path = "chart/pods.rs"]
mod pods;
#[path = "chart/release.rs"]
mod release;
#[path = "chart/rewrite.rs"]
mod rewrite;
#[path = "chart/series.rs"]
mod series;
#[path = "chart/traces.rs"]
mod traces;
#[path = "chart/workload.rs"]
mod workload;
