//! What the index can be told from outside, and what it refuses.

use crate::error::Error;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::path::PathBuf;

/// Where the index is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// In a file beside the objects: a store on its own.
    #[default]
    Embedded,
    /// In Redis, shared by a fleet.
    Redis,
}

/// The index of a store. All fields but `kind` and `lease_seconds` are for Redis.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// `embedded` or `redis`.
    pub kind: Kind,
    /// `redis://host:port` or, for TLS, `rediss://host:port`; a database may follow (`/2`). Several addresses are
    /// seeds of one cluster.
    pub urls: Vec<String>,
    /// The addresses are nodes of a Redis Cluster.
    pub cluster: bool,
    /// User of Redis' access control lists; empty: the default user.
    pub username: String,
    /// Password; empty: none.
    pub password: String,
    /// PEM file with the authorities that may sign the server's certificate, for `rediss://`; absent: the public
    /// ones.
    pub ca_file: Option<PathBuf>,
    /// Prefix of every key in Redis: fleets with different ones do not see each other.
    pub namespace: String,
    /// A store that shows no sign of life for this long is no member any more. Signs come three times as often.
    pub lease_seconds: f64,
    /// Longest wait for an answer of Redis; a lookup then answers without other nodes. Connecting may take four
    /// times as long, which nobody waits for.
    pub timeout_seconds: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kind: Kind::Embedded,
            urls: Vec::new(),
            cluster: false,
            username: String::new(),
            password: String::new(),
            ca_file: None,
            namespace: "cacheclip".into(),
            lease_seconds: 10.0,
            timeout_seconds: 0.5,
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, urls, cluster, username, password, ca_file, namespace, .. } = self;
        f.debug_struct("Options")
            .field("kind", kind)
            .field("urls", urls)
            .field("cluster", cluster)
            .field("username", username)
            .field("password", &if password.is_empty() { "" } else { "<redacted>" })
            .field("ca_file", ca_file)
            .field("namespace", namespace)
            .field("lease_seconds", &self.lease_seconds)
            .field("timeout_seconds", &self.timeout_seconds)
            .finish()
    }
}

impl Options {
    /// Deserializes what can be used: a wrong index is a wrong configuration and not a failed start.
    pub(crate) fn deserialize_checked<'de, D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let options = Self::deserialize(from)?;
        options.check().map_err(D::Error::custom)?;
        Ok(options)
    }

    pub(crate) fn tls(&self) -> bool {
        self.urls.iter().any(|url| url.starts_with("rediss://"))
    }

    /// Refuses what cannot work, by the name of the field.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let refuse = |field: &'static str, reason: String| Err(Error::Option { field, reason });
        // A lease is renewed three times, each time within the timeout; below a tenth of a second that is noise.
        if !(0.1..=3600.0).contains(&self.lease_seconds) {
            return refuse("index.lease_seconds", format!("is {}, must be 0.1 to 3600", self.lease_seconds));
        }
        if self.kind == Kind::Embedded {
            return Ok(());
        }
        if !(self.timeout_seconds > 0.0 && self.timeout_seconds <= self.lease_seconds) {
            let why = format!("is {}, must be above 0 and at most index.lease_seconds", self.timeout_seconds);
            return refuse("index.timeout_seconds", why);
        }
        if self.urls.is_empty() {
            return refuse("index.urls", "is empty; name the server: [\"redis://host:6379\"]".into());
        }
        for url in &self.urls {
            if let Err(why) = self.check_url(url) {
                return refuse("index.urls", why);
            }
        }
        if self.urls.len() > 1 && !self.cluster {
            let why = "several addresses are seeds of a cluster; set index.cluster = true or leave one";
            return refuse("index.urls", why.into());
        }
        if self.tls() && !self.urls.iter().all(|url| url.starts_with("rediss://")) {
            return refuse("index.urls", "mixes redis:// and rediss://; use one of them".into());
        }
        if self.ca_file.is_some() && !self.tls() {
            return refuse("index.ca_file", "is for TLS; write index.urls with rediss://".into());
        }
        if !self.username.is_empty() && self.password.is_empty() {
            return refuse("index.password", "is empty though index.username is set".into());
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if !(1..=64).contains(&self.namespace.len()) || !self.namespace.chars().all(plain) {
            let why = format!("is {:?}, must be 1 to 64 letters, digits, dots, dashes", self.namespace);
            return refuse("index.namespace", why);
        }
        Ok(())
    }

    fn check_url(&self, url: &str) -> Result<(), String> {
        let parsed = redis::parse_redis_url(url).filter(|it| ["redis", "rediss"].contains(&it.scheme()));
        // The address is not repeated before it is known to hold no password.
        let Some(parsed) = parsed else { return Err("write redis://host:port or rediss://host:port".into()) };
        if !parsed.username().is_empty() || parsed.password().is_some() {
            return Err("holds credentials; use index.username and index.password".into());
        }
        if parsed.host_str().is_none_or(str::is_empty) {
            return Err(format!("{url:?} has no host; write redis://host:port"));
        }
        if parsed.fragment().is_some() || parsed.query().is_some() {
            return Err(format!("{url:?} has parameters; write redis://host:port"));
        }
        match parsed.path().trim_matches('/') {
            "" => Ok(()),
            _ if self.cluster => Err(format!("{url:?} names a database; a cluster has one only")),
            database if database.parse::<u16>().is_ok() => Ok(()),
            database => Err(format!("{database:?} is no database; write a number or nothing")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redis(urls: &[&str]) -> Options {
        let urls = urls.iter().map(|url| (*url).to_owned()).collect();
        Options { kind: Kind::Redis, urls, ..Options::default() }
    }

    #[test]
    fn what_cannot_work_is_refused_by_the_name_of_its_field() {
        let one = || redis(&["redis://h:1"]);
        let cases = [
            ("index.urls", redis(&[])),
            ("index.urls", redis(&["http://h:1"])),
            ("index.urls", redis(&["redis+unix:///run/redis"])),
            ("index.urls", redis(&["h:1"])),
            ("index.urls", redis(&["redis://user:hunter2@h:1"])),
            ("index.urls", redis(&["rediss://h:1#insecure"])),
            ("index.urls", redis(&["redis://h:1?protocol=resp3"])),
            ("index.urls", redis(&["redis://h:1/x"])),
            ("index.urls", redis(&["redis://h:1", "redis://i:1"])),
            ("index.urls", Options { cluster: true, ..redis(&["redis://h:1", "rediss://i:1"]) }),
            ("index.urls", Options { cluster: true, ..redis(&["redis://h:1/2"]) }),
            ("index.ca_file", Options { ca_file: Some("x".into()), ..one() }),
            ("index.password", Options { username: "x".into(), ..one() }),
            ("index.namespace", Options { namespace: String::new(), ..one() }),
            ("index.namespace", Options { namespace: "{a}".into(), ..one() }),
            ("index.lease_seconds", Options { lease_seconds: 0.0, ..one() }),
            ("index.lease_seconds", Options { lease_seconds: f64::NAN, ..one() }),
            ("index.timeout_seconds", Options { timeout_seconds: 0.0, ..one() }),
            ("index.timeout_seconds", Options { timeout_seconds: 11.0, ..one() }),
        ];
        for (field, options) in cases {
            let error = options.check().expect_err(field).to_string();
            assert!(error.starts_with(&format!("{field}: ")), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn what_can_work_is_taken() {
        let good = [
            Options::default(),
            redis(&["redis://h"]),
            redis(&["redis://h:6379/2"]),
            redis(&["redis://[::1]:6379"]),
            Options { ca_file: Some("ca.crt".into()), ..redis(&["rediss://h:1"]) },
            Options { cluster: true, ..redis(&["redis://h:1", "redis://i:1"]) },
            Options { password: "p".into(), ..redis(&["redis://h:1"]) },
        ];
        for options in good {
            options.check().expect("sound");
        }
    }

    #[test]
    fn a_password_is_not_shown() {
        let options = Options { password: "hunter2".into(), ..redis(&["redis://h"]) };
        assert!(!format!("{options:?}").contains("hunter2"));
    }
}
