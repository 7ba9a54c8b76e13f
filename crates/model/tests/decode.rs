//! Decoding several sequences in one step.

use cacheclip_model::load::{Source, load};
use cacheclip_model::pages::Allocator;
use cacheclip_model::walk::BLOCK_ROWS;
use cacheclip_model::{Batch, Cpu, Decoder, Logits, Pass, config::Config};

fn small() -> Decoder<Cpu> {
    let config = Config::shape("aux-30m").expect("a known shape");
    let config = Config { layers: 2, vocab: 500, ..config };
    load(&Source::Random { config, seed: 3 }, Cpu).expect("random weights").decoder
}

#[test]
fn sequences_that_are_decoded_together_get_what_each_gets_alone() {
    let decoder = small();
    let allocator = Allocator::new(64);
    let mut pages = decoder.pages(64).unwrap();
    let prompts: Vec<Vec<u32>> = [40usize, 7, 33].iter().map(|&n| (0..n as u32 + 1).collect()).collect();
    let mut alone = Vec::new();
    for prompt in &prompts {
        let sequence = allocator.sequence(prompt.len()).unwrap();
        let positions: Vec<u32> = (0..prompt.len() as u32).collect();
        alone.extend(decoder.forward(&mut pages, Pass::new(prompt, &positions, sequence.table())).unwrap());
    }
    let sequences: Vec<_> = prompts.iter().map(|prompt| allocator.sequence(prompt.len()).unwrap()).collect();
    for (prompt, sequence) in prompts.iter().zip(&sequences) {
        let head = prompt.len() - 1;
        let positions: Vec<u32> = (0..head as u32).collect();
        decoder.forward(&mut pages, Pass::new(&prompt[..head], &positions, sequence.table())).unwrap();
    }
    let ids: Vec<u32> = prompts.iter().map(|prompt| *prompt.last().unwrap()).collect();
    let positions: Vec<u32> = prompts.iter().map(|prompt| prompt.len() as u32 - 1).collect();
    let tables: Vec<&[u32]> = sequences.iter().map(|sequence| sequence.table()).collect();
    let batch = Batch { ids: &ids, positions: &positions, tables: &tables };
    let mut together = Vec::new();
    decoder.decode(&mut pages, batch, &mut together).unwrap();
    assert_eq!(together.len(), 3 * decoder.config().vocab);
    let scale = alone.iter().fold(0f32, |most, v| most.max(v.abs()));
    let worst = alone.iter().zip(&together).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(worst < 1e-4 * scale, "differs by {worst} of {scale}");
}

#[test]
fn the_last_rows_logits_are_the_same_alone_and_among_all_whatever_is_left_for_the_last_block() {
    let decoder = small();
    let allocator = Allocator::new(64);
    let mut pages = decoder.pages(64).unwrap();
    for rows in [1, 2, BLOCK_ROWS, BLOCK_ROWS + 1, BLOCK_ROWS + 2] {
        let sequence = allocator.sequence(rows).unwrap();
        let ids: Vec<u32> = (0..rows as u32).map(|i| i * 13 % 500).collect();
        let positions: Vec<u32> = (0..rows as u32).collect();
        let mut logits = |logits| {
            let pass = Pass { logits, ..Pass::new(&ids, &positions, sequence.table()) };
            decoder.forward(&mut pages, pass).unwrap()
        };
        let (last, all) = (logits(Logits::Last), logits(Logits::All));
        let want = &all[all.len() - last.len()..];
        let worst = last.iter().zip(want).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        let scale = want.iter().fold(0f32, |most, v| most.max(v.abs()));
        assert!(worst < 1e-4 * scale, "{rows} rows: differs by {worst} of {scale}");
    }
}

#[test]
fn a_decoding_step_allocates_nothing_once_it_is_warm() {
    // One thread: handing work to others is the thread pool's business, not the step's.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        let decoder = small();
        let allocator = Allocator::new(16);
        let mut pages = decoder.pages(16).unwrap();
        let (a, b) = (allocator.sequence(64).unwrap(), allocator.sequence(64).unwrap());
        let mut logits = Vec::new();
        let mut counts = Vec::new();
        for step in 0..20 {
            let batch = Batch { ids: &[step, 7], positions: &[step, step], tables: &[a.table(), b.table()] };
            let counted =
                allocation_counter::measure(|| decoder.decode(&mut pages, batch, &mut logits).unwrap());
            counts.push(counted.count_total);
        }
        assert!(counts[0] > 0, "the count counts");
        assert_eq!(counts[4..], [0; 16], "allocations per step: {counts:?}");
    });
}
