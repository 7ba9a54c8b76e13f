//! The one configuration loader: defaults, then a TOML file, then the environment, then overrides.
//!
//! Environment variables are `CACHECLIP_` and the field in capitals, with `__` between levels:
//! `CACHECLIP_SERVICE__LISTEN=0.0.0.0:7070`. A value that looks like a number or a boolean is one; quote it twice
//! (`'"0123"'`) where the field is text.

use crate::Error;
use figment::Figment;
use figment::providers::{Env, Format as _, Serialized, Toml};
use figment::value::Value;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;

/// Prefix of the environment variables that are read.
pub const ENV_PREFIX: &str = "CACHECLIP_";

/// Variables with the prefix that are command line flags and no fields (see [`crate::run()`]).
const FLAGS: [&str; 3] = ["config", "log", "log_format"];

/// One `field=value` of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// Dotted path of the field.
    pub field: String,
    /// The value as TOML writes it; a bare word is text.
    pub value: String,
}

impl std::str::FromStr for Override {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((field, value)) if !field.trim().is_empty() => {
                Ok(Self { field: field.trim().into(), value: value.trim().into() })
            }
            _ => Err(format!("{text:?} is not field=value")),
        }
    }
}

/// Loads a configuration. `T` refuses unknown fields by `#[serde(deny_unknown_fields)]`.
///
/// # Errors
/// A file that cannot be read, an unknown field, a value of the wrong kind: with the field and its source.
pub fn load<T>(file: Option<&Path>, overrides: &[Override]) -> Result<T, Error>
where
    T: DeserializeOwned + Serialize + Default,
{
    load_from(file, Env::prefixed(ENV_PREFIX).ignore(&FLAGS).split("__"), overrides)
}

fn load_from<T>(file: Option<&Path>, env: Env, overrides: &[Override]) -> Result<T, Error>
where
    T: DeserializeOwned + Serialize + Default,
{
    let wrong = |reason: String| Error::Config { file: file.map(Path::to_owned), reason };
    let mut figment = Figment::from(Serialized::defaults(T::default()));
    if let Some(path) = file {
        // figment skips a file that is not there; a file that was asked for must be.
        if !path.is_file() {
            return Err(wrong("there is no such file".into()));
        }
        figment = figment.merge(Toml::file_exact(path));
    }
    figment = figment.merge(env);
    for Override { field, value } in overrides {
        // Infallible: what is no TOML value is text.
        let value: Value = value.parse().unwrap_or_else(|never| match never {});
        figment = figment.merge((field.as_str(), value));
    }
    figment
        .extract()
        .map_err(|error| wrong(error.into_iter().map(|one| one.to_string()).collect::<Vec<_>>().join("; ")))
}

/// The configuration as a TOML file that [`load`] takes, with the values of secrets left out.
///
/// # Errors
/// A configuration that TOML cannot express.
pub fn dump<T: Serialize>(config: &T) -> Result<String, Error> {
    let wrong = |reason: String| Error::Config { file: None, reason };
    let mut value = toml::Value::try_from(config).map_err(|error| wrong(error.to_string()))?;
    redact(&mut value);
    toml::to_string_pretty(&value).map_err(|error| wrong(error.to_string()))
}

fn redact(value: &mut toml::Value) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table.iter_mut() {
                let secret = ["secret", "password", "token"].iter().any(|word| key.ends_with(word));
                match value {
                    toml::Value::String(text) if secret && !text.is_empty() => *text = "<redacted>".into(),
                    other => redact(other),
                }
            }
        }
        toml::Value::Array(values) => values.iter_mut().for_each(redact),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Options;
    use serde::Deserialize;
    use std::io::Write as _;

    #[derive(Debug, PartialEq, Default, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Sample {
        scope_secret: String,
        peers: Vec<String>,
        service: Options,
    }

    fn no_env() -> Env {
        Env::prefixed("CACHECLIP_UNUSED_IN_TESTS_")
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(text.as_bytes()).expect("a write");
        file
    }

    #[test]
    fn overrides_win_over_the_file_and_the_file_over_defaults() {
        let file = file("[service]\nlisten = \"0.0.0.0:7070\"\nmax_concurrent_requests = 5\n");
        let overrides =
            ["service.listen=127.0.0.1:1", "peers=[\"a\", \"b\"]"].map(|text| text.parse().expect("sound"));
        let sample: Sample = load_from(Some(file.path()), no_env(), &overrides).expect("a configuration");
        assert_eq!(sample.service.listen, "127.0.0.1:1");
        assert_eq!(sample.service.max_concurrent_requests, 5);
        assert_eq!(sample.service.drain_seconds, Options::default().drain_seconds);
        assert_eq!(sample.peers, ["a", "b"]);
    }

    #[test]
    fn a_wrong_configuration_names_the_file_and_the_field() {
        let cases = [
            ("[service]\nlisten_on = \"x\"\n", "listen_on"),
            ("[service]\ndrain_seconds = \"x\"\n", "drain_seconds"),
        ];
        for (text, field) in cases {
            let file = file(text);
            let error = load_from::<Sample>(Some(file.path()), no_env(), &[]).expect_err(text).to_string();
            assert!(error.contains(field), "{error}");
            assert!(error.contains(&file.path().display().to_string()), "{error}");
        }
        let missing =
            load_from::<Sample>(Some(Path::new("nowhere.toml")), no_env(), &[]).expect_err("no file");
        assert!(missing.to_string().contains("nowhere.toml"), "{missing}");
        let overridden = load_from::<Sample>(None, no_env(), &["service.nope=1".parse().expect("sound")]);
        assert!(overridden.expect_err("unknown").to_string().contains("nope"));
    }

    #[test]
    fn a_dump_can_be_loaded_and_shows_no_secret() {
        let sample = Sample { scope_secret: "c0ffee".into(), ..Default::default() };
        let text = dump(&sample).expect("a dump");
        assert!(!text.contains("c0ffee"), "{text}");
        let loaded: Sample = load_from(Some(file(&text).path()), no_env(), &[]).expect("a configuration");
        assert_eq!(loaded.service, sample.service);
    }
}
