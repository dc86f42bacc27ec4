//! Signalling through a session: what real clients and livekit-server said to each other
//! and policy on hand-written SDP.

use crate::golden::{golden, holds, pass, read};
use crate::media::lean;
use crate::net::Rng;
use crate::sdp::{CLIENT_CID, OTHER_SID};
use crate::world::{Options, TestEnv, World, addr, description, front, others, sdp_of};
use auralink_proto::aic::EXTENSION_URI;
use auralink_proto::description::HostCandidate;
use auralink_proto::ladder::Rungs;
use auralink_proto::policy::{Mode, Policy, RedPolicy, VideoCodec, VideoPolicy};
use auralink_proto::session::{Session, SessionConfig};
use auralink_proto::signal::wire::{Fields, Value, write_bytes, write_uint};
use auralink_proto::signal::{Frame, Verdict};

pub(crate) const FINGERPRINT: &str = "sha-256 AB:CD";

pub(crate) fn session(policy: Policy) -> (Session, TestEnv) {
    let session = Session::new(SessionConfig {
        rungs: Rungs::ALL,
        models: Some(1),
        policy,
        fingerprint: FINGERPRINT.to_owned(),
        client_candidates: vec![HostCandidate {
            addr: front(),
            tcp: false,
        }],
        ufrag_prefix: "0a".to_owned(),
    });
    let env = TestEnv {
        rng: Rng::new(1),
        bound: Vec::new(),
    };
    (session, env)
}

fn answer_of(options: Options) -> (World, String) {
    let world = World::connected(50, options);
    let answer = world.at_client.last().unwrap().clone();
    (world, answer)
}

pub(crate) fn section(sdp: &str, mid: &str) -> String {
    let parts: Vec<&str> = sdp.split("\r\nm=").collect();
    let wanted = format!("a=mid:{mid}");
    let found = parts
        .iter()
        .find(|part| part.lines().any(|line| line == wanted));
    format!("m={}", found.unwrap())
}

#[test]
fn a_lean_answer_steers_the_voice_and_nothing_else() {
    let (off, plain) = answer_of(Options::default());
    let (on, steered) = answer_of(Options {
        policy: lean(RedPolicy::Auto),
        ..Options::default()
    });
    let voice = section(&steered, "0");
    assert!(
        voice.starts_with("m=audio 7982 UDP/TLS/RTP/SAVPF 111\r\n"),
        "{voice}"
    );
    assert!(!voice.contains("red/"), "{voice}");
    for line in ["b=TIAS:12000", "a=ptime:40", "a=maxptime:40"] {
        assert!(voice.lines().any(|l| l == line), "{line} in {voice}");
    }
    let fmtp = voice
        .lines()
        .find(|l| l.starts_with("a=fmtp:111 "))
        .unwrap();
    assert!(
        fmtp.contains("maxaveragebitrate=12000") && fmtp.contains("useinbandfec=1"),
        "{fmtp}"
    );
    for line in ["b=TIAS", "a=ptime", "maxaveragebitrate", EXTENSION_URI] {
        assert!(!plain.contains(line), "{line} with off");
        assert!(
            !off.at_server.last().unwrap().contains(line),
            "{line} with off"
        );
    }
    // Video and data aren't touched by an audio policy.
    let body = |sdp: &str, mid| {
        let text = section(sdp, mid);
        text.lines()
            .filter(|l| !l.starts_with("a=ice-"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for mid in ["1", "2"] {
        assert_eq!(body(&plain, mid), body(&steered, mid));
    }
    let up = &on.description.unwrap().up;
    assert_eq!(up.len(), 1);
    assert_eq!(up[0].wrap_red, Some((111, 63)));
}

#[test]
fn with_red_kept_the_answer_keeps_it() {
    let (world, answer) = answer_of(Options {
        policy: lean(RedPolicy::Keep),
        ..Options::default()
    });
    let voice = section(&answer, "0");
    assert!(
        voice.starts_with("m=audio 7982 UDP/TLS/RTP/SAVPF 63 111\r\n"),
        "{voice}"
    );
    assert!(
        voice.contains("b=TIAS:12000"),
        "the rate is steered all the same"
    );
    let description = world.description.unwrap();
    assert!(description.up.iter().all(|rule| rule.wrap_red.is_none()));
    assert!(description.down.iter().all(|rule| rule.shed_red.is_none()));
}

#[test]
fn encrypted_voice_keeps_its_red_but_is_steered_lower() {
    let (world, answer) = answer_of(Options {
        policy: lean(RedPolicy::Auto),
        client_encrypts: true,
        ..Options::default()
    });
    let voice = section(&answer, "0");
    assert!(voice.contains("a=rtpmap:63 red/48000/2"), "{voice}");
    assert!(voice.contains("b=TIAS:12000"), "{voice}");
    assert!(
        world
            .description
            .unwrap()
            .up
            .iter()
            .all(|rule| rule.wrap_red.is_none())
    );
}

/// LiveKit takes the offer's `stereo=1` out of its answer unless it looks for the track at the wrong moment.
#[test]
fn an_answer_that_leaves_a_microphone_stereo_is_mended() {
    for mode in [Mode::Lean, Mode::Neural] {
        let (world, answer) = answer_of(Options {
            policy: Policy {
                mode,
                ..lean(RedPolicy::Auto)
            },
            fmtp: [";stereo=1"; 2],
            ..Options::default()
        });
        let voice = section(&answer, "0");
        let fmtp = voice
            .lines()
            .find(|line| line.starts_with("a=fmtp:111 "))
            .unwrap();
        assert!(
            fmtp.contains(";stereo=0") && fmtp.contains(";usedtx=1"),
            "{mode:?}: {fmtp}"
        );
        let lowers = mode == Mode::Lean;
        assert_eq!(fmtp.contains("maxaveragebitrate=12000"), lowers, "{fmtp}");
        assert_eq!(voice.contains("b=TIAS"), lowers, "{voice}");
        let up = world.description.unwrap().up;
        assert_eq!(
            up.iter().any(|rule| rule.default_bytes_per_second > 0),
            lowers
        );
    }
    let (_, answer) = answer_of(Options {
        fmtp: [";stereo=1"; 2],
        ..Options::default()
    });
    assert!(answer.contains("stereo=1"), "off changes nothing: {answer}");
    // What it says only of tracks that it knows to be stereo.
    for mode in [Mode::Lean, Mode::Neural] {
        let (_, answer) = answer_of(Options {
            policy: Policy {
                mode,
                ..lean(RedPolicy::Auto)
            },
            fmtp: [";stereo=1", ";stereo=1;maxaveragebitrate=510000"],
            ..Options::default()
        });
        let voice = section(&answer, "0");
        assert!(
            voice.contains(";stereo=1;maxaveragebitrate=510000") && !voice.contains("b=TIAS"),
            "{mode:?}: {voice}"
        );
    }
}

#[test]
fn music_is_left_alone_in_both_directions() {
    // The stream that is heard is someone's stereo track, or what a shared screen plays.
    for (source, stereo) in [(2, true), (4, false)] {
        let mut world = World::new(
            51,
            Options {
                policy: lean(RedPolicy::Auto),
                ..Options::default()
            },
        );
        let mut track = Vec::new();
        write_bytes(&mut track, 1, CLIENT_CID.as_bytes());
        write_uint(&mut track, 8, source);
        write_uint(&mut track, 12, u64::from(stereo));
        world.client_says(4, &track);
        world.server_says(5, &others(OTHER_SID, source, stereo));
        world.offer();
        assert!(world.run_until(10, World::up));
        let answer = world.at_client.last().unwrap();
        assert!(section(answer, "0").contains("SAVPF 63 111"), "{answer}");
        assert!(
            !answer.contains("b=TIAS") && !answer.contains("maxaveragebitrate"),
            "{answer}"
        );
        let description = world.description.clone().unwrap();
        assert!(description.up.iter().all(|rule| rule.wrap_red.is_none()));
        assert!(description.down.iter().all(|rule| rule.shed_red.is_none()));
        // And it really passes as it is.
        let sent = crate::media::talk(&mut world, 20);
        assert_eq!(crate::media::plain(&world.client.rtp), sent.down);
        assert_eq!(crate::media::plain(&world.server.rtp), sent.up);
    }
}

#[test]
fn the_hint_gets_an_id_that_is_free_in_every_section() {
    let (mut session, mut env) = session(lean(RedPolicy::Auto));
    let sdp = |ids: std::ops::RangeInclusive<u16>| {
        let world = World::new(52, Options::default());
        let media_lines = ids.map(|id| format!("a=extmap:{id} urn:x:{id}")).collect();
        let content = crate::sdp::Content {
            audio_ssrc: 1,
            video_ssrc: 2,
            audio_track: CLIENT_CID,
            fmtp: "",
            media_lines,
        };
        crate::sdp::write(&world.client, "actpass", &content)
    };
    for (ids, want) in [(3..=14, 16), (3..=12, 13), (3..=16, 17)] {
        let mut frame = Vec::new();
        write_bytes(&mut frame, 1, &description("offer", &sdp(ids.clone()), &[]));
        let Verdict::Binary(new) = session
            .client_frame(&mut env, Frame::Binary(&frame))
            .unwrap()
        else {
            panic!("an offer is edited");
        };
        let [(_, new)] = &read(true, false, &new)[..] else {
            panic!("one SDP");
        };
        let line = format!("a=extmap:{want} {EXTENSION_URI}");
        assert_eq!(
            new.lines().filter(|l| *l == line).count(),
            2,
            "{ids:?}: audio and video\n{new}"
        );
        assert!(new.contains("a=extmap-allow-mixed"));
    }
}

#[test]
fn the_join_response_offers_only_the_codec_that_policy_wants_and_only_if_it_can() {
    let join = |codecs: &[&str]| {
        let mut join = Vec::new();
        for mime in codecs {
            let mut codec = Vec::new();
            write_bytes(&mut codec, 1, mime.as_bytes());
            write_bytes(&mut join, 14, &codec);
        }
        // A field that nobody here knows.
        write_bytes(&mut join, 900, b"unknown");
        let mut frame = Vec::new();
        write_bytes(&mut frame, 1, &join);
        frame
    };
    let mimes = |frame: &[u8]| -> Vec<String> {
        let field = Fields::new(frame).next().unwrap().unwrap();
        let join = field.value;
        let Value::Bytes(join) = join else { panic!() };
        assert!(holds(join, "unknown"));
        Fields::new(join)
            .map_while(Result::ok)
            .filter(|field| field.number == 14)
            .map(|field| {
                let Value::Bytes(codec) = field.value else {
                    panic!()
                };
                let Some(Ok(field)) = Fields::new(codec).next() else {
                    panic!()
                };
                let Value::Bytes(mime) = field.value else {
                    panic!()
                };
                String::from_utf8(mime.to_vec()).unwrap()
            })
            .collect()
    };
    let all = [
        "audio/opus",
        "audio/red",
        "video/VP8",
        "video/H264",
        "video/vp9",
        "video/AV1",
    ];
    let with = |mode, codec| Policy {
        mode,
        video: Some(VideoPolicy {
            codec,
            ..VideoPolicy::default()
        }),
        ..Policy::default()
    };
    let pass = |policy, codecs: &[&str]| {
        let (mut session, mut env) = session(policy);
        let frame = join(codecs);
        match session
            .server_frame(&mut env, Frame::Binary(&frame))
            .unwrap()
        {
            Verdict::Keep => mimes(&frame),
            Verdict::Binary(new) => mimes(&new),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        pass(with(Mode::Lean, VideoCodec::Vp9), &all),
        ["audio/opus", "audio/red", "video/vp9"]
    );
    assert_eq!(
        pass(with(Mode::Lean, VideoCodec::Av1), &all),
        ["audio/opus", "audio/red", "video/AV1"]
    );
    assert_eq!(pass(with(Mode::Lean, VideoCodec::Keep), &all), all);
    assert_eq!(pass(with(Mode::Off, VideoCodec::Av1), &all), all);
    assert_eq!(
        pass(with(Mode::Lean, VideoCodec::Av1), &all[..4]),
        all[..4],
        "it would have none"
    );
}

#[test]
fn malformed_messages_are_errors_and_leave_the_session_usable() {
    let (mut session, mut env) = session(lean(RedPolicy::Auto));
    let mut rng = Rng::new(60);
    for _ in 0..2000 {
        let len = rng.below(300);
        let bytes = rng.bytes(len);
        let _ = session.client_frame(&mut env, Frame::Binary(&bytes));
        let _ = session.server_frame(&mut env, Frame::Binary(&bytes));
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let _ = session.client_frame(&mut env, Frame::Text(&text));
        let _ = session.query(&mut env, &format!("join_request={text}"));
    }
    let mut no_sdp = Vec::new();
    write_bytes(&mut no_sdp, 1, &description("offer", "not an SDP", &[]));
    assert!(
        session
            .client_frame(&mut env, Frame::Binary(&no_sdp))
            .is_err()
    );
    assert!(session.poll_update().is_none());
    let entry = golden("chromium-single").into_iter().nth(1).unwrap();
    assert_eq!(
        pass(&mut session, &mut env, "after noise", entry)
            .unwrap()
            .sdps
            .len(),
        1
    );
    assert!(session.poll_update().is_some());
    assert_eq!(sdp_of(&description("offer", "v=0", &[])), "v=0");
    assert_ne!(addr("127.0.0.1:1"), front());
}
