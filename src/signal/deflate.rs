//! permessage-deflate (RFC 7692), each message by itself: "no context takeover" both ways, as LiveKit has it. So a connection keeps
//! nothing between two messages, and what it takes to compress one (some 300 KiB) is there once a thread.
//!
//! It is agreed on with a client that offers it, as LiveKit would, and offered to the upstream where the client did and the way there
//! leaves the host. A message that wouldn't get shorter goes as it is, which the RFC leaves open for each.

use std::cell::RefCell;

use bytes::BytesMut;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use hyper::HeaderMap;
use hyper::header::{self, HeaderValue};

/// What is offered and answered.
pub(super) const TERMS: HeaderValue = HeaderValue::from_static(
    "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
);

/// Shorter messages aren't tried: pings and mutes would gain a few bytes.
const SHORTEST: usize = 128;

/// Longer ones aren't either: the thread that does it has other sessions to serve, and takes some 10 ms for this much.
const LONGEST: usize = 1 << 20;

/// A message's end, which is left out on the wire (RFC 7692 section 7.2.1).
const TAIL: [u8; 4] = [0, 0, 0xff, 0xff];

thread_local! {
    static PACKER: RefCell<Compress> = RefCell::new(Compress::new(Compression::fast(), false));
    static UNPACKER: RefCell<Decompress> = RefCell::new(Decompress::new(false));
}

/// Names and values of the extensions that a field names, each extension's name first.
fn extensions(h: &HeaderMap) -> impl Iterator<Item = Vec<(&str, Option<&str>)>> {
    let values = h.get_all(header::SEC_WEBSOCKET_EXTENSIONS).into_iter();
    // No value that means anything here holds a comma, quoted or not.
    let each = values.filter_map(|value| value.to_str().ok());
    each.flat_map(|value| value.split(',')).map(|extension| {
        let parts = extension.split(';').map(|part| match part.split_once('=') {
            Some((name, value)) => (name.trim(), Some(value.trim().trim_matches('"'))),
            None => (part.trim(), None),
        });
        parts.collect()
    })
}

/// Whether a client offers it in a form that [`TERMS`] answer: RFC 7692 section 7.1. It can have no smaller window than deflate's own,
/// which is the only one here.
pub(super) fn offered(h: &HeaderMap) -> bool {
    extensions(h).any(|extension| {
        let Some((("permessage-deflate", None), parameters)) = extension.split_first() else {
            return false;
        };
        let good = |(name, value): &(&str, Option<&str>)| match (*name, *value) {
            ("server_no_context_takeover" | "client_no_context_takeover", None)
            | ("client_max_window_bits", None)
            | ("server_max_window_bits", Some("15")) => true,
            ("client_max_window_bits", Some(bits)) => is_window(bits),
            _ => false,
        };
        parameters.iter().all(good) && is_set(parameters)
    })
}

/// Whether an upstream that was offered [`TERMS`] takes them; not: it leaves the extension out.
///
/// # Errors
/// It answers with something else.
pub(super) fn agreed(h: &HeaderMap) -> Result<bool, ()> {
    let mut all = extensions(h);
    let Some(one) = all.next() else {
        return Ok(false);
    };
    let Some((("permessage-deflate", None), parameters)) = one.split_first() else {
        return Err(());
    };
    let good = |(name, value): &(&str, Option<&str>)| match (*name, *value) {
        ("server_no_context_takeover" | "client_no_context_takeover", None) => true,
        // Of its own accord; whatever fits a smaller window fits the largest.
        ("server_max_window_bits", Some(bits)) => is_window(bits),
        _ => false,
    };
    let fresh = parameters.contains(&("server_no_context_takeover", None));
    if all.next().is_none() && fresh && parameters.iter().all(good) && is_set(parameters) {
        Ok(true)
    } else {
        Err(())
    }
}

fn is_window(bits: &str) -> bool {
    matches!(bits, "8" | "9" | "10" | "11" | "12" | "13" | "14" | "15")
}

/// No name stands there twice.
fn is_set(parameters: &[(&str, Option<&str>)]) -> bool {
    let twice = |(at, (name, _)): (usize, &(&str, Option<&str>))| {
        parameters[..at].iter().any(|(other, _)| other == name)
    };
    !parameters.iter().enumerate().any(twice)
}

/// The payload compressed; `None` where that is not worth it.
pub(super) fn compressed(payload: &[u8]) -> Option<Vec<u8>> {
    if !(SHORTEST..=LONGEST).contains(&payload.len()) {
        return None;
    }
    PACKER.with_borrow_mut(|packer| {
        packer.reset();
        let mut out = Vec::new();
        loop {
            if out.len() >= payload.len() {
                return None;
            }
            out.reserve(payload.len() / 2 + 64);
            // At most as long as the payload, which is a usize.
            let rest = payload.get(packer.total_in() as usize..)?;
            packer
                .compress_vec(rest, &mut out, FlushCompress::Sync)
                .ok()?;
            // Where there is room left, all of it is out.
            if packer.total_in() as usize == payload.len() && out.len() < out.capacity() {
                break;
            }
        }
        let kept = out.strip_suffix(&TAIL)?.len();
        out.truncate(kept);
        (kept < payload.len()).then_some(out)
    })
}

/// Why a message can't be decompressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bad {
    /// It is not deflate (RFC 1951).
    Malformed,
    /// It would be longer than allowed.
    TooLong,
}

/// The message, which may have `most` bytes. Memory follows what came out, and none is taken for more than that.
pub(super) fn decompressed(payload: &[u8], most: usize) -> Result<BytesMut, Bad> {
    UNPACKER.with_borrow_mut(|unpacker| {
        unpacker.reset(false);
        let mut out = Vec::new();
        if !feed(unpacker, payload, &mut out, most)? {
            feed(unpacker, &TAIL, &mut out, most)?;
        }
        Ok(BytesMut::from(&out[..]))
    })
}

/// Decompresses all of `part`. True: with it the stream has ended by its own mark, which a message may (section 7.2.3.4).
fn feed(
    unpacker: &mut Decompress,
    part: &[u8],
    out: &mut Vec<u8>,
    most: usize,
) -> Result<bool, Bad> {
    let mut rest = part;
    loop {
        if out.len() == out.capacity() {
            // Doubled; one byte beyond the limit shows that there is more.
            let room = out.len().max(part.len()).max(256);
            out.reserve_exact(room.min(most + 1 - out.len()));
        }
        let (read, had) = (unpacker.total_in(), out.len());
        let status = unpacker
            .decompress_vec(rest, out, FlushDecompress::Sync)
            .map_err(|_| Bad::Malformed)?;
        let used = unpacker.total_in() - read;
        // At most as long as `rest`, which is a usize.
        rest = rest.get(used as usize..).ok_or(Bad::Malformed)?;
        if out.len() > most {
            return Err(Bad::TooLong);
        }
        if status == Status::StreamEnd {
            if rest.is_empty() {
                return Ok(true);
            }
            unpacker.reset(false);
        } else if rest.is_empty() && out.len() < out.capacity() {
            return Ok(false);
        } else if used == 0 && out.len() == had && out.len() < out.capacity() {
            return Err(Bad::Malformed);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn field(value: &str) -> HeaderMap {
        let mut h = HeaderMap::new();
        let value = HeaderValue::from_str(value).unwrap();
        h.insert(header::SEC_WEBSOCKET_EXTENSIONS, value);
        h
    }

    #[test]
    fn offers_of_browsers_and_libraries() {
        for (taken, offer) in [
            // Chromium and Firefox; python's websockets; gorilla; what is quoted; a second choice.
            (true, "permessage-deflate; client_max_window_bits"),
            (true, "permessage-deflate"),
            (
                true,
                "permessage-deflate; server_max_window_bits=15; client_max_window_bits=12",
            ),
            (
                true,
                "permessage-deflate; server_no_context_takeover; client_no_context_takeover",
            ),
            (true, "permessage-deflate;client_max_window_bits=\"10\""),
            (
                true,
                "x-webkit-deflate-frame, permessage-deflate; server_max_window_bits=10, permessage-deflate",
            ),
            (false, ""),
            (false, "x-webkit-deflate-frame"),
            (false, "permessage-deflate; server_max_window_bits=10"),
            (false, "permessage-deflate; server_max_window_bits"),
            (false, "permessage-deflate; client_max_window_bits=7"),
            (false, "permessage-deflate; client_max_window_bits=08"),
            (false, "permessage-deflate; client_no_context_takeover=1"),
            (
                false,
                "permessage-deflate; client_no_context_takeover; client_no_context_takeover",
            ),
            (false, "permessage-deflate; mux"),
            (false, "permessage-deflate=1"),
        ] {
            assert_eq!(offered(&field(offer)), taken, "{offer}");
        }
        assert!(!offered(&HeaderMap::new()));
    }

    #[test]
    fn answers_of_servers() {
        assert_eq!(agreed(&HeaderMap::new()), Ok(false));
        let mut terms = HeaderMap::new();
        terms.insert(header::SEC_WEBSOCKET_EXTENSIONS, TERMS);
        assert_eq!(agreed(&terms), Ok(true));
        assert!(offered(&terms));
        for (answer, taken) in [
            (
                "permessage-deflate; server_no_context_takeover; server_max_window_bits=9",
                Ok(true),
            ),
            ("permessage-deflate", Err(())),
            (
                "permessage-deflate; server_no_context_takeover; client_max_window_bits=9",
                Err(()),
            ),
            (
                "permessage-deflate; server_no_context_takeover, permessage-deflate",
                Err(()),
            ),
            ("permessage-bzip2", Err(())),
        ] {
            assert_eq!(agreed(&field(answer)), taken, "{answer}");
        }
    }

    /// RFC 7692 section 7.2.3.
    #[test]
    fn the_examples_of_the_rfc() {
        for (payload, text) in [
            (&b"\xf2\x48\xcd\xc9\xc9\x07\x00"[..], &b"Hello"[..]),
            (b"\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00", b"Hello"),
            (b"\xf3\x48\xcd\xc9\xc9\x07\x00", b"Hello"),
            (
                b"\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00",
                b"Hello",
            ),
            (b"\x00", b""),
            (b"", b""),
        ] {
            assert_eq!(decompressed(payload, 5).unwrap(), text, "{payload:x?}");
        }
        // What a message before it said, of whichever session, is not there (section 7.2.3.2).
        let before = decompressed(b"\xf2\x48\xcd\xc9\xc9\x07\x00", 5).unwrap();
        assert_eq!(before, &b"Hello"[..]);
        if let Ok(out) = decompressed(b"\xf2\x00\x11\x00\x00", 5) {
            assert_eq!(out, &b"H\0\0\0\0"[..]);
        }
        assert_eq!(
            decompressed(b"\xf2\x48\xcd\xc9\xc9\x07\x00", 4),
            Err(Bad::TooLong)
        );
        for bad in [&b"\xff\xff"[..], b"\x07", b"\x00\x05\x00\xfa\xfe\x48"] {
            assert_eq!(decompressed(bad, 100), Err(Bad::Malformed), "{bad:x?}");
        }
    }

    #[test]
    fn a_bomb_takes_no_more_than_is_allowed() {
        let mut packer = Compress::new(Compression::best(), false);
        let mut bomb = Vec::with_capacity(1 << 20);
        packer
            .compress_vec(&vec![0; 64 << 20], &mut bomb, FlushCompress::Sync)
            .unwrap();
        assert!(bomb.len() < 100_000, "{}", bomb.len());
        assert_eq!(decompressed(&bomb, 1 << 20), Err(Bad::TooLong));
        assert_eq!(decompressed(&bomb, 0), Err(Bad::TooLong));
        let whole = decompressed(&bomb[..bomb.len() - 4], 64 << 20).unwrap();
        assert_eq!(
            (whole.len(), whole.iter().all(|n| *n == 0)),
            (64 << 20, true)
        );
    }

    proptest! {
        #[test]
        fn what_is_compressed_comes_back(seed: Vec<u8>, times in 1..200_usize) {
            let payload = seed.repeat(times);
            if let Some(packed) = compressed(&payload) {
                prop_assert!(packed.len() < payload.len());
                prop_assert_eq!(decompressed(&packed, payload.len()).unwrap(), &payload[..]);
                prop_assert_eq!(decompressed(&packed, payload.len() - 1), Err(Bad::TooLong));
            }
        }

        #[test]
        fn nonsense_is_bounded(payload: Vec<u8>, most in 0..5_000_usize) {
            if let Ok(out) = decompressed(&payload, most) {
                prop_assert!(out.len() <= most);
            }
        }
    }
}
