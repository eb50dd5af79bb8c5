//! Small files that are read once, at a start: JSON with a checksum, so that one flipped bit is not believed.
//!
//! The checksum is the last member of the object, and is of every byte before it: the file stays JSON, and a version
//! that knows of no checksum reads it as well.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// What comes between the object's own members and the checksum, and after it.
const BEFORE: &str = ",\n  \"crc32\": \"";
const BEHIND: &str = "\"\n}\n";

/// Hexadecimal digits of a CRC-32.
const DIGITS: usize = 8;

/// The text of a value that is stored as an object with members.
pub fn seal(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value)?;
    // Of an object that has members, the end is a line of its own.
    if let Some(members) = text.strip_suffix(b"\n}") {
        text.truncate(members.len());
        let checksum = crc32fast::hash(&text);
        text.extend_from_slice(format!("{BEFORE}{checksum:0DIGITS$x}{BEHIND}").as_bytes());
    }
    Ok(text)
}

/// The value in a text; a text without a checksum is an earlier version's. An error says where it is wrong, and
/// nothing of what is in it: that may be secret.
pub fn open<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    if let Some((members, checksum)) = sealed(text)
        && checksum != format!("{:0DIGITS$x}", crc32fast::hash(members)).as_bytes()
    {
        return Err("its checksum is not that of its content".to_owned());
    }
    serde_json::from_slice(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        format!("it makes no sense at line {line}, column {column}")
    })
}

/// What the checksum is of, and the checksum.
fn sealed(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let text = text.strip_suffix(BEHIND.as_bytes())?;
    let (text, checksum) = text.split_at_checked(text.len().checked_sub(DIGITS)?)?;
    Some((text.strip_suffix(BEFORE.as_bytes())?, checksum))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeMap;

    type Object = BTreeMap<String, Vec<String>>;

    fn value() -> Object {
        let words = ["a", "b"].map(str::to_owned).to_vec();
        [("one".to_owned(), words), ("two".to_owned(), Vec::new())].into()
    }

    #[test]
    fn a_flipped_bit_is_an_error_or_changes_nothing() {
        #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        struct Stored {
            one: String,
            #[serde(default)]
            two: Option<u32>,
        }
        let value = || Stored {
            one: "words".to_owned(),
            two: Some(7),
        };
        let text = seal(&value()).unwrap();
        assert_eq!(open::<Stored>(&text), Ok(value()));
        for bit in 0..text.len() * 8 {
            let mut flipped = text.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(read) = open::<Stored>(&flipped) {
                assert_eq!(read, value(), "{}", String::from_utf8_lossy(&flipped));
            }
        }
    }

    #[test]
    fn an_earlier_versions_file_is_read_and_a_sealed_one_is_json() {
        let plain = serde_json::to_vec_pretty(&value()).unwrap();
        assert_eq!(open::<Object>(&plain), Ok(value()));
        let sealed: serde_json::Value = serde_json::from_slice(&seal(&value()).unwrap()).unwrap();
        assert_eq!(sealed["one"], serde_json::json!(["a", "b"]));
    }

    #[test]
    fn an_error_tells_nothing_of_the_content() {
        let error = open::<BTreeMap<String, u32>>(br#"{"a":"secret"}"#).unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }
}
