//! Redis servers of a test: started on free ports, killed at its end.

use crate::common::key;
use std::cell::RefCell;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Whether there is a server to start; says so where there is none.
pub(crate) fn installed() -> bool {
    let found = |program: &str| {
        let run = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        run.is_ok_and(|status| status.success())
    };
    let installed = found("redis-server") && found("redis-cli");
    if !installed {
        println!("skipped: redis-server is not installed (apt-get install redis-server)");
    }
    installed
}

/// How a server wants to be spoken to.
#[derive(Clone, Default)]
pub(crate) struct Flavour {
    pub(crate) password: Option<&'static str>,
    pub(crate) tls: bool,
    pub(crate) cluster: bool,
}

pub(crate) struct Server {
    child: RefCell<Option<Child>>,
    flavour: Flavour,
    pub(crate) port: u16,
    dir: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Server {
    pub(crate) fn start(flavour: Flavour) -> Self {
        // Somebody else may take a free port before the server does.
        for _ in 0..5 {
            let server = Self::at(free_port(), flavour.clone());
            if server.launch() {
                return server;
            }
        }
        panic!("redis-server does not start");
    }

    /// A server that has not been started yet.
    pub(crate) fn at(port: u16, flavour: Flavour) -> Self {
        let dir = tempfile::tempdir().unwrap();
        if flavour.tls {
            certify(dir.path());
        }
        Self { child: RefCell::new(None), flavour, port, dir }
    }

    /// Starts it, empty; false where it stopped at once.
    pub(crate) fn launch(&self) -> bool {
        let port = self.port.to_string();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--loglevel", "warning"]);
        command.arg("--dir").arg(self.dir.path());
        if self.flavour.tls {
            command.args(["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no"]);
            for (option, file) in [
                ("--tls-cert-file", "server.crt"),
                ("--tls-key-file", "server.key"),
                ("--tls-ca-cert-file", "ca.crt"),
            ] {
                command.arg(option).arg(self.dir.path().join(file));
            }
        } else {
            command.args(["--port", &port]);
        }
        if let Some(password) = self.flavour.password {
            command.args(["--requirepass", password]);
        }
        if self.flavour.cluster {
            let nodes = self.dir.path().join("nodes.conf");
            command.args(["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]);
            command.arg("--cluster-config-file").arg(nodes);
        }
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.cli(&["PING"]) != "PONG" {
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(Instant::now() < deadline, "redis-server does not answer within a minute");
            std::thread::sleep(Duration::from_millis(20));
        }
        self.child.replace(Some(child));
        true
    }

    /// What redis-cli prints for a command.
    pub(crate) fn cli(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("redis-cli");
        command.args(["-h", "127.0.0.1", "-p", &self.port.to_string()]);
        if self.flavour.tls {
            command.arg("--tls").arg("--cacert").arg(self.ca_file());
        }
        if let Some(password) = self.flavour.password {
            command.args(["-a", password, "--no-auth-warning"]);
        }
        let output = command.args(arguments).stderr(Stdio::null()).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    pub(crate) fn url(&self) -> String {
        format!("{}://127.0.0.1:{}", if self.flavour.tls { "rediss" } else { "redis" }, self.port)
    }

    pub(crate) fn ca_file(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    /// STOP or CONT.
    pub(crate) fn signal(&self, signal: &str) {
        let child = self.child.borrow();
        // The shell's own kill, because the program may be missing.
        let kill = format!("kill -{signal} {}", child.as_ref().unwrap().id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    pub(crate) fn kill(&self) {
        if let Some(mut child) = self.child.take() {
            // It may be gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Whether the record of chunk `n` names `node`.
    pub(crate) fn names(&self, n: u32, node: &str) -> bool {
        self.cli(&["HEXISTS", &chunk(n), node]) == "1"
    }
}

/// Redis' key of chunk `n`.
pub(crate) fn chunk(n: u32) -> String {
    format!("cacheclip:v1:chunk:{}", key(n))
}

/// Three servers that are one cluster.
pub(crate) fn cluster() -> Vec<Server> {
    let flavour = Flavour { cluster: true, ..Flavour::default() };
    let servers: Vec<_> = (0..3).map(|_| Server::start(flavour.clone())).collect();
    let addresses: Vec<_> = servers.iter().map(|server| format!("127.0.0.1:{}", server.port)).collect();
    let mut create = Command::new("redis-cli");
    create.args(["--cluster", "create"]).args(addresses).arg("--cluster-yes");
    let output = create.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let deadline = Instant::now() + Duration::from_secs(60);
    let ready = |server: &Server| server.cli(&["CLUSTER", "INFO"]).contains("cluster_state:ok");
    while !servers.iter().all(ready) {
        assert!(Instant::now() < deadline, "no cluster within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
    servers
}

/// A further server of the cluster, with all that `master` has; the others know of it.
pub(crate) fn replica(servers: &[Server], master: &Server) -> Server {
    let replica = Server::start(Flavour { cluster: true, ..Flavour::default() });
    let id = master.cli(&["CLUSTER", "MYID"]);
    let address = |server: &Server| format!("127.0.0.1:{}", server.port);
    let mut add = Command::new("redis-cli");
    add.args(["--cluster", "add-node", &address(&replica), &address(master)]);
    let output = add.args(["--cluster-slave", "--cluster-master-id", &id]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let replica_id = replica.cli(&["CLUSTER", "MYID"]);
    let known = |server: &Server| server.cli(&["CLUSTER", "REPLICAS", &id]).contains(&replica_id);
    let copied = || replica.cli(&["INFO", "replication"]).contains("master_link_status:up");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !(servers.iter().all(known) && copied()) {
        assert!(Instant::now() < deadline, "no replica within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
    replica
}

/// A free port whose neighbour 10,000 further, which a cluster's node also listens on, is free and exists.
pub(crate) fn free_port() -> u16 {
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        if port.checked_add(10_000).is_some_and(|bus| TcpListener::bind(("127.0.0.1", bus)).is_ok()) {
            return port;
        }
    }
}

/// An authority of our own, and a certificate of it for loopback.
fn certify(dir: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    authority.distinguished_name.push(DnType::CommonName, "an authority of this test");
    let authority_key = KeyPair::generate().unwrap();
    std::fs::write(dir.join("ca.crt"), authority.self_signed(&authority_key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(authority, authority_key);
    let mut server = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
    server.distinguished_name.push(DnType::CommonName, "redis of this test");
    let server_key = KeyPair::generate().unwrap();
    std::fs::write(dir.join("server.crt"), server.signed_by(&server_key, &issuer).unwrap().pem()).unwrap();
    std::fs::write(dir.join("server.key"), server_key.serialize_pem()).unwrap();
}
