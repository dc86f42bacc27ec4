#![allow(clippy::unwrap_used)]

use super::*;
use crate::dtls::SrtpProtectionProfile as Profile;
use proptest::prelude::*;
use rtc_srtp::config::Config;
use rtc_srtp::context::Context;
use rtc_srtp::protection_profile::ProtectionProfile;

const CM: Profile = Profile::Srtp_Aes128_Cm_Hmac_Sha1_80;
const GCM: Profile = Profile::Srtp_Aead_Aes_128_Gcm;

const PLAIN: u8 = 111;
const FRAMED: u8 = 20;
const SSRC: u32 = 7;

fn keys(profile: Profile, is_client: bool) -> SrtpKeys {
    let len = if profile == GCM { 56 } else { 60 };
    SrtpKeys {
        profile,
        material: (0..len).collect(),
        is_client,
    }
}

fn pair_of(profile: Profile) -> (Srtp, Srtp) {
    let end = |is_client| {
        let mut srtp = Srtp::new(&keys(profile, is_client)).unwrap();
        srtp.set_framed_pts((Some(FRAMED), Some(FRAMED)));
        srtp
    };
    (end(true), end(false))
}

fn pair() -> (Srtp, Srtp) {
    pair_of(CM)
}

fn rtp(payload_type: u8, sequence: u16) -> Vec<u8> {
    let mut packet = vec![0x80, payload_type];
    packet.extend(sequence.to_be_bytes());
    packet.extend([0, 0, 0, 9]);
    packet.extend(SSRC.to_be_bytes());
    packet.extend(b"said");
    packet
}

fn of_ssrc(mut packet: Vec<u8>, ssrc: u32) -> Vec<u8> {
    packet[8..12].copy_from_slice(&ssrc.to_be_bytes());
    packet
}

fn report(ssrc: u32) -> Vec<u8> {
    let mut packet = vec![0x81, 201, 0, 7];
    packet.extend(ssrc.to_be_bytes());
    packet.extend([0x5a; 24]);
    packet
}

fn sent(from: &mut Srtp, packet: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    assert!(from.protect_rtp(packet, &mut wire));
    wire
}

fn sent_rtcp(from: &mut Srtp, packet: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    assert!(from.protect_rtcp(packet, &mut wire));
    wire
}

fn got(to: &mut Srtp, wire: &[u8]) -> Result<Vec<u8>, Refusal> {
    let mut plain = Vec::new();
    to.unprotect_rtp(wire, &mut plain).map(|()| plain)
}

fn got_rtcp(to: &mut Srtp, wire: &[u8]) -> Result<Vec<u8>, Refusal> {
    let mut plain = Vec::new();
    to.unprotect_rtcp(wire, &mut plain).map(|()| plain)
}

/// Sends one packet; its length on the wire, if it arrives.
fn goes(from: &mut Srtp, to: &mut Srtp, packet: &[u8]) -> Option<usize> {
    let wire = sent(from, packet);
    let arrives = got(to, &wire);
    assert!(arrives.is_err() || arrives.as_deref() == Ok(packet));
    arrives.is_ok().then_some(wire.len())
}

/// `rtc-srtp` in place of one end: what it receives with, and what it sends with.
fn other(profile: Profile, is_client: bool) -> (Context, Context) {
    let (kind, keys) = (
        if profile == GCM {
            ProtectionProfile::AeadAes128Gcm
        } else {
            ProtectionProfile::Aes128CmHmacSha1_80
        },
        keys(profile, is_client),
    );
    let mut config = Config {
        profile: kind,
        ..Config::default()
    };
    config
        .set_session_keys_from_keying_material(&keys.material, is_client)
        .unwrap();
    let provider = rtc_crypto::default_provider().unwrap();
    let context = |key: &[u8], salt: &[u8]| {
        Context::new(key, salt, kind, None, None, provider.crypto()).unwrap()
    };
    let keys = &config.keys;
    (
        context(&keys.remote_master_key, &keys.remote_master_salt),
        context(&keys.local_master_key, &keys.local_master_salt),
    )
}

/// RTP with what it may have: contributors, an extension of whole elements, padding.
fn rich(sequence: u16, ssrc: u32, shape: u8, len: usize) -> Vec<u8> {
    let mut packet = rtp(PLAIN | shape & 0x80, sequence);
    packet.truncate(12);
    packet = of_ssrc(packet, ssrc);
    let contributors = shape & 3;
    packet[0] |= contributors;
    packet.extend((0..4 * contributors).map(|n| n ^ 0xc5));
    if shape & 4 != 0 {
        packet[0] |= 0x10;
        packet.extend([0xbe, 0xde, 0, 2, 0x12, 1, 2, 3, 0x30, 0x7f, 0, 0]);
    }
    packet.extend((0..len).map(|n| (n % 251) as u8));
    if shape & 8 != 0 {
        packet[0] |= 0x20;
        packet.extend([0, 0, 0, 4]);
    }
    packet
}

#[test]
fn a_stream_that_becomes_framed_late_is_understood() {
    for last in [65_530u32, 65_535, 70_000, 140_000, 200_000] {
        let (mut edge, mut origin) = pair();
        // Not one of each number: the guess goes by the highest.
        for index in (60_000..last).step_by(97).chain([last]) {
            let packet = rtp(PLAIN, u16::try_from(index & 0xffff).unwrap());
            let len = goes(&mut edge, &mut origin, &packet);
            assert_eq!(len, Some(packet.len() + 10), "{index}");
        }
        let newest = edge.newest_sent(SSRC).unwrap();
        assert_eq!(u32::from(newest), last & 0xffff);
        for ahead in 1..20 {
            let packet = rtp(FRAMED, newest.wrapping_add(ahead));
            let len = goes(&mut edge, &mut origin, &packet);
            assert_eq!(len, Some(packet.len() + 4), "{last} + {ahead}");
        }
    }
}

#[test]
fn the_highest_sequence_number_sent_is_known() {
    let (mut edge, _) = pair();
    assert_eq!(edge.newest_sent(SSRC), None);
    for (sequence, newest) in [
        (65_534, 65_534),
        (65_533, 65_534),
        (2, 2),
        (65_535, 2),
        (3, 3),
    ] {
        sent(&mut edge, &rtp(PLAIN, sequence));
        assert_eq!(edge.newest_sent(SSRC), Some(newest));
    }
}

#[test]
fn keys_that_do_not_fit_are_refused() {
    for profile in [CM, GCM] {
        for len in [0, 31, 55, 57, 59, 61] {
            let mut keys = keys(profile, true);
            keys.material.resize(len, 0);
            assert!(Srtp::new(&keys).is_err());
        }
    }
    let odd = SrtpKeys {
        profile: Profile::Unsupported,
        ..keys(CM, true)
    };
    assert!(Srtp::new(&odd).is_err());
}

#[test]
fn the_wire_is_that_of_another_implementation() {
    for profile in [CM, GCM] {
        for ours_is_client in [true, false] {
            let mut ours = Srtp::new(&keys(profile, ours_is_client)).unwrap();
            let (mut inbound, mut outbound) = other(profile, !ours_is_client);
            // Over three wraps, with holes, what is overtaken and what comes twice.
            let mut index = 65_000u32;
            let mut order = Vec::new();
            while index < 300_000 {
                order.extend([index + 2, index, index + 1, index]);
                index += if index & 0xffff > 65_400 || index & 0xffff < 50 {
                    3
                } else {
                    1_009
                };
            }
            for (n, index) in order.into_iter().enumerate() {
                let sequence = u16::try_from(index & 0xffff).unwrap();
                let packet = rich(sequence, SSRC + (n as u32 & 1), n as u8, n % 1200);
                let wire = sent(&mut ours, &packet);
                assert_eq!(&inbound.decrypt_rtp(&wire).unwrap()[..], packet);
                let theirs = outbound.encrypt_rtp(&packet).unwrap();
                assert_eq!(
                    got(&mut ours, &theirs).as_deref(),
                    Ok(&packet[..]),
                    "{index}"
                );
            }
            for n in 0..200u32 {
                let mut packet = report(SSRC + n % 3);
                packet.extend((0..n * 4).map(|n| n as u8));
                let wire = sent_rtcp(&mut ours, &packet);
                assert_eq!(&inbound.decrypt_rtcp(&wire).unwrap()[..], packet);
                let theirs = outbound.encrypt_rtcp(&packet).unwrap();
                assert_eq!(got_rtcp(&mut ours, &theirs).as_deref(), Ok(&packet[..]));
            }
        }
    }
}

#[test]
fn the_short_tag_is_the_beginning_of_the_whole_one() {
    let (mut edge, mut origin) = pair();
    let framed = sent(&mut edge, &rtp(FRAMED, 5));
    let mut whole = Srtp::new(&keys(CM, true)).unwrap();
    let whole = sent(&mut whole, &rtp(FRAMED, 5));
    assert_eq!(framed[..], whole[..whole.len() - 6]);
    assert_eq!(got(&mut origin, &whole), Err(Refusal::Unauthentic));
    assert_eq!(got(&mut origin, &framed), Ok(rtp(FRAMED, 5)));
    // GCM has one length.
    let (mut edge, mut origin) = pair_of(GCM);
    assert_eq!(goes(&mut edge, &mut origin, &rtp(FRAMED, 5)), Some(16 + 16));
}

#[test]
fn rtcp_in_the_clear_is_not_authentic() {
    for profile in [CM, GCM] {
        let (mut edge, mut origin) = pair_of(profile);
        let mut forged = report(SSRC);
        forged.extend([0, 0, 0, 1]);
        forged.extend([0xaa; 10]);
        assert_eq!(got_rtcp(&mut origin, &forged), Err(Refusal::Unauthentic));
        // Nor is a real packet whose E bit was taken away.
        let mut real = sent_rtcp(&mut edge, &report(SSRC));
        let at = edge.outbound.rtcp_index_at(&real);
        real[at] &= 0x7f;
        assert_eq!(got_rtcp(&mut origin, &real), Err(Refusal::Unauthentic));
        real[at] |= 0x80;
        assert_eq!(got_rtcp(&mut origin, &real), Ok(report(SSRC)));
    }
}

#[test]
fn no_bit_can_be_changed_and_what_was_changed_leaves_nothing() {
    for profile in [CM, GCM] {
        let (mut edge, mut origin) = pair_of(profile);
        let rtp = [
            sent(&mut edge, &rtp(PLAIN, 5)),
            sent(&mut edge, &rtp(FRAMED, 6)),
            sent(&mut edge, &rich(7, SSRC, 15, 9)),
        ];
        let rtcp = sent_rtcp(&mut edge, &report(SSRC));
        for (packet, is_rtp) in rtp.iter().map(|p| (p, true)).chain([(&rtcp, false)]) {
            let mut plain = vec![1, 2, 3];
            for bit in 0..packet.len() * 8 {
                let mut bent = packet.clone();
                bent[bit / 8] ^= 1 << (bit % 8);
                let taken = if is_rtp {
                    origin.unprotect_rtp(&bent, &mut plain)
                } else {
                    origin.unprotect_rtcp(&bent, &mut plain)
                };
                assert!(taken.is_err(), "bit {bit}");
            }
            for len in 0..packet.len() {
                assert!(origin.unprotect_rtp(&packet[..len], &mut plain).is_err());
                assert!(origin.unprotect_rtcp(&packet[..len], &mut plain).is_err());
            }
        }
        assert_eq!(origin.came.len() + origin.came_rtcp.len(), 0);
        // Nor was anything learned from them.
        for packet in &rtp {
            assert!(got(&mut origin, packet).is_ok());
        }
        assert!(got_rtcp(&mut origin, &rtcp).is_ok());
    }
}

#[test]
fn what_is_not_authentic_does_not_move_the_rollover_counter() {
    for profile in [CM, GCM] {
        let (mut edge, mut origin) = pair_of(profile);
        for index in (0..200_000u32).step_by(501) {
            let real = sent(&mut edge, &rtp(PLAIN, (index & 0xffff) as u16));
            for ahead in [1, 0x3fff, 0x7fff, 0x8001, 0xc000] {
                let mut forged = real.clone();
                let sequence = ((index + ahead) & 0xffff) as u16;
                forged[2..4].copy_from_slice(&sequence.to_be_bytes());
                assert_eq!(got(&mut origin, &forged), Err(Refusal::Unauthentic));
            }
            assert!(got(&mut origin, &real).is_ok(), "{index}");
        }
    }
}

#[test]
fn rtcp_comes_once() {
    for profile in [CM, GCM] {
        let (mut edge, mut origin) = pair_of(profile);
        let wires: Vec<Vec<u8>> = (0..200)
            .map(|n| sent_rtcp(&mut edge, &report(SSRC + n % 2)))
            .collect();
        // Overtaken by up to 32 of its stream's.
        for chunk in wires.chunks(64) {
            for wire in chunk.iter().rev() {
                assert!(got_rtcp(&mut origin, wire).is_ok());
            }
        }
        for wire in &wires {
            assert_eq!(got_rtcp(&mut origin, wire), Err(Refusal::Replayed));
        }
    }
}

#[test]
fn framed_packets_come_once_and_others_as_often_as_they_are_sent() {
    for profile in [CM, GCM] {
        let (mut edge, mut origin) = pair_of(profile);
        let wires: Vec<(Vec<u8>, bool)> = (65_500..65_600u32)
            .map(|index| {
                let framed = index % 3 != 0;
                let packet = rtp(if framed { FRAMED } else { PLAIN }, index as u16);
                (sent(&mut edge, &packet), framed)
            })
            .collect();
        for (wire, _) in &wires {
            assert!(got(&mut origin, wire).is_ok());
        }
        for (wire, framed) in &wires {
            let again = got(&mut origin, wire);
            assert_eq!(again.is_err(), *framed);
            assert!(!framed || again == Err(Refusal::Replayed));
        }
    }
}

#[test]
fn forged_packets_take_no_room() {
    let (mut edge, mut origin) = pair();
    for ssrc in 0..20_000 {
        let mut forged = vec![0x80, 201, 0, 1];
        forged.extend(u32::to_be_bytes(ssrc));
        forged.extend([0x80, 0, 0, 1]);
        forged.extend([0xaa; 10]);
        assert!(got_rtcp(&mut origin, &forged).is_err());
        let mut forged = of_ssrc(rtp(PLAIN, 1), ssrc);
        forged.extend([0xaa; 10]);
        assert!(got(&mut origin, &forged).is_err());
    }
    assert_eq!(origin.came.len() + origin.came_rtcp.len(), 0);
    assert_eq!(
        got_rtcp(&mut origin, &sent_rtcp(&mut edge, &report(1))),
        Ok(report(1))
    );
}

#[test]
fn a_stream_after_many_that_ended_is_heard_and_the_tables_stay_small() {
    let (mut edge, mut origin) = pair();
    let streams = 3 * MAX_STREAMS as u32;
    for ssrc in 100..100 + streams {
        assert!(goes(&mut edge, &mut origin, &of_ssrc(rtp(PLAIN, 1), ssrc)).is_some());
        let wire = sent_rtcp(&mut edge, &report(ssrc));
        assert!(got_rtcp(&mut origin, &wire).is_ok());
        // One goes on all the time, through a wrap.
        if ssrc % 20 == 0 {
            let sequence = (60_000 + ssrc / 4) as u16;
            assert!(goes(&mut edge, &mut origin, &rtp(PLAIN, sequence)).is_some());
        }
    }
    assert!(origin.came.len() <= MAX_STREAMS && origin.came_rtcp.len() <= MAX_STREAMS);
    assert!(origin.forgotten() > 0);
    assert!(
        edge.newest_sent(100).is_some(),
        "what was sent is known for ever"
    );
}

#[test]
fn a_key_that_is_used_up_says_so_and_known_streams_go_on() {
    let (mut edge, _) = pair();
    let mut wire = Vec::new();
    for ssrc in 0..MAX_SENT as u32 {
        assert!(edge.protect_rtp(&of_ssrc(rtp(PLAIN, 1), ssrc), &mut wire));
    }
    assert!(!edge.is_used_up());
    assert!(!edge.protect_rtp(&of_ssrc(rtp(PLAIN, 1), u32::MAX), &mut wire));
    assert!(wire.is_empty() && edge.is_used_up());
    assert!(edge.protect_rtp(&of_ssrc(rtp(PLAIN, 2), 5), &mut wire));
    assert_eq!(edge.sent.len(), MAX_SENT);

    let (mut edge, _) = pair();
    edge.sent_rtcp = MAX_RTCP_INDEX - 1;
    assert!(edge.protect_rtcp(&report(1), &mut wire));
    assert!(!edge.protect_rtcp(&report(1), &mut wire) && edge.is_used_up());
    assert!(!edge.protect_rtcp(&report(2), &mut wire), "of no stream");

    let (mut edge, _) = pair();
    edge.sent.insert(SSRC, 0xffff_ffff_ffff);
    assert!(edge.protect_rtp(&rtp(PLAIN, 0xfff0), &mut wire));
    assert!(!edge.protect_rtp(&rtp(PLAIN, 1), &mut wire) && edge.is_used_up());
}

#[test]
fn padding_that_fits_passes_and_what_does_not_is_malformed() {
    for profile in [CM, GCM] {
        let (mut edge, mut origin) = pair_of(profile);
        // A probe of libwebrtc: nothing but 255 bytes of padding.
        let mut probe = rtp(PLAIN, 1);
        probe.truncate(12);
        probe[0] |= 0x20;
        probe.resize(12 + 254, 0);
        probe.push(255);
        assert!(goes(&mut edge, &mut origin, &probe).is_some());
        // Nothing at all: LiveKit's and Firefox's keep-alives.
        let mut empty = rtp(PLAIN, 2);
        empty.truncate(12);
        assert!(goes(&mut edge, &mut origin, &empty).is_some());
        // RFC 3550 appendix A.1.
        for (sequence, last) in [(3, 0), (4, 6)] {
            let mut odd = rtp(PLAIN, sequence);
            odd[0] |= 0x20;
            odd.push(last);
            let wire = sent(&mut edge, &odd);
            let mut plain = Vec::new();
            let taken = origin.unprotect_rtp(&wire, &mut plain);
            assert_eq!(taken, Err(Refusal::Malformed));
            assert!(plain.is_empty());
        }
    }
}

#[test]
fn a_header_that_is_longer_than_the_packet_is_malformed() {
    let (mut edge, mut origin) = pair();
    let wire = sent(&mut edge, &rtp(PLAIN, 1));
    for first in [0x8f, 0x90, 0x00, 0x40, 0xc0] {
        let mut bent = wire.clone();
        bent[0] = first;
        assert_eq!(
            got(&mut origin, &bent),
            Err(Refusal::Malformed),
            "{first:#x}"
        );
        assert!(!edge.protect_rtp(&bent[..16], &mut Vec::new()));
    }
}

/// An element of a header extension that goes on into the payload; the payload becomes shorter on the way.
#[test]
fn a_bent_header_extension_passes_as_it_is_and_ends_nothing() {
    use crate::description::RecodeRule;
    use crate::hop::recode::Recoder;
    for profile in [CM, GCM] {
        let (mut client, mut ours) = pair_of(profile);
        let mut packet = vec![0x90, PLAIN, 0, 5, 0, 0, 0, 9, 0, 0, 0, 7];
        // Id 1 of 16 bytes: 3 in the extension of one word, 13 in the payload.
        packet.extend([0xbe, 0xde, 0, 1, 0x1f, 0, 0, 0]);
        // Opus: SILK, wideband, 20 ms.
        packet.push(0x48);
        packet.extend([0x55; 60]);
        let wire = sent(&mut client, &packet);
        assert_eq!(wire[..20], packet[..20], "the extension ends where it says");
        let plain = got(&mut ours, &wire).unwrap();
        assert_eq!(plain, packet);
        let rule = RecodeRule {
            rung: None,
            key: None,
            lossy_only: false,
        };
        #[allow(clippy::disallowed_methods)]
        let now = std::time::Instant::now();
        let mut recoder = Recoder::new(PLAIN, None, rule, true);
        recoder.take(now, &plain, 100);
        let job = recoder.poll_job().unwrap();
        let mut opus = vec![0x48];
        opus.resize(14, 0x66);
        recoder.recoded(now, job.id, opus);
        let mut out = Vec::new();
        recoder.poll_packet(&mut out).unwrap();
        // As `Relay::pass_coded` does.
        let wire = sent(&mut ours, &out);
        assert_eq!(got(&mut client, &wire), Ok(out));
    }
}

proptest! {
    /// No index of RTP is used for two packets, and none of RTCP at all, whatever is sent.
    #[test]
    fn no_index_goes_out_twice(packets in proptest::collection::vec((any::<bool>(), 0u32..3, any::<u16>()), 1..400)) {
        let (mut edge, _) = pair();
        let mut newest: HashMap<u32, u64> = HashMap::new();
        let mut rtcp = 0;
        for (is_rtp, ssrc, sequence) in packets {
            if is_rtp {
                sent(&mut edge, &of_ssrc(rtp(PLAIN, sequence), ssrc));
                let index = edge.sent[&ssrc];
                prop_assert!(newest.get(&ssrc).is_none_or(|newest| *newest <= index));
                newest.insert(ssrc, index);
            } else {
                let wire = sent_rtcp(&mut edge, &report(ssrc));
                let at = edge.outbound.rtcp_index_at(&wire);
                let index = u32::from_be_bytes(wire[at..at + 4].try_into().unwrap());
                rtcp += 1;
                prop_assert_eq!(index, rtcp | E_BIT);
            }
        }
    }

    #[test]
    fn strangers_bytes_are_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..120), gcm: bool) {
        let (_, mut origin) = pair_of(if gcm { GCM } else { CM });
        if let Some(first) = bytes.first_mut() {
            *first = *first & 0x3f | 0x80;
        }
        let mut plain = Vec::new();
        prop_assert!(origin.unprotect_rtp(&bytes, &mut plain).is_err());
        prop_assert!(origin.unprotect_rtcp(&bytes, &mut plain).is_err());
        // Of one's own they come back as they are, or don't go.
        let (mut edge, mut origin) = pair_of(if gcm { GCM } else { CM });
        let mut wire = Vec::new();
        if edge.protect_rtp(&bytes, &mut wire) {
            match origin.unprotect_rtp(&wire, &mut plain) {
                Ok(()) => prop_assert_eq!(&plain, &bytes),
                Err(refusal) => prop_assert!(refusal == Refusal::Malformed && RtpHeader::parse(&bytes).is_none()),
            }
        }
        if edge.protect_rtcp(&bytes, &mut wire) {
            prop_assert_eq!(origin.unprotect_rtcp(&wire, &mut plain), Ok(()));
            prop_assert_eq!(&plain, &bytes);
        }
    }
}
