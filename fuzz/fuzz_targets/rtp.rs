//! Decrypted RTP and RTCP: headers, extensions, RED, report blocks and a direction's rules.
#![cfg_attr(fuzzing, no_main)]

use auralink_fuzz::fuzz_target;
use auralink_proto::aic::Hint;
use auralink_proto::description::{MediaKind, TrackRule};
use auralink_proto::flow::Flow;
use auralink_proto::packet::{RtpHeader, append_extension, classify, report_blocks};
use auralink_proto::red::{Shed, shed, wrap};

fuzz_target!(|data: &[u8]| {
    let Some((&[a, id], packet)) = data.split_first_chunk::<2>() else {
        return;
    };
    let _ = classify(packet);
    report_blocks(packet, |_, _| {});
    let Some(header) = RtpHeader::parse(packet) else {
        return;
    };
    let payload = header.payload(packet).to_vec();
    if let Some(element) = header.extension(packet, id) {
        let _ = Hint::parse(element);
    }

    let mut extended = packet.to_vec();
    let before: Vec<Option<Vec<u8>>> = (1..=14)
        .map(|id| header.extension(packet, id).map(<[u8]>::to_vec))
        .collect();
    if append_extension(&mut extended, &header, id, b"1234567") {
        let after = RtpHeader::parse(&extended).expect("still a packet");
        assert_eq!(after.payload(&extended), payload);
        for (known, before) in (1..=14).zip(before) {
            if known != id && before.is_some() {
                assert_eq!(
                    after.extension(&extended, known).map(<[u8]>::to_vec),
                    before
                );
            }
        }
    } else {
        assert_eq!(extended, packet);
    }

    let mut shorter = packet.to_vec();
    match shed(&mut shorter, &header) {
        Shed::Dropped(bytes) => {
            assert_eq!(shorter.len() + bytes, packet.len());
            let header = RtpHeader::parse(&shorter).expect("still a packet");
            assert_eq!(shed(&mut shorter.clone(), &header), Shed::PrimaryOnly);
        }
        _ => assert_eq!(shorter, packet),
    }
    let mut wrapped = packet.to_vec();
    wrap(&mut wrapped, &header, 63);
    let wrapped_header = RtpHeader::parse(&wrapped).expect("still a packet");
    assert_eq!(&wrapped_header.payload(&wrapped)[1..], payload);

    let mut flow = Flow::default();
    let rule = TrackRule {
        ssrcs: vec![header.ssrc],
        mid: "0".to_owned(),
        kind: MediaKind::Audio,
        wrap_red: (a & 1 != 0).then_some((header.payload_type, 63)),
        shed_red: (a & 2 != 0).then_some(header.payload_type),
        shed_always: a & 4 != 0,
        default_bytes_per_second: u32::from(a) * 100,
        ..TrackRule::default()
    };
    flow.set_rules(&[rule], Some(id));
    for turn in 0..3 {
        let mut packet = packet.to_vec();
        let len = packet.len();
        let _ = flow.apply(&mut packet, len, turn, |_| None);
        assert!(RtpHeader::parse(&packet).is_some());
        flow.report(header.ssrc, a);
    }
});
