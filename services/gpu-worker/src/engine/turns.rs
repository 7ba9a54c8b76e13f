//! Whose turn it is: tenants share the engine's prefill work evenly, however much each of them asks for.
//!
//! Start-time fair queueing (Goyal, Vin and Cheng, 1996), rows times layers being the work: of all tenants that have
//! some to do, the one that was served least goes next, and one that comes back starts where the others are.

use std::collections::HashMap;
use std::sync::Arc;

/// Who asks, opaque; empty for work that is nobody's.
pub(crate) type Tenant = Arc<[u8]>;

/// Tenants that are remembered while they have nothing to do.
const REMEMBERED: usize = 1024;

/// What each tenant was served.
#[derive(Debug, Default)]
pub(super) struct Turns {
    served: HashMap<Tenant, u64>,
    /// What the tenant was served that went last, before it went.
    now: u64,
}

impl Turns {
    /// Index of the candidate that goes next: the first of the tenant that was served least.
    pub(super) fn next<'a>(&self, candidates: impl Iterator<Item = (usize, &'a Tenant)>) -> Option<usize> {
        candidates.min_by_key(|(index, tenant)| (self.start(tenant), *index)).map(|(index, _)| index)
    }

    /// Counts work done for a tenant.
    pub(super) fn charge(&mut self, tenant: &Tenant, work: u64) {
        self.now = self.start(tenant);
        self.served.insert(Arc::clone(tenant), self.now + work);
        if self.served.len() > REMEMBERED {
            // Who was served less than most starts with the others, as if coming back.
            let mut served: Vec<u64> = self.served.values().copied().collect();
            let (_, median, _) = served.select_nth_unstable(REMEMBERED / 2);
            self.now = self.now.max(*median);
            self.served.retain(|_, served| *served > self.now);
        }
    }

    fn start(&self, tenant: &Tenant) -> u64 {
        self.served.get(tenant).map_or(self.now, |served| (*served).max(self.now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> Tenant {
        name.as_bytes().into()
    }

    #[test]
    fn one_tenants_many_requests_do_not_keep_another_waiting() {
        let (many, few) = (tenant("many"), tenant("few"));
        let mut turns = Turns::default();
        turns.charge(&many, 1000);
        let candidates = [&many, &many, &many, &few];
        let mut went = [0; 4];
        for _ in 0..40 {
            let next = turns.next(candidates.into_iter().enumerate()).expect("there are candidates");
            went[next] += 1;
            turns.charge(candidates[next], 100);
        }
        assert_eq!(
            went,
            [15, 0, 0, 25],
            "ten turns to catch up, then every other; first come within a tenant"
        );
    }

    #[test]
    fn time_away_is_not_saved_up() {
        let (here, away) = (tenant("here"), tenant("away"));
        let mut turns = Turns::default();
        turns.charge(&away, 1);
        (0..100).for_each(|_| turns.charge(&here, 10));
        let mut went = 0;
        for _ in 0..10 {
            let next = turns.next([&away, &here].into_iter().enumerate());
            went += usize::from(next == Some(0));
            turns.charge([&away, &here][next.unwrap_or(1)], 10);
        }
        assert!((5..=6).contains(&went), "{went} of ten turns");
    }

    #[test]
    fn tenants_that_are_gone_are_forgotten() {
        let mut turns = Turns::default();
        (0..10 * REMEMBERED as u64).for_each(|i| turns.charge(&i.to_le_bytes()[..].into(), 1));
        assert!(turns.served.len() <= REMEMBERED + 1);
    }
}
