//! What a LiveKit access token claims, read without checking its signature: LiveKit checks it, and
//! nothing comes of a session before LiveKit has accepted it. Only policy is chosen by it.
//!
//! LiveKit reads claims with Go's `encoding/json`, which takes names in any case, the last of several, and merges objects that
//! are there twice. What another reader could read otherwise is refused here; no library writes it.

use crate::query::Unclear;
use base64::Engine;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};
use std::fmt;

/// A token longer than this is not read: LiveKit's carry metadata, but headers bound them.
const MAX_TOKEN: usize = 64 * 1024;

/// `base64.RawURLEncoding` of Go, which minds neither bits that are left over nor line breaks.
const RAW_URL: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::RequireNone)
        .with_decode_allow_trailing_bits(true),
);

/// The claims that policy looks at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Claims {
    /// `video.room`
    pub room: String,
    /// `sub`, or `jti` where that is empty.
    pub identity: String,
    /// `iss`
    pub api_key: String,
    /// `video.canUpdateOwnMetadata`
    pub can_update_own_metadata: bool,
}

/// Reads a JWT's claims; `None` where LiveKit can't read them either.
///
/// # Errors
/// When one that matters is there twice, or in another spelling.
pub fn claims(token: &str) -> Result<Option<Claims>, Unclear> {
    let mut parts = token.split('.');
    let (Some(_), Some(payload), Some(_), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Ok(None);
    };
    if token.len() > MAX_TOKEN {
        return Ok(None);
    }
    let payload: Vec<u8> = payload
        .bytes()
        .filter(|byte| !matches!(byte, b'\r' | b'\n'))
        .collect();
    let Ok(json) = RAW_URL.decode(payload) else {
        return Ok(None);
    };
    let mut read = Read::default();
    let mut json = serde_json::Deserializer::from_slice(&json);
    let whole = Object(&mut read, &TOP).deserialize(&mut json).is_ok() && json.end().is_ok();
    if !whole {
        return Ok(None);
    }
    if let Some(name) = read.unclear {
        return Err(Unclear::Claim(name));
    }
    let [issuer, subject, id, room] = read.texts.map(Option::unwrap_or_default);
    Ok(Some(Claims {
        room,
        identity: if subject.is_empty() { id } else { subject },
        api_key: issuer,
        can_update_own_metadata: read.can_update_own_metadata,
    }))
}

/// What a name stands for.
#[derive(Clone, Copy)]
enum Claim {
    /// Its place in [`Read::texts`].
    Text(usize),
    Video,
    CanUpdateOwnMetadata,
}

const TOP: [(&str, Claim); 4] = [
    ("iss", Claim::Text(0)),
    ("sub", Claim::Text(1)),
    ("jti", Claim::Text(2)),
    ("video", Claim::Video),
];
const VIDEO: [(&str, Claim); 2] = [
    ("room", Claim::Text(3)),
    ("canUpdateOwnMetadata", Claim::CanUpdateOwnMetadata),
];

#[derive(Default)]
struct Read {
    texts: [Option<String>; 4],
    can_update_own_metadata: bool,
    unclear: Option<&'static str>,
}

/// A JSON object, or null, of which these names matter.
struct Object<'r>(&'r mut Read, &'static [(&'static str, Claim)]);

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self(read, names) = self;
        let mut seen = [false; TOP.len()];
        while let Some(name) = map.next_key::<String>()? {
            let known = names
                .iter()
                .zip(&mut seen)
                .find(|((known, _), _)| folds_to(&name, known));
            let Some(((known, claim), seen)) = known else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if std::mem::replace(seen, true) || name != *known {
                read.unclear = Some(known);
            }
            match claim {
                Claim::Text(place) => read.texts[*place] = map.next_value()?,
                Claim::Video => map.next_value_seed(Object(read, &VIDEO))?,
                Claim::CanUpdateOwnMetadata => {
                    read.can_update_own_metadata = map.next_value::<Option<bool>>()? == Some(true);
                }
            }
        }
        Ok(())
    }
}

/// Whether Go's `encoding/json` takes a name for another: without regard to case, by Unicode's simple folding, which has two
/// characters more that fold to ASCII letters.
fn folds_to(name: &str, known: &str) -> bool {
    let fold = |c: char| match c {
        'ſ' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    };
    name.chars().map(fold).eq(known.chars().map(fold))
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    fn token(payload: &[u8]) -> String {
        format!("x.{}.y", URL_SAFE_NO_PAD.encode(payload))
    }

    fn read(payload: &str) -> Result<Option<Claims>, Unclear> {
        claims(&token(payload.as_bytes()))
    }

    #[test]
    fn claims_are_read_and_garbage_is_nobody() {
        let payload = r#"{"iss":"devkey","sub":"anna","video":{"room":"support-1","canUpdateOwnMetadata":true},"exp":1e99}"#;
        let anna = Claims {
            room: "support-1".into(),
            identity: "anna".into(),
            api_key: "devkey".into(),
            can_update_own_metadata: true,
        };
        assert_eq!(read(payload), Ok(Some(anna.clone())));
        // Go's decoder skips line breaks.
        let broken = token(payload.as_bytes()).replace('J', "J\r\n");
        assert_eq!(claims(&broken), Ok(Some(anna)));
        let padded = format!("x.{}=.y", URL_SAFE_NO_PAD.encode(payload));
        for bad in [
            "",
            "a.b.c",
            "a.!!.c",
            "a.eyJ4.c",
            "a.e30",
            "a.e30.c.d",
            &padded,
        ] {
            assert_eq!(claims(bad), Ok(None), "{bad}");
        }
        for bad in [
            "[]",
            "7",
            "{} {}",
            r#"{"sub":7}"#,
            r#"{"video":"x"}"#,
            r#"{"video":{"room":["a"]}}"#,
        ] {
            assert_eq!(read(bad), Ok(None), "{bad}");
        }
        assert_eq!(claims(&token(b"{\"sub\":\"\xff\"}")), Ok(None));
    }

    #[test]
    fn what_go_leaves_out_is_left_out() {
        let none = Ok(Some(Claims::default()));
        for empty in [
            "{}",
            "null",
            r#"{"sub":null,"video":null}"#,
            r#"{"video":{"room":null}}"#,
        ] {
            assert_eq!(read(empty), none, "{empty}");
        }
        let named = |payload: &str| read(payload).map(|claims| claims.unwrap_or_default().identity);
        assert_eq!(named(r#"{"jti":"b"}"#).as_deref(), Ok("b"));
        assert_eq!(named(r#"{"sub":"","jti":"b"}"#).as_deref(), Ok("b"));
        assert_eq!(named(r#"{"jti":"b","sub":"a"}"#).as_deref(), Ok("a"));
        // It is the `sub` that counts (`APIKeyTokenVerifier.Verify`).
        assert_eq!(named(r#"{"sub":"a","identity":"b"}"#).as_deref(), Ok("a"));
    }

    #[test]
    fn a_claim_that_can_be_read_in_two_ways_is_refused() {
        for (payload, claim) in [
            (r#"{"sub":"a","sub":"b"}"#, "sub"),
            (r#"{"sub":"a","Sub":"b"}"#, "sub"),
            (r#"{"SUB":"b"}"#, "sub"),
            ("{\"sub\":\"a\",\"ſub\":\"b\"}", "sub"),
            (r#"{"sub":"a","\u017fub":"b"}"#, "sub"),
            (r#"{"sub":"a","sub":null}"#, "sub"),
            (r#"{"iss":"a","iſſ":"b"}"#, "iss"),
            (
                r#"{"video":{"room":"a"},"video":{"roomJoin":true}}"#,
                "video",
            ),
            (r#"{"video":{"room":"a"},"VIDEO":{"room":"b"}}"#, "video"),
            (r#"{"video":{"room":"a","ROOM":"b"}}"#, "room"),
            (
                r#"{"video":{"canUpdateOwnMetadata":false,"canupdateownmetadata":true}}"#,
                "canUpdateOwnMetadata",
            ),
        ] {
            assert_eq!(read(payload), Err(Unclear::Claim(claim)), "{payload}");
        }
        // What doesn't matter may be there as often as it likes.
        assert!(read(r#"{"sub":"a","x":1,"x":2,"metadata":{"sub":"b"}}"#).is_ok());
    }
}
