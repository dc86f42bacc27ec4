//! Binary frames.

use proptest::prelude::*;

use super::super::wire::{Change, Fields, Value, patch, write_varint};
use super::*;
use crate::description::MediaKind;

fn request(bytes: &[u8], visitor: &mut Recorder) -> Result<Verdict, SignalError> {
    edit_request(Frame::Binary(bytes), visitor)
}

fn response(bytes: &[u8], visitor: &mut Recorder) -> Result<Verdict, SignalError> {
    edit_response(Frame::Binary(bytes), visitor)
}

#[test]
fn sdp_is_replaced_in_each_of_its_places() {
    let cases: [(&[u32], SdpSlot); 4] = [
        (&[1], SdpSlot::Offer),
        (&[2], SdpSlot::Answer),
        (&[12, 5], SdpSlot::SyncOffer),
        (&[12, 1], SdpSlot::SyncAnswer),
    ];
    for (path, slot) in cases {
        let build = |sdp: &str| {
            path.iter()
                .rev()
                .fold(description("x", sdp), |inner, n| field(*n, &inner))
        };
        // Longer than 127 bytes against shorter: each length on the path changes its own length.
        let (short, long) = ("v=0", "v=0\r\n".repeat(100));
        let mut visitor = Recorder::replacing(&long);
        assert_eq!(
            binary(request(&build(short), &mut visitor).unwrap()),
            build(&long)
        );
        assert_eq!(visitor.sdp, [(slot, short.to_owned())]);
        let mut visitor = Recorder::replacing(short);
        assert_eq!(
            binary(request(&build(&long), &mut visitor).unwrap()),
            build(short)
        );
        assert_eq!(
            request(&build(short), &mut Recorder::default()).unwrap(),
            Verdict::Keep
        );
    }
    for (path, slot) in [(2, SdpSlot::Answer), (3, SdpSlot::Offer)] {
        let entry = |mid: &str, sid: &str| {
            field(
                4,
                &[field(1, mid.as_bytes()), field(2, sid.as_bytes())].concat(),
            )
        };
        let build = |sdp: &str| {
            // The map may stand on either side of the SDP.
            let inner = [
                entry("0", "TR_a"),
                description("x", sdp),
                entry("1", "TR_b"),
            ];
            field(path, &inner.concat())
        };
        let mut visitor = Recorder::replacing("new");
        assert_eq!(
            binary(response(&build("old"), &mut visitor).unwrap()),
            build("new")
        );
        assert_eq!(visitor.sdp, [(slot, "old".to_owned())]);
        let mids = [("0", "TR_a"), ("1", "TR_b")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(visitor.mids, mids);
    }
}

#[test]
fn a_refused_sdp_stops_the_frame() {
    let mut visitor = Recorder {
        refuse: true,
        ..Recorder::default()
    };
    let frame = field(1, &description("offer", "v=0"));
    assert_eq!(
        request(&frame, &mut visitor),
        Err(SignalError::Refused("no".to_owned()))
    );
}

#[test]
fn candidates_are_dropped_or_kept() {
    let init = r#"{"candidate":"candidate:1 1 udp 1 192.0.2.1 1 typ host","sdpMid":"0"}"#;
    let trickle = [field(1, init.as_bytes()), number(2, 1), number(3, 1)].concat();
    let up = field(3, &trickle);
    let down = field(4, &trickle);
    let mut visitor = Recorder::default();
    assert_eq!(request(&up, &mut visitor), Ok(Verdict::Keep));
    assert_eq!(visitor.trickles, [(Target::Subscriber, init.to_owned())]);
    visitor.drop_trickle = true;
    assert_eq!(request(&up, &mut visitor), Ok(Verdict::Drop));
    assert_eq!(response(&down, &mut visitor), Ok(Verdict::Drop));
    // Only `final`: no candidate, for the publisher.
    assert_eq!(
        request(&field(3, &number(3, 1)), &mut visitor),
        Ok(Verdict::Drop)
    );
    assert_eq!(
        visitor.trickles.last().unwrap(),
        &(Target::Publisher, String::new())
    );
}

#[test]
fn a_track_request_is_read() {
    let codec = |name: &str, cid: &str| {
        field(
            10,
            &[field(1, name.as_bytes()), field(2, cid.as_bytes())].concat(),
        )
    };
    let audio = [
        field(1, b"cid"),
        field(2, b"mic"),
        number(8, 2),
        number(13, 1),
        number(14, 1),
        // packed: TF_STEREO, TF_ECHO_CANCELLATION
        field(17, &[0, 3]),
    ];
    let video = [
        field(1, b"cam"),
        number(3, 1),
        number(4, 1280),
        number(5, 720),
        number(6, 1),
        number(8, 1),
        field(9, b""),
        field(9, b""),
        codec("av1", "c1"),
        codec("vp8", "c2"),
        // unpacked: TF_NO_DTX
        number(17, 1),
    ];
    let mut visitor = Recorder::default();
    for track in [audio.concat(), video.concat()] {
        assert_eq!(request(&field(4, &track), &mut visitor), Ok(Verdict::Keep));
    }
    let [audio, video] = visitor.added.as_slice() else {
        panic!("two tracks")
    };
    assert_eq!(
        audio,
        &AddTrack {
            cid: "cid".to_owned(),
            name: "mic".to_owned(),
            kind: MediaKind::Audio,
            source: SOURCE_MICROPHONE,
            stereo: true,
            encrypted: true,
            disable_red: true,
            ..AddTrack::default()
        }
    );
    assert_eq!(video.kind, MediaKind::Video);
    assert_eq!((video.width, video.height, video.layers), (1280, 720, 2));
    assert_eq!(video.simulcast_codecs, ["av1", "vp8"]);
    assert_eq!(video.simulcast_cids, ["c1", "c2"]);
    assert!(video.disable_dtx && video.muted && !video.stereo);
}

fn track(sid: &str) -> Vec<u8> {
    [
        field(1, sid.as_bytes()),
        number(2, 1),
        number(9, 3),
        field(11, b"video/AV1"),
        field(13, &field(1, b"video/AV1")),
        field(13, &field(1, b"video/VP8")),
        number(16, 2),
    ]
    .concat()
}

fn join() -> Vec<u8> {
    let codec = |mime: &str| field(14, &field(1, mime.as_bytes()));
    let other = [
        field(1, b"PA_other"),
        field(2, b"agent"),
        field(4, &track("TR_1")),
        number(14, 4),
    ];
    [
        field(1, &[field(1, b"RM_1"), field(2, b"room")].concat()),
        field(2, &[field(1, b"PA_me"), field(2, b"me")].concat()),
        field(3, &other.concat()),
        field(4, b"1.0"),
        number(6, 1),
        field(12, &field(2, b"1.13.5")),
        codec("video/VP8"),
        codec("video/AV1"),
        field(77, b"unknown between the codecs"),
        codec("video/H264"),
        codec("audio/opus"),
        number(15, 1),
    ]
    .concat()
}

#[test]
fn a_join_is_read_and_its_codecs_are_filtered() {
    let mut visitor = Recorder::default();
    assert_eq!(
        response(&field(1, &join()), &mut visitor),
        Ok(Verdict::Keep)
    );
    let read = &visitor.joins[0];
    assert_eq!(
        (read.room_name.as_str(), read.room_sid.as_str()),
        ("room", "RM_1")
    );
    assert_eq!(
        (read.participant_sid.as_str(), read.identity.as_str()),
        ("PA_me", "me")
    );
    assert_eq!(read.server_version, "1.13.5");
    assert!(read.subscriber_primary && read.fast_publish);
    assert_eq!(
        read.enabled_publish_codecs,
        ["video/VP8", "video/AV1", "video/H264", "audio/opus"]
    );
    let other = &read.other_participants[0];
    assert_eq!((other.identity.as_str(), other.kind), ("agent", 4));
    assert_eq!(other.tracks[0].codecs, ["video/AV1", "video/VP8"]);
    assert_eq!(other.tracks[0].source, SOURCE_SCREEN_SHARE);
    assert!(other.tracks[0].encrypted);

    let mut visitor = Recorder {
        keep_codecs: Some(vec!["VIDEO/av1".to_owned(), "audio/opus".to_owned()]),
        ..Recorder::default()
    };
    let new = binary(response(&field(1, &join()), &mut visitor).unwrap());
    let removed = |join: Vec<u8>| {
        let mut join = join;
        for mime in ["video/VP8", "video/H264"] {
            let codec = field(14, &field(1, mime.as_bytes()));
            let at = join.windows(codec.len()).position(|w| w == codec).unwrap();
            join.drain(at..at + codec.len());
        }
        join
    };
    assert_eq!(new, field(1, &removed(join())));
}

#[test]
fn other_answers_are_told() {
    let mut visitor = Recorder::default();
    let participant = [field(1, b"PA_x"), number(3, 3), field(4, &track("TR_2"))].concat();
    let frames = [
        field(19, b""),
        field(5, &field(1, &participant)),
        field(6, &[field(1, b"cid"), field(2, &track("TR_3"))].concat()),
        field(
            24,
            &[field(1, &field(2, b"elsewhere")), field(4, &participant)].concat(),
        ),
        field(8, &[number(2, 3), number(3, 1)].concat()),
        // As a client of protocol 12 is told to come again.
        field(8, &number(1, 1)),
        // An unknown message of a newer protocol.
        field(40, b"x"),
        Vec::new(),
    ];
    for frame in &frames {
        assert_eq!(response(frame, &mut visitor), Ok(Verdict::Keep));
    }
    assert_eq!(visitor.reconnects, 1);
    assert_eq!(visitor.participants.len(), 2);
    assert_eq!(visitor.participants[0].state, 3);
    assert_eq!(visitor.published[0].0, "cid");
    assert_eq!(visitor.published[0].1.sid, "TR_3");
    assert_eq!(visitor.rooms, ["elsewhere"]);
    assert_eq!(
        visitor.left,
        [
            (ACTION_RESUME, REASON_SERVER_SHUTDOWN),
            (ACTION_RECONNECT, 0)
        ]
    );
    assert_eq!(request(&field(8, b""), &mut visitor), Ok(Verdict::Keep));
    assert_eq!(visitor.left.len(), 3);
}

#[test]
fn a_leave_is_written_as_the_server_writes_it() {
    assert_eq!(
        leave_response(ACTION_RECONNECT, REASON_SERVER_SHUTDOWN),
        [0x42, 6, 0x08, 1, 0x10, 3, 0x18, 2]
    );
    assert_eq!(leave_response(ACTION_DISCONNECT, 0), [0x42, 0]);
    let mut visitor = Recorder::default();
    for action in [ACTION_DISCONNECT, ACTION_RESUME, ACTION_RECONNECT] {
        response(&leave_response(action, 9), &mut visitor).unwrap();
        let text = leave_response_json(action, 9);
        edit_response(Frame::Text(&text), &mut visitor).unwrap();
    }
    assert_eq!(
        visitor.left,
        [(0, 9), (0, 9), (1, 9), (1, 9), (2, 9), (2, 9)]
    );
    assert!(leave_response_json(2, 3).contains("SERVER_SHUTDOWN"));
}

#[test]
fn what_is_not_well_formed_is_refused() {
    let mut offer = field(1, &description("offer", "v=0"));
    let cases: [(&[u8], SignalError); 9] = [
        (&[0x0a], SignalError::Truncated),
        (&[0x0a, 0x05, 1], SignalError::Truncated),
        (&[0x0d, 1, 2, 3], SignalError::Truncated),
        (&[0x09, 1, 2, 3], SignalError::Truncated),
        (&[0x08, 0xff], SignalError::Truncated),
        (&[0x0b, 0x0c], SignalError::Wire("groups are not supported")),
        (&[0x0f], SignalError::Wire("unknown wire type")),
        (&[0x02, 0], SignalError::Wire("field number out of range")),
        (
            &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2],
            SignalError::Wire("varint overflows 64 bits"),
        ),
    ];
    for (bytes, error) in cases {
        assert_eq!(request(bytes, &mut Recorder::default()), Err(error.clone()));
        assert_eq!(response(bytes, &mut Recorder::default()), Err(error));
    }
    let huge = [0x0a, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1];
    assert_eq!(
        request(&huge, &mut Recorder::default()),
        Err(SignalError::Truncated)
    );
    // Within the path too.
    assert_eq!(
        request(&field(1, &[0x12, 9]), &mut Recorder::default()),
        Err(SignalError::Truncated)
    );
    assert_eq!(
        request(&field(1, &field(2, b"\xff\xfe")), &mut Recorder::default()),
        Err(SignalError::Utf8)
    );
    offer.truncate(offer.len() - 1);
    assert_eq!(
        request(&offer, &mut Recorder::default()),
        Err(SignalError::Truncated)
    );
    let long = vec![0; MAX_FRAME + 1];
    assert!(matches!(
        request(&long, &mut Recorder::default()),
        Err(SignalError::TooLong { .. })
    ));
}

/// A field that the schema does not know, with a tag and a length that need not be the shortest.
fn unknown() -> impl Strategy<Value = Vec<u8>> {
    let padded = |value: u64, pad: bool| {
        let mut out = Vec::new();
        write_varint(&mut out, value);
        if pad && out.len() < 9 {
            let last = out.len() - 1;
            out[last] |= 0x80;
            out.push(0);
        }
        out
    };
    (
        200_u64..536_870_911,
        0_u8..4,
        any::<u64>(),
        prop::collection::vec(any::<u8>(), 0..40),
        any::<bool>(),
    )
        .prop_map(move |(number, kind, value, bytes, pad)| {
            let tag = |wire: u64| padded(number << 3 | wire, pad);
            match kind {
                0 => [tag(0), padded(value, pad)].concat(),
                1 => [tag(1), value.to_le_bytes().to_vec()].concat(),
                2 => [tag(2), padded(bytes.len() as u64, pad), bytes].concat(),
                _ => [tag(5), value.to_le_bytes()[..4].to_vec()].concat(),
            }
        })
}

fn unknowns() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(unknown(), 0..5).prop_map(|fields| fields.concat())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn unknown_fields_come_out_as_they_went_in(
        around in prop::collection::vec(unknowns(), 6),
        path in prop::sample::select(vec![vec![1], vec![2], vec![12, 5], vec![12, 1]]),
        old in "[ -~\r\n]{1,400}",
        new in "[ -~\r\n\u{80}-\u{2000}]{0,400}",
    ) {
        let build = |sdp: &str| {
            let mut out = [around[0].clone(), field(2, sdp.as_bytes()), around[1].clone()].concat();
            for (depth, number) in path.iter().rev().enumerate() {
                let (before, after) = (&around[2 + 2 * depth], &around[3 + 2 * depth]);
                out = [before.clone(), field(*number, &out), after.clone()].concat();
            }
            out
        };
        let mut visitor = Recorder::replacing(&new);
        prop_assert_eq!(binary(request(&build(&old), &mut visitor).unwrap()), build(&new));
        prop_assert_eq!(&visitor.sdp[0].1, &old);
        prop_assert_eq!(request(&build(&old), &mut Recorder::default()), Ok(Verdict::Keep));
    }

    #[test]
    fn fields_add_up_to_the_message(message in unknowns()) {
        let mut sum = Vec::new();
        for field in Fields::new(&message) {
            sum.extend_from_slice(field.unwrap().raw);
        }
        prop_assert_eq!(sum, message);
    }

    #[test]
    fn a_dropped_field_leaves_the_rest(before in unknowns(), after in unknowns(), value in any::<Vec<u8>>()) {
        let message = [before.clone(), field(14, &value), after.clone()].concat();
        let new = patch(&message, 14, |_| Ok(Change::Drop)).unwrap();
        prop_assert_eq!(new, Some([before, after].concat()));
    }

    #[test]
    fn varints_survive(value in any::<u64>()) {
        let bytes = number(5, value);
        match Fields::new(&bytes).next() {
            Some(field) => prop_assert_eq!(field.unwrap().value, Value::Varint(value)),
            None => prop_assert_eq!(value, 0),
        }
    }

    #[test]
    fn garbage_is_kept_or_refused(bytes in any::<Vec<u8>>(), number in 1_u32..25) {
        for frame in [bytes.clone(), field(number, &bytes), field(number, &field(2, &bytes))] {
            for verdict in [
                request(&frame, &mut Recorder::default()),
                response(&frame, &mut Recorder::default()),
            ] {
                prop_assert!(matches!(verdict, Ok(Verdict::Keep) | Err(_)));
            }
            let _ = request(&frame, &mut Recorder::replacing("v=0"));
        }
    }

    #[test]
    fn a_cut_frame_is_refused_or_shorter(cut in 0_usize..600) {
        let frame = [field(12, &[field(5, &description("offer", &"v=0\r\n".repeat(80)))].concat())].concat();
        let cut = cut.min(frame.len());
        let verdict = request(&frame[..cut], &mut Recorder::replacing("x"));
        prop_assert_eq!(verdict.is_ok(), cut == 0 || cut == frame.len());
    }
}
