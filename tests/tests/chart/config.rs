//! Every rendered configuration, with the container's arguments and environment, through the real binary.

use crate::helm::{NAMESPACE, RELEASE, binary, output, profiles, rendered, rendered_with, root};
use crate::workload::{Labels, SERVICES, Workload, workload};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// The binary of a workload, by the name of its image.
fn program(workload: &Workload) -> Option<std::path::PathBuf> {
    let image = workload.container().image.as_deref().expect("an image");
    let name = image.rsplit('/').next().and_then(|name| name.split(':').next()).expect("a name");
    binary(name)
}

/// The container's command line, but for the place of the configuration file, and with nothing in the environment but the
/// container's own.
fn dump(program: &Path, workload: &Workload, config: &str, environment: &Labels) -> Output {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("config.toml");
    std::fs::write(&file, config).expect("a write");
    let arguments = workload.container().args.as_ref().expect("arguments");
    assert_eq!(arguments[..2], ["--config", "/etc/cacheclip/config.toml"]);
    let mut command = Command::new(program);
    command
        .arg("--config")
        .arg(&file)
        .args(&arguments[2..])
        .arg("--dump-config")
        .env_clear()
        .envs(environment);
    output(&mut command)
}

fn parsed(output: &Output, at: &str) -> toml::Table {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{at}: {:?}: {errors}", output.status);
    String::from_utf8_lossy(&output.stdout).parse().unwrap_or_else(|error| panic!("{at}: {error}"))
}

/// Whether a dump holds a value: tables may hold more, and a whole number may be written as a fraction.
fn holds(dump: &toml::Value, wanted: &toml::Value) -> bool {
    let number =
        |value: &toml::Value| value.as_float().or_else(|| value.as_integer().map(|value| value as f64));
    match (dump, wanted) {
        (toml::Value::Table(dump), toml::Value::Table(wanted)) => {
            wanted.iter().all(|(key, wanted)| dump.get(key).is_some_and(|dump| holds(dump, wanted)))
        }
        _ => dump == wanted || (number(dump).is_some() && number(dump) == number(wanted)),
    }
}

#[test]
fn every_configuration_is_taken_by_the_service_that_reads_it() {
    for (profile, objects) in profiles() {
        for component in SERVICES {
            let at = format!("{profile}: {component}");
            let workload = workload(&objects, component);
            let Some(program) = program(&workload) else { continue };
            let (config, environment) = (workload.config(&objects), workload.environment(&objects));
            let dump = parsed(&dump(&program, &workload, &config, &environment), &at);
            let wanted = config.parse::<toml::Table>().unwrap_or_else(|error| panic!("{at}: {error}"));
            for (field, wanted) in &wanted {
                let there = dump.get(field).unwrap_or_else(|| panic!("{at}: {field} was lost"));
                assert!(holds(there, wanted), "{at}: {field} is {there} and not {wanted}");
            }
            // The ports that Kubernetes is told of are those that the service listens on.
            for (field, port) in [("listen", "grpc"), ("admin_listen", "metrics")] {
                let listen = dump["service"][field].as_str().expect("an address");
                let listening = listen.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
                assert_eq!(listening, Some(workload.port(port)), "{at}: {field} is {listen}");
            }
            check_identity(&at, component, &objects, &dump);
        }
    }
}

/// What comes by environment: secrets, and who a store is.
fn check_identity(at: &str, component: &str, objects: &[Value], dump: &toml::Table) {
    let text = |field: &str| dump.get(field).and_then(toml::Value::as_str).unwrap_or_default().to_owned();
    match component {
        "gateway" => assert_eq!(text("scope_secret"), "<redacted>", "{at}"),
        "cache-store" => {
            let name = format!("{RELEASE}-cacheclip-cache-store");
            assert_eq!(text("node"), format!("{name}-0"), "{at}");
            assert_eq!(text("advertise"), format!("http://{name}-0.{name}.{NAMESPACE}.svc:7073"), "{at}");
            let headless = workload(objects, component).headless;
            assert_eq!(headless.as_deref(), Some(name.as_str()), "{at}: pods have no such name");
            let index = &dump["index"];
            let redis = index["kind"].as_str() == Some("redis");
            let password = index.get("password").and_then(toml::Value::as_str);
            assert_eq!(password == Some("<redacted>"), redis, "{at}: {index}");
        }
        _ => {}
    }
}

#[test]
fn a_field_that_no_service_has_is_noticed_in_file_and_environment() {
    let Some(objects) = rendered("default") else { return };
    for component in SERVICES {
        let workload = workload(&objects, component);
        let Some(program) = program(&workload) else { continue };
        let (config, environment) = (workload.config(&objects), workload.environment(&objects));
        let refused = |config: &str, environment: &Labels, says: &str| {
            let output = dump(&program, &workload, config, environment);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(64), "{component}: {errors}");
            assert!(errors.contains(says), "{component}: {errors}");
        };
        refused(&format!("no_such_field = 1\n{config}"), &environment, "no_such_field");
        // What Kubernetes would set for a service of the release's namespace, were it not told otherwise.
        let mut linked = environment.clone();
        linked.insert("CACHECLIP_GATEWAY_PORT".into(), "tcp://10.0.0.1:7070".into());
        refused(&config, &linked, "gateway_port");
    }
}

/// A value of a schema's kind.
fn sample(schema: &Value, field: &str) -> String {
    if let Some(value) = schema["enum"][0].as_str() {
        return format!("\"{value}\"");
    }
    match (schema["type"].as_str(), schema["$ref"].as_str()) {
        (Some("boolean"), _) => "true".into(),
        (Some("integer"), _) | (None, Some("#/definitions/bytes")) => "1".into(),
        (Some("number"), _) | (None, Some("#/definitions/seconds")) => "0.5".into(),
        (Some("string"), _) => "\"sample\"".into(),
        other => panic!("{field}: no sample for {other:?}"),
    }
}

#[test]
fn a_worker_that_was_given_a_gpu_computes_on_it_and_keeps_its_kernels() {
    for (profile, objects) in profiles() {
        let workload = workload(&objects, "gpu-worker");
        let config: toml::Table = workload.config(&objects).parse().expect("TOML");
        let gpu = profile == "gpu";
        assert_eq!(config.get("device").and_then(toml::Value::as_str), gpu.then_some("cuda"), "{profile}");
        let kept = config.get("cuda").and_then(|cuda| cuda["kept"].as_str());
        let mounts = workload.container().volume_mounts.iter().flatten();
        let mut writable =
            mounts.filter(|mount| mount.read_only != Some(true)).map(|mount| &mount.mount_path);
        assert_eq!(kept.is_some_and(|kept| writable.any(|path| path == kept)), gpu, "{profile}: {kept:?}");
    }
    // What values say stands over it.
    let Some(objects) = rendered_with("gpu", &["gpuWorker.config.cuda.kept=/elsewhere"]) else { return };
    let config: toml::Table = workload(&objects, "gpu-worker").config(&objects).parse().expect("TOML");
    assert_eq!(config["cuda"]["kept"].as_str(), Some("/elsewhere"));
    assert_eq!(config["device"].as_str(), Some("cuda"));
}

/// Dotted fields of a configuration's schema, with their schemas.
fn fields(schema: &Value, whole: &Value, path: &str) -> Vec<(String, Value)> {
    let behind =
        schema["$ref"].as_str().map(|name| &whole["definitions"][name.rsplit('/').next().expect("a name")]);
    match behind.unwrap_or(schema)["properties"].as_object() {
        Some(inner) => {
            let dotted =
                |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
            inner.iter().flat_map(|(name, schema)| fields(schema, whole, &dotted(name))).collect()
        }
        None => vec![(path.to_owned(), schema.clone())],
    }
}

#[test]
fn every_field_that_values_may_set_is_one_of_the_service() {
    let Some(objects) = rendered("default") else { return };
    let text =
        std::fs::read_to_string(root().join("deploy/helm/cacheclip/values.schema.json")).expect("the schema");
    let schema = serde_json::from_str::<Value>(&text).expect("JSON");
    for (component, values) in SERVICES.into_iter().zip(["gateway", "gpuWorker", "auxScorer", "cacheStore"]) {
        let Some(program) = program(&workload(&objects, component)) else { continue };
        let fields = fields(&schema["properties"][values]["properties"]["config"], &schema, "");
        assert!(fields.len() > 5, "{component}: {fields:?}");
        for (field, schema) in fields {
            let set = format!("{field}={}", sample(&schema, &field));
            let output = output(Command::new(&program).args(["--dump-config", "--set", &set]).env_clear());
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{component}: {set}: {errors}");
        }
    }
}
