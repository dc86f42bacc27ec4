//! Queries of strangers: what is read is what Go would read, and what goes on says the same.
#![cfg_attr(fuzzing, no_main)]

use auralink_fuzz::fuzz_target;
use auralink_proto::query::{Query, Unclear};

/// Go's `net/url.ParseQuery`, as simple as it gets: all values of a name, in order, of the pairs that it doesn't leave out.
fn go(query: &str, name: &str) -> Vec<Vec<u8>> {
    let unescape = |text: &str| {
        let mut bytes = text.bytes();
        let mut plain = Vec::new();
        while let Some(byte) = bytes.next() {
            let mut hex = || char::from(bytes.next()?).to_digit(16);
            plain.push(match byte {
                b'%' => (hex()? * 16 + hex()?) as u8,
                b'+' => b' ',
                byte => byte,
            });
        }
        Some(plain)
    };
    query
        .split('&')
        .filter(|pair| !pair.is_empty() && !pair.contains(';'))
        .filter_map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((unescape(name)?, unescape(value)?))
        })
        .filter(|(own, _)| own == name.as_bytes())
        .map(|(_, value)| value)
        .collect()
}

fuzz_target!(|text: &str| {
    let Ok(query) = Query::parse(text) else {
        return;
    };
    for name in ["access_token", "join_request", "sid"] {
        let theirs = go(text, name);
        match query.get(name) {
            Ok(Some(value)) => assert_eq!(theirs, [value.as_bytes()]),
            Ok(None) => assert!(theirs.is_empty() || theirs == [b""]),
            Err(Unclear::Repeated(_)) => assert!(theirs.len() > 1),
            Err(Unclear::NotUtf8(_)) => assert!(std::str::from_utf8(&theirs[0]).is_err()),
            Err(other) => panic!("{other}"),
        }
        let Ok(new) = query.with(name, "x%3D") else {
            continue;
        };
        // It says the new value, if there was one, and of all else the same.
        let again = Query::parse(&new).expect("what goes on can be read");
        let expected = (!theirs.is_empty()).then_some("x=");
        assert_eq!(again.get(name), Ok(expected));
        for other in ["access_token", "join_request", "sid", "reconnect"] {
            if other != name {
                assert_eq!(again.get(other), query.get(other));
            }
        }
    }
});
