//! What a LiveKit access token claims, read without checking its signature: LiveKit checks it, and
//! nothing comes of a session before LiveKit has accepted it. Only policy is chosen by it.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// A token longer than this is not read: LiveKit's carry metadata, but headers bound them.
const MAX_TOKEN: usize = 64 * 1024;

/// The claims that policy looks at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Claims {
    /// `video.room`
    pub room: String,
    /// `sub`
    pub identity: String,
    /// `iss`
    pub api_key: String,
    /// `video.canUpdateOwnMetadata`
    pub can_update_own_metadata: bool,
}

/// Reads a JWT's claims; all empty where it is not one.
#[must_use]
pub fn claims(token: &str) -> Claims {
    let read = || {
        if token.len() > MAX_TOKEN {
            return None;
        }
        let payload = token.split('.').nth(1)?;
        let json = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
        let json: serde_json::Value = serde_json::from_slice(&json).ok()?;
        let text = |value: Option<&serde_json::Value>| {
            value
                .and_then(serde_json::Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        Some(Claims {
            room: text(json.get("video").and_then(|video| video.get("room"))),
            identity: text(json.get("sub")),
            api_key: text(json.get("iss")),
            can_update_own_metadata: json
                .get("video")
                .and_then(|video| video.get("canUpdateOwnMetadata"))
                .and_then(serde_json::Value::as_bool)
                .unwrap_or_default(),
        })
    };
    read().unwrap_or_default()
}

/// The token of a signalling request, where LiveKit looks for it: `Authorization: Bearer`, then
/// `access_token` in the query.
#[must_use]
pub fn find<'a>(authorization: Option<&'a str>, query: &'a str) -> Option<&'a str> {
    authorization
        .and_then(|value| value.strip_prefix("Bearer "))
        .or_else(|| {
            query
                .split('&')
                .find_map(|pair| pair.strip_prefix("access_token="))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_read_and_garbage_is_nobody() {
        let payload = URL_SAFE_NO_PAD.encode(
            r#"{"iss":"devkey","sub":"anna","video":{"room":"support-1","canUpdateOwnMetadata":true}}"#,
        );
        let token = format!("x.{payload}.y");
        assert_eq!(
            claims(&token),
            Claims {
                room: "support-1".into(),
                identity: "anna".into(),
                api_key: "devkey".into(),
                can_update_own_metadata: true,
            }
        );
        for bad in ["", "a.b.c", "a.!!.c", "a.eyJ4.c"] {
            assert_eq!(claims(bad), Claims::default());
        }
    }

    #[test]
    fn a_header_goes_before_the_query() {
        assert_eq!(find(Some("Bearer h"), "access_token=q"), Some("h"));
        assert_eq!(find(None, "a=b&access_token=q&c=d"), Some("q"));
        assert_eq!(find(None, ""), None);
    }
}
