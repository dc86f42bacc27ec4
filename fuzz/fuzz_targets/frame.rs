//! WebSocket frames of strangers: what is read depends on the bytes and not on where they were cut, memory on what came and not on
//! what a header claims, and what is read can be written and read again. Where permessage-deflate was agreed on (the second bit of the
//! first byte), what comes out is bounded as what came in is.
#![cfg_attr(fuzzing, no_main)]

use auralink::signal::fuzz::{deflated_frames, frames, written};
use auralink_fuzz::fuzz_target;

/// Longest message, bytes.
const MOST: usize = 4096;

fuzz_target!(|data: &[u8]| {
    let [from_client, cuts, rest @ ..] = data else {
        return;
    };
    let deflates = from_client & 2 == 2;
    let from_client = from_client & 1 == 1;
    let read = |bytes: &[u8], pieces: &[usize]| match deflates {
        true => deflated_frames(bytes, pieces, from_client, MOST),
        false => frames(bytes, pieces, from_client, MOST),
    };
    let (cuts, bytes) = rest.split_at(usize::from(*cuts).min(rest.len()));
    let pieces: Vec<usize> = cuts.iter().map(|n| usize::from(*n)).collect();
    let whole = read(bytes, &[]);
    let cut = read(bytes, &pieces);
    assert_eq!((&whole.messages, &whole.end), (&cut.messages, &cut.end));
    let single = read(bytes, &vec![1; bytes.len()]);
    assert_eq!(
        (&whole.messages, &whole.end),
        (&single.messages, &single.end)
    );
    // Two buffers that double, and what is read at least at a time.
    assert!(
        single.memory <= 4 * bytes.len() + (16 << 10),
        "{}",
        single.memory
    );
    let sizes = |n: &(u8, Vec<u8>)| n.1.len() <= if n.0 >= 8 { 125 } else { MOST };
    assert!(whole.messages.iter().all(sizes));
    let mask = from_client.then_some([1, 2, 3, 4]);
    let again = frames(&written(&whole.messages, mask), &pieces, from_client, MOST);
    assert_eq!((again.messages, again.end.as_str()), (whole.messages, ""));
});
