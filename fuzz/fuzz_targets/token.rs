//! Tokens of strangers: where they stand in a request, and what they claim.
#![cfg_attr(fuzzing, no_main)]

use auralink_proto::token::{claims, find};
use auralink_fuzz::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = claims(text);
    let (header, query) = text.split_once('\n').unwrap_or(("", text));
    if let Some(token) = find(Some(header), query) {
        let _ = claims(token);
    }
    let _ = find(None, query);
});
