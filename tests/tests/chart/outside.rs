//! What the profile `external-redis` expects to find: a Redis Cluster behind TLS, with an account that has the rights
//! which docs/operations.md tells operators to give, and no others.

use crate::helm::{output, root};
use crate::workload::SECRET_SAMPLE;
use cacheclip_tests::fleet::redis_server;
use cacheclip_tests::process::{Process, Program, free_port};
use cacheclip_tests::until;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

/// A cluster of as many nodes as the configuration names seeds.
#[derive(Debug)]
pub(crate) struct External {
    /// Rendered addresses with those of this machine.
    pub(crate) urls: Vec<(String, String)>,
    /// The authority that signed the nodes' certificates, as PEM.
    pub(crate) ca: String,
    _nodes: Vec<Process>,
}

/// Starts what a rendered index needs and the release does not bring; `None` where that is nothing.
pub(crate) async fn start(index: &toml::Value, dir: &Path) -> Option<External> {
    let text = |field: &str| index.get(field).and_then(toml::Value::as_str).unwrap_or_default().to_owned();
    if index.get("cluster").and_then(toml::Value::as_bool) != Some(true) {
        return None;
    }
    let urls = index["urls"].as_array().expect("seeds");
    let urls = urls.iter().map(|url| url.as_str().expect("text").to_owned()).collect::<Vec<_>>();
    assert!(urls.iter().all(|url| url.starts_with("rediss://")), "not behind TLS: {urls:?}");

    let dir = dir.join("external");
    std::fs::create_dir_all(&dir).expect("a directory");
    let ca = certify(&dir);
    let account = format!(
        "user default off\nuser {} on >{SECRET_SAMPLE} ~{}:* {} +cluster\n",
        text("username"),
        text("namespace"),
        rights()
    );
    let nodes = urls.iter().enumerate().map(|(at, _)| node(&dir, at, &account)).collect::<Vec<_>>();
    let cli = |(process, _): &(Process, u16), words: &[&str]| {
        let port = process.grpc.port().to_string();
        let mut command = Command::new("redis-cli");
        command.args(["-h", "127.0.0.1", "-p", &port, "--tls", "--cacert"]).arg(dir.join("ca.crt"));
        command.args(["--user", &text("username"), "--pass", SECRET_SAMPLE, "--no-auth-warning"]).args(words);
        String::from_utf8_lossy(&output(&mut command).stdout).trim().to_owned()
    };
    for node in &nodes {
        until("a node of the cluster answers", async || cli(node, &["PING"]) == "PONG").await;
    }
    // Each node has its share of the slots, so that a request for one leads to the other.
    let share = 16_384 / nodes.len();
    for (at, node) in nodes.iter().enumerate() {
        let last = if at + 1 == nodes.len() { 16_383 } else { (at + 1) * share - 1 };
        let (first, last) = ((at * share).to_string(), last.to_string());
        assert_eq!(cli(node, &["CLUSTER", "ADDSLOTSRANGE", &first, &last]), "OK");
        let (port, bus) = (node.0.grpc.port().to_string(), node.1.to_string());
        assert_eq!(cli(&nodes[0], &["CLUSTER", "MEET", "127.0.0.1", &port, &bus]), "OK");
    }
    let whole = format!("cluster_size:{}", nodes.len());
    for node in &nodes {
        until("the cluster is one", async || {
            let info = cli(node, &["CLUSTER", "INFO"]);
            info.contains("cluster_state:ok") && info.contains(&whole)
        })
        .await;
    }
    let here = nodes.iter().map(|(process, _)| format!("rediss://{}", process.grpc));
    let urls = urls.into_iter().zip(here).collect();
    Some(External { urls, ca, _nodes: nodes.into_iter().map(|(process, _)| process).collect() })
}

/// The commands of an account, as the documentation lists them.
fn rights() -> String {
    let page = std::fs::read_to_string(root().join("docs/operations.md")).expect("the page");
    let line = page.lines().find(|line| line.starts_with("+hset "));
    line.expect("the rights that operators are told to give").to_owned()
}

/// A node, and the port that nodes talk to each other on.
fn node(dir: &Path, at: usize, account: &str) -> (Process, u16) {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let bus = free_port();
    let own = dir.join(format!("node-{at}"));
    std::fs::create_dir_all(&own).expect("a directory");
    let file = |name: &str| dir.join(name).display().to_string();
    let config = format!(
        "port 0\ntls-port {}\ncluster-port {bus}\nbind 127.0.0.1\ndir {}\nsave \"\"\nappendonly no\n\
         cluster-enabled yes\ncluster-announce-ip 127.0.0.1\ntls-cluster yes\ntls-auth-clients no\n\
         tls-cert-file {}\ntls-key-file {}\ntls-ca-cert-file {}\n{account}",
        address.port(),
        own.display(),
        file("server.crt"),
        file("server.key"),
        file("ca.crt"),
    );
    let path = own.join("redis.conf");
    std::fs::write(&path, config).expect("a write");
    let program =
        Program::new(redis_server().expect("it was looked for before"), vec![path.display().to_string()]);
    (Process::start("redis-node", program, &own, address, address), bus)
}

/// An authority of our own and a certificate of it for loopback; the authority's PEM.
fn certify(dir: &Path) -> String {
    let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    authority.distinguished_name.push(DnType::CommonName, "an authority of this test");
    let key = KeyPair::generate().expect("a key");
    let ca = authority.self_signed(&key).expect("a certificate").pem();
    let issuer = Issuer::new(authority, key);
    let mut server = CertificateParams::new(vec!["127.0.0.1".into()]).expect("parameters");
    server.distinguished_name.push(DnType::CommonName, "redis of this test");
    let key = KeyPair::generate().expect("a key");
    let certificate = server.signed_by(&key, &issuer).expect("a certificate").pem();
    for (name, text) in [("ca.crt", &ca), ("server.crt", &certificate), ("server.key", &key.serialize_pem())]
    {
        std::fs::write(dir.join(name), text).expect("a write");
    }
    ca
}
