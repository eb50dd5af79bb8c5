//! Times and sizes as people write them.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// `500ms`, `30s`, `10m`, `2h`, `7d`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, u64); 5] = [
        ("ms", 1),
        ("s", 1_000),
        ("m", 60_000),
        ("h", 3_600_000),
        ("d", 86_400_000),
    ];
    let (number, unit) = split_number(text);
    let milliseconds = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .and_then(|(_, scale)| number.parse::<u64>().ok()?.checked_mul(*scale));
    match milliseconds {
        Some(milliseconds) => Ok(Duration::from_millis(milliseconds)),
        None => Err("expected a whole number and a unit: 500ms, 30s, 10m, 2h or 7d".to_owned()),
    }
}

/// `1048576`, `512K`, `128M`, `1G`; powers of 1,024, and `MB` and `MiB` mean the same as `M`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split_number(text);
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => Some(0),
        "K" | "KB" | "KIB" => Some(10),
        "M" | "MB" | "MIB" => Some(20),
        "G" | "GB" | "GIB" => Some(30),
        _ => None,
    };
    let bytes = shift.and_then(|shift: u32| number.parse::<u64>().ok()?.checked_mul(1 << shift));
    bytes.ok_or_else(|| "expected bytes, or a whole number and K, M or G: 128M".to_owned())
}

/// A moment: RFC 3339, or how long ago.
pub(super) fn parse_moment(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(moment);
    }
    let ago = parse_duration(text).map_err(|_| {
        "expected how long ago (30s, 10m, 2h, 7d) or a moment such as 2026-01-31T12:00:00Z"
            .to_owned()
    })?;
    SignedDuration::try_from(ago)
        .ok()
        .and_then(|ago| now.checked_sub(ago).ok())
        .ok_or_else(|| "is longer ago than the calendar goes back".to_owned())
}

fn split_number(text: &str) -> (&str, &str) {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    text.split_at(digits)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn durations_need_a_number_and_a_unit() {
        assert_eq!(parse_duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(parse_duration("10m").unwrap(), Duration::from_secs(600));
        assert_eq!(parse_duration("7d").unwrap(), Duration::from_secs(604_800));
        for bad in [
            "",
            "10",
            "m",
            "-1s",
            "1.5h",
            "10 m",
            "10y",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("7", 7),
            ("1K", 1 << 10),
            ("128MiB", 128 << 20),
            ("1g", 1 << 30),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "M", "1.5M", "-1", "1T", "99999999999G"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn moments_are_rfc_3339_or_how_long_ago() {
        let now: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
        let at = |text| parse_moment(text, now).map(|moment| moment.to_string());
        assert_eq!(at("10m").unwrap(), "2026-01-31T11:50:00Z");
        assert_eq!(
            at("2026-01-31T10:00:00+01:00").unwrap(),
            "2026-01-31T09:00:00Z"
        );
        for bad in ["yesterday", "2026-01-31", "", "999999999999d"] {
            assert!(at(bad).is_err(), "{bad:?}");
        }
    }
}
