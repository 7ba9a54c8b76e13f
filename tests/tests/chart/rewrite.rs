//! What of a rendered text cannot be the same on a test's machine, and nothing else of it.

use std::collections::BTreeSet;

/// Texts that are rendered for a cluster, with what stands for them here.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rewrites(Vec<(String, String)>);

impl Rewrites {
    pub(crate) fn add(&mut self, rendered: impl Into<String>, here: impl Into<String>) {
        self.0.push((rendered.into(), here.into()));
    }

    /// Each part of the text is looked at once, and the longest that fits is taken: what was put in is never replaced
    /// again, and `/etc/cacheclip-redis` is not taken for `/etc/cacheclip`.
    pub(crate) fn apply(&self, text: &str) -> String {
        let mut here = String::new();
        let mut rest = text;
        while let Some(letter) = rest.chars().next() {
            let fitting = self.0.iter().filter(|(rendered, _)| rest.starts_with(rendered));
            match fitting.max_by_key(|(rendered, _)| rendered.len()) {
                Some((rendered, instead)) => {
                    here.push_str(instead);
                    rest = &rest[rendered.len()..];
                }
                None => {
                    here.push(letter);
                    rest = &rest[letter.len_utf8()..];
                }
            }
        }
        here
    }
}

/// Dotted names of the fields in which two configurations differ.
pub(crate) fn changed(rendered: &str, here: &str) -> BTreeSet<String> {
    let parse = |text: &str| text.parse::<toml::Table>().unwrap_or_else(|error| panic!("{error}: {text}"));
    let mut found = BTreeSet::new();
    compare(&parse(rendered), &parse(here), "", &mut found);
    found
}

fn compare(one: &toml::Table, other: &toml::Table, path: &str, found: &mut BTreeSet<String>) {
    for field in one.keys().chain(other.keys()) {
        let dotted = if path.is_empty() { field.clone() } else { format!("{path}.{field}") };
        match (one.get(field), other.get(field)) {
            (Some(toml::Value::Table(one)), Some(toml::Value::Table(other))) => {
                compare(one, other, &dotted, found);
            }
            (one, other) if one != other => {
                found.insert(dotted);
            }
            _ => {}
        }
    }
}

#[test]
fn the_longest_text_is_replaced_once_and_every_changed_field_is_named() {
    let mut rewrites = Rewrites::default();
    rewrites.add("/etc/cacheclip", "/here/etc/cacheclip-redis");
    rewrites.add("/etc/cacheclip-redis", "/there");
    assert_eq!(
        rewrites.apply("a /etc/cacheclip-redis/x /etc/cacheclip/y"),
        "a /there/x /here/etc/cacheclip-redis/y"
    );
    let found = changed("a = 1\n[b]\nc = 2\nd = 3", "a = 1\ne = 5\n[b]\nc = 4");
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["b.c", "b.d", "e"]);
}
