//! Load or recompute: which chunks of a request to fetch and which to compute, where both would do.

/// How a chunk's KV is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Fetched from a store.
    Load,
    /// Computed here, canonically.
    Compute,
}

/// What takes chunks one after the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Server {
    /// Seconds until it has done what it was asked for.
    pub backlog: f64,
    /// Seconds per unit of a further chunk: per byte of the link, per row of the engine.
    pub per_unit: f64,
}

/// One chunk that is in no memory here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Bytes to fetch.
    pub bytes: u64,
    /// Rows to compute.
    pub rows: usize,
}

/// Divides chunks between the link and the engine so that the later of the two ends early: list scheduling on two
/// machines (Graham, 1966), each chunk to the one that would be done with it first, the link where they draw. What is not
/// known yet is tried: without a known link everything is loaded, and without a known engine, too.
pub fn divide(chunks: &[Cost], link: Option<Server>, engine: Option<Server>) -> Vec<Way> {
    let (Some(mut link), Some(mut engine)) = (link, engine) else { return vec![Way::Load; chunks.len()] };
    let assign = |chunk: &Cost| {
        let loaded = link.backlog + link.per_unit * chunk.bytes as f64;
        let computed = engine.backlog + engine.per_unit * chunk.rows as f64;
        if loaded <= computed {
            link.backlog = loaded;
            Way::Load
        } else {
            engine.backlog = computed;
            Way::Compute
        }
    };
    chunks.iter().map(assign).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: Cost = Cost { bytes: 50_000_000, rows: 512 };

    fn loaded(link_mb_per_second: f64, rows_per_second: f64, chunks: usize) -> usize {
        let link = Server { backlog: 0.0, per_unit: 1e-6 / link_mb_per_second };
        let engine = Server { backlog: 0.0, per_unit: 1.0 / rows_per_second };
        let ways = divide(&vec![CHUNK; chunks], Some(link), Some(engine));
        ways.iter().filter(|way| **way == Way::Load).count()
    }

    #[test]
    fn a_fast_link_loads_and_a_fast_engine_computes() {
        assert_eq!(loaded(10_000.0, 100.0, 8), 8);
        assert_eq!(loaded(1.0, 100_000.0, 8), 0);
    }

    #[test]
    fn where_neither_is_much_faster_both_work() {
        // 50 MB at 50 MB/s and 512 rows at 512 rows/s: a second each.
        assert_eq!(loaded(50.0, 512.0, 8), 4);
        // The link takes a third of the engine's time.
        assert_eq!(loaded(150.0, 512.0, 8), 6);
    }

    #[test]
    fn whoever_is_busy_is_spared() {
        let link = Server { backlog: 10.0, per_unit: 1e-9 };
        let engine = Server { backlog: 0.0, per_unit: 1e-3 };
        assert_eq!(divide(&[CHUNK; 3], Some(link), Some(engine)), [Way::Compute; 3]);
        let engine = Server { backlog: 10.0, ..engine };
        assert_eq!(divide(&[CHUNK; 3], Some(link), Some(engine)), [Way::Load; 3]);
    }

    #[test]
    fn what_is_not_known_is_tried() {
        let known = Some(Server { backlog: 0.0, per_unit: 1e-3 });
        for (link, engine) in [(None, known), (known, None), (None, None)] {
            assert_eq!(divide(&[CHUNK; 2], link, engine), [Way::Load; 2]);
        }
    }
}
