#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

const LYRA: Frames = Frames::LYRA;
const NONE: Option<&Redundant<Vec<u8>>> = None;

fn bodies() -> impl Strategy<Value = (u8, Body<Vec<u8>>)> {
    let bytes = |len: usize| proptest::collection::vec(any::<u8>(), len..=len);
    let native = (
        0u8..128,
        any::<bool>(),
        proptest::collection::vec(any::<u8>(), 0..300),
        proptest::option::of(0u16..900),
    )
        .prop_map(|(payload_type, marker, payload, cut)| {
            let len = u16::try_from(payload.len()).unwrap();
            let trimmed_from = cut.map(|cut| len + cut);
            let body = Body::Native {
                payload_type,
                marker,
                trimmed_from,
                payload,
            };
            (1, body)
        });
    let coded = (0usize..3, 1u8..=4, 0u8..3, -32i8..=31, 1usize..200).prop_flat_map(
        move |(codec, packets, unit, gain, opus)| {
            let codec = [CodecId::Lyra3, CodecId::Lyra6, CodecId::Opus][codec];
            let unit_ms = [20, 40, 60][usize::from(unit)];
            let packets = packets.min(120 / unit_ms);
            let ms = u32::from(unit_ms) * u32::from(packets);
            bytes(LYRA.len(codec, ms).unwrap_or(opus)).prop_map(move |payload| {
                let body = Body::Coded {
                    codec,
                    unit_ms,
                    gain,
                    payload,
                };
                (packets, body)
            })
        },
    );
    prop_oneof![native, coded]
}

fn parts() -> impl Strategy<Value = Part<Vec<u8>>> {
    (any::<u16>(), any::<bool>(), bodies()).prop_map(|(sequence, red, (packets, body))| Part {
        sequence,
        packets,
        red,
        body,
    })
}

fn owned(copy: &Redundant<&[u8]>) -> Redundant<Vec<u8>> {
    Redundant {
        hop_distance: copy.hop_distance,
        ticks_back: copy.ticks_back,
        part: copy.part.to_owned(),
    }
}

proptest! {
    #[test]
    fn a_part_and_its_copy_survive_their_bytes(
        part in parts(),
        copied in parts(),
        with_copy in any::<bool>(),
        hop_distance in 1u8..=7,
        originals in 1u16..=31,
        ticks in proptest::option::of(any::<u16>()),
    ) {
        let mut copied = copied;
        copied.sequence = part.sequence.wrapping_sub(originals);
        let implied = match &copied.body {
            Body::Coded { unit_ms, .. } => u32::from(originals) * u32::from(*unit_ms) * TICKS_PER_MS,
            Body::Native { .. } => 960,
        };
        let copy = Redundant { hop_distance, ticks_back: ticks.map_or(implied, u32::from), part: copied };
        let mut out = vec![1, 2, 3];
        let written = part.write(with_copy.then_some(&copy), LYRA, &mut out);
        let fits = copy.part.body.payload().len() <= 255 && copy.part.body.codec() != CodecId::Trimmed;
        prop_assert_eq!(written.is_ok(), !with_copy || fits);
        if written.is_err() {
            prop_assert_eq!(out, vec![1, 2, 3]);
            return Ok(());
        }
        let read = Payload::parse(&out[3..], LYRA).unwrap();
        prop_assert_eq!(read.part.to_owned(), part);
        prop_assert_eq!(read.redundant.as_ref().map(owned), with_copy.then_some(copy));
        prop_assert!(!read.skipped);
    }

    #[test]
    fn garbage_is_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..80), codec in 0u8..16) {
        if let Some(first) = bytes.first_mut() { *first = *first & 0x0f | codec << 4; }
        let Ok(read) = Payload::parse(&bytes, LYRA) else { return Ok(()) };
        prop_assert!(read.part.body.payload().len() < bytes.len());
        // What was understood can be said again.
        let mut again = Vec::new();
        read.part.write(read.redundant.as_ref(), LYRA, &mut again).unwrap();
        let twice = Payload::parse(&again, LYRA).unwrap();
        prop_assert_eq!((&twice.part, &twice.redundant), (&read.part, &read.redundant));
    }
}

fn coded(codec: CodecId, packets: u8, unit_ms: u8, gain: i8, len: usize) -> Part<Vec<u8>> {
    Part {
        sequence: 1,
        packets,
        red: false,
        body: Body::Coded {
            codec,
            unit_ms,
            gain,
            payload: vec![0; len],
        },
    }
}

#[test]
fn fields_out_of_range_are_not_written() {
    let mut out = Vec::new();
    for part in [
        coded(CodecId::Opus, 0, 20, 0, 9),
        coded(CodecId::Opus, 5, 20, 0, 9),
        coded(CodecId::Opus, 3, 60, 0, 9),
        coded(CodecId::Opus, 1, 30, 0, 9),
        coded(CodecId::Opus, 1, 20, 32, 9),
        coded(CodecId::Opus, 1, 20, -33, 9),
        coded(CodecId::Opus, 1, 20, 0, 0),
        coded(CodecId::Lyra6, 2, 20, 0, 16),
        coded(CodecId::Native, 1, 20, 0, 9),
    ] {
        assert_eq!(
            part.write(NONE, LYRA, &mut out),
            Err(Unwritable),
            "{part:?}"
        );
        assert!(out.is_empty());
    }
    let part = coded(CodecId::Lyra6, 2, 20, -32, 30);
    part.write(NONE, LYRA, &mut out).unwrap();
    let copy = |originals: u16, hop_distance, ticks_back| Redundant {
        hop_distance,
        ticks_back,
        part: Part {
            sequence: 1u16.wrapping_sub(originals),
            ..coded(CodecId::Lyra3, 2, 20, 0, 16)
        },
    };
    for wrong in [
        copy(0, 1, 0),
        copy(32, 1, 0),
        copy(2, 0, 0),
        copy(2, 8, 0),
        copy(2, 1, 65_536),
    ] {
        assert_eq!(part.write(Some(&wrong), LYRA, &mut out), Err(Unwritable));
    }
}

#[test]
fn what_is_wrong_is_named() {
    let parse = |bytes: &[u8]| Payload::parse(bytes, LYRA).map(|_| ()).unwrap_err();
    assert_eq!(parse(&[]), Unreadable::Short);
    assert_eq!(parse(&[0x40, 0, 1]), Unreadable::Short);
    assert_eq!(parse(&[0x10, 0, 1, 222, 0]), Unreadable::Short);
    assert_eq!(parse(&[0x50, 0, 1, 0, 9]), Unreadable::Codec(5));
    // Three of 10 ms.
    assert_eq!(parse(&[0x48, 0, 1, 0xc0, 9]), Unreadable::Duration);
    assert_eq!(parse(&[0x4c, 0, 1, 0x80, 9]), Unreadable::Duration);
    assert_eq!(parse(&[0x04, 0, 1, 222, 9]), Unreadable::Count);
    assert_eq!(parse(&[0x40, 0, 1, 0]), Unreadable::Length);
    assert_eq!(parse(&[0x20, 0, 1, 0, 9]), Unreadable::Length);
    assert_eq!(parse(&[0x10, 0, 1, 222, 0, 1, 8, 8]), Unreadable::Length);
    assert_eq!(parse(&[0x10, 0, 1, 222, 0x05, 0xdd, 8]), Unreadable::Length);
    assert_eq!(
        parse(&[0x41, 0, 1, 0, 0x40, 0x01, 0, 1, 9, 9]),
        Unreadable::Redundant
    );
    assert_eq!(
        parse(&[0x41, 0, 1, 0, 0x40, 0x21, 0, 9, 9, 9]),
        Unreadable::Redundant
    );
}

#[test]
fn a_copy_of_another_version_is_skipped() {
    let read = Payload::parse(&[0x41, 0, 9, 0, 0xf0, 0x21, 0, 2, 7, 7, 0x58, 1], LYRA).unwrap();
    assert!(read.skipped && read.redundant.is_none());
    assert_eq!(read.part.body.payload(), [0x58, 1]);
}

#[test]
fn lengths_are_those_of_the_bundle() {
    // 40 ms a frame, 16 and 30 bytes: the second bundle of docs/models.md.
    let frames = Frames::new(1920, 16, 30).unwrap();
    let mut out = Vec::new();
    for (codec, packets, unit_ms, len, fits) in [
        (CodecId::Lyra3, 2, 20, 16, true),
        (CodecId::Lyra6, 1, 40, 30, true),
        (CodecId::Lyra6, 2, 60, 90, true),
        (CodecId::Lyra6, 2, 20, 15, false),
        (CodecId::Lyra6, 1, 20, 15, false),
        (CodecId::Lyra6, 1, 60, 45, false),
        (CodecId::Opus, 1, 60, 45, true),
    ] {
        out.clear();
        let part = coded(codec, packets, unit_ms, 0, len);
        assert_eq!(part.write(NONE, frames, &mut out).is_ok(), fits, "{part:?}");
        if fits {
            let read = Payload::parse(&out, frames).unwrap();
            assert_eq!(read.part.to_owned(), part);
        }
    }
    // A copy at L1 says no length: it follows from the bundle, and where it can't, what comes after can't be told.
    let part = coded(CodecId::Opus, 1, 20, 0, 9);
    let copy = Redundant {
        hop_distance: 1,
        ticks_back: 1920,
        part: Part {
            sequence: 65_535,
            ..coded(CodecId::Lyra3, 2, 20, 0, 16)
        },
    };
    out.clear();
    part.write(Some(&copy), frames, &mut out).unwrap();
    let read = Payload::parse(&out, frames).unwrap();
    assert_eq!(read.redundant.as_ref().map(owned), Some(copy));
    assert_eq!(read.part.body.payload(), [0; 9]);
    out[4] &= !0x0c;
    let broken = Payload::parse(&out, frames).unwrap_err();
    assert_eq!(broken, Unreadable::Redundant, "one original of 20 ms");
}
