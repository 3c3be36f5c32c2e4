//! A `timestamptz` as it comes over the wire.

use sqlx::error::BoxDynError;
use sqlx::postgres::{PgTypeInfo, PgValueFormat, PgValueRef};
use sqlx::{Decode, Postgres, Type};

use crate::Moment;

/// From 1970 to 2000, where Postgres begins to count.
const MICROS_TO_2000: i64 = 946_684_800_000_000;

/// Microseconds since 2000, as Postgres keeps them. Read like this, neither the server nor we
/// calculate with dates, and no crate for those is needed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timestamp(i64);

impl Type<Postgres> for Timestamp {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("TIMESTAMPTZ")
    }
}

impl<'r> Decode<'r, Postgres> for Timestamp {
    fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
        if value.format() == PgValueFormat::Text {
            return Err("a timestamp came as text".into());
        }
        Ok(Self(i64::from_be_bytes(value.as_bytes()?.try_into()?)))
    }
}

impl From<Timestamp> for Moment {
    fn from(timestamp: Timestamp) -> Self {
        Self::from_micros(timestamp.0.saturating_add(MICROS_TO_2000))
    }
}
