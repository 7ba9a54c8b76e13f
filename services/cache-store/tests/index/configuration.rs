//! The `[index]` table, as the program takes it.

use crate::process::PROGRAM;
use std::process::Command;

#[test]
fn a_wrong_index_is_a_bad_configuration_that_names_its_field() {
    let cases: [(&[&str], &str); 4] = [
        (&["index.kind=redis"], "index.urls: is empty"),
        (&["index.kind=redis", "index.urls=[\"http://h:1\"]"], "index.urls: write redis://"),
        (&["index.kind=valkey"], "valkey"),
        (&["index.lease_seconds=0"], "index.lease_seconds: is 0"),
    ];
    for (settings, expected) in cases {
        let settings = settings.iter().flat_map(|setting| ["--set", setting]);
        let output = Command::new(PROGRAM).args(settings).output().unwrap();
        let line = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{line}");
        assert!(line.contains(expected), "{line}");
    }
}

#[test]
fn a_dumped_configuration_shows_the_index_and_not_its_password() {
    let mut program = Command::new(PROGRAM);
    program.env("CACHECLIP_INDEX__KIND", "redis").env("CACHECLIP_INDEX__PASSWORD", "hunter2");
    program.args(["--dump-config", "--set", "index.urls=[\"redis://h:1\"]"]);
    let output = program.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("[index]") && text.contains("redis://h:1"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}
