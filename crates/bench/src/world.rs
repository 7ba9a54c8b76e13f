//! A small world of people, tokens and places, written as reports.
//!
//! The same word lists and sentence forms that the tiny models were trained on (`models/tiny/world.json`,
//! `models/tiny/train/world.py`), in corpora they never saw:
//!
//! ```text
//! fact   Marlow keeps the amber falcon near the mill.
//! link   Alder keeps Marlow's token near the ford.       (Marlow's statement stands in an earlier report)
//! ```
//!
//! Reports come in districts of [`DISTRICT`]; links stay inside a district and point backwards, so a prompt
//! of two whole districts never refers to a report that is not there. Within that rule every question gets
//! its reports in an order of its own.

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, SliceRandom as _};
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

/// Reports that link among themselves.
pub const DISTRICT: usize = 4;
/// Statements per report.
const STATEMENTS: usize = 6;
/// Share of statements that are links, where an earlier report offers a source.
const LINKS: f64 = 0.35;
/// Share of statements that say nothing.
const FILLERS: f64 = 0.08;

/// The word lists.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Words {
    pub(crate) names: Vec<String>,
    pub(crate) adjectives: Vec<String>,
    pub(crate) nouns: Vec<String>,
    pub(crate) places: Vec<String>,
    pub(crate) towns: Vec<String>,
    pub(crate) verbs: Vec<String>,
    pub(crate) fillers: Vec<String>,
}

impl Words {
    /// The lists that the models were trained on.
    pub(crate) fn shipped() -> Self {
        serde_json::from_str(include_str!("../../../models/tiny/world.json"))
            .expect("the word lists are part of this program")
    }
}

/// What a question asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// One fact of one report.
    Single,
    /// Two names whose statements stand in different reports.
    Several,
    /// A link to a fact in another report.
    Link,
    /// A link to a link to a fact, in three reports.
    TwoLinks,
}

impl Family {
    /// All families, in the order questions take turns.
    pub const ALL: [Self; 4] = [Self::Single, Self::Several, Self::Link, Self::TwoLinks];
    /// The families that the small primary was trained to answer reliably with full attention (see its card): where
    /// full prefill itself guesses, agreeing with it says nothing.
    pub const RELIABLE: [Self; 3] = [Self::Single, Self::Several, Self::Link];

    /// The family's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Several => "several",
            Self::Link => "link",
            Self::TwoLinks => "two-links",
        }
    }
}

/// One report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// For people.
    pub name: String,
    /// The text that becomes a chunk.
    pub text: String,
}

/// A question over some of a corpus's documents, in an order of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// What it asks for.
    pub family: Family,
    /// Indices into the corpus, in the order of the prompt.
    pub chunks: Vec<usize>,
    /// The prompt's tail.
    pub text: String,
    /// The right answer.
    pub answer: String,
}

/// Documents and questions about them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corpus {
    /// The reports.
    pub documents: Vec<Document>,
    /// Questions with their answers.
    pub questions: Vec<Question>,
}

/// What is known about a name.
#[derive(Clone, Debug)]
struct Entry {
    name: String,
    adjective: String,
    noun: String,
    document: usize,
    /// Links between the name and its value.
    depth: usize,
}

/// Generates `districts` districts of reports and `questions` questions whose families take turns; the same seed,
/// the same corpus.
pub fn generate(seed: u64, districts: usize, questions: usize, families: &[Family]) -> Corpus {
    Generator { random: StdRng::seed_from_u64(seed), words: Words::shipped(), entries: Vec::new() }
        .corpus(districts, questions, families)
}

struct Generator {
    random: StdRng,
    words: Words,
    entries: Vec<Entry>,
}

impl Generator {
    fn corpus(mut self, districts: usize, questions: usize, families: &[Family]) -> Corpus {
        // Drawn without replacement over the whole corpus: a name means one thing in every prompt.
        self.words.names.shuffle(&mut self.random);
        self.words.adjectives.shuffle(&mut self.random);
        self.words.towns.shuffle(&mut self.random);
        let documents = (0..districts * DISTRICT).map(|index| self.document(index)).collect();
        let questions =
            families.iter().cycle().take(questions).map(|&family| self.question(family, districts)).collect();
        Corpus { documents, questions }
    }

    fn document(&mut self, index: usize) -> Document {
        let town = self.words.towns[index % self.words.towns.len()].clone();
        let mut sentences = vec![format!("Report from {town}.")];
        // The second report always links to the first and the third to the second, so that every district
        // has something to ask about.
        let must = match index % DISTRICT {
            1 => Some(0),
            2 => Some(1),
            _ => None,
        };
        let at = self.random.random_range(0..STATEMENTS);
        for slot in 0..STATEMENTS {
            let depth = must.filter(|_| slot == at);
            sentences.push(self.statement(index, depth));
        }
        Document { name: format!("{:02}-{}", index + 1, town.to_lowercase()), text: sentences.join(" ") }
    }

    fn statement(&mut self, document: usize, must_link_to: Option<usize>) -> String {
        let random = &mut self.random;
        if must_link_to.is_none() && random.random_bool(FILLERS) {
            return pick(&self.words.fillers, random);
        }
        let earlier = document / DISTRICT * DISTRICT..document;
        let sources: Vec<&Entry> = self
            .entries
            .iter()
            .filter(|entry| earlier.contains(&entry.document) && entry.depth < 2)
            .filter(|entry| must_link_to.is_none_or(|depth| entry.depth == depth))
            .collect();
        let (verb, place) = (pick(&self.words.verbs, random), pick(&self.words.places, random));
        let links = must_link_to.is_some() || random.random_bool(LINKS);
        let source = sources.choose(random).filter(|_| links).map(|entry| (*entry).clone());
        let name = self.words.names.pop().expect("a corpus has fewer statements than there are names");
        match source {
            Some(source) => {
                let text = format!("{name} {verb} {}'s token near the {place}.", source.name);
                self.entries.push(Entry { name, document, depth: source.depth + 1, ..source });
                text
            }
            None => {
                let adjective =
                    self.words.adjectives.pop().expect("a corpus has fewer facts than there are adjectives");
                let noun = pick(&self.words.nouns, random);
                let text = format!("{name} {verb} the {adjective} {noun} near the {place}.");
                self.entries.push(Entry { name, adjective, noun, document, depth: 0 });
                text
            }
        }
    }

    fn question(&mut self, family: Family, districts: usize) -> Question {
        let home = self.random.random_range(0..districts);
        let mut others: Vec<usize> = (0..districts).filter(|&d| d != home).collect();
        others.shuffle(&mut self.random);
        let chosen: Vec<usize> = std::iter::once(home).chain(others.into_iter().take(1)).collect();
        let depth = match family {
            Family::Single | Family::Several => 0,
            Family::Link => 1,
            Family::TwoLinks => 2,
        };
        let within = |entry: &&Entry| chosen.contains(&(entry.document / DISTRICT));
        let at_home = |entry: &&Entry| entry.document / DISTRICT == home;
        let asked: Vec<&Entry> = self.entries.iter().filter(|e| at_home(e) && e.depth == depth).collect();
        let first =
            (*asked.choose(&mut self.random).expect("every district has an entry of every depth")).clone();
        let second = (family == Family::Several).then(|| {
            let rest: Vec<&Entry> = self
                .entries
                .iter()
                .filter(within)
                .filter(|e| e.document != first.document && e.depth == 0)
                .collect();
            (*rest.choose(&mut self.random).expect("other reports hold facts")).clone()
        });
        let asked: Vec<(&str, String)> = std::iter::once(&first)
            .chain(&second)
            .map(|entry| (entry.name.as_str(), format!("{} {}", entry.adjective, entry.noun)))
            .collect();
        let (text, answer) = wording(&asked);
        Question { family, chunks: self.interleave(&chosen), text, answer }
    }

    /// The districts' reports, each district in its own order, shuffled into each other.
    fn interleave(&mut self, districts: &[usize]) -> Vec<usize> {
        let mut next: Vec<usize> = districts.iter().map(|district| district * DISTRICT).collect();
        let mut turns: Vec<usize> = (0..districts.len()).flat_map(|d| [d; DISTRICT]).collect();
        turns.shuffle(&mut self.random);
        turns
            .into_iter()
            .map(|district| {
                next[district] += 1;
                next[district] - 1
            })
            .collect()
    }
}

/// Question and answer, as the models were taught to read and write them, for one name or two with what they keep.
pub(crate) fn wording(asked: &[(&str, String)]) -> (String, String) {
    let names: Vec<&str> = asked.iter().map(|(name, _)| *name).collect();
    let verb = if names.len() == 1 { "does" } else { "do" };
    let text = format!("\nQuestion: what {verb} {} keep?\nAnswer: {}'s", names.join(" and "), names[0]);
    let parts = asked.iter().enumerate().map(|(place, (name, value))| match place {
        0 => value.clone(),
        _ => format!("{name}'s {value}"),
    });
    (text, parts.collect::<Vec<_>>().join(", ") + ".")
}

pub(crate) fn pick(words: &[String], random: &mut StdRng) -> String {
    words.choose(random).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_corpus_and_another_one_another() {
        let corpus = |seed| generate(seed, 6, 24, &Family::ALL);
        assert_eq!(corpus(5), corpus(5));
        assert_ne!(corpus(5), corpus(6));
    }

    #[test]
    fn every_answer_follows_from_reports_that_stand_in_the_prompt_in_order() {
        for seed in 0..20 {
            let corpus = generate(seed, 6, 24, &Family::ALL);
            for question in &corpus.questions {
                let prompt: Vec<&str> =
                    question.chunks.iter().map(|&index| corpus.documents[index].text.as_str()).collect();
                let asked: Vec<String> = question
                    .answer
                    .split(", ")
                    .enumerate()
                    .map(|(i, part)| match i {
                        0 => {
                            question.text.rsplit("Answer: ").next().unwrap().trim_end_matches("'s").to_owned()
                        }
                        _ => part.split("'s").next().unwrap().to_owned(),
                    })
                    .collect();
                for (name, value) in asked.iter().zip(question.answer.trim_end_matches('.').split(", ")) {
                    let value = value.rsplit("'s ").next().unwrap();
                    assert_eq!(resolve(&prompt, name, prompt.len()).as_deref(), Some(value), "{question:?}");
                }
            }
        }
    }

    /// What `name` keeps, reading like a person: the statement, then the links it points back to.
    fn resolve(prompt: &[&str], name: &str, before: usize) -> Option<String> {
        let (at, words) = prompt[..before].iter().enumerate().find_map(|(at, text)| {
            let sentence = text.split(". ").find(|sentence| sentence.split(' ').next() == Some(name))?;
            Some((at, sentence.split(' ').skip(2).collect::<Vec<_>>()))
        })?;
        if words[0] == "the" {
            return Some(format!("{} {}", words[1], words[2]));
        }
        resolve(prompt, words[0].strip_suffix("'s")?, at)
    }

    #[test]
    fn families_take_turns_and_orders_differ() {
        let corpus = generate(1, 6, 24, &Family::ALL);
        for family in Family::ALL {
            assert_eq!(corpus.questions.iter().filter(|q| q.family == family).count(), 6);
        }
        let orders: std::collections::HashSet<_> = corpus.questions.iter().map(|q| &q.chunks).collect();
        assert!(orders.len() > 20);
    }
}
