//! Kernels alone, by the device's clock: each beside what bounds it, and attention beside PyTorch's flash kernel, in turns.

use crate::work::{Peer, Work};
use cacheclip_bench::runs::Runs;
use cacheclip_kernels::cuda::Heads;
use cacheclip_kernels::cuda::floor::{self, Floor};
use cacheclip_kernels::cuda::launch::Stored;
use cacheclip_kernels::cuda::timing::{Prepared, Stand};
use cacheclip_model::config::Config;
use serde::Serialize;
use serde_json::json;
use std::time::Instant;

/// Seconds of work before anything counts: while a case is made the device's clocks fall.
const WARM: f64 = 0.1;
/// Bytes that *place* goes over before it comes to the same again: several times what a second-level cache holds.
const SPREAD: u64 = 512 << 20;
/// Most sets of buffers.
const MOST_SETS: u64 = 64;
/// Seconds that a round of one kernel is repeated for, about.
const ROUND: f64 = 0.02;
/// Most repetitions in a round.
const MOST: u32 = 200;
/// Columns of all sequences of a batch that is decoded, at most.
const MOST_COLUMNS: u32 = 1 << 19;
/// Every so-manieth row is one that repair computes.
const REPAIRED: u32 = 5;

/// Attention of a shape.
pub fn heads(shape: &Config) -> Heads {
    Heads { queries: shape.heads as u32, kv: shape.kv_heads as u32, dim: shape.head_dim as u32 }
}

/// A copy that kernels bound by bytes are compared with.
#[derive(Debug)]
pub struct Copy<'a>(Prepared<'a>);

impl<'a> Copy<'a> {
    /// Reserves its buffers, of so many bytes each.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(stand: &'a Stand, bytes: usize) -> anyhow::Result<Self> {
        let copy = stand.copy(bytes)?;
        copy.seconds(2)?;
        Ok(Self(copy))
    }

    /// Bytes per second, read and written counted.
    ///
    /// # Errors
    /// A device fault.
    pub fn bytes_per_second(&self) -> anyhow::Result<f64> {
        Ok(self.0.floor().bytes as f64 / self.0.seconds(5)?)
    }
}

/// One kernel on one size.
#[derive(Debug, Serialize)]
struct Row {
    row: &'static str,
    shape: &'static str,
    /// Tokens in the cache.
    tokens: u32,
    /// Rows computed, or sequences decoded.
    rows: u32,
    /// Of *place*: what is stored.
    stored: Option<&'static str>,
    floor_bytes: u64,
    floor_flops: u64,
    seconds: Runs,
    bytes_per_second: Runs,
    flops_per_second: Runs,
    /// Its floor's bytes per second over those of a copy in the same round.
    of_copy: Runs,
    /// PyTorch's flash attention of the same rows, in the same rounds.
    flash_seconds: Option<Runs>,
    /// Its time over ours.
    of_flash: Option<Runs>,
}

/// What was asked for.
struct Case {
    row: &'static str,
    tokens: u32,
    rows: u32,
    stored: Option<&'static str>,
}

/// Times every kernel of every shape.
///
/// # Errors
/// Of `stand`, which opens a machine; a device fault.
pub fn run(work: &Work, stand: impl Fn(Heads) -> anyhow::Result<Stand>) -> anyhow::Result<()> {
    let mut peer = work.peer().inspect_err(|why| work.say(format_args!("no peer: {why}"))).ok();
    for (index, &name) in work.scale.shapes.iter().enumerate() {
        let heads = heads(&work.scale.shape(name)?);
        let stand = stand(heads)?;
        let copy = Copy::new(&stand, work.scale.copy)?;
        let mut times = Times { work, stand: &stand, copy, shape: name, heads };
        // Other shapes at the telling length only, which is the first.
        let lengths = if index == 0 { work.scale.lengths } else { &work.scale.lengths[..1] };
        for &tokens in lengths {
            let tokens = tokens as u32;
            if work.deadline.passed() {
                return Ok(());
            }
            times.attention(tokens, peer.as_mut())?;
            times.bytes(tokens)?;
        }
    }
    Ok(())
}

struct Times<'a> {
    work: &'a Work,
    stand: &'a Stand,
    copy: Copy<'a>,
    shape: &'static str,
    heads: Heads,
}

impl Times<'_> {
    /// Full prefill, selected rows, a question.
    fn attention(&mut self, tokens: u32, peer: Option<&mut Peer>) -> anyhow::Result<()> {
        let (all, question): (Vec<u32>, _) = ((0..tokens).collect(), self.work.scale.question as u32);
        let flash = peer.map(|peer| {
            let (queries, kv, dim) = (self.heads.queries, self.heads.kv, self.heads.dim);
            let request =
                json!({ "op": "attend", "heads": queries, "kv_heads": kv, "dim": dim, "tokens": tokens });
            move || peer.number(&request, "seconds")
        });
        let case = |row, rows: usize| Case { row, tokens, rows: rows as u32, stored: None };
        self.time(case("attend_rows", all.len()), self.stand.attend_rows(&all)?, flash)?;
        let none = None::<fn() -> anyhow::Result<f64>>;
        let some: Vec<u32> =
            (0..tokens).filter(|row| row % REPAIRED == 0 || row + question >= tokens).collect();
        self.time(case("attend_repair", some.len()), self.stand.attend_rows(&some)?, none)?;
        let question = &all[all.len() - question as usize..];
        self.time(case("attend_question", question.len()), self.stand.attend_rows(question)?, none)
    }

    /// Kernels that are bound by bytes.
    fn bytes(&mut self, tokens: u32) -> anyhow::Result<()> {
        let none = None::<fn() -> anyhow::Result<f64>>;
        let chunk = self.work.scale.chunk as u32;
        for (stored, planes, name) in
            [(Stored::Bf16, false, "bf16"), (Stored::Bf16, true, "bf16 planes"), (Stored::F32, false, "f32")]
        {
            let case = Case { row: "place", tokens, rows: tokens, stored: Some(name) };
            let bytes = floor::place(self.heads, tokens, stored).bytes.max(1);
            let sets =
                if self.work.scale.rehearsal { 1 } else { SPREAD.div_ceil(bytes).min(MOST_SETS) as u32 };
            self.time(case, self.stand.place(tokens / chunk, chunk, (stored, planes), sets)?, none)?;
        }
        let case = |row, rows| Case { row, tokens, rows, stored: None };
        self.time(case("scatter", tokens), self.stand.scatter(tokens)?, none)?;
        let question = self.work.scale.question as u32;
        self.time(case("probe", question), self.stand.probe(question, tokens)?, none)?;
        let batches = self.work.scale.batches.iter().map(|&batch| batch as u32);
        for batch in batches.filter(|batch| batch * tokens <= MOST_COLUMNS) {
            self.time(case("decode", batch), self.stand.decode(batch, tokens)?, none)?;
        }
        Ok(())
    }

    /// Rounds of a kernel, a copy and a peer, in turns; a row.
    fn time(
        &mut self,
        case: Case,
        kernel: Prepared<'_>,
        mut peer: Option<impl FnMut() -> anyhow::Result<f64>>,
    ) -> anyhow::Result<()> {
        if self.work.deadline.passed() {
            return Ok(());
        }
        // Warm, and long enough for the clock.
        let began = Instant::now();
        let mut once = kernel.seconds(1)?.min(kernel.seconds(1)?);
        let repeat =
            |once: f64, seconds: f64| ((seconds / once / f64::from(kernel.sets())) as u32).clamp(1, MOST);
        while !self.work.scale.rehearsal && began.elapsed().as_secs_f64() < WARM {
            once = kernel.seconds(repeat(once, WARM / 10.0))?;
        }
        let times = if self.work.scale.rehearsal { 1 } else { repeat(once, ROUND) };
        let Floor { bytes, flops } = kernel.floor();
        let (mut seconds, mut copies, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.work.scale.rounds {
            seconds.push(kernel.seconds(times)?);
            copies.push(self.copy.bytes_per_second()?);
            match peer.as_mut().map(|ask| ask()) {
                Some(Ok(took)) => theirs.push(took),
                Some(Err(error)) => {
                    self.work.say(format_args!("the peer: {error:#}"));
                    peer = None;
                }
                None => {}
            }
        }
        let rate = |amount: u64| Runs::of(seconds.iter().map(|took| amount as f64 / took).collect());
        let over = |a: &[f64], b: &[f64]| Runs::of(a.iter().zip(b).map(|(a, b)| a / b).collect());
        let rates: Vec<f64> = seconds.iter().map(|took| bytes as f64 / took).collect();
        // A peer that failed halfway gives nothing: rounds would not be the same.
        let theirs = (theirs.len() == seconds.len()).then_some(theirs);
        let row = Row {
            row: case.row,
            shape: self.shape,
            tokens: case.tokens,
            rows: case.rows,
            stored: case.stored,
            floor_bytes: bytes,
            floor_flops: flops,
            bytes_per_second: rate(bytes),
            flops_per_second: rate(flops),
            of_copy: over(&rates, &copies),
            of_flash: theirs.as_ref().map(|theirs| over(theirs, &seconds)),
            flash_seconds: theirs.map(Runs::of),
            seconds: Runs::of(seconds),
        };
        self.work.say(format_args!(
            "{} {} {} rows {} {}: {} µs, {:.0} GB/s, {:.0} TFLOP/s, {} of a copy{}",
            row.row,
            row.shape,
            row.rows,
            row.tokens,
            row.stored.unwrap_or_default(),
            row.seconds.map(|it| it * 1e6).text(1),
            row.bytes_per_second.median / 1e9,
            row.flops_per_second.median / 1e12,
            row.of_copy.text(2),
            row.of_flash.as_ref().map(|it| format!(", {} of flash", it.text(2))).unwrap_or_default(),
        ));
        self.work.row(&row)
    }
}
