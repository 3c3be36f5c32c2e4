//! The format of a snapshot:
//!
//! | part | content |
//! | --- | --- |
//! | header | [`MAGIC`], [`VERSION`] (u32), cursor (i64), base (i64) |
//! | each object | id, minus the previous id; number of sightings; base minus the latest sighting; for each further sighting, the later one minus it |
//! | end | CRC-64 of everything before it |
//!
//! The numbers of the objects are varints (LEB128), the others are little-endian.

use std::io::{self, Write};

use crc::{CRC_64_XZ, Crc, Digest, Table};

use crate::object::Micros;
use crate::view_state::{SIGHTINGS_MAX, Sightings};

const MAGIC: &[u8; 8] = b"lastseen";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = MAGIC.len() + 4 + 8 + 8;
const CHECKSUM_BYTES: usize = 8;
/// Maximum size of a snapshot: with a million objects, enough for 7 sightings of each. With
/// more, the viewer would be ready later.
pub(super) const BYTES_MAX: usize = 32 << 20;

static CRC: Crc<u64, Table<16>> = Crc::<u64, Table<16>>::new(&CRC_64_XZ);

/// The reason why a file is not usable.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Rejection {
    #[error("it is not a snapshot of a viewer")]
    NotASnapshot,
    #[error("its version is {0}, this program needs version {VERSION}")]
    Version(u32),
    #[error("its checksum is wrong")]
    Checksum,
    #[error("it is larger than {BYTES_MAX} bytes")]
    TooLarge,
}

/// Writes a snapshot.
pub(super) struct Encoder<W> {
    into: W,
    digest: Digest<'static, u64, Table<16>>,
    base: Micros,
    previous: Option<i64>,
    /// What [`Encoder::flush`] has not written yet.
    pending: Vec<u8>,
    written: usize,
    /// Number of bytes for each object.
    share: usize,
}

impl<W: Write> Encoder<W> {
    /// `objects` is the approximate number of objects. Times near `base` take the least space.
    pub(super) fn new(into: W, cursor: i64, base: Micros, objects: usize) -> Self {
        let mut pending = Vec::new();
        pending.extend(MAGIC);
        pending.extend(VERSION.to_le_bytes());
        pending.extend(cursor.to_le_bytes());
        pending.extend(base.to_le_bytes());
        let (digest, share) = (CRC.digest(), share(objects));
        Self { into, digest, base, previous: None, pending, written: 0, share }
    }

    /// Adds an object, with an id above that of the previous one. Leaves out the oldest sightings
    /// if all together take more than the object's share of [`BYTES_MAX`].
    pub(super) fn add(&mut self, id: i64, sightings: &Sightings) {
        let Some(&last_seen) = sightings.back() else { return };
        let begin = self.pending.len();
        put(&mut self.pending, id.abs_diff(self.previous.unwrap_or(i64::MIN)));
        self.previous = Some(id);
        let count_at = self.pending.len();
        self.pending.push(1);
        put(&mut self.pending, zigzag(self.base.wrapping_sub(last_seen)));
        let mut later = last_seen;
        for &sighting in sightings.iter().rev().skip(1).take(SIGHTINGS_MAX - 1) {
            let end = self.pending.len();
            put(&mut self.pending, later.abs_diff(sighting));
            if self.pending.len() - begin > self.share {
                self.pending.truncate(end);
                break;
            }
            self.pending[count_at] += 1;
            later = sighting;
        }
    }

    /// Writes the objects that were added.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.written += self.pending.len();
        if self.written + CHECKSUM_BYTES > BYTES_MAX {
            let reason = format!("the objects do not fit into {BYTES_MAX} bytes");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
        }
        self.digest.update(&self.pending);
        self.into.write_all(&self.pending)?;
        self.pending.clear();
        Ok(())
    }

    /// Writes the rest, and returns the writer.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.flush()?;
        self.into.write_all(&self.digest.finalize().to_le_bytes())?;
        Ok(self.into)
    }
}

/// The share of an object in [`BYTES_MAX`]; a tenth is left for objects that come online meanwhile.
fn share(objects: usize) -> usize {
    BYTES_MAX / 10 * 9 / objects.max(1)
}

/// A snapshot with a right checksum.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) cursor: i64,
    base: Micros,
    bytes: Vec<u8>,
}

impl Checked {
    /// Checks everything but the objects.
    pub(super) fn new(bytes: Vec<u8>) -> Result<Self, Rejection> {
        if bytes.len() > BYTES_MAX {
            return Err(Rejection::TooLarge);
        }
        let content = bytes.strip_prefix(MAGIC).ok_or(Rejection::NotASnapshot)?;
        let (version, content) = content.split_first_chunk().ok_or(Rejection::Checksum)?;
        match u32::from_le_bytes(*version) {
            VERSION => {}
            other => return Err(Rejection::Version(other)),
        }
        let (checked, checksum) = bytes.split_last_chunk().ok_or(Rejection::Checksum)?;
        if checked.len() < HEADER_BYTES || CRC.checksum(checked) != u64::from_le_bytes(*checksum) {
            return Err(Rejection::Checksum);
        }
        let (cursor, content) = content.split_first_chunk().ok_or(Rejection::Checksum)?;
        let (base, _) = content.split_first_chunk().ok_or(Rejection::Checksum)?;
        let (cursor, base) = (i64::from_le_bytes(*cursor), i64::from_le_bytes(*base));
        Ok(Self { cursor, base, bytes })
    }

    pub(super) fn objects(&self) -> Objects<'_> {
        let end = self.bytes.len().saturating_sub(CHECKSUM_BYTES);
        let rest = self.bytes.get(HEADER_BYTES..end).unwrap_or_default();
        Objects { rest, base: self.base, previous: None, is_valid: true }
    }
}

/// Decodes the objects and their sightings, in ascending order of the ids, up to the first invalid
/// object.
pub(super) struct Objects<'a> {
    rest: &'a [u8],
    base: Micros,
    previous: Option<i64>,
    is_valid: bool,
}

impl Iterator for Objects<'_> {
    type Item = (i64, Sightings);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() || !self.is_valid {
            return None;
        }
        let object = self.decode();
        self.is_valid = object.is_some();
        object
    }
}

impl Objects<'_> {
    /// Whether no object was invalid so far.
    pub(super) fn is_valid(&self) -> bool {
        self.is_valid
    }

    fn decode(&mut self) -> Option<(i64, Sightings)> {
        let id = match (self.previous, self.number()?) {
            (None, difference) => i64::MIN.checked_add_unsigned(difference)?,
            (Some(_), 0) => return None,
            (Some(previous), difference) => previous.checked_add_unsigned(difference)?,
        };
        self.previous = Some(id);
        let count = usize::try_from(self.number()?).ok()?;
        if !(1..=SIGHTINGS_MAX).contains(&count) {
            return None;
        }
        let mut sighting = self.base.wrapping_sub(from_zigzag(self.number()?));
        let mut sightings = vec![sighting; count];
        for earlier in sightings.iter_mut().rev().skip(1) {
            let difference = self.number().filter(|difference| *difference > 0)?;
            sighting = sighting.checked_sub_unsigned(difference)?;
            *earlier = sighting;
        }
        Some((id, sightings.into()))
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let (&byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            let bits = u64::from(byte & 0x7f);
            if bits.leading_zeros() < shift {
                return None;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }
}

fn put(into: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        into.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    into.push(number.to_le_bytes()[0]);
}

/// Maps numbers near zero, also negative ones, to small numbers.
fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)).cast_unsigned()
}

fn from_zigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ -(number & 1).cast_signed()
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, btree_set};
    use proptest::prelude::*;

    use super::*;

    type View = std::collections::BTreeMap<i64, Sightings>;

    fn encode(cursor: i64, base: Micros, view: &View) -> Vec<u8> {
        let mut encoder = Encoder::new(Vec::new(), cursor, base, view.len());
        for (index, (id, sightings)) in view.iter().enumerate() {
            encoder.add(*id, sightings);
            if index % 3 == 0 {
                encoder.flush().unwrap();
            }
        }
        encoder.finish().unwrap()
    }

    fn times() -> impl Strategy<Value = Micros> {
        prop_oneof![any::<i64>(), Just(i64::MIN), Just(i64::MAX), 0_i64..100]
    }

    fn views() -> impl Strategy<Value = View> {
        let sightings = btree_set(times(), 1..=SIGHTINGS_MAX);
        btree_map(times(), sightings.prop_map(|times| times.into_iter().collect()), 0..20)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn decoded_view_equals_the_encoded_one(
            view in views(), cursor in any::<i64>(), base in times(),
        ) {
            let file = Checked::new(encode(cursor, base, &view)).unwrap();
            prop_assert_eq!(file.cursor, cursor);
            let mut objects = file.objects();
            prop_assert_eq!(objects.by_ref().collect::<View>(), view);
            prop_assert!(objects.is_valid());
        }

        #[test]
        fn changed_or_truncated_file_is_rejected(
            view in views(), at in any::<prop::sample::Index>(), bits in 1..=u8::MAX,
        ) {
            let file = encode(7, 50, &view);
            let at = at.index(file.len());
            prop_assert!(Checked::new(file[..at].to_vec()).is_err());
            let mut changed = file;
            changed[at] ^= bits;
            prop_assert!(Checked::new(changed).is_err());
        }

        #[test]
        fn any_content_is_decoded_up_to_the_first_invalid_object(
            content in prop::collection::vec(prop_oneof![0..3_u8, any::<u8>()], 0..60),
        ) {
            let mut file = [MAGIC, VERSION.to_le_bytes().as_slice(), &content].concat();
            file.extend(CRC.checksum(&file).to_le_bytes());
            let Ok(file) = Checked::new(file) else { return Ok(()) };
            let mut objects = file.objects();
            let mut last = None;
            for (id, sightings) in objects.by_ref() {
                prop_assert!(last < Some(id), "the ids are not in ascending order");
                prop_assert!(sightings.iter().is_sorted() && sightings.len() <= SIGHTINGS_MAX);
                last = Some(id);
            }
            prop_assert!(!objects.is_valid() || objects.rest.is_empty());
        }
    }

    #[test]
    fn other_files_and_versions_are_told_apart() {
        let mut file = encode(7, 50, &View::new());
        file[8] = 2;
        assert_eq!(Checked::new(file).unwrap_err(), Rejection::Version(2));
        for other in [&b""[..], b"lastsee", b"SQLite format 3\0"] {
            assert_eq!(Checked::new(other.to_vec()).unwrap_err(), Rejection::NotASnapshot);
        }
        assert_eq!(Checked::new(MAGIC.to_vec()).unwrap_err(), Rejection::Checksum);
    }

    #[test]
    fn objects_share_the_size_limit_and_lose_their_oldest_sightings() {
        // Each time takes four bytes.
        let sightings: Sightings = (1..=20).map(|time| time * 10_000_000).collect();
        let kept = |objects| {
            let mut encoder = Encoder::new(Vec::new(), 7, 210_000_000, objects);
            for id in 1..=100 {
                encoder.add(id, &sightings);
            }
            let file = encoder.finish().unwrap();
            let bytes = file.len();
            (Checked::new(file).unwrap().objects().last().unwrap().1, bytes)
        };
        assert_eq!(kept(100).0, sightings);
        let (of_a_million, bytes) = kept(1_000_000);
        assert_eq!(of_a_million, sightings.range(13..).copied().collect::<Sightings>());
        assert!(bytes <= BYTES_MAX / 10_000, "{bytes}");
        assert_eq!(kept(usize::MAX).0, [200_000_000]);
    }

    #[test]
    fn view_that_does_not_fit_is_an_error() {
        let mut encoder = Encoder::new(io::sink(), 7, 0, 1);
        encoder.written = BYTES_MAX - HEADER_BYTES - CHECKSUM_BYTES;
        assert!(encoder.flush().is_ok());
        encoder.add(1, &Sightings::from([0]));
        assert_eq!(encoder.flush().unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
