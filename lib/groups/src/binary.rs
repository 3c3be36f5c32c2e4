//! The binary form of a tree. A program that finds the binary form of its definition need not parse
//! the definition.

use twox_hash::XxHash3_64;

use crate::definition::Definition;
use crate::kind::Weights;
use crate::tree::Tree;

/// The bytes are not the binary form of the definition. A caller that still has the definition
/// parses it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BinaryError {
    /// The bytes are something else.
    #[error("not the binary form of groups")]
    Foreign,
    /// Another version of this crate wrote the bytes.
    #[error("the binary form has version {0}; expected version {VERSION}")]
    OtherVersion(u32),
    /// The bytes belong to another definition.
    #[error("the binary form belongs to another definition")]
    OtherSource,
    /// The bytes are incomplete or changed.
    #[error("the binary form is damaged: {0}")]
    Damaged(&'static str),
}

/// A hash of the names and contents of the documents of a definition.
pub fn source_hash<'a>(documents: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> u64 {
    let hashes = documents.into_iter().flat_map(|(name, content)| {
        [XxHash3_64::oneshot(name.as_bytes()), XxHash3_64::oneshot(content)]
    });
    let hashes: Vec<u8> = hashes.flat_map(u64::to_le_bytes).collect();
    XxHash3_64::oneshot(&hashes)
}

/// Increment it whenever [`Definition`] changes.
const VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"LSGROUPS";

impl Tree {
    /// The binary form of the definition, without statuses: a header (magic, version, `source`,
    /// hash of the rest), then the definition. `source` is the [`source_hash`] of the documents.
    #[must_use]
    pub fn to_bytes(&self, source: u64) -> Vec<u8> {
        let definition = &self.definition;
        let arrays = 4 * definition.parents.len() + definition.ids.len() + definition.members.len();
        let mut bytes = Vec::with_capacity(64 + definition.names.len() + 2 * arrays);
        bytes.resize(HEADER, 0);
        // Appending to a Vec cannot fail. If it did, the payload would be cut off, and `from_bytes`
        // would reject it.
        let mut bytes = postcard::to_extend(definition, bytes).unwrap_or_default();
        bytes.resize(bytes.len().max(HEADER), 0);
        let hash = XxHash3_64::oneshot(&bytes[HEADER..]);
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..20].copy_from_slice(&source.to_le_bytes());
        bytes[20..HEADER].copy_from_slice(&hash.to_le_bytes());
        bytes
    }

    /// Reads the binary form. The tree is as new.
    ///
    /// # Errors
    ///
    /// If the bytes are not what [`Self::to_bytes`] of this version returned for the same `source`.
    pub fn from_bytes(bytes: &[u8], source: u64, weights: Weights) -> Result<Self, BinaryError> {
        let (magic, rest) = bytes.split_first_chunk::<8>().ok_or(BinaryError::Foreign)?;
        if magic != MAGIC {
            return Err(BinaryError::Foreign);
        }
        let cut_off = BinaryError::Damaged("it is cut off");
        let Some((version, rest)) = rest.split_first_chunk::<4>() else { return Err(cut_off) };
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(BinaryError::OtherVersion(version));
        }
        let Some((of_source, rest)) = rest.split_first_chunk::<8>() else { return Err(cut_off) };
        let Some((hash, payload)) = rest.split_first_chunk::<8>() else { return Err(cut_off) };
        if u64::from_le_bytes(*of_source) != source {
            return Err(BinaryError::OtherSource);
        }
        if u64::from_le_bytes(*hash) != XxHash3_64::oneshot(payload) {
            return Err(BinaryError::Damaged("its hash differs"));
        }
        let (definition, rest) = postcard::take_from_bytes::<Definition>(payload)
            .map_err(|_| BinaryError::Damaged("it cannot be decoded"))?;
        if !rest.is_empty() {
            return Err(BinaryError::Damaged("it is too long"));
        }
        definition.check().map_err(BinaryError::Damaged)?;
        Ok(Self::new(definition, weights))
    }
}

const HEADER: usize = 28;
