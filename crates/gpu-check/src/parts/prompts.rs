//! Time to the first token: full prefill, PyTorch's prefill and reuse of the same prompt, in turns, all in from the
//! host's memory, scoring included.

use crate::bed::{Bed, Room};
use crate::model::{Model, Prompt, Spent, tokens};
use crate::scorer::Scorer;
use crate::work::{Peer, Work};
use cacheclip_bench::runs::Runs;
use cacheclip_model::config::Config;
use serde::Serialize;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Shares of the reused rows to recompute.
pub const RATIOS: [f32; 3] = [0.2, 0.1, 0.0];
/// Auxiliary models: the first at every length, the others at the telling one.
const AUXILIARIES: [&str; 2] = ["aux-30m", "smollm2-135m"];
/// Rows of a block that are tried beside the usual.
const BLOCKS: [usize; 3] = [512, 1024, 2048];

/// A prompt of one length.
#[derive(Debug, Serialize)]
struct Row {
    row: &'static str,
    shape: &'static str,
    /// In chunks.
    tokens: usize,
    chunk_tokens: usize,
    question_tokens: usize,
    block_rows: usize,
    /// Of prefix and chunks, as they lie in the host's memory.
    kv_bytes: usize,
    full_seconds: Runs,
    full_flops_per_second: Runs,
    /// PyTorch's version, device and attention.
    torch: Option<String>,
    torch_seconds: Option<Runs>,
    /// PyTorch's time over ours.
    of_torch: Option<Runs>,
    reuse: Vec<Reuse>,
}

/// Reuse at one ratio.
#[derive(Debug, Serialize)]
struct Reuse {
    ratio: f32,
    /// Rows recomputed over rows reused.
    realised: f64,
    /// The auxiliary model that scored; none where nothing is recomputed.
    auxiliary: Option<&'static str>,
    /// Tokens that it scored.
    auxiliary_tokens: Option<usize>,
    seconds: Runs,
    /// Until the rows were known.
    choosing_seconds: Runs,
    /// Full prefill's time over reuse's, round by round.
    speedup: Runs,
}

/// What is timed in every round besides full prefill.
struct Case<'a> {
    ratio: f32,
    scorer: Option<(&'static str, &'a Scorer)>,
    spent: Vec<Spent>,
}

/// Times every length; with `more`, also block sizes and KV that is still on its way.
///
/// # Errors
/// No device or no room for the model; a device fault.
pub fn run<B: Bed>(bed: &B, work: &Work, name: &'static str, more: bool) -> anyhow::Result<()> {
    let (scale, shape) = (work.scale, work.scale.shape(name)?);
    let longest = scale.longest();
    work.say(format_args!("{name}: weights"));
    let room = Room::of(&shape, &[longest], longest, scale.block_rows);
    let mut model = Model::random(bed, &shape, longest, room)?;
    // Behind ours: what is left is the peer's.
    let mut peer = match work.peer() {
        Ok(peer) => Some(peer),
        Err(why) => {
            work.say(format_args!("no peer: {why}"));
            None
        }
    };
    for &length in scale.lengths {
        if work.deadline.passed() {
            return Ok(());
        }
        let telling = length == scale.telling;
        let count = length / scale.chunk;
        work.say(format_args!("{name}: {length} tokens, chunks"));
        let prompt = model.prompt(count, scale.chunk, scale.question)?;
        // What scoring costs does not depend on the model that is scored for.
        let scorers = scorers(work, count, if telling && more { AUXILIARIES.len() } else { 1 })?;
        let measured = measure(work, &mut model, &prompt, &scorers, name, peer.as_mut())?;
        if let (true, true, Some(choosing)) = (more, telling, measured) {
            on_its_way(work, &mut model, &prompt, &scorers[0].1, choosing)?;
            blocks(work, &mut model, length)?;
        }
    }
    Ok(())
}

fn scorers(work: &Work, count: usize, kinds: usize) -> anyhow::Result<Vec<(&'static str, Scorer)>> {
    let dir = work.models.join("aux");
    let scorer = |&name: &&'static str| {
        Ok((name, Scorer::new(&work.scale.shape(name)?, &dir, count, work.scale.chunk)?))
    };
    AUXILIARIES[..kinds].iter().map(scorer).collect()
}

/// Rounds of everything; the row. Returns reuse's median seconds at the first ratio.
fn measure<D: crate::bed::Timed>(
    work: &Work,
    model: &mut Model<D>,
    prompt: &Prompt,
    scorers: &[(&'static str, Scorer)],
    name: &'static str,
    mut peer: Option<&mut Peer>,
) -> anyhow::Result<Option<f64>> {
    let shape = model.shape().clone();
    let length = prompt.assembly.reused().len();
    let mut cases = Vec::new();
    for (index, (auxiliary, scorer)) in scorers.iter().enumerate() {
        for ratio in RATIOS {
            // Without rows to choose nobody is asked.
            let scored = ratio > 0.0;
            if scored || index == 0 {
                cases.push(Case { ratio, scorer: scored.then_some((*auxiliary, scorer)), spent: Vec::new() });
            }
        }
    }
    let asked = request(name, &shape, prompt.ids.len());
    let full = std::cell::RefCell::new((Vec::new(), Vec::new(), &mut cases));
    work.rounds(
        work.scale.rounds,
        || {
            let mut all = full.borrow_mut();
            let (ours, theirs, cases) = &mut *all;
            ours.push(model.full(&prompt.ids)?.1);
            if let Some(asking) = peer.as_mut() {
                match asking.number(&asked, "seconds") {
                    Ok(took) => theirs.push(took),
                    Err(error) => {
                        work.say(format_args!("no more peer: {error:#}"));
                        peer = None;
                    }
                }
            }
            for case in cases.iter_mut() {
                let spent = match case.scorer {
                    Some((_, scorer)) => {
                        model.reuse(prompt, || scorer.choose(&prompt.assembly, case.ratio))?.1
                    }
                    None => model.reuse(prompt, || Ok(Vec::new()))?.1,
                };
                case.spent.push(spent);
            }
            Ok(())
        },
        || {
            let mut all = full.borrow_mut();
            let (ours, theirs, cases) = &mut *all;
            ours.clear();
            theirs.clear();
            cases.iter_mut().for_each(|case| case.spent.clear());
        },
    )?;
    let (ours, theirs, _) = full.into_inner();
    let torch = peer.map(|peer| peer.version.clone());
    let flops = flops(&shape, prompt.ids.len());
    let theirs = (theirs.len() == ours.len()).then_some(theirs);
    let row = Row {
        row: "prompt",
        shape: name,
        tokens: length,
        chunk_tokens: work.scale.chunk,
        question_tokens: work.scale.question,
        block_rows: work.scale.block_rows,
        kv_bytes: prompt.bytes(),
        full_flops_per_second: Runs::of(ours.iter().map(|took| flops / took).collect()),
        of_torch: theirs
            .as_ref()
            .map(|theirs| Runs::of(theirs.iter().zip(&ours).map(|(theirs, ours)| theirs / ours).collect())),
        torch,
        torch_seconds: theirs.map(Runs::of),
        reuse: cases.iter().map(|case| reuse(case, &ours, length, prompt.assembly.chunks())).collect(),
        full_seconds: Runs::of(ours),
    };
    say(work, &row);
    work.row(&row)?;
    Ok(row.reuse.first().map(|reuse| reuse.seconds.median))
}

fn reuse(case: &Case<'_>, full: &[f64], length: usize, chunks: usize) -> Reuse {
    let of = |value: &dyn Fn(&Spent) -> f64| Runs::of(case.spent.iter().map(value).collect());
    Reuse {
        ratio: case.ratio,
        realised: of(&|spent| spent.recomputed as f64 / length as f64).median,
        auxiliary: case.scorer.map(|(name, _)| name),
        auxiliary_tokens: case.scorer.map(|(_, scorer)| scorer.tokens(chunks)),
        seconds: of(&|spent| spent.all),
        choosing_seconds: of(&|spent| spent.choosing),
        speedup: Runs::of(full.iter().zip(&case.spent).map(|(full, spent)| full / spent.all).collect()),
    }
}

fn say(work: &Work, row: &Row) {
    let torch =
        row.of_torch.as_ref().map_or(String::new(), |it| format!(", torch's over ours {}", it.text(2)));
    let (full, rate) = (row.full_seconds.map(|it| it * 1e3), row.full_flops_per_second.median / 1e12);
    let (shape, tokens) = (row.shape, row.tokens);
    work.say(format_args!("{shape} {tokens}: full {} ms, {rate:.0} TFLOP/s{torch}", full.text(1)));
    for it in &row.reuse {
        let (ms, choosing) = (it.seconds.map(|it| it * 1e3), it.choosing_seconds.median * 1e3);
        work.say(format_args!(
            "{shape} {tokens}: ratio {} {}: {} ms ({choosing:.1} to choose), {}x",
            it.ratio,
            it.auxiliary.unwrap_or("nothing"),
            ms.text(1),
            it.speedup.text(2)
        ));
    }
}

/// What the peer is asked to time.
fn request(name: &str, shape: &Config, tokens: usize) -> Value {
    json!({
        "op": "prefill", "name": name, "tokens": tokens, "vocab": shape.vocab, "hidden": shape.hidden,
        "intermediate": shape.intermediate, "layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "theta": shape.rope_theta, "eps": shape.norm_eps,
        "biases": shape.family.has_qkv_biases(), "tied": shape.tied,
    })
}

/// Operations of full prefill that nobody can do without: products of all rows but the output head's, which is of one,
/// and attention of each row to half of the prompt on average. Behind its keys and values the last layer is of one row,
/// too.
pub fn flops(shape: &Config, tokens: usize) -> f64 {
    let (tokens, table) = (tokens as f64, (shape.vocab * shape.hidden) as f64);
    let weights = shape.parameters() as f64 - if shape.tied { 1.0 } else { 2.0 } * table;
    let head = (shape.heads * shape.head_dim) as f64;
    let behind = (head + 3.0 * shape.intermediate as f64) * shape.hidden as f64;
    let (seen, layers) = (tokens * (tokens + 1.0) / 2.0, shape.layers as f64);
    let products = 2.0 * (weights * tokens - behind * (tokens - 1.0));
    products + 4.0 * head * (seen * (layers - 1.0) + tokens) + 2.0 * table
}

/// KV that a store is still sending.
#[derive(Debug, Serialize)]
struct OnItsWay {
    row: &'static str,
    tokens: usize,
    ratio: f32,
    bytes: usize,
    /// At which the last layer has come when reuse from the host's memory would be done: at that or more, a link costs
    /// little.
    bytes_per_second_needed: f64,
    /// Reuse with layers that arrive evenly at that rate. Their bytes lie in the host's memory from the beginning: the
    /// link itself is not measured.
    seconds: Runs,
    /// The same at half of the rate.
    half_rate_seconds: Runs,
}

fn on_its_way<D: crate::bed::Timed>(
    work: &Work,
    model: &mut Model<D>,
    prompt: &Prompt,
    scorer: &Scorer,
    resident: f64,
) -> anyhow::Result<()> {
    if work.deadline.passed() {
        return Ok(());
    }
    let bytes = prompt.bytes();
    let needed = bytes as f64 / resident;
    let mut rate = |share: f64| -> anyhow::Result<Runs> {
        let mut seconds = Vec::new();
        for _ in 0..work.scale.rounds.min(3) {
            let took = Duration::from_secs_f64(bytes as f64 / (needed * share));
            seconds.push(paced(model, prompt, took, || scorer.choose(&prompt.assembly, RATIOS[0]))?);
        }
        Ok(Runs::of(seconds))
    };
    let row = OnItsWay {
        row: "from_store",
        tokens: prompt.assembly.reused().len(),
        ratio: RATIOS[0],
        bytes,
        bytes_per_second_needed: needed,
        seconds: rate(1.0)?,
        half_rate_seconds: rate(0.5)?,
    };
    let (at, half) = (row.seconds.map(|it| it * 1e3), row.half_rate_seconds.map(|it| it * 1e3));
    let (at, half) = (at.text(1), half.text(1));
    work.say(format_args!(
        "from a store: {:.1} GB/s needed; {at} ms at that, {half} ms at half",
        needed / 1e9
    ));
    work.row(&row)
}

/// Reuse with layers that arrive evenly over `took`.
fn paced<D: crate::bed::Timed>(
    model: &mut Model<D>,
    prompt: &Prompt,
    took: Duration,
    choose: impl FnOnce() -> anyhow::Result<Vec<u32>> + Send,
) -> anyhow::Result<f64> {
    let layers = model.shape().layers;
    let arriving = prompt.arriving();
    let spent = std::thread::scope(|scope| {
        let (began, arriving) = (Instant::now(), &arriving);
        scope.spawn(move || {
            for layer in 1..=layers {
                let due = took.mul_f64(layer as f64 / layers as f64);
                std::thread::sleep(due.saturating_sub(began.elapsed()));
                arriving.arrive();
            }
        });
        model.reuse(arriving, choose)
    })?;
    Ok(spent.1.all)
}

/// Full prefill with other blocks.
#[derive(Debug, Serialize)]
struct Blocks {
    row: &'static str,
    tokens: usize,
    block_rows: usize,
    full_seconds: Runs,
}

fn blocks<D: crate::bed::Timed>(work: &Work, model: &mut Model<D>, length: usize) -> anyhow::Result<()> {
    let ids = tokens(length, 0, model.shape().vocab);
    for rows in BLOCKS.into_iter().filter(|&rows| rows <= work.scale.block_rows) {
        if work.deadline.passed() {
            break;
        }
        model.set_block_rows(rows);
        let mut seconds = Vec::new();
        for _ in 0..work.scale.rounds.min(3) {
            seconds.push(model.full(&ids)?.1);
        }
        let row = Blocks { row: "blocks", tokens: length, block_rows: rows, full_seconds: Runs::of(seconds) };
        work.say(format_args!("blocks of {rows}: {} ms", row.full_seconds.map(|it| it * 1e3).text(1)));
        work.row(&row)?;
    }
    model.set_block_rows(work.scale.block_rows);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_of_a_14b_prefill_are_those_of_its_weights_and_of_half_a_square() {
        let shape = Config::shape("qwen2.5-14b").unwrap();
        // 13.2 billion weights outside of the tables, of which 0.24 behind the last layer's attention; 47 layers of 40 heads
        // of 128.
        let expected = 2.0 * 12.97e9 * 16384.0 + 2.0 * (47.0 * 40.0 * 128.0) * 16384.0 * 16384.0;
        let got = flops(&shape, 16_384);
        assert!((got / expected - 1.0).abs() < 2e-3, "{got:.3e} {expected:.3e}");
    }
}
