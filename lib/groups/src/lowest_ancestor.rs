//! The lowest common ancestor of two groups, without climbing: a climb takes a million steps in a
//! chain of a million levels.

/// Answers queries by minima of the array of parents. In pre-order, the lowest common ancestor of
/// two groups is the least parent of the groups after the first one, up to the second one.
pub(crate) struct LowestAncestor<'a> {
    parents: &'a [u32],
    /// `minima[n][block]` is the minimum of the 2^n blocks from `block`.
    minima: Vec<Vec<u32>>,
}

const BLOCK: usize = 64;

impl<'a> LowestAncestor<'a> {
    pub(crate) fn new(parents: &'a [u32]) -> Self {
        let blocks = parents.chunks(BLOCK).map(minimum).collect::<Vec<_>>();
        let mut minima = vec![blocks];
        let mut width = 1;
        while let Some(last) = minima.last().filter(|last| last.len() > width) {
            let wider = last.iter().zip(&last[width..]).map(|(&left, &right)| left.min(right));
            let wider = wider.collect();
            minima.push(wider);
            width *= 2;
        }
        Self { parents, minima }
    }

    /// Expects `first < second`.
    pub(crate) fn common(&self, first: u32, second: u32) -> u32 {
        let (start, end) = (first as usize + 1, second as usize + 1);
        let (first_block, end_block) = (start.div_ceil(BLOCK), end / BLOCK);
        if first_block >= end_block {
            return minimum(&self.parents[start..end]);
        }
        let level = (end_block - first_block).ilog2() as usize;
        let blocks = &self.minima[level];
        let inner = blocks[first_block].min(blocks[end_block - (1 << level)]);
        inner
            .min(minimum(&self.parents[start..first_block * BLOCK]))
            .min(minimum(&self.parents[end_block * BLOCK..end]))
    }
}

fn minimum(parents: &[u32]) -> u32 {
    parents.iter().copied().min().unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn climb(parents: &[u32], first: u32, second: u32) -> u32 {
        let (mut first, mut second) = (first, second);
        while first != second {
            let lower = if first > second { &mut first } else { &mut second };
            *lower = parents[*lower as usize];
        }
        first
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(30) })]

        #[test]
        fn minima_find_the_same_ancestor_as_climbing(climbs in vec(0_u32..6, 1..2_000)) {
            let mut parents = vec![0_u32];
            for steps in climbs {
                // Mostly goes deeper, so that common ancestors are at all depths.
                let last = u32::try_from(parents.len()).unwrap() - 1;
                let above = |group: u32, _| parents[group as usize];
                parents.push((0..steps.saturating_sub(3) * 2).fold(last, above));
            }
            let lowest = LowestAncestor::new(&parents);
            let groups = u32::try_from(parents.len()).unwrap();
            for first in (0..groups).step_by(29) {
                for second in (first + 1..groups).step_by(23) {
                    prop_assert_eq!(lowest.common(first, second), climb(&parents, first, second));
                }
            }
        }
    }
}
