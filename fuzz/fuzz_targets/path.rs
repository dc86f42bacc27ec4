//! Paths of strangers: nothing that a lenient reader takes for a session's is spliced, and nothing leaves the base path.
#![cfg_attr(fuzzing, no_main)]

use auralink::signal::path::{Place, read, target};
use auralink_fuzz::fuzz_target;
use hyper::Method;

/// The parts of a path for a reader who decodes as long as there is anything to decode, takes every slash for one, and resolves
/// dots; `None` where dots lead above the root.
fn lenient(path: &str) -> Option<Vec<Vec<u8>>> {
    let mut plain = path.as_bytes().to_vec();
    loop {
        let mut next = Vec::new();
        let mut at = 0;
        while at < plain.len() {
            let hex = |at: usize| plain.get(at).and_then(|b| char::from(*b).to_digit(16));
            match (plain[at], hex(at + 1), hex(at + 2)) {
                (b'%', Some(high), Some(low)) => {
                    next.push((high * 16 + low) as u8);
                    at += 3;
                }
                (byte, ..) => {
                    next.push(byte);
                    at += 1;
                }
            }
        }
        if next == plain {
            break;
        }
        plain = next;
    }
    let mut parts: Vec<Vec<u8>> = Vec::new();
    for part in plain.split(|b| matches!(b, b'/' | b'\\')) {
        match part.split(|b| *b == b';').next().unwrap_or_default() {
            b"" | b"." => {}
            b".." => {
                parts.pop()?;
            }
            _ => parts.push(part.to_vec()),
        }
    }
    Some(parts)
}

fuzz_target!(|text: &str| {
    let Ok(place) = read(&Method::GET, text) else {
        return;
    };
    let parts = lenient(text).expect("what leads upwards is refused");
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let session = matches!(parts.as_slice(), [.., b"rtc"] | [.., b"rtc", b"v1"]);
    match place {
        // The only one whose bytes nobody looks at.
        Place::Agent => {
            assert!(!session && parts.last() == Some(&&b"agent"[..]));
            assert!(!text.contains(['%', '\\', ';', '?', '#']));
        }
        // Whatever the upstream makes of it, its 101 or its WHIP session is not passed on.
        Place::Session(_) | Place::Whip | Place::WhipSession(_) | Place::Other => {}
    }
    if session {
        assert_ne!(place, Place::Agent);
    }
    let forwarded = target("/base/of/it", text, None);
    let forwarded = lenient(&forwarded).expect("it stays below the root");
    assert!(forwarded.starts_with(&[b"base".to_vec(), b"of".to_vec(), b"it".to_vec()]));
});
