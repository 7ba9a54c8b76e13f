//! Task families over the generated world, in the sentence forms that the shipped pair was taught.
//!
//! RULER's families (needles, variable tracking) and what reuse of chunks breaks beyond them: links whose source
//! stands in another chunk, one definition used elsewhere, statements cut by a chunk's edge. Every task draws names,
//! values and orders anew from (seed, family, number); models were trained on contexts of another generator's seeds.

use super::task::{Scoring, Task};
use super::writing::{Context, Kind, Mix, Reserved};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

/// Chunks of a prompt, where a family does not say otherwise.
const CHUNKS: usize = 8;
/// Statements over all chunks of the families that cut the same text into more or fewer.
const EQUAL_TEXT: usize = 48;
/// Tokens that an answer of this world can have at most.
const ANSWER_TOKENS: usize = 24;

/// A kind of task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// One fact among sentences that say nothing.
    NiahSingle,
    /// One fact among facts.
    NiahMultiKey,
    /// Two facts of different chunks.
    NiahMultiQuery,
    /// One name with two values in different chunks, both asked for.
    NiahMultiValue,
    /// A link to a fact in another chunk.
    Vt1,
    /// A link to a link to a fact, in three chunks.
    Vt2,
    /// One fact that two links in two other chunks use; both links asked for.
    Definition,
    /// A name whose value is stated again, otherwise, in a later chunk: the later one counts.
    Conflict,
    /// A fact that a cut at a fixed length splits over two chunks.
    Cut,
    /// A fact within the first eight tokens of its chunk.
    ChunkHead,
    /// A link over four chunks of the same text as the next two.
    Chunks4,
    /// A link over eight chunks.
    Chunks8,
    /// A link over sixteen chunks.
    Chunks16,
    /// A link whose chunks stand in another order than they were written in (sources still first).
    Shuffled,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 14] = [
        Self::NiahSingle,
        Self::NiahMultiKey,
        Self::NiahMultiQuery,
        Self::NiahMultiValue,
        Self::Vt1,
        Self::Vt2,
        Self::Definition,
        Self::Conflict,
        Self::Cut,
        Self::ChunkHead,
        Self::Chunks4,
        Self::Chunks8,
        Self::Chunks16,
        Self::Shuffled,
    ];

    /// The family's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::NiahSingle => "niah-single",
            Self::NiahMultiKey => "niah-multi-key",
            Self::NiahMultiQuery => "niah-multi-query",
            Self::NiahMultiValue => "niah-multi-value",
            Self::Vt1 => "vt-1",
            Self::Vt2 => "vt-2",
            Self::Definition => "definition",
            Self::Conflict => "conflict",
            Self::Cut => "cut",
            Self::ChunkHead => "chunk-head",
            Self::Chunks4 => "chunks-4",
            Self::Chunks8 => "chunks-8",
            Self::Chunks16 => "chunks-16",
            Self::Shuffled => "shuffled",
        }
    }

    /// The family of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }

    /// Whether the answer needs more than one chunk read together.
    pub fn cross_chunk(self) -> bool {
        !matches!(
            self,
            Self::NiahSingle
                | Self::NiahMultiKey
                | Self::NiahMultiQuery
                | Self::NiahMultiValue
                | Self::ChunkHead
        )
    }

    /// The task with number `index` under `seed`.
    pub fn task(self, seed: u64, index: usize) -> Task {
        let text = format!("cacheclip eval {seed} {} {index}", self.name());
        let mut random = StdRng::from_seed(*blake3::hash(text.as_bytes()).as_bytes());
        // Some contexts have nothing to ask about in this family: another is drawn.
        loop {
            if let Some(task) = self.draw(&mut random, index) {
                return task;
            }
        }
    }

    fn draw(self, random: &mut StdRng, index: usize) -> Option<Task> {
        let mix = match self {
            Self::NiahSingle => Mix { links: 0.0, fillers: 1.0 },
            Self::NiahMultiKey
            | Self::NiahMultiQuery
            | Self::NiahMultiValue
            | Self::Cut
            | Self::ChunkHead => Mix { links: 0.0, fillers: 0.08 },
            _ => Mix { links: 0.4, fillers: 0.08 },
        };
        let slots: Vec<usize> = match self {
            Self::Chunks4 => vec![EQUAL_TEXT / 4; 4],
            Self::Chunks8 => vec![EQUAL_TEXT / 8; 8],
            Self::Chunks16 => vec![EQUAL_TEXT / 16; 16],
            _ => (0..CHUNKS).map(|_| random.random_range(5..=7)).collect(),
        };
        let mut context = Context::new(random);
        let reserved = self.reserve(&mut context, &slots, random);
        context.fill(&slots, &mix, &reserved, random);
        let asked: Vec<usize> = match self {
            Self::NiahSingle | Self::NiahMultiValue | Self::Definition | Self::ChunkHead => {
                context.reserved_entries()
            }
            Self::Conflict => vec![*context.reserved_entries().last()?],
            Self::NiahMultiKey => vec![context.any(random, |entry| entry.depth == 0)?],
            Self::NiahMultiQuery => {
                let first = context.any(random, |entry| entry.depth == 0)?;
                let home = context.entries[first].chunk;
                vec![first, context.any(random, |entry| entry.depth == 0 && entry.chunk != home)?]
            }
            Self::Cut => return self.cut(&context, random, index),
            Self::Vt2 => vec![context.any(random, |entry| entry.depth == 2)?],
            Self::Vt1 | Self::Chunks4 | Self::Chunks8 | Self::Chunks16 => {
                vec![context.any(random, |entry| entry.depth == 1)?]
            }
            Self::Shuffled => {
                context.shuffle(random);
                vec![context.any(random, |entry| entry.depth == 1)?]
            }
        };
        // Of a definition only its users are asked for.
        let asked = if self == Self::Definition { asked[1..].to_vec() } else { asked };
        let mut decisive: Vec<_> = asked.iter().flat_map(|&entry| context.chain(entry)).collect();
        if self == Self::Conflict {
            decisive.extend(context.reserved_entries().iter().flat_map(|&entry| context.chain(entry)));
        }
        let (question, answer) = context.wording(&asked);
        Some(self.wrap(index, context.texts(), question, answer, decisive))
    }

    /// Statements that must stand somewhere, in order.
    fn reserve(self, context: &mut Context, slots: &[usize], random: &mut StdRng) -> Vec<Reserved> {
        let mut chunks: Vec<usize> =
            rand::seq::index::sample(random, slots.len(), slots.len().min(3)).into_vec();
        chunks.sort_unstable();
        let mut at = |place: usize, kind| {
            let chunk = chunks[place];
            Reserved { chunk, slot: random.random_range(0..slots[chunk]), kind }
        };
        match self {
            Self::NiahSingle => vec![at(0, Kind::Fact)],
            Self::NiahMultiValue | Self::Conflict => {
                let name = context.next_name();
                vec![at(0, Kind::Named(name.clone())), at(1, Kind::Named(name))]
            }
            Self::Definition => {
                let name = context.next_name();
                vec![
                    at(0, Kind::Named(name.clone())),
                    at(1, Kind::LinkTo(name.clone())),
                    at(2, Kind::LinkTo(name)),
                ]
            }
            Self::ChunkHead => vec![Reserved { slot: 0, ..at(1, Kind::Headless) }],
            _ => Vec::new(),
        }
    }

    /// The whole text cut into chunks of equally many words; asked is a fact that a cut goes through.
    fn cut(self, context: &Context, random: &mut StdRng, index: usize) -> Option<Task> {
        let text = context.texts().join(" ");
        // Words with the space before them, so that tokens on both sides of a cut are what they were.
        let starts: Vec<usize> = text.match_indices(' ').map(|(at, _)| at).collect();
        let step = starts.len().div_ceil(CHUNKS);
        let mut edges: Vec<usize> = starts.iter().copied().skip(step).step_by(step).collect();
        edges.insert(0, 0);
        edges.push(text.len());
        let inside = |from: usize, to: usize| edges.iter().any(|&edge| from < edge && edge < to);
        let split: Vec<(usize, usize)> = (0..context.entries.len())
            .filter_map(|entry| {
                let statement = context.statement(entry);
                let from = text.find(statement)?;
                // Between the name and the last word of the value.
                let value = statement.find(" near")?;
                inside(from, from + value).then_some((entry, from))
            })
            .collect();
        let &(entry, from) = split.choose(random)?;
        let to = from + context.statement(entry).len();
        let chunks: Vec<&str> = edges.windows(2).map(|edge| &text[edge[0]..edge[1]]).collect();
        let decisive = edges.windows(2).enumerate().filter_map(|(chunk, edge)| {
            let (a, b) = (from.max(edge[0]), to.min(edge[1]));
            (a < b).then(|| (chunk, (a - edge[0]) as u32..(b - edge[0]) as u32))
        });
        let (question, answer) = context.wording(&[entry]);
        let chunks = chunks.into_iter().map(str::to_owned).collect();
        Some(self.wrap(index, chunks, question, answer, decisive.collect()))
    }

    fn wrap(
        self,
        index: usize,
        chunks: Vec<String>,
        question: String,
        answer: String,
        mut decisive: Vec<(usize, std::ops::Range<u32>)>,
    ) -> Task {
        decisive.sort_by_key(|(chunk, bytes)| (*chunk, bytes.start));
        decisive.dedup();
        Task {
            family: self.name().to_owned(),
            index,
            prefix: None,
            chunks,
            question,
            answers: vec![answer],
            scoring: Scoring::Exact,
            max_tokens: ANSWER_TOKENS,
            decisive,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_tasks_and_another_one_others() {
        for family in Family::ALL {
            assert_eq!(family.task(1, 3), family.task(1, 3));
            assert_ne!(family.task(1, 3), family.task(2, 3));
            assert_eq!(Family::named(family.name()), Some(family));
        }
    }

    #[test]
    fn decisive_bytes_hold_the_asked_names_and_the_values_of_the_answer() {
        for family in Family::ALL {
            for index in 0..40 {
                let task = family.task(7, index);
                let read: Vec<&str> = task
                    .decisive
                    .iter()
                    .map(|(chunk, bytes)| &task.chunks[*chunk][bytes.start as usize..bytes.end as usize])
                    .collect();
                let read = read.join("");
                let asked = task.question.rsplit("Answer: ").next().unwrap().trim_end_matches("'s");
                assert!(read.contains(asked), "{family:?}: {asked} in {read}");
                for word in task.answers[0].trim_end_matches('.').split(' ') {
                    let word = word.trim_end_matches(',').trim_end_matches("'s");
                    assert!(read.contains(word), "{family:?}: {word} in {read}");
                }
            }
        }
    }

    #[test]
    fn families_are_what_their_names_say() {
        for index in 0..40 {
            let chunks = |family: Family| {
                let task = family.task(3, index);
                let mut chunks: Vec<usize> = task.decisive.iter().map(|(chunk, _)| *chunk).collect();
                chunks.dedup();
                (task, chunks)
            };
            assert_eq!(chunks(Family::NiahSingle).1.len(), 1);
            assert_eq!(chunks(Family::Vt1).1.len(), 2);
            assert_eq!(chunks(Family::Vt2).1.len(), 3);
            assert_eq!(chunks(Family::Definition).1.len(), 3);
            assert_eq!(chunks(Family::Cut).1.len(), 2);
            assert_eq!(chunks(Family::Conflict).1.len(), 2);
            assert_eq!(chunks(Family::Chunks16).0.chunks.len(), 16);
            let (task, chunks) = chunks(Family::ChunkHead);
            assert_eq!((chunks.len(), task.decisive[0].1.start), (1, 1));
        }
    }

    #[test]
    fn links_point_backwards_in_every_order() {
        for index in 0..40 {
            let task = Family::Shuffled.task(5, index);
            let asked = task.question.rsplit("Answer: ").next().unwrap().trim_end_matches("'s").to_owned();
            let (last, bytes) = task.decisive.last().unwrap();
            assert!(task.chunks[*last][bytes.start as usize..].trim_start().starts_with(&asked));
        }
    }
}
