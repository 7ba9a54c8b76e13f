//! What happens to rows between products, against the CPU, on any machine that launches kernels.

use super::compare::{Buffer, Machine, bits, farthest, numbers, rounded};
use cacheclip_kernels::cuda::{Heads, rows};
use cacheclip_kernels::{ops, random};
use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Widths that leave the last threads of a block without work, and one that every thread goes over twice.
const WIDTHS: [usize; 3] = [8, 136, 4104];
const ROWS: usize = 5;
/// A result near 4 is rounded by up to 2⁻⁷; sums are taken in another order.
const TOLERANCE: f32 = 1.0 / 64.0;

fn shape(rows: usize, width: usize) -> (u32, u32) {
    (rows as u32, width as u32)
}

pub(crate) fn rows_are_gathered_biased_and_gated_as_the_cpu_does(machine: &dyn Machine, _: Heads) {
    let mut rng = StdRng::seed_from_u64(11);
    for width in WIDTHS {
        let x = numbers(&mut rng, ROWS * width);
        let from = Buffer::new(machine, &rounded(&x));
        let indices: [u32; 7] = [3, 0, 4, 4, 1, 2, 0];
        let (list, out) =
            (Buffer::new(machine, &indices), Buffer::filled(machine, bf16::NAN, indices.len() * width));
        let gathered = shape(indices.len(), width);
        machine.run(&rows::gather(from.address(), list.address(), gathered, out.address()));
        let expected: Vec<f32> =
            indices.iter().flat_map(|&i| &x[i as usize * width..][..width]).copied().collect();
        assert!(bits(&out.values()) == bits(&rounded(&expected)), "gather of {width}");

        let bias: Vec<f32> = (0..width).map(|_| rng.random_range(-1.0..1.0)).collect();
        let of_bias = Buffer::new(machine, &bias);
        machine.run(&rows::add_bias(from.address(), of_bias.address(), shape(ROWS, width)));
        let mut expected = x.clone();
        ops::add_bias(&mut expected, &bias);
        // One sum and one rounding.
        assert!(bits(&from.values()) == bits(&rounded(&expected)), "bias of {width}");

        let both = numbers(&mut rng, ROWS * 2 * width);
        let (of_both, out) =
            (Buffer::new(machine, &rounded(&both)), Buffer::filled(machine, bf16::NAN, ROWS * width));
        machine.run(&rows::gate(of_both.address(), shape(ROWS, width), out.address()));
        let mut expected = vec![0.0; ROWS * width];
        ops::silu_gate(&both, width, &mut expected);
        let distance = farthest(&out.values(), &expected);
        assert!(distance <= TOLERANCE, "gate of {width}: {distance}");
    }
}

pub(crate) fn norms_are_the_cpus_norms(machine: &dyn Machine, heads: Heads) {
    let mut rng = StdRng::seed_from_u64(12);
    let eps = 1e-5;
    for width in WIDTHS {
        let (x, weight) = (numbers(&mut rng, ROWS * width), numbers(&mut rng, width));
        let (from, of_weight) = (Buffer::new(machine, &rounded(&x)), Buffer::new(machine, &weight));
        let out = Buffer::filled(machine, bf16::NAN, ROWS * width);
        machine.run(&rows::norm(from.address(), of_weight.address(), shape(ROWS, width), eps, out.address()));
        let mut expected = vec![0.0; ROWS * width];
        ops::rms_norm(&x, &weight, eps, &mut expected);
        let distance = farthest(&out.values(), &expected);
        assert!(distance <= TOLERANCE, "norm of {width}: {distance}");
    }
    let (dim, width) = (heads.dim as usize, heads.row() as usize);
    let x = numbers(&mut rng, ROWS * width);
    let weights = [numbers(&mut rng, dim), numbers(&mut rng, dim)];
    let from = Buffer::new(machine, &rounded(&x));
    let [query, key] = [0, 1].map(|i| Buffer::new(machine, &weights[i]));
    let launch = rows::norm_heads(heads, from.address(), ROWS as u32, query.address(), key.address(), eps);
    machine.run(&launch);
    let mut expected = x.clone();
    for row in expected.chunks_exact_mut(width) {
        for (head, of_head) in row.chunks_exact_mut(dim).enumerate() {
            let before = of_head.to_vec();
            match head as u32 {
                head if head < heads.queries => ops::rms_norm(&before, &weights[0], eps, of_head),
                head if head < heads.queries + heads.kv => ops::rms_norm(&before, &weights[1], eps, of_head),
                // Values stay as they are.
                _ => {}
            }
        }
    }
    let device = from.values();
    let distance = farthest(&device, &expected);
    assert!(distance <= TOLERANCE, "{heads:?}: {distance}");
    let values = |values: &[bf16]| -> Vec<u16> {
        let first = ((heads.queries + heads.kv) * heads.dim) as usize;
        values.chunks_exact(width).flat_map(|row| bits(&row[first..])).collect()
    };
    assert!(values(&device) == values(&rounded(&x)), "{heads:?}: values were normed");
}

pub(crate) fn keys_and_values_leave_as_they_are_stored(machine: &dyn Machine, heads: Heads) {
    let mut rng = StdRng::seed_from_u64(13);
    let (dim, width) = (heads.dim as usize, heads.row() as usize);
    let x = numbers(&mut rng, ROWS * width);
    let from = Buffer::new(machine, &rounded(&x));
    let out = Buffer::filled(machine, bf16::NAN, 2 * heads.kv as usize * ROWS * dim);
    machine.run(&rows::export(heads, from.address(), ROWS as u32, out.address()));
    let stored = heads.queries as usize..(heads.queries + 2 * heads.kv) as usize;
    let expected: Vec<f32> = stored
        .flat_map(|head| x.chunks_exact(width).flat_map(move |row| &row[head * dim..(head + 1) * dim]))
        .copied()
        .collect();
    assert!(bits(&out.values()) == bits(&rounded(&expected)), "{heads:?}");
}

pub(crate) fn random_weights_are_the_hosts_bit_for_bit(machine: &dyn Machine, _: Heads) {
    for (base, bound, count) in [(1u64, 0.02f32, 1000usize), (u64::MAX - 7, 1.7, 300), (0, 0.1, 0)] {
        let out = Buffer::filled(machine, bf16::NAN, count + 1);
        machine.run(&rows::random_weights(out.address(), count as u64, base, bound));
        let mut expected: Vec<f32> = (0..count as u64).map(|i| random::value(base, i, bound)).collect();
        // Nothing behind the last is touched.
        expected.push(f32::NAN);
        assert!(bits(&out.values()) == bits(&rounded(&expected)), "{base}");
    }
}
