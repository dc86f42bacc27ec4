//! The query parameter.

use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE, URL_SAFE_NO_PAD};
use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::*;

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

fn inner(sdp: &str) -> Vec<u8> {
    let client = [
        number(1, 1),
        field(2, b"2.23.0"),
        number(3, 17),
        field(7, b"chrome"),
    ]
    .concat();
    let sync = [
        field(1, &description("answer", sdp)),
        field(5, &description("offer", sdp)),
    ];
    [
        field(1, &client),
        field(2, &number(1, 1)),
        field(5, &[field(1, b"cid"), number(8, 2)].concat()),
        field(6, &description("offer", sdp)),
        number(7, 1),
        number(8, 2),
        field(9, b"PA_1"),
        field(10, &sync.concat()),
        field(88, b"unknown"),
    ]
    .concat()
}

fn wrapped(inner: &[u8], compression: u64) -> Vec<u8> {
    let inner = if compression == 1 {
        gzip(inner)
    } else {
        inner.to_vec()
    };
    [
        number(1, compression),
        field(2, &inner),
        field(9, b"unknown"),
    ]
    .concat()
}

#[test]
fn an_empty_sdp_is_none() {
    let bytes = wrapped(&inner(""), 0);
    let mut visitor = Recorder::replacing("v=0 new");
    let (new, info) = edit_join_request(&URL_SAFE.encode(&bytes), &mut visitor).unwrap();
    assert_eq!((new, info.has_offer), (None, false));
    assert!(visitor.sdp.is_empty());
}

#[test]
fn every_sdp_in_it_is_replaced() {
    for compression in [0, 1] {
        let bytes = wrapped(&inner("v=0 old"), compression);
        let mut visitor = Recorder::replacing("v=0 new");
        let (new, info) = edit_join_request(&URL_SAFE.encode(&bytes), &mut visitor).unwrap();
        let slots: Vec<SdpSlot> = visitor.sdp.iter().map(|(slot, _)| *slot).collect();
        assert_eq!(
            slots,
            [SdpSlot::Offer, SdpSlot::SyncOffer, SdpSlot::SyncAnswer]
        );
        assert_eq!(visitor.added[0].source, SOURCE_MICROPHONE);
        assert_eq!(
            info,
            JoinRequestInfo {
                reconnect: true,
                reconnect_reason: 2,
                participant_sid: "PA_1".to_owned(),
                gzip: compression == 1,
                has_offer: true,
                sdk: 1,
                sdk_version: "2.23.0".to_owned(),
                protocol: 17,
                browser: "chrome".to_owned(),
                auto_subscribe: true,
            }
        );
        // LiveKit's decoder wants the URL-safe alphabet and padding.
        let new = URL_SAFE.decode(new.unwrap()).unwrap();
        if compression == 0 {
            assert_eq!(new, wrapped(&inner("v=0 new"), 0));
        } else {
            assert_eq!(new[..2], [8, 1]);
            assert!(new.ends_with(&field(9, b"unknown")));
        }
        // Read again, it says the new text, and put back the old one it is what it was.
        let mut back = Recorder::replacing("v=0 old");
        let (old, _) = edit_join_request(&URL_SAFE.encode(&new), &mut back).unwrap();
        assert!(back.sdp.iter().all(|(_, sdp)| sdp == "v=0 new"));
        let mut same = Recorder::default();
        let (kept, again) = edit_join_request(&old.unwrap(), &mut same).unwrap();
        assert_eq!(kept, None);
        assert_eq!(again, info);
        assert!(same.sdp.iter().all(|(_, sdp)| sdp == "v=0 old"));
    }
}

#[test]
fn base64_is_read_as_livekit_reads_it() {
    // Bytes which need the characters that differ.
    let bytes = [wrapped(&inner("v=0"), 0), field(200, &[0xff; 7])].concat();
    let padded = URL_SAFE.encode(&bytes);
    assert!(padded.ends_with('=') && padded.contains('_'));
    let broken = padded.replace('_', "\r\n_");
    for text in [&padded, &broken] {
        let (_, info) = edit_join_request(text, &mut Recorder::default()).unwrap();
        assert!(info.has_offer);
    }
    for text in [URL_SAFE_NO_PAD.encode(&bytes), STANDARD.encode(&bytes)] {
        let refused = edit_join_request(&text, &mut Recorder::default());
        assert_eq!(refused.unwrap_err(), SignalError::Base64);
    }
}

#[test]
fn what_is_there_once_is_not_taken_twice() {
    let edit = |inner: Vec<u8>| {
        let text = URL_SAFE.encode(wrapped(&inner, 0));
        edit_join_request(&text, &mut Recorder::replacing("x")).unwrap_err()
    };
    for (number, value) in [
        (6, description("offer", "v=0 a")),
        (9, b"PA_2".to_vec()),
        (10, field(5, &description("offer", "v=0 a"))),
    ] {
        let twice = [inner("v=0"), field(number, &value)].concat();
        assert_eq!(edit(twice), SignalError::Repeated(number));
    }
    assert_eq!(
        edit([inner("v=0"), number(7, 1)].concat()),
        SignalError::Repeated(7)
    );
    let offer = [description("offer", "v=0 a"), field(2, b"v=0 b")].concat();
    assert_eq!(edit(field(6, &offer)), SignalError::Repeated(2));
    let wrapper = [wrapped(&inner("v=0"), 0), field(2, &inner("v=0 b"))].concat();
    let text = URL_SAFE.encode(wrapper);
    assert_eq!(
        edit_join_request(&text, &mut Recorder::default()).unwrap_err(),
        SignalError::Repeated(2)
    );
}

#[test]
fn only_so_many_tracks_are_remembered_of_somebody_unknown() {
    let track = |size: usize| field(5, &field(1, &vec![b'x'; size]));
    let request = [track(5000), track(3).repeat(100)].concat();
    let mut visitor = Recorder::default();
    let text = URL_SAFE.encode(wrapped(&request, 1));
    edit_join_request(&text, &mut visitor).unwrap();
    assert_eq!(visitor.added.len(), MAX_JOIN_TRACKS);
    assert!(visitor.added.iter().all(|track| track.cid.len() == 3));
    let many = URL_SAFE.encode(wrapped(&number(99, 1).repeat(1000), 1));
    let refused = edit_join_request(&many, &mut Recorder::default());
    assert!(matches!(refused, Err(SignalError::Wire(_))));
}

#[test]
fn a_bomb_is_refused() {
    let bomb = field(88, &vec![0; 64 << 20]);
    let bomb = wrapped(&bomb, 1);
    assert!(bomb.len() < 100_000);
    assert_eq!(
        edit_join_request(&URL_SAFE.encode(&bomb), &mut Recorder::default()).unwrap_err(),
        SignalError::TooLong {
            what: "decompressed join_request",
            limit: MAX_JOIN_REQUEST
        }
    );
    let long = "A".repeat(MAX_JOIN_REQUEST + 1);
    assert!(matches!(
        edit_join_request(&long, &mut Recorder::default()),
        Err(SignalError::TooLong { .. })
    ));
}

#[test]
fn what_livekit_refuses_is_refused() {
    let edit = |bytes: &[u8]| {
        edit_join_request(&URL_SAFE.encode(bytes), &mut Recorder::default()).unwrap_err()
    };
    assert_eq!(edit(&number(1, 7)), SignalError::Compression(7));
    assert_eq!(edit(&[0x0a, 9]), SignalError::Truncated);
    assert_eq!(edit(&wrapped(&[0x0a, 9], 1)), SignalError::Truncated);
    let bad = [number(1, 1), field(2, b"no gzip")].concat();
    assert!(matches!(edit(&bad), SignalError::Gzip(_)));
    let mut cut = gzip(&inner("v=0"));
    cut.truncate(cut.len() / 2);
    assert!(matches!(
        edit(&[number(1, 1), field(2, &cut)].concat()),
        SignalError::Gzip(_)
    ));
    assert_eq!(
        edit_join_request("not base64!", &mut Recorder::default()).unwrap_err(),
        SignalError::Base64
    );
    // Empty is what an older client would send; LiveKit takes it.
    let (new, info) = edit_join_request("", &mut Recorder::default()).unwrap();
    assert_eq!((new, info), (None, JoinRequestInfo::default()));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 500,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn garbage_is_kept_or_refused(text in "[-_+/=a-zA-Z0-9]{0,80}", bytes in any::<Vec<u8>>(), compression in 0_u64..2) {
        let _ = edit_join_request(&text, &mut Recorder::replacing("x"));
        let _ = edit_join_request(&URL_SAFE.encode(&bytes), &mut Recorder::replacing("x"));
        let bytes = wrapped(&bytes, compression);
        let _ = edit_join_request(&URL_SAFE.encode(bytes), &mut Recorder::replacing("x"));
    }
}
