//! Which shard an object belongs to, and which consumer should have a shard.
//!
//! Both use rendezvous hashing: each candidate gets a weight, and the highest wins. If a candidate
//! is added or removed, only the objects or shards that it wins or loses move.
//!
//! Decision: docs/decisions/0078-how-are-objects-distributed-over-shards.md

/// The shard of an object, from 0 to `count` - 1.
///
/// All producers must agree on it, whatever their version: otherwise two consumers would look up
/// the same object.
pub(super) fn shard_of(id: i64, count: u16) -> u16 {
    (0..count).max_by_key(|shard| weight(id.cast_unsigned(), *shard)).unwrap_or(0)
}

/// The priority of a consumer for a shard. Of all consumers of a shard, RabbitMQ delivers to the
/// one with the highest priority.
pub(super) fn priority(consumer: u64, shard: u16) -> i32 {
    // RabbitMQ expects a signed integer; the first 31 bits are as random as all 64.
    i32::try_from(weight(consumer, shard) >> 33).unwrap_or(i32::MAX)
}

/// A pseudo-random number for a key and a shard: the finalizer of the generator `SplitMix64`,
/// applied to each.
fn weight(key: u64, shard: u16) -> u64 {
    mix(mix(key).wrapping_add(u64::from(shard)))
}

fn mix(mut bits: u64) -> u64 {
    bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: i64 = 10_000;

    /// Producers of different versions run at the same time during an upgrade.
    #[test]
    fn shard_of_an_object_never_changes() {
        let shards: Vec<u16> =
            [i64::MIN, -1, 0, 1, 2, 42, i64::MAX].map(|id| shard_of(id, 8)).into();
        assert_eq!(shards, [6, 6, 3, 4, 1, 7, 2]);
    }

    #[test]
    fn shards_get_equal_parts_of_the_objects() {
        let mut objects = [0_i64; 8];
        for id in 0..IDS {
            objects[usize::from(shard_of(id, 8))] += 1;
        }
        let fair = IDS / 8;
        assert!(objects.iter().all(|count| (count - fair).abs() < fair / 5), "{objects:?}");
    }

    #[test]
    fn added_shard_takes_objects_and_moves_no_other() {
        let mut taken = 0;
        for id in 0..IDS {
            let (before, after) = (shard_of(id, 4), shard_of(id, 5));
            assert!(before == after || after == 4, "{id}: {before} to {after}");
            taken += i64::from(after == 4);
        }
        let fair = IDS / 5;
        assert!((taken - fair).abs() < fair / 5, "{taken}");
    }

    #[test]
    fn every_consumer_wins_shards() {
        let consumers: Vec<u64> = (0..4).map(mix).collect();
        let winner = |shard| consumers.iter().max_by_key(|id| priority(**id, shard)).unwrap();
        for consumer in &consumers {
            let won = (0..32).filter(|shard| winner(*shard) == consumer).count();
            assert!((3..=14).contains(&won), "{won}");
        }
    }
}
