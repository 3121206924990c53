//! The time of day as text. Knows nothing else.

use time::OffsetDateTime;

/// Now, in RFC 3339, UTC, with milliseconds: `2026-11-22T21:34:00.123Z`.
pub fn now() -> String {
    text(OffsetDateTime::now_utc())
}

/// Digit by digit: the crate's own formatting takes ten times as long, twice in each request.
fn text(time: OffsetDateTime) -> String {
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second, milli) = time.to_hms_milli();
    let year = u16::try_from(year).unwrap_or_default();
    let mut text = *b"0000-00-00T00:00:00.000Z";
    let ends = [4, 7, 10, 13, 16, 19, 23];
    let numbers = [year, month as u16, day.into(), hour.into(), minute.into(), second.into(), milli];
    for (end, mut number) in ends.into_iter().zip(numbers) {
        for digit in text[..end].iter_mut().rev() {
            if number == 0 {
                break;
            }
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_its_place_and_its_zeros() {
        for (millis, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (1_790_112_840_123, "2026-09-22T21:34:00.123Z"),
            (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
        ] {
            let time = OffsetDateTime::from_unix_timestamp_nanos(millis * 1_000_000).expect("a time");
            assert_eq!(text(time), expected);
        }
    }
}
