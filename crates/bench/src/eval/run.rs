//! All tasks of a run, on several threads, with records as they come.

use super::Error;
use super::bench::{Bench, Cell, Record};
use super::families::Family;
use super::pair::Pair;
use super::policies::{ADAPTIVE, Attention, FULL, Policy, Target, calibrate, catalogue};
use super::prepare::{Anchor, Prepared};
use super::records::Records;
use super::reference::Reference;
use super::report::Report;
use super::scene::Reading;
use super::signals::{Signal, measure};
use super::suite::{Settings, Source};
use super::task::Task;
use serde_json::json;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Instant;

/// Seed of the tasks that the adaptive ratio's targets are found on; refused for reported runs.
const DEVELOPMENT: u64 = 1_000_003;
/// Such tasks per family.
const CALIBRATION: usize = 12;

/// Where a run stands.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Tasks with a record.
    pub done: usize,
    /// All tasks.
    pub total: usize,
}

/// One task to do.
#[derive(Clone, Copy, Debug)]
enum Job<'a> {
    Drawn(Family, usize),
    Given(&'a Task),
}

impl Job<'_> {
    fn key(&self) -> (&str, usize) {
        match self {
            Self::Drawn(family, index) => (family.name(), *index),
            Self::Given(task) => (&task.family, task.index),
        }
    }

    fn task(&self, seed: u64) -> Task {
        match self {
            Self::Drawn(family, index) => family.task(seed, *index),
            Self::Given(task) => (*task).clone(),
        }
    }
}

/// Evaluates, and sums up. `progress` hears after every task.
///
/// # Errors
/// Settings that do not fit together, records of another run, or the first task that failed.
pub fn run(pair: &Pair, settings: &Settings, progress: &mut dyn FnMut(Progress)) -> Result<Report, Error> {
    let began = Instant::now();
    check(settings)?;
    let jobs: Vec<Job<'_>> = match &settings.source {
        Source::Families(families) => {
            families.iter().flat_map(|&it| (0..settings.n).map(move |index| Job::Drawn(it, index))).collect()
        }
        Source::Tasks(tasks) => tasks.iter().map(Job::Given).collect(),
    };
    let header = json!({
        "suite": settings.suite,
        "seed": settings.seed,
        "n": settings.n,
        "families": families(&jobs),
        "policies": settings.policies,
        "ratios": settings.ratios,
        "primary": pair.primary.weights,
        "aux": pair.aux.weights,
    });
    let (mut file, known) = match &settings.out {
        Some(dir) => {
            let (file, known) = Records::open(dir, &header, settings.resume)?;
            (Some(file), known)
        }
        None => (None, Vec::new()),
    };
    let targets = if settings.policies.iter().any(|name| name == ADAPTIVE) {
        targets(pair, settings)?
    } else {
        Vec::new()
    };
    let policies: Vec<Box<dyn Policy>> = catalogue(&targets)
        .into_iter()
        .filter(|policy| settings.policies.iter().any(|name| name == policy.name()))
        .collect();
    let cells = cells(&policies, &settings.ratios);
    let plain = policies.iter().any(|policy| {
        matches!(policy.attention(), Attention::LocalPositions | Attention::Parallel(_))
            || policy.needs().contains(&Signal::Independent)
    });
    let reference = if plain { Some(Reference::load(&pair.primary.dir)?) } else { None };
    let done: HashSet<(&str, usize)> = known.iter().map(|it| (it.family.as_str(), it.index)).collect();
    let open: Vec<Job<'_>> = jobs.iter().copied().filter(|job| !done.contains(&job.key())).collect();
    let mut records = known;
    progress(Progress { done: records.len(), total: jobs.len() });
    evaluate(pair, reference.as_ref(), settings, &open, &cells, &mut |record| {
        if let Some(file) = &mut file {
            file.append(&record)?;
        }
        records.push(record);
        progress(Progress { done: records.len(), total: jobs.len() });
        Ok(())
    })?;
    let order = families(&jobs);
    records.sort_by_key(|record| (order.iter().position(|it| *it == record.family), record.index));
    Ok(Report::new(pair, settings, &policies, &cells, &records, began.elapsed().as_secs_f64()))
}

/// Names of the families, in order.
fn families(jobs: &[Job<'_>]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for job in jobs {
        let (family, _) = job.key();
        if !names.iter().any(|known| known == family) {
            names.push(family.to_owned());
        }
    }
    names
}

fn check(settings: &Settings) -> Result<(), Error> {
    let all: Vec<String> = catalogue(&[]).iter().map(|policy| policy.name().to_owned()).collect();
    let refuse = |why: String| Err(Error::Settings(why));
    if let Some(name) = settings.policies.iter().find(|name| !all.contains(name)) {
        return refuse(format!("unknown policy {name:?}: choose from {}", all.join(", ")));
    }
    if !settings.policies.iter().any(|name| name == FULL) {
        return refuse(format!(
            "policy {FULL} must be among the policies: all others are measured against it"
        ));
    }
    if let Some(ratio) = settings.ratios.iter().find(|ratio| !(0.0..=1.0).contains(*ratio)) {
        return refuse(format!("ratio {ratio} is not within 0..1"));
    }
    if settings.seed == DEVELOPMENT {
        return refuse(format!("seed {DEVELOPMENT} is for development: targets are calibrated on its tasks"));
    }
    Ok(())
}

/// Policies with each ratio they take; those without a budget once.
fn cells<'a>(policies: &'a [Box<dyn Policy>], ratios: &[f32]) -> Vec<Cell<'a>> {
    let mut cells = Vec::new();
    for policy in policies {
        let policy = &**policy;
        if policy.budgeted() {
            let taken = ratios.iter().copied().filter(|&ratio| policy.takes(ratio));
            cells.extend(taken.map(|ratio| Cell { policy, ratio: Some(ratio) }));
        } else {
            cells.push(Cell { policy, ratio: None });
        }
    }
    cells
}

fn evaluate(
    pair: &Pair,
    reference: Option<&Reference>,
    settings: &Settings,
    jobs: &[Job<'_>],
    cells: &[Cell<'_>],
    take: &mut dyn FnMut(Record) -> Result<(), Error>,
) -> Result<(), Error> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let threads = settings.threads.max(1);
    let (send, receive) = sync_channel::<Result<Record, Error>>(2 * threads);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let send = send.clone();
            let (next, stop) = (&next, &stop);
            scope.spawn(move || {
                // One task per core beats sharing a small model's matrices among cores; and results do not depend
                // on how many there are.
                let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
                let work =
                    || {
                        let mut bench = Bench::new(pair, reference, settings.seed)?;
                        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                            if stop.load(Ordering::Relaxed) {
                                break;
                            }
                            let (task, (family, index)) = (job.task(settings.seed), job.key());
                            let agreement = index < settings.agreement;
                            let record = bench.record(&task, cells, agreement).map_err(|source| {
                                Error::Task { family: family.to_owned(), index, source: Box::new(source) }
                            });
                            // Nobody takes records any more after a failure.
                            if send.send(record).is_err() {
                                break;
                            }
                        }
                        Ok(())
                    };
                let failed = match pool {
                    Ok(pool) => pool.install(work),
                    Err(error) => Err(Error::Settings(format!("no thread could be started: {error}"))),
                };
                if let Err(error) = failed {
                    // As above.
                    let _ = send.send(Err(error));
                }
            });
        }
        drop(send);
        let mut result = Ok(());
        for record in &receive {
            if result.is_ok() {
                result = record.and_then(&mut *take);
                stop.store(result.is_err(), Ordering::Relaxed);
            }
        }
        result
    })
}

/// Covered mass for each mean ratio, from tasks of the development seed. Given tasks have none.
fn targets(pair: &Pair, settings: &Settings) -> Result<Vec<Target>, Error> {
    let Source::Families(families) = &settings.source else { return Ok(Vec::new()) };
    let scorer = Signal::Aux(Reading::MAX, 2);
    let mut bench = Bench::new(pair, None, DEVELOPMENT)?;
    let mut samples = Vec::new();
    for (family, index) in families.iter().flat_map(|it| (0..CALIBRATION).map(move |index| (it, index))) {
        let task = family.task(DEVELOPMENT, index);
        let aux = bench.auxiliary(&task, &[scorer])?;
        let mut tools = bench.instruments();
        let prepared = Prepared::new(tools.primary, &task, &[])?;
        let signals = measure(&mut tools, &prepared, aux.as_ref(), &[scorer])?;
        let (assembly, rows) = (prepared.assembly(Anchor::Layout), signals.rows(scorer)?);
        let base = assembly.reused().start;
        let candidates = assembly.candidates().flat_map(|(_, at)| &rows[at.start - base..at.end - base]);
        samples.push((candidates.copied().collect(), rows.len()));
    }
    Ok(calibrate(&samples, &settings.ratios))
}
