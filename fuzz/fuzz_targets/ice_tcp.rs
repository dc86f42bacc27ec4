//! ICE-TCP framing (RFC 4571): whatever a stranger writes into a connection, in whatever pieces it is read.
#![cfg_attr(fuzzing, no_main)]

use auralink_fuzz::fuzz_target;
use auralink_proto::framing::{Deframer, MAX_FRAME, PREFIX};
use auralink_proto::stun::addressed_ufrag;

/// Reads the stream in pieces; the frames, and whether it could be read to its end.
fn read(stream: &[u8], mut piece: impl FnMut() -> usize) -> (Vec<Vec<u8>>, bool) {
    let (mut deframer, mut frames, mut rest) = (Deframer::default(), Vec::new(), stream);
    loop {
        loop {
            match deframer.next_frame() {
                Ok(Some(frame)) => {
                    assert!(frame.len() <= MAX_FRAME);
                    let _ = addressed_ufrag(frame);
                    frames.push(frame.to_vec());
                }
                Ok(None) => break,
                Err(_) => return (frames, false),
            }
        }
        // Never more than a frame that isn't whole.
        assert!(deframer.waiting() < PREFIX + MAX_FRAME);
        if rest.is_empty() {
            // Nothing has got lost: what came out and what waits is what went in.
            let out: usize = frames.iter().map(|frame| PREFIX + frame.len()).sum();
            assert_eq!(out + deframer.waiting(), stream.len());
            return (frames, true);
        }
        let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
        deframer.push(now);
        rest = later;
    }
}

fuzz_target!(|data: &[u8]| {
    // The first byte says how the rest is cut.
    let Some((cut, stream)) = data.split_first() else {
        return;
    };
    let whole = read(stream, || usize::MAX);
    let mut step = usize::from(*cut);
    let pieces = read(stream, || {
        step = step.wrapping_mul(31).wrapping_add(7) % 2000;
        step
    });
    assert_eq!(whole, pieces);
    // And back: the frames framed again are the stream, up to where it could be read.
    let mut again = Vec::new();
    for frame in &whole.0 {
        again.extend(u16::try_from(frame.len()).unwrap_or(u16::MAX).to_be_bytes());
        again.extend(frame);
    }
    assert!(stream.starts_with(&again));
});
