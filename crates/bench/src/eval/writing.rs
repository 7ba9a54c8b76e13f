//! Writes contexts of the generated world: reports of statements, of which some point to earlier reports.

use crate::world::{Words, pick, wording};
use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, SliceRandom as _};
use std::ops::Range;

/// Links between a name and its value, at most.
const DEEPEST: usize = 2;
/// How often a link prefers one of the deepest sources there are.
const DEEP: f64 = 0.5;

/// Shares of statement kinds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mix {
    /// Of links, where an earlier report offers a source.
    pub(super) links: f64,
    /// Of sentences that say nothing.
    pub(super) fillers: f64,
}

/// What a reserved place says.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// A fact about a fresh name.
    Fact,
    /// A fact about this name.
    Named(String),
    /// A fresh name's link to this name.
    LinkTo(String),
    /// A fact about a fresh name, at the start of a chunk that has no heading.
    Headless,
}

/// A statement whose place is fixed before the rest is drawn.
#[derive(Clone, Debug)]
pub(super) struct Reserved {
    pub(super) chunk: usize,
    pub(super) slot: usize,
    pub(super) kind: Kind,
}

/// What is known about a name.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    value: String,
    /// Links between the name and its value.
    pub(super) depth: usize,
    pub(super) chunk: usize,
    /// Index among the chunk's sentences.
    at: usize,
    /// Entry that a link points to.
    source: Option<usize>,
    reserved: bool,
}

/// Reports and what can be asked about them.
#[derive(Debug)]
pub(super) struct Context {
    words: Words,
    chunks: Vec<Vec<String>>,
    pub(super) entries: Vec<Entry>,
}

impl Context {
    /// Nothing written yet; names and adjectives are drawn without replacement, so that each means one thing.
    pub(super) fn new(random: &mut StdRng) -> Self {
        let mut words = Words::shipped();
        words.names.shuffle(random);
        words.adjectives.shuffle(random);
        Self { words, chunks: Vec::new(), entries: Vec::new() }
    }

    /// A name that nobody has.
    pub(super) fn next_name(&mut self) -> String {
        self.words.names.pop().unwrap_or_default()
    }

    /// Writes `slots[c]` statements into chunk `c`.
    pub(super) fn fill(&mut self, slots: &[usize], mix: &Mix, reserved: &[Reserved], random: &mut StdRng) {
        for (chunk, &count) in slots.iter().enumerate() {
            self.chunks.push(vec![format!("Report from {}.", pick(&self.words.towns, random))]);
            for slot in 0..count {
                match reserved.iter().find(|it| (it.chunk, it.slot) == (chunk, slot)) {
                    Some(it) => self.keep(chunk, &it.kind, random),
                    None => self.draw(chunk, mix, random),
                }
            }
        }
    }

    fn keep(&mut self, chunk: usize, kind: &Kind, random: &mut StdRng) {
        match kind {
            Kind::Fact => {
                let name = self.next_name();
                self.fact(chunk, name, random);
            }
            Kind::Named(name) => self.fact(chunk, name.clone(), random),
            Kind::LinkTo(name) => {
                let source = self.entries.iter().rposition(|entry| entry.name == *name).unwrap_or_default();
                self.link(chunk, source, random);
            }
            Kind::Headless => {
                // Opens with a space, as statements do elsewhere: the name is the token it always is.
                self.chunks[chunk] = vec![String::new()];
                let name = self.next_name();
                self.fact(chunk, name, random);
            }
        }
        if let Some(entry) = self.entries.last_mut() {
            entry.reserved = true;
        }
    }

    fn draw(&mut self, chunk: usize, mix: &Mix, random: &mut StdRng) {
        if random.random_bool(mix.fillers) {
            let filler = pick(&self.words.fillers, random);
            return self.chunks[chunk].push(filler);
        }
        let sources: Vec<usize> = (0..self.entries.len())
            .filter(|&it| self.entries[it].chunk < chunk && self.entries[it].depth < DEEPEST)
            .filter(|&it| !self.entries[it].reserved)
            .collect();
        let deepest = sources.iter().map(|&it| self.entries[it].depth).max().unwrap_or_default();
        let deep: Vec<usize> =
            sources.iter().copied().filter(|&it| self.entries[it].depth == deepest).collect();
        let from = if random.random_bool(DEEP) { deep } else { sources };
        match from.choose(random).filter(|_| mix.links > 0.0 && random.random_bool(mix.links)) {
            Some(&source) => self.link(chunk, source, random),
            None => {
                let name = self.next_name();
                self.fact(chunk, name, random);
            }
        }
    }

    fn fact(&mut self, chunk: usize, name: String, random: &mut StdRng) {
        let adjective = self.words.adjectives.pop().unwrap_or_default();
        let value = format!("{adjective} {}", pick(&self.words.nouns, random));
        self.write(chunk, format!("the {value}"), Entry { name, value, depth: 0, ..blank(chunk) }, random);
    }

    fn link(&mut self, chunk: usize, source: usize, random: &mut StdRng) {
        let Entry { name: owner, value, depth, .. } = self.entries[source].clone();
        let name = self.next_name();
        let entry = Entry { name, value, depth: depth + 1, source: Some(source), ..blank(chunk) };
        self.write(chunk, format!("{owner}'s token"), entry, random);
    }

    fn write(&mut self, chunk: usize, what: String, entry: Entry, random: &mut StdRng) {
        let (verb, place) = (pick(&self.words.verbs, random), pick(&self.words.places, random));
        let at = self.chunks[chunk].len();
        self.chunks[chunk].push(format!("{} {verb} {what} near the {place}.", entry.name));
        self.entries.push(Entry { at, ..entry });
    }

    /// Entries of the reserved places, in order.
    pub(super) fn reserved_entries(&self) -> Vec<usize> {
        (0..self.entries.len()).filter(|&it| self.entries[it].reserved).collect()
    }

    /// One of the drawn entries that `wanted` takes.
    pub(super) fn any(&self, random: &mut StdRng, wanted: impl Fn(&Entry) -> bool) -> Option<usize> {
        let fit: Vec<usize> = (0..self.entries.len())
            .filter(|&it| !self.entries[it].reserved && wanted(&self.entries[it]))
            .collect();
        fit.choose(random).copied()
    }

    /// The chunks in another order, sources still before what points to them.
    pub(super) fn shuffle(&mut self, random: &mut StdRng) {
        let count = self.chunks.len();
        let needs: Vec<Vec<usize>> = (0..count)
            .map(|chunk| {
                let links = self.entries.iter().filter(|entry| entry.chunk == chunk);
                links.filter_map(|entry| entry.source).map(|source| self.entries[source].chunk).collect()
            })
            .collect();
        let mut order: Vec<usize> = Vec::new();
        while order.len() < count {
            let ready: Vec<usize> = (0..count)
                .filter(|it| !order.contains(it) && needs[*it].iter().all(|need| order.contains(need)))
                .collect();
            let Some(&next) = ready.choose(random) else { break };
            order.push(next);
        }
        self.chunks = order.iter().map(|&chunk| self.chunks[chunk].clone()).collect();
        for entry in &mut self.entries {
            entry.chunk = order.iter().position(|&chunk| chunk == entry.chunk).unwrap_or_default();
        }
    }

    /// An entry's sentence.
    pub(super) fn statement(&self, entry: usize) -> &str {
        &self.chunks[self.entries[entry].chunk][self.entries[entry].at]
    }

    /// Chunk and bytes of the statements that an entry's value rests on.
    pub(super) fn chain(&self, entry: usize) -> Vec<(usize, Range<u32>)> {
        let mut chain = Vec::new();
        let mut next = Some(entry);
        while let Some(entry) = next {
            let Entry { chunk, at, source, .. } = self.entries[entry];
            let before: usize = self.chunks[chunk][..at].iter().map(|sentence| sentence.len() + 1).sum();
            chain.push((chunk, before as u32..(before + self.chunks[chunk][at].len()) as u32));
            next = source;
        }
        chain
    }

    /// The chunks' texts.
    pub(super) fn texts(&self) -> Vec<String> {
        self.chunks.iter().map(|sentences| sentences.join(" ")).collect()
    }

    /// Question and answer about some entries.
    pub(super) fn wording(&self, asked: &[usize]) -> (String, String) {
        let asked: Vec<(&str, String)> = asked
            .iter()
            .map(|&it| (self.entries[it].name.as_str(), self.entries[it].value.clone()))
            .collect();
        wording(&asked)
    }
}

fn blank(chunk: usize) -> Entry {
    Entry { name: String::new(), value: String::new(), depth: 0, chunk, at: 0, source: None, reserved: false }
}
