//! Tokens of strangers: where they stand in a request, and what they claim.
#![no_main]

use auralink_proto::token::{claims, find};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    claims(text);
    let (header, query) = text.split_once('\n').unwrap_or(("", text));
    if let Some(token) = find(Some(header), query) {
        claims(token);
    }
    find(None, query);
});
