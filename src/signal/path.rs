//! What the path of a request leads to, in whatever way it is spelled.
//!
//! A session's SDP must not get past the sidecar by a spelling that the server behind it, or a proxy in between, reads in another
//! way than this module does. So sessions are recognised generously (any prefix, because a proxy may strip it; any escapes; doubled
//! and trailing slashes), WebSockets of workers narrowly (letter by letter), and what is neither is no WebSocket: the upstream may
//! refuse it, but a 101 from there is not passed on.
//!
//! Parts that lead upwards are refused in any spelling: what is forwarded stays under the upstream's base path.

use hyper::Method;

/// Levels of percent-encoding that are looked through. A client encodes once and a careless proxy once more; what is deeper is
/// refused, because each level costs a pass over the path.
const LEVELS: usize = 4;

/// What a request's path leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Signalling of a participant: `/rtc` or `/rtc/v1`, under whatever prefix.
    Session(&'static str),
    /// Where WHIP sessions are made: `/whip/v1`.
    Whip,
    /// A WHIP session: the last part of `/whip/v1/…`.
    WhipSession(String),
    /// The WebSocket of workers, `/agent`, spelled plainly. No SDP crosses it.
    Agent,
    /// Anything else.
    Other,
}

/// Why a path is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It is no path: the authority of a proxy request, or an asterisk that no OPTIONS goes with.
    NotAPath,
    /// A part of it is `..`, spelled in some way.
    Upwards,
    /// It is encoded more often than anybody has a reason for.
    TooDeep,
}

impl Refused {
    /// A sentence for the client.
    pub fn detail(self) -> &'static str {
        match self {
            Refused::NotAPath => "the request target is no path: this is a gateway, not a proxy",
            Refused::Upwards => "a path with a part `..` is not served; send it resolved",
            Refused::TooDeep => "a path that is percent-encoded over and over is not served",
        }
    }
}

/// Reads the path of a request, as it stands in its target.
///
/// # Errors
/// The path can't be forwarded.
pub fn read(method: &Method, path: &str) -> Result<Place, Refused> {
    if path == "*" && method == Method::OPTIONS {
        // OPTIONS for the server as a whole: RFC 9112 section 3.2.4.
        return Ok(Place::Other);
    }
    if !path.starts_with('/') {
        return Err(Refused::NotAPath);
    }
    let mut level = path.as_bytes().to_vec();
    let mut place = Place::Other;
    for _ in 0..=LEVELS {
        let parts = || level.split(|b| matches!(b, b'/' | b'\\'));
        // Servers of Java's kind cut parameters off a part before they look at it: `/..;x/`.
        let bare = |part: &[u8]| part.split(|b| *b == b';').next() == Some(b"..");
        if parts().any(bare) {
            return Err(Refused::Upwards);
        }
        if place == Place::Other {
            // Go's ServeMux and more lenient routers take doubled slashes and single dots away.
            let parts: Vec<&[u8]> = parts()
                .filter(|part| !matches!(*part, b"" | b"."))
                .collect();
            place = of_parts(&parts);
        }
        match decode(&level) {
            Some(plain) => level = plain,
            None if place == Place::Other && plain_agent(path) => return Ok(Place::Agent),
            None => return Ok(place),
        }
    }
    Err(Refused::TooDeep)
}

fn of_parts(parts: &[&[u8]]) -> Place {
    match parts {
        [.., b"rtc"] => Place::Session("/rtc"),
        [.., b"rtc", b"v1"] => Place::Session("/rtc/v1"),
        [.., b"whip", b"v1"] => Place::Whip,
        [.., b"whip", b"v1", id] => Place::WhipSession(String::from_utf8_lossy(id).into_owned()),
        _ => Place::Other,
    }
}

/// One level of percent-encoding less; `None` if there is none. A broken escape stays as it is: the upstream refuses it.
fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let hex = |b: Option<&u8>| b.and_then(|b| char::from(*b).to_digit(16));
    let mut plain = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        match (byte, hex(text.get(at + 1)), hex(text.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                plain.push((high << 4 | low) as u8);
                at += 3;
            }
            _ => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    (plain.len() < text.len()).then_some(plain)
}

/// Whether every reader takes it for the path of workers: nothing in it has two readings.
fn plain_agent(path: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && part != "."
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~'))
    };
    let parts = path.strip_prefix('/').unwrap_or("");
    path.ends_with("/agent") && parts.split('/').all(plain)
}

/// The upstream's path for a client's.
pub fn target(base: &str, path: &str, query: Option<&str>) -> String {
    let mut target = match path {
        "*" => path.to_owned(),
        _ => format!("{base}{path}"),
    };
    if let Some(query) = query {
        target.push('?');
        target.push_str(query);
    }
    target
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn get(path: &str) -> Result<Place, Refused> {
        read(&Method::GET, path)
    }

    #[test]
    fn a_session_is_known_by_any_spelling_of_its_path() {
        for path in [
            "/rtc",
            "/rtc/",
            "//rtc",
            "/./rtc",
            "/%72tc",
            "/rt%63",
            "/%2frtc",
            "/rtc/.",
            "/%2572tc",
            "/livekit/sfu/rtc",
            "/a%2fb/rtc",
            "/x\\rtc",
        ] {
            assert_eq!(get(path), Ok(Place::Session("/rtc")), "{path}");
        }
        for path in ["/rtc/v1", "/rtc/v1/", "/rtc%2Fv1", "/rtc//v1", "/lk/rtc/v1"] {
            assert_eq!(get(path), Ok(Place::Session("/rtc/v1")), "{path}");
        }
        for path in [
            "/",
            "/rtc/validate",
            "/rtc/v1/validate",
            "/rtc/v2",
            "/RTC",
            "/rtc%",
            "/rtc%zz",
            "/%",
            "/rtc/%ff",
            "/rtc;a",
        ] {
            assert_eq!(get(path), Ok(Place::Other), "{path}");
        }
    }

    #[test]
    fn whip_and_its_sessions_are_known_under_a_prefix() {
        for path in [
            "/whip/v1",
            "/%77hip/v1",
            "/whip//v1/",
            "/whip%2Fv1",
            "/lk/whip/v1",
        ] {
            assert_eq!(get(path), Ok(Place::Whip), "{path}");
        }
        let session = Place::WhipSession("PA_1".to_owned());
        for path in ["/whip/v1/PA_1", "/lk/whip/v1/PA%5f1"] {
            assert!(matches!(get(path), Ok(Place::WhipSession(_))), "{path}");
        }
        assert_eq!(get("/whip/v1/PA_1"), Ok(session));
        assert_eq!(get("/whip/v2"), Ok(Place::Other));
    }

    #[test]
    fn workers_are_known_only_where_it_is_spelled_plainly() {
        for path in ["/agent", "/livekit/sfu/agent", "/a-b/v1.2/agent"] {
            assert_eq!(get(path), Ok(Place::Agent), "{path}");
        }
        for path in [
            "//agent",
            "/agent/",
            "/%61gent",
            "/x/./agent",
            "/a;b/agent",
            "/agent2",
        ] {
            assert_eq!(get(path), Ok(Place::Other), "{path}");
        }
    }

    #[test]
    fn what_leads_upwards_is_refused_in_any_spelling() {
        for path in [
            "/..",
            "/../admin",
            "/x/../../admin",
            "/x/../rtc",
            "/%2e%2e/admin",
            "/.%2E/admin",
            "/x%2f..%2f..%2fadmin",
            "/..%5cadmin",
            "/..\\admin",
            "/%252e%252e/admin",
            "/..;a=b/admin",
        ] {
            assert_eq!(get(path), Err(Refused::Upwards), "{path}");
        }
        for path in ["/...", "/a..b", "/..a", "/.well-known/x"] {
            assert_eq!(get(path), Ok(Place::Other), "{path}");
        }
        let deep = format!("/%{}2e./x", "25".repeat(20_000));
        assert_eq!(get(&deep), Err(Refused::TooDeep));
    }

    #[test]
    fn what_is_no_path_is_refused() {
        assert_eq!(get("*"), Err(Refused::NotAPath));
        assert_eq!(get(""), Err(Refused::NotAPath));
        assert_eq!(read(&Method::OPTIONS, "*"), Ok(Place::Other));
    }

    proptest! {
        /// Any mixture of escapes of a session's path is a session's, or refused.
        #[test]
        fn no_escape_hides_a_session(escape in prop::collection::vec(0_u8..3, 7), v1 in any::<bool>()) {
            let plain: &[u8] = if v1 { b"/rtc/v1" } else { b"/rtc" };
            let mut path = "/".to_owned();
            for (byte, how) in plain.iter().zip(escape) {
                match how {
                    0 => path.push(char::from(*byte)),
                    1 => path.push_str(&format!("%{byte:02x}")),
                    _ => path.push_str(&format!("%25{byte:02X}")),
                }
            }
            prop_assert!(matches!(get(&path), Ok(Place::Session(_))), "{}", path);
        }
    }
}
