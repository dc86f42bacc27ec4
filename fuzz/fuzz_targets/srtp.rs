//! RTP and RTCP of a participant who has keys: whatever she encrypts, and what a stranger makes of it on the way.
//!
//! Input: a byte that says which profile, and whether it goes through a whole relay that enhances audio; then for each packet two bytes
//! of flags and length, and its contents before they are encrypted.
#![cfg_attr(fuzzing, no_main)]
#![allow(dead_code)]

#[path = "../../src/proto/tests/sim/net.rs"]
mod net;
#[path = "../../src/proto/tests/sim/peer.rs"]
mod peer;
#[path = "../../src/proto/tests/sim/sdp.rs"]
mod sdp;
#[path = "../../src/proto/tests/sim/world.rs"]
mod world;

use auralink_fuzz::fuzz_target;
use auralink_proto::coding::{EngineRungs, Job, Outcome};
use auralink_proto::dtls::{SrtpKeys, SrtpProtectionProfile};
use auralink_proto::ladder::Rungs;
use auralink_proto::packet::{Kind, RtpHeader, classify};
use auralink_proto::policy::{Mode, Policy};
use auralink_proto::relay::Side;
use auralink_proto::srtp::{Refusal, Srtp};
use auralink_proto::stun::Path;
use peer::Peer;
use std::collections::HashSet;
use world::{CM, GCM, Options, World, client_addr, front};

/// Payload type of framed packets, whose tag is short.
const FRAMED: u8 = 20;

/// One input packet: what is done to it, and the bytes.
struct Step<'a> {
    flags: u8,
    bytes: &'a [u8],
}

impl Step<'_> {
    /// The packet as one that the demultiplexer takes for RTP or RTCP.
    fn packet(&self) -> Vec<u8> {
        let mut packet = self.bytes.to_vec();
        if let [first, second, ..] = packet.as_mut_slice() {
            *first = *first & 0x3f | 0x80;
            match (self.flags & 0x80 != 0, (192..=223).contains(second)) {
                (true, false) => *second = 200 + (*second & 7),
                (false, true) => *second &= 0x1f,
                _ => {}
            }
        }
        packet
    }

    /// What a stranger makes of it on the way.
    fn bent(&self, wire: &[u8]) -> Option<Vec<u8>> {
        let mut bent = wire.to_vec();
        let at = self.bytes.len() % wire.len().max(1);
        match self.flags >> 4 & 7 {
            1 => *bent.get_mut(at)? ^= 1 << (self.flags & 7),
            2 => bent.truncate(at),
            3 => bent.push(self.flags),
            // RTCP in the clear: its E bit is in front of a tag of ten bytes, or at the end.
            4 => *bent.iter_mut().rev().nth(13)? &= 0x7f,
            5 => *bent.iter_mut().rev().nth(3)? &= 0x7f,
            _ => return None,
        }
        (bent != wire).then_some(bent)
    }
}

fn steps(mut rest: &[u8]) -> Vec<Step<'_>> {
    let mut steps = Vec::new();
    while let Some((&[flags, len], tail)) = rest.split_first_chunk::<2>() {
        let (bytes, tail) = tail.split_at(usize::from(len).min(tail.len()));
        rest = tail;
        steps.push(Step { flags, bytes });
    }
    steps
}

fn srtp(profile: SrtpProtectionProfile, material: Vec<u8>, is_client: bool) -> Srtp {
    let keys = SrtpKeys {
        profile,
        material,
        is_client,
    };
    let mut srtp = Srtp::new(&keys).expect("keys");
    srtp.set_framed_pts((Some(FRAMED), Some(FRAMED)));
    srtp
}

/// One context to another.
fn over_a_wire(profile: SrtpProtectionProfile, steps: &[Step<'_>]) {
    let material: Vec<u8> = (0..if profile == GCM { 56 } else { 60 }).collect();
    let mut from = srtp(profile, material.clone(), true);
    let mut to = srtp(profile, material, false);
    let (mut wire, mut plain) = (Vec::new(), Vec::new());
    let mut known = HashSet::new();
    for step in steps {
        // As a stranger sends it.
        assert!(to.unprotect_rtp(step.bytes, &mut plain).is_err());
        assert!(to.unprotect_rtcp(step.bytes, &mut plain).is_err());
        let packet = step.packet();
        if classify(&packet) == Kind::Rtcp {
            if !from.protect_rtcp(&packet, &mut wire) {
                assert!(packet.len() < 8);
                continue;
            }
            if let Some(bent) = step.bent(&wire) {
                assert!(to.unprotect_rtcp(&bent, &mut plain).is_err());
            }
            assert_eq!(to.unprotect_rtcp(&wire, &mut plain), Ok(()));
            assert_eq!(plain, packet);
            let again = to.unprotect_rtcp(&wire, &mut plain);
            assert_eq!(again, Err(Refusal::Replayed));
            continue;
        }
        if !from.protect_rtp(&packet, &mut wire) {
            assert_eq!(RtpHeader::parse(&packet), None);
            continue;
        }
        if let Some(bent) = step.bent(&wire) {
            assert!(to.unprotect_rtp(&bent, &mut plain).is_err());
        }
        let taken = to.unprotect_rtp(&wire, &mut plain);
        match (taken, RtpHeader::parse(&packet)) {
            (Ok(()), Some(header)) => {
                assert_eq!(plain, packet);
                known.insert(header.ssrc);
                if header.payload_type == FRAMED {
                    let again = to.unprotect_rtp(&wire, &mut plain);
                    assert_eq!(again, Err(Refusal::Replayed));
                }
            }
            (Err(Refusal::Malformed), None) => assert!(plain.is_empty()),
            // It came, or is so old that nobody knows.
            (Err(Refusal::Replayed), Some(header)) => {
                assert_eq!(header.payload_type, FRAMED);
                assert!(known.contains(&header.ssrc));
            }
            odd => panic!("{odd:?}"),
        }
    }
}

/// An engine that answers with what is shorter than anything.
fn answer(job: Job) -> Option<Outcome> {
    let Job::Recode(track, job) = job else {
        return None;
    };
    Some(Outcome::Recoded(track, job.id, vec![0x48]))
}

fn own(peer: &Peer, profile: SrtpProtectionProfile) -> Srtp {
    srtp(profile, peer.material.clone(), peer.active == Some(true))
}

/// A participant's packets through a relay that enhances them.
fn through_a_relay(profile: SrtpProtectionProfile, steps: &[Step<'_>]) {
    const ABLE: EngineRungs = EngineRungs {
        encodes: Rungs::OPUS,
        decodes: Rungs::OPUS,
        ..EngineRungs::NONE
    };
    let mut policy = Policy {
        mode: Mode::Lean,
        ..Policy::default()
    };
    policy.audio.enhance = true;
    let options = Options {
        policy,
        client_profiles: vec![CM],
        server_profiles: vec![profile],
        ..Options::default()
    };
    let mut world = World::connected(1, options);
    world.codecs(ABLE, answer);
    let (mut from, mut to) = (own(&world.client, CM), own(&world.server, profile));
    let path = Path {
        local: front(),
        remote: client_addr(),
        tcp: false,
    };
    let before = world.sent.len();
    let (mut wire, mut plain) = (Vec::new(), Vec::new());
    let mut authentic = 0;
    for step in steps {
        let packet = step.packet();
        let protected = if classify(&packet) == Kind::Rtcp {
            from.protect_rtcp(&packet, &mut wire)
        } else {
            from.protect_rtp(&packet, &mut wire)
        };
        if !protected {
            continue;
        }
        if let Some(bent) = step.bent(&wire) {
            world.inject(Side::Client, path, &bent);
        }
        authentic += 1;
        world.inject(Side::Client, path, &wire);
        if step.flags & 8 != 0 {
            world.codecs(ABLE, answer);
            world.run_ms(21);
        }
    }
    world.codecs(ABLE, answer);
    world.run_ms(100);
    assert!(!world.relay().is_closed(), "{}", world.report());
    // One packet of hers is one at the most, and is authentic to the server: nobody else's came out.
    let out: Vec<Vec<u8>> = world.sent[before..]
        .iter()
        .filter(|sent| sent.1 == Side::Server)
        .map(|sent| sent.3.clone())
        .filter(|sent| matches!(classify(sent), Kind::Rtp | Kind::Rtcp))
        .collect();
    assert!(out.len() <= authentic);
    for sent in out {
        if classify(&sent) == Kind::Rtcp {
            assert_eq!(to.unprotect_rtcp(&sent, &mut plain), Ok(()));
        } else if to.unprotect_rtp(&sent, &mut plain).is_ok() {
            assert!(RtpHeader::parse(&plain).is_some());
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&first, rest)) = data.split_first() else {
        return;
    };
    let steps = steps(rest);
    let profile = if first & 1 == 0 { CM } else { GCM };
    over_a_wire(profile, &steps);
    // A handshake costs a thousand packets.
    if first & 6 == 6 && !steps.is_empty() {
        through_a_relay(profile, &steps);
    }
});
