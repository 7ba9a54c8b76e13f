//! What a deletion took from each tier, put together from what several holders say of it.

use crate::v1::{Tier, TierDeletion};

impl TierDeletion {
    /// So many objects and bytes of a tier.
    pub fn of(tier: Tier, objects: usize, bytes: u64) -> Self {
        Self { tier: tier.into(), objects: u32::try_from(objects).unwrap_or(u32::MAX), bytes }
    }
}

/// Adds what another holder gave up; each tier stands in `tiers` once, ascending.
pub fn add(tiers: &mut Vec<TierDeletion>, more: &TierDeletion) {
    let known = slot(tiers, more.tier);
    known.objects = known.objects.saturating_add(more.objects);
    known.bytes = known.bytes.saturating_add(more.bytes);
}

/// Takes over what another holder says of the same tier: the larger number where they differ, for one of them may have
/// been told less.
pub fn at_least(tiers: &mut Vec<TierDeletion>, told: &TierDeletion) {
    let known = slot(tiers, told.tier);
    known.objects = known.objects.max(told.objects);
    known.bytes = known.bytes.max(told.bytes);
}

fn slot(tiers: &mut Vec<TierDeletion>, tier: i32) -> &mut TierDeletion {
    let at = tiers.binary_search_by_key(&tier, |it| it.tier).unwrap_or_else(|at| {
        tiers.insert(at, TierDeletion { tier, objects: 0, bytes: 0 });
        at
    });
    &mut tiers[at]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_holders_add_up_and_one_that_is_told_twice_does_not() {
        let disk = |objects, bytes| TierDeletion::of(Tier::StoreDisk, objects, bytes);
        let ram = TierDeletion::of(Tier::WorkerRam, 1, 5);
        let mut sum = Vec::new();
        [disk(2, 10), ram, disk(1, 7)].iter().for_each(|it| add(&mut sum, it));
        assert_eq!(sum, [ram, disk(3, 17)]);
        let mut same = vec![disk(3, 17)];
        [disk(3, 17), disk(2, 10), ram].iter().for_each(|it| at_least(&mut same, it));
        assert_eq!(same, sum);
    }
}
