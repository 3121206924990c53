//! The time of day as text. Knows nothing else.

use time::OffsetDateTime;
use time::macros::format_description;

/// Now, in RFC 3339, UTC, with milliseconds: `2026-11-22T21:34:00.123Z`.
pub fn now() -> String {
    let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::now_utc().format(&format).unwrap_or_default()
}
