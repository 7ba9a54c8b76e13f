//! Where helm and the binaries are, and what helm renders.

use serde::Deserialize as _;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// Values files of `ci/`, without their endings.
pub(crate) const PROFILES: [&str; 4] = ["default", "gpu", "external-redis", "minimal"];
pub(crate) const RELEASE: &str = "cc";
pub(crate) const NAMESPACE: &str = "rag";
/// Far above what any command here takes; a hanging one is a failure and not a wait.
const LIMIT: Duration = Duration::from_secs(60);

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package is in the workspace").to_owned()
}

/// The directory of the profile's binaries: the executable of a test is in its `deps`.
pub(crate) fn binaries() -> PathBuf {
    let executable = std::env::current_exe().expect("a test has an executable");
    executable.ancestors().nth(2).expect("target/release/deps/test").to_owned()
}

/// A service's binary, or the reason why there is none.
pub(crate) fn binary(name: &str) -> Option<PathBuf> {
    let path = binaries().join(name);
    let there = path.is_file();
    if !there {
        println!("skipped: {} is not built (cargo build --release --workspace --bins)", path.display());
    }
    there.then_some(path)
}

/// A command's output, within a limit.
pub(crate) fn output(command: &mut Command) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(LIMIT) {
        Ok(output) => output.unwrap_or_else(|error| panic!("{command:?}: {error}")),
        Err(_) => panic!("{command:?}: no end after {LIMIT:?}"),
    }
}

fn program() -> Option<PathBuf> {
    let named = std::env::var_os("HELM").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join("helm"));
    let tools = [root().join("target/tools/bin/helm"), binaries().join("../tools/bin/helm")];
    let found = named.into_iter().chain(on_path).chain(tools).find(|path| path.is_file());
    if found.is_none() {
        println!(
            "skipped: helm is neither in $HELM, nor on PATH, nor in target/tools (tests/chart/run.sh installs it)"
        );
    }
    found
}

/// What helm renders for a profile and further `--set`s; `None` without helm.
pub(crate) fn rendered_with(profile: &str, sets: &[&str]) -> Option<Vec<Value>> {
    let chart = root().join("deploy/helm/cacheclip");
    let mut command = Command::new(program()?);
    command.args(["template", RELEASE, "--namespace", NAMESPACE, "--values"]);
    command.arg(chart.join("ci").join(profile).with_extension("yaml")).arg(chart);
    command.args(sets.iter().flat_map(|set| ["--set", set]));
    let output = output(&mut command);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "helm template of {profile} with {sets:?}: {errors}");
    let text = String::from_utf8(output.stdout).expect("helm prints text");
    let objects = serde_yaml_ng::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).expect("YAML"))
        .filter(|object| !object.is_null())
        .collect::<Vec<_>>();
    assert!(objects.len() > 10, "{profile} has only {} objects", objects.len());
    Some(objects)
}

/// What helm renders for a profile; `None` without helm.
pub(crate) fn rendered(profile: &str) -> Option<Vec<Value>> {
    rendered_with(profile, &[])
}

/// Every profile with what helm renders for it; nothing without helm.
pub(crate) fn profiles() -> impl Iterator<Item = (&'static str, Vec<Value>)> {
    PROFILES.into_iter().map_while(|profile| Some((profile, rendered(profile)?)))
}
