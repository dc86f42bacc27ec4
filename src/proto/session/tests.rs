//! What a session keeps and tells media, whatever is sent to it.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::signal::wire::{write_bytes, write_uint};
use std::fmt::Write;

/// Counts, so that no two credentials are the same.
struct TestEnv(u8);

impl Env for TestEnv {
    fn random(&mut self, bytes: &mut [u8]) {
        self.0 = self.0.wrapping_add(1);
        bytes.fill(self.0);
    }
    fn bind_server_leg(&mut self, _: Target) -> Result<Vec<SocketAddr>, String> {
        Ok(vec!["127.0.0.1:5000".parse().unwrap()])
    }
}

fn session() -> Session {
    Session::new(SessionConfig {
        policy: Policy {
            mode: Mode::Lean,
            ..Policy::default()
        },
        fingerprint: "sha-256 AA:BB".into(),
        client_candidates: Vec::new(),
        ufrag_prefix: "0".into(),
        rungs: Rungs::ALL,
        models: None,
    })
}

fn sdp(ufrag: &str, lines: &str) -> String {
    format!(
        "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 63 111\r\nc=IN IP4 0.0.0.0\r\na=mid:0\r\n\
         a=ice-ufrag:{ufrag}\r\na=ice-pwd:{ufrag}{ufrag}{ufrag}{ufrag}{ufrag}\r\na=setup:actpass\r\na=sendonly\r\n\
         a=rtpmap:111 opus/48000/2\r\na=rtpmap:63 red/48000/2\r\n{lines}"
    )
}

/// The server's offer, whose section "0" is the track `TR_0`.
fn offered(session: &mut Session, ufrag: &str, lines: &str) {
    let (mut entry, mut description, mut response) = (Vec::new(), Vec::new(), Vec::new());
    write_bytes(&mut entry, 1, b"0");
    write_bytes(&mut entry, 2, b"TR_0");
    write_bytes(&mut description, 1, b"offer");
    write_bytes(&mut description, 2, sdp(ufrag, lines).as_bytes());
    write_bytes(&mut description, 4, &entry);
    write_bytes(&mut response, 3, &description);
    let frame = Frame::Binary(&response);
    session
        .server_frame(&mut TestEnv(ufrag.len() as u8), frame)
        .unwrap();
}

fn trickled(session: &mut Session, candidate: &str) {
    let (mut trickle, mut response) = (Vec::new(), Vec::new());
    let init = format!("{{\"candidate\":\"{candidate}\"}}");
    write_bytes(&mut trickle, 1, init.as_bytes());
    write_uint(&mut trickle, 2, 1);
    write_bytes(&mut response, 4, &trickle);
    let frame = Frame::Binary(&response);
    session.server_frame(&mut TestEnv(0), frame).unwrap();
}

/// A participant that publishes one track.
fn update(session: &mut Session, number: u32, muted: bool, stereo: bool) {
    let (mut track, mut participant) = (Vec::new(), Vec::new());
    let (mut update, mut response) = (Vec::new(), Vec::new());
    write_bytes(&mut track, 1, format!("TR_{number}").as_bytes());
    write_uint(&mut track, 6, u64::from(muted));
    write_uint(&mut track, 14, u64::from(stereo));
    write_bytes(&mut participant, 1, format!("PA_{number}").as_bytes());
    write_uint(&mut participant, 3, 2);
    write_bytes(&mut participant, 4, &track);
    write_bytes(&mut update, 1, &participant);
    write_bytes(&mut response, 5, &update);
    let frame = Frame::Binary(&response);
    session.server_frame(&mut TestEnv(0), frame).unwrap();
}

fn updates(session: &mut Session) -> usize {
    std::iter::from_fn(|| session.poll_update()).count()
}

#[test]
fn only_what_changed_is_described_again() {
    let mut session = session();
    offered(&mut session, "abcd", "");
    assert_eq!(updates(&mut session), 1);
    // Others come, mute and unmute.
    let mut described = 0;
    for turn in 0..200 {
        for number in 1..6 {
            update(&mut session, number + turn, turn % 2 == 0, turn % 3 == 0);
            let changed = session.pcs.iter().flatten().any(|pc| pc.changed);
            assert!(!changed, "it isn't even looked at");
            described += updates(&mut session);
        }
    }
    assert_eq!(described, 0, "nothing that is heard here is another");
    for turn in 0..100 {
        update(&mut session, 0, turn % 2 == 0, false);
        described += updates(&mut session);
    }
    assert_eq!(described, 1, "the track is heard; its mutes change nothing");
    update(&mut session, 0, false, true);
    assert_eq!(updates(&mut session), 1, "it is music now");
    // The same offer again says nothing new, another generation of ICE does.
    offered(&mut session, "abcd", "");
    assert_eq!(updates(&mut session), 0);
    offered(&mut session, "efgh", "");
    assert_eq!(updates(&mut session), 1);
}

#[test]
fn candidates_of_old_generations_are_forgotten() {
    let mut session = session();
    for generation in 0..100u32 {
        let ufrag = format!("gen{generation:04}");
        // Faster than the offer, and after it; with the name of its generation, and without.
        let candidate = |n: u32| {
            let address = format!("203.0.113.9 {}", 1000 + 10 * generation + n);
            format!("candidate:1 1 udp 1 {address} typ host")
        };
        trickled(&mut session, &format!("{} ufrag {ufrag}", candidate(1)));
        offered(&mut session, &ufrag, &format!("a={}\r\n", candidate(2)));
        trickled(&mut session, &candidate(3));
        let known = session.poll_update().unwrap().server.remote_candidates;
        assert_eq!(known, [1, 2, 3].map(candidate), "{generation}");
        assert!(session.candidates[1].len() <= 3);
    }
    // Within one, the newest count, and none that is no candidate's length.
    for n in 0..1000 {
        trickled(
            &mut session,
            &format!("candidate:1 1 udp 1 203.0.113.9 {n} typ host"),
        );
    }
    trickled(
        &mut session,
        &format!("candidate:{}", "1".repeat(MAX_CANDIDATE)),
    );
    let known = session.poll_update().unwrap().server.remote_candidates;
    assert_eq!(known.len(), MAX_CANDIDATES);
    assert!(known.last().unwrap().contains(" 999 "));
}

#[test]
fn every_fingerprint_counts() {
    let mut session = session();
    let lines = "a=fingerprint:sha-1 00:01\r\na=fingerprint:sha-256 00:02\r\na=fingerprint:sha-256 00:03\r\n\
                 a=fingerprint:sha-256 00:02\r\n";
    offered(&mut session, "abcd", lines);
    let told = session.poll_update().unwrap().server.fingerprints;
    let digests: Vec<_> = told.iter().map(|one| one.digest[1]).collect();
    assert_eq!(digests, [1, 2, 3]);
    let mut many = String::new();
    for n in 0..1000 {
        write!(
            many,
            "a=fingerprint:sha-256 {:02x}:{:02x}\r\n",
            n / 256,
            n % 256
        )
        .unwrap();
    }
    offered(&mut session, "abcd", &many);
    assert!(session.poll_update().unwrap().server.fingerprints.len() <= 8);
}

#[test]
fn a_section_with_more_ssrcs_than_a_stream_has_names_none() {
    for (count, named) in [(2, 2), (16, 16), (5000, 0)] {
        let mut session = session();
        update(&mut session, 0, false, false);
        let mut lines = String::new();
        for n in 0..count {
            write!(lines, "a=ssrc:{n} cname:x\r\n").unwrap();
        }
        offered(&mut session, "abcd", &lines);
        let down = session.poll_update().unwrap().down;
        assert_eq!(down.len(), 1);
        assert_eq!(down[0].ssrcs.len(), named);
    }
}
