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
