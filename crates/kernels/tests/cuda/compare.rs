//! What the CUDA kernels compute, against the CPU kernels, on any machine that launches them.

#[path = "machine.rs"]
mod machine;

use cacheclip_kernels::attend::{Queries, attend_each, attend_rows};
use cacheclip_kernels::cuda::Heads;
use cacheclip_kernels::cuda::launch::{self, Angles, Attended, Paged, Parts, Rows, Stored};
use cacheclip_kernels::page::{HeadShape, LayerView, PAGE_TOKENS, pages_for};
use cacheclip_kernels::place::{StoredLayer, place, scatter};
use cacheclip_kernels::probe::{Reduce, probe, probe_rows};
use cacheclip_kernels::rope::RopeTable;
use half::{bf16, f16};
pub(crate) use machine::{Buffer, Machine, Memory};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What a slot holds that nobody wrote: it must not be read, or must not count.
const GARBAGE: bf16 = bf16::NAN;

/// Numbers that bf16 holds exactly.
pub(crate) fn numbers(rng: &mut StdRng, count: usize) -> Vec<f32> {
    (0..count).map(|_| bf16::from_f32(rng.random_range(-2.0..2.0)).to_f32()).collect()
}

pub(crate) fn rounded(values: &[f32]) -> Vec<bf16> {
    values.iter().copied().map(bf16::from_f32).collect()
}

/// A pool of the CPU as the device has it: bf16, and K by tokens.
fn to_device(pool: &[f32], shape: HeadShape) -> Vec<bf16> {
    let mut device = rounded(pool);
    for (page, head) in
        (0..pool.len() / shape.page()).flat_map(|page| (0..shape.kv_heads).map(move |head| (page, head)))
    {
        let tile = shape.k_tile(page, head);
        for (slot, i) in (0..PAGE_TOKENS).flat_map(|slot| (0..shape.head_dim).map(move |i| (slot, i))) {
            device[tile + slot * shape.head_dim + i] = bf16::from_f32(pool[tile + i * PAGE_TOKENS + slot]);
        }
    }
    device
}

pub(crate) fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn angles<'a>(machine: &'a dyn Machine, rope: &RopeTable) -> (Buffer<'a, f32>, Buffer<'a, f32>) {
    let rows = || (0..rope.positions()).map(|position| rope.at(position));
    let cosines: Vec<f32> = rows().flat_map(|(cosines, _)| cosines).copied().collect();
    let sines: Vec<f32> = rows().flat_map(|(_, sines)| sines).copied().collect();
    (Buffer::new(machine, &cosines), Buffer::new(machine, &sines))
}

/// A table of `pages` pages among twice as many, in no order.
fn table(pages: usize, rng: &mut StdRng) -> Vec<u32> {
    let mut all: Vec<u32> = (0..2 * pages as u32).collect();
    for i in (1..all.len()).rev() {
        all.swap(i, rng.random_range(0..=i));
    }
    all.truncate(pages);
    all
}

fn stored_bytes(values: &[f32], stored: Stored, planes: bool) -> Vec<u8> {
    let bytes: Vec<u8> = match stored {
        Stored::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Stored::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Stored::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
    };
    let size = bytes.len() / values.len();
    match planes {
        false => bytes,
        true => (0..size).flat_map(|plane| bytes.iter().skip(plane).step_by(size)).copied().collect(),
    }
}

pub(crate) fn place_writes_what_the_cpu_writes_bit_for_bit(machine: &dyn Machine, heads: Heads) {
    let mut rng = StdRng::seed_from_u64(1);
    let (shape, rope) = (heads.shape(), RopeTable::new(heads.dim as usize, 256, 10_000.0, None));
    let (cosines, sines) = angles(machine, &rope);
    let table = table(10, &mut rng);
    // Two sections, one of them not on a page's border, and a gap.
    let sections = [(19usize, 13usize), (50, 80)];
    for (stored, planes) in [
        (Stored::F32, false),
        (Stored::F16, false),
        (Stored::Bf16, false),
        (Stored::F32, true),
        (Stored::F16, true),
        (Stored::Bf16, true),
    ] {
        let mut cpu = vec![7.0; 20 * shape.page()];
        let device = Buffer::new(machine, &to_device(&cpu, shape));
        let (mut staging, mut spans) = (Vec::new(), Vec::new());
        for (tokens, start) in sections {
            let half = tokens * shape.kv_heads * shape.head_dim;
            let values: Vec<f32> = (0..2 * half)
                .map(|_| rng.random_range(-2.0f32..2.0))
                .map(|value| match stored {
                    Stored::F32 => value,
                    Stored::F16 => f16::from_f32(value).to_f32(),
                    Stored::Bf16 => bf16::from_f32(value).to_f32(),
                })
                .collect();
            let layer = StoredLayer { k: &values[..half], v: &values[half..], tokens };
            place(&mut cpu, &table, shape, layer, start, &rope);
            // `launch::Span`, in the bytes of a little-endian machine.
            spans.extend([staging.len() as u64, tokens as u64 | (start as u64) << 32]);
            staging.extend(stored_bytes(&values, stored, planes));
            staging.resize(staging.len().next_multiple_of(4096), 0);
        }
        let (staging, spans, tables) =
            (Buffer::new(machine, &staging), Buffer::new(machine, &spans), Buffer::new(machine, &table));
        let pages = Paged { pool: device.address(), tables: tables.address(), stride: 0 };
        let angles = Angles { cosines: cosines.address(), sines: sines.address() };
        let spans = (spans.address(), 2, 50);
        machine.run(&launch::place(heads, pages, staging.address(), (stored, planes), spans, angles));
        assert!(
            bits(&device.values()) == bits(&to_device(&cpu, shape)),
            "{heads:?} {stored:?} planes {planes}"
        );
    }
}

pub(crate) fn scatter_writes_what_the_cpu_writes_bit_for_bit(machine: &dyn Machine, heads: Heads) {
    let mut rng = StdRng::seed_from_u64(2);
    let (shape, rope) = (heads.shape(), RopeTable::new(heads.dim as usize, 256, 10_000.0, None));
    let (cosines, sines) = angles(machine, &rope);
    let positions: Vec<u32> = (0..150).filter(|p| p % 7 == 3 || (40..60).contains(p)).collect();
    let width = heads.row() as usize;
    for each in [false, true] {
        // Of one sequence, or each row of its own.
        let rows = if each { 3 } else { positions.len() };
        let positions = &positions[positions.len() - rows..];
        let tables = table(10 * if each { rows } else { 1 }, &mut rng);
        let mut cpu_rows = numbers(&mut rng, rows * width);
        let mut cpu = vec![7.0; 2 * tables.len() * shape.page()];
        let device_rows = Buffer::new(machine, &rounded(&cpu_rows));
        let device = Buffer::new(machine, &to_device(&cpu, shape));
        if each {
            for (row, table) in tables.chunks(10).enumerate() {
                let qkv = &mut cpu_rows[row * width..(row + 1) * width];
                scatter(&mut cpu, table, shape, heads.queries as usize, qkv, &positions[row..=row], &rope);
            }
        } else {
            scatter(&mut cpu, &tables, shape, heads.queries as usize, &mut cpu_rows, positions, &rope);
        }
        let (tables, positions) = (Buffer::new(machine, &tables), Buffer::new(machine, positions));
        let pages =
            Paged { pool: device.address(), tables: tables.address(), stride: if each { 10 } else { 0 } };
        let launched = Rows {
            data: device_rows.address(),
            stride: heads.row(),
            positions: positions.address(),
            count: rows as u32,
        };
        let angles = Angles { cosines: cosines.address(), sines: sines.address() };
        machine.run(&launch::scatter(heads, pages, launched, angles));
        assert!(bits(&device.values()) == bits(&to_device(&cpu, shape)), "{heads:?} pages, each {each}");
        // The CPU leaves keys in its rows as they were, and so does the device.
        assert!(bits(&device_rows.values()) == bits(&rounded(&cpu_rows)), "{heads:?} rows, each {each}");
    }
}

/// A sequence of `tokens` tokens on both sides; what it does not fill is garbage on the device's.
struct Sequence {
    cpu: Vec<f32>,
    device: Vec<bf16>,
    table: Vec<u32>,
}

fn sequence(heads: Heads, tokens: usize, rng: &mut StdRng) -> Sequence {
    let (shape, dim) = (heads.shape(), heads.dim as usize);
    let table = table(pages_for(tokens), rng);
    let mut cpu = vec![0.0; 2 * table.len() * shape.page()];
    for position in 0..tokens {
        for head in 0..shape.kv_heads {
            let (page, slot) = (table[position / PAGE_TOKENS] as usize, position % PAGE_TOKENS);
            let (k, v) = (shape.k_tile(page, head), shape.v_tile(page, head));
            for i in 0..dim {
                let of_token = numbers(rng, 2);
                (cpu[k + i * PAGE_TOKENS + slot], cpu[v + slot * dim + i]) = (of_token[0], of_token[1]);
            }
        }
    }
    let mut device = to_device(&cpu, shape);
    let filled = |page: usize| table.iter().position(|&entry| entry as usize == page);
    for (at, value) in device.iter_mut().enumerate() {
        let slot = at % shape.tile() / dim;
        let written = filled(at / shape.page()).is_some_and(|index| index * PAGE_TOKENS + slot < tokens);
        if !written {
            *value = GARBAGE;
        }
    }
    Sequence { cpu, device, table }
}

impl Sequence {
    fn view(&self, heads: Heads) -> LayerView<'_> {
        LayerView { pool: &self.cpu, table: &self.table, shape: heads.shape() }
    }
}

/// Weights are rounded to bf16 before they meet values of up to 2, results once more: 2⁻⁹ of each.
const TOLERANCE: f32 = 2.0 * 2.0 / 512.0;

pub(crate) fn farthest(device: &[bf16], cpu: &[f32]) -> f32 {
    assert_eq!(device.len(), cpu.len());
    let difference = |(a, b): (&bf16, &f32)| {
        assert!(a.is_finite(), "garbage was read");
        (a.to_f32() - b).abs()
    };
    device.iter().zip(cpu).map(difference).fold(0.0, f32::max)
}

/// Attention of rows on the machine: results, and logs for a probe.
fn attend(
    heads: Heads,
    machine: &dyn Machine,
    of: &Sequence,
    queries: &[f32],
    positions: &[u32],
    splits: u32,
) -> (Vec<bf16>, Vec<f32>) {
    let vectors = positions.len() * heads.queries as usize;
    let (pool, table) = (Buffer::new(machine, &of.device), Buffer::new(machine, &of.table));
    let (data, at) = (Buffer::new(machine, &rounded(queries)), Buffer::new(machine, positions));
    let out = Buffer::filled(machine, GARBAGE, vectors * heads.dim as usize);
    let logs = Buffer::filled(machine, f32::NAN, vectors);
    let sums = Buffer::filled(machine, f32::NAN, vectors * (splits * heads.dim) as usize);
    let stats = Buffer::filled(machine, f32::NAN, vectors * splits as usize * 2);
    let pages = Paged { pool: pool.address(), tables: table.address(), stride: 0 };
    let rows = Rows {
        data: data.address(),
        stride: (queries.len() / positions.len()) as u32,
        positions: at.address(),
        count: positions.len() as u32,
    };
    let to = Attended { out: out.address(), logs: logs.address() };
    let parts = (splits > 1).then_some(Parts { sums: sums.address(), stats: stats.address(), splits });
    machine.run(&launch::attend_rows(heads, pages, rows, to, parts));
    if let Some(parts) = parts {
        machine.run(&launch::merge(heads, rows.count, parts, to));
    }
    (out.values(), logs.values())
}

pub(crate) fn attend_rows_is_the_cpus_attention_for_any_rows(
    machine: &dyn Machine,
    heads: Heads,
    tokens: u32,
) {
    let mut rng = StdRng::seed_from_u64(3);
    let of = sequence(heads, tokens as usize, &mut rng);
    let few: Vec<u32> = (0..tokens).filter(|p| p % 11 == 4).collect();
    let last = tokens - 1;
    for (name, positions, splits) in [
        ("full prefill", (0..tokens / 3).collect::<Vec<_>>(), 1),
        ("a chunk of it", (tokens / 2..tokens / 2 + 45).collect(), 1),
        ("selected rows", few.clone(), 1),
        ("selected rows in ranges", few, 3),
        ("the last row, in more ranges than tiles", vec![last], tokens / 64 + 4),
        ("the first row", vec![0], 1),
    ] {
        let width = heads.row() as usize;
        let queries = numbers(&mut rng, positions.len() * width);
        let with =
            |positions| Queries { data: &queries, stride: width, heads: heads.queries as usize, positions };
        let mut cpu = vec![0.0; positions.len() * (heads.queries * heads.dim) as usize];
        attend_rows(&of.view(heads), with(&positions), &mut cpu);
        let (device, _) = attend(heads, machine, &of, &queries, &positions, splits);
        let distance = farthest(&device, &cpu);
        assert!(distance <= TOLERANCE, "{heads:?}, {name}: {distance}");
        // The tolerance tells a row's limit from its neighbour's, where one column counts for something.
        if positions[0] > 64 {
            continue;
        }
        let next: Vec<u32> = positions.iter().map(|&p| (p + 1).min(last)).collect();
        attend_rows(&of.view(heads), with(&next), &mut cpu);
        assert!(
            farthest(&device, &cpu) > 2.0 * TOLERANCE,
            "{heads:?}, {name}: the control is not told apart"
        );
    }
}

pub(crate) fn decode_is_the_cpus_attention_of_each_sequence(machine: &dyn Machine, heads: Heads) {
    let mut rng = StdRng::seed_from_u64(4);
    let (shape, lengths) = (heads.shape(), [1usize, 97, 40]);
    let sequences = lengths.map(|tokens| sequence(heads, tokens, &mut rng));
    // One pool for all, each sequence's pages behind those of the one before.
    let stride = sequences.iter().map(|of| of.table.len()).max().unwrap();
    let (mut pool, mut tables) = (Vec::new(), Vec::new());
    for of in &sequences {
        let before = (pool.len() / shape.page()) as u32;
        // Entries behind a sequence's last page are of no page at all.
        tables.extend((0..stride).map(|i| of.table.get(i).map_or(u32::MAX, |entry| entry + before)));
        pool.extend_from_slice(&of.device);
    }
    let (width, positions) = (heads.row() as usize, lengths.map(|tokens| tokens as u32 - 1));
    let queries = numbers(&mut rng, lengths.len() * width);
    let mut cpu = vec![0.0; lengths.len() * (heads.queries * heads.dim) as usize];
    let of_rows =
        Queries { data: &queries, stride: width, heads: heads.queries as usize, positions: &positions };
    attend_each(|row| sequences[row].view(heads), of_rows, &mut cpu);

    let (pool, tables) = (Buffer::new(machine, &pool), Buffer::new(machine, &tables));
    let (data, at) = (Buffer::new(machine, &rounded(&queries)), Buffer::new(machine, &positions));
    for splits in [1, 3, 9] {
        let vectors = lengths.len() * heads.queries as usize;
        let out = Buffer::filled(machine, GARBAGE, vectors * heads.dim as usize);
        let sums = Buffer::filled(machine, f32::NAN, vectors * (splits * heads.dim) as usize);
        let stats = Buffer::filled(machine, f32::NAN, vectors * splits as usize * 2);
        let pages = Paged { pool: pool.address(), tables: tables.address(), stride: stride as u32 };
        let rows = Rows {
            data: data.address(),
            stride: heads.row(),
            positions: at.address(),
            count: lengths.len() as u32,
        };
        let parts = Parts { sums: sums.address(), stats: stats.address(), splits };
        machine.run(&launch::decode(heads, pages, rows, parts));
        let to = Attended { out: out.address(), logs: 0 };
        machine.run(&launch::merge(heads, rows.count, parts, to));
        // Weights stay in f32 here: what is rounded is the result.
        let distance = farthest(&out.values(), &cpu);
        assert!(distance <= 2.0 / 256.0, "{heads:?}, {splits} ranges: {distance}");
    }
}

pub(crate) fn probe_reports_the_cpus_probabilities(machine: &dyn Machine, heads: Heads) {
    let mut rng = StdRng::seed_from_u64(5);
    let of = sequence(heads, 150, &mut rng);
    let positions: Vec<u32> = (128..146).collect();
    let (width, count) = (heads.row() as usize, positions.len());
    let queries = numbers(&mut rng, count * width);
    let (_, logs) = attend(heads, machine, &of, &queries, &positions, 1);
    let with =
        Queries { data: &queries, stride: width, heads: heads.queries as usize, positions: &positions };
    let (pool, table, logs) =
        (Buffer::new(machine, &of.device), Buffer::new(machine, &of.table), Buffer::new(machine, &logs));
    let (data, at) = (Buffer::new(machine, &rounded(&queries)), Buffer::new(machine, &positions));
    // Fewer columns than the rows see, and more than there are pages.
    for columns in [123usize, 150, 400] {
        for (over_heads, over_rows) in [(Reduce::Mean, Reduce::Max), (Reduce::Max, Reduce::Mean)] {
            let out = Buffer::filled(machine, f32::NAN, count * columns);
            let reduced = Buffer::filled(machine, f32::NAN, columns);
            let pages = Paged { pool: pool.address(), tables: table.address(), stride: 0 };
            let rows = Rows {
                data: data.address(),
                stride: heads.row(),
                positions: at.address(),
                count: count as u32,
            };
            let look =
                launch::probe(heads, pages, rows, columns as u32, logs.address(), over_heads, out.address());
            machine.run(&look);
            let (probabilities, rows) = (out.address(), count as u32);
            let over =
                launch::probe_reduce(probabilities, rows, columns as u32, over_rows, reduced.address());
            machine.run(&over);
            // Keys and queries are exact, sums are f32 on both sides.
            for (device, cpu) in [
                (out.values(), probe_rows(&of.view(heads), with, columns, over_heads)),
                (reduced.values(), probe(&of.view(heads), with, columns, over_heads, over_rows)),
            ] {
                assert_eq!(device.len(), cpu.len());
                for (at, (a, b)) in device.iter().zip(&cpu).enumerate() {
                    assert!((a - b).abs() <= 1e-5 + 1e-4 * b, "{heads:?}, {over_heads:?}, {at}: {a} {b}");
                }
            }
        }
    }
}
