//! What the device computes: its certificate, and the tiny model's answers beside the CPU's, token by token.

use crate::bed::{Bed, Rehearsal, Room, Timed};
use crate::model::{Model, Prompt};
use crate::work::Work;
use anyhow::Context as _;
use cacheclip_bench::world::{Corpus, Family, Question, generate};
use cacheclip_model::certificate::{certify, relative_error};
use cacheclip_model::config::Config;
use cacheclip_model::device::Precision;
use cacheclip_model::load::Source;
use cacheclip_model::pages::Sequence;
use cacheclip_model::sample::{Options, Sampler};
use cacheclip_plan::Assembly;
use cacheclip_prompt::Composer;
use serde::Serialize;

/// Longest answer.
const ANSWER: usize = 16;
/// Every so-manieth chunk row is recomputed.
const STEP: usize = 5;
/// Blocks of a prompt this short.
const BLOCK_ROWS: usize = 512;

#[derive(Debug, Serialize)]
struct Certified {
    row: &'static str,
    passed: bool,
    /// The checks with their errors, or why there is no certificate.
    said: String,
}

#[derive(Debug, Default, Serialize)]
struct Answers {
    row: &'static str,
    passed: bool,
    /// Questions.
    n: usize,
    /// Answers equal to the CPU's, token by token: of full prefill, and with every fifth chunk row recomputed.
    equal_full: usize,
    equal_reuse: usize,
    /// Largest relative error of the first token's logits.
    worst_error: f32,
    /// Smallest relative error of logits of another question's prompt.
    least_control: f32,
}

/// Checks the device.
///
/// # Errors
/// No device, or the tiny model is not there; a device fault.
pub fn run<B: Bed>(bed: &B, work: &Work) -> anyhow::Result<()> {
    let dir = work.models.join("primary");
    let config = Config::from_dir(&dir)?;
    let room = Room::of(&config, &[config.max_positions; 4], config.max_positions, BLOCK_ROWS);
    let source = Source::Dir(dir.clone());
    let mut device = Model::load(&source, bed.open(&config, room)?, room)?;
    let certificate = certify(device.decoder());
    let passed = certificate.is_ok();
    let said = certificate.map_or_else(|error| error.to_string(), |it| it.to_string());
    work.say(format_args!("certificate: {said}"));
    work.row(&Certified { row: "certificate", passed, said })?;

    let mut cpu = Model::load(&source, Rehearsal.open(&config, room)?, room)?;
    let composer = Composer::from_dir(&dir).with_context(|| dir.display().to_string())?;
    let corpus = generate(23, 4, work.scale.questions, &Family::RELIABLE);
    let answers = compare(work, &mut device, &mut cpu, &composer, &corpus)?;
    work.say(format_args!(
        "answers: {} and {} of {} equal, error {:.1e}, control {:.1e}",
        answers.equal_full, answers.equal_reuse, answers.n, answers.worst_error, answers.least_control
    ));
    work.row(&answers)
}

/// The device's answers beside the CPU's, as many as there is time for.
fn compare<D: Timed, E: Timed>(
    work: &Work,
    device: &mut Model<D>,
    cpu: &mut Model<E>,
    composer: &Composer,
    corpus: &Corpus,
) -> anyhow::Result<Answers> {
    let Precision { tolerance, control } = device.decoder().device().precision();
    let mut answers = Answers { row: "answers", least_control: f32::INFINITY, ..Answers::default() };
    let mut other: Option<Vec<f32>> = None;
    for question in &corpus.questions {
        if work.deadline.passed() && answers.n > 0 {
            break;
        }
        let (ours, theirs) =
            (answer(device, composer, corpus, question)?, answer(cpu, composer, corpus, question)?);
        answers.n += 1;
        answers.equal_full += usize::from(ours.full == theirs.full);
        answers.equal_reuse += usize::from(ours.reuse == theirs.reuse);
        answers.worst_error = answers.worst_error.max(relative_error(&ours.logits, &theirs.logits));
        if let Some(other) = &other {
            answers.least_control = answers.least_control.min(relative_error(&ours.logits, other));
        }
        other = Some(theirs.logits);
    }
    answers.passed = answers.n > 1
        && answers.equal_full == answers.n
        && answers.equal_reuse == answers.n
        && answers.worst_error <= tolerance
        && answers.least_control >= control;
    Ok(answers)
}

/// What a model answers.
struct Answer {
    full: Vec<u32>,
    reuse: Vec<u32>,
    /// Of the first token, by full prefill.
    logits: Vec<f32>,
}

fn answer<D: Timed>(
    model: &mut Model<D>,
    composer: &Composer,
    corpus: &Corpus,
    question: &Question,
) -> anyhow::Result<Answer> {
    let prompt = prompt(model, composer, corpus, question)?;
    let (logits, _) = model.full(&prompt.ids)?;
    let sequence = model.sequence(prompt.ids.len() + ANSWER)?;
    model.fill(&sequence, &prompt.ids)?;
    let full = go_on(model, &sequence, prompt.ids.len(), &logits)?;
    let sequence = model.sequence(prompt.ids.len() + ANSWER)?;
    let rows: Vec<u32> =
        prompt.assembly.reused().filter(|row| row % STEP == 0).map(|row| row as u32).collect();
    let repaired = model.repaired(&sequence, &prompt, &rows)?;
    let reuse = go_on(model, &sequence, prompt.ids.len(), &repaired)?;
    Ok(Answer { full, reuse, logits })
}

/// The prompt of a question, with its chunks' KV as this model computes it.
fn prompt<D: Timed>(
    model: &mut Model<D>,
    composer: &Composer,
    corpus: &Corpus,
    question: &Question,
) -> anyhow::Result<Prompt> {
    let anchor = composer.anchor()?;
    let mut ids = anchor.clone();
    let mut sections = vec![(model.canonical(&[], &anchor)?, 0)];
    let mut lengths = Vec::new();
    for &chunk in &question.chunks {
        let own = composer.chunk(&corpus.documents[chunk].text)?.ids;
        sections.push((model.canonical(&anchor, &own)?, ids.len()));
        lengths.push(own.len());
        ids.extend(own);
    }
    let tail = composer.question(&question.text)?.ids;
    let assembly = Assembly::new(anchor.len(), &lengths, tail.len(), true);
    ids.extend(tail);
    Ok(Prompt::new(ids, assembly, sections))
}

/// Greedy tokens from the first one's logits on, to the end token or the longest answer.
fn go_on<D: Timed>(
    model: &mut Model<D>,
    sequence: &Sequence,
    tokens: usize,
    logits: &[f32],
) -> anyhow::Result<Vec<u32>> {
    let mut sampler = Sampler::new(Options::default());
    let mut answer = vec![sampler.next(logits)?];
    let mut next = Vec::new();
    while answer.len() < ANSWER {
        let last = answer[answer.len() - 1];
        if model.shape().eos.contains(&last) {
            break;
        }
        let position = (tokens + answer.len() - 1) as u32;
        model.decode(&[last], &[position], &[sequence.table()], &mut next)?;
        answer.push(sampler.next(&next)?);
    }
    Ok(answer)
}
