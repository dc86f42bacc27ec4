//! Signalling through a session: what real clients and livekit-server said to each other
//! (tests/golden), and policy on hand-written SDP.

use crate::media::lean;
use crate::net::Rng;
use crate::sdp::{CLIENT_CID, Described, OTHER_SID};
use crate::world::{Options, TestEnv, World, addr, back, description, front, others, sdp_of};
use auralink_proto::aic::EXTENSION_URI;
use auralink_proto::description::{HostCandidate, Target};
use auralink_proto::policy::{Mode, Policy, RedPolicy, VideoCodec, VideoPolicy};
use auralink_proto::session::{Session, SessionConfig, resumed_sid};
use auralink_proto::signal::wire::{Fields, Value, write_bytes, write_uint};
use auralink_proto::signal::{
    Frame, RequestVisitor, ResponseVisitor, SdpSlot, Verdict, edit_join_request, edit_request,
    edit_response,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::collections::{HashMap, HashSet};
use std::io::Read;

const FINGERPRINT: &str = "sha-256 AB:CD";

fn session(policy: Policy) -> (Session, TestEnv) {
    let session = Session::new(SessionConfig {
            rungs: auralink_proto::ladder::Rungs::ALL,
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

/// Collects the SDPs of a frame.
#[derive(Default)]
struct Reader(Vec<(SdpSlot, String)>);

impl RequestVisitor for Reader {
    fn sdp(&mut self, slot: SdpSlot, sdp: &str) -> Result<Option<String>, String> {
        self.0.push((slot, sdp.to_owned()));
        Ok(None)
    }
    fn trickle(&mut self, _: Target, _: &str) -> bool {
        true
    }
}

impl ResponseVisitor for Reader {
    fn sdp(
        &mut self,
        slot: SdpSlot,
        sdp: &str,
        _: &[(String, String)],
    ) -> Result<Option<String>, String> {
        self.0.push((slot, sdp.to_owned()));
        Ok(None)
    }
    fn trickle(&mut self, _: Target, _: &str) -> bool {
        true
    }
}

enum Entry {
    Connect,
    Query(String),
    Frame {
        up: bool,
        text: bool,
        bytes: Vec<u8>,
    },
}

fn golden(name: &str) -> Vec<Entry> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let file = std::fs::File::open(folder.join(format!("{name}.txt.gz"))).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(file)
        .read_to_string(&mut text)
        .unwrap();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(
            |line| match line.split(' ').collect::<Vec<_>>().as_slice() {
                ["path", _] => Entry::Connect,
                ["query", value] => Entry::Query((*value).to_owned()),
                [way, kind, data] => Entry::Frame {
                    up: *way == "up",
                    text: *kind == "text",
                    bytes: STANDARD.decode(data).unwrap(),
                },
                _ => panic!("{name}: {line}"),
            },
        )
        .collect()
}

const ALL: [&str; 8] = [
    "python-single",
    "python-dual",
    "node-single",
    "go-dual",
    "chromium-single",
    "chromium-dual",
    "firefox-single",
    "json",
];

/// A frame as it goes in and as it comes out; the latter's SDPs are paired with the former's.
struct Passed {
    up: bool,
    sdps: Vec<(SdpSlot, String, String)>,
    out: Option<Vec<u8>>,
    is_trickle: bool,
}

fn read(up: bool, text: bool, bytes: &[u8]) -> Vec<(SdpSlot, String)> {
    let frame = if text {
        Frame::Text(std::str::from_utf8(bytes).unwrap())
    } else {
        Frame::Binary(bytes)
    };
    let mut reader = Reader::default();
    if up {
        edit_request(frame, &mut reader).unwrap();
    } else {
        edit_response(frame, &mut reader).unwrap();
    }
    reader.0
}

fn pass(session: &mut Session, env: &mut TestEnv, name: &str, entry: Entry) -> Option<Passed> {
    let pair = |old: Vec<(SdpSlot, String)>, new: Vec<(SdpSlot, String)>| {
        assert_eq!(old.len(), new.len(), "{name}");
        old.into_iter()
            .zip(new)
            .map(|((slot, old), (_, new))| (slot, old, new))
            .collect()
    };
    match entry {
        Entry::Connect => None,
        Entry::Query(value) => {
            let mut old = Reader::default();
            edit_join_request(&value, &mut old).unwrap();
            let query = format!(
                "auto_subscribe=1&join_request={}&x=y",
                value.replace('=', "%3D")
            );
            let new_query = session.query(env, &query).unwrap();
            assert_eq!(new_query.is_some(), !old.0.is_empty(), "{name}");
            let new_query = new_query.unwrap_or(query);
            assert!(new_query.starts_with("auto_subscribe=1&join_request="));
            assert!(new_query.ends_with("&x=y"));
            let value = new_query.split('&').nth(1).unwrap().replace("%3D", "=");
            let value = value.strip_prefix("join_request=").unwrap();
            let mut new = Reader::default();
            edit_join_request(value, &mut new).unwrap();
            Some(Passed {
                up: true,
                sdps: pair(old.0, new.0),
                out: None,
                is_trickle: false,
            })
        }
        Entry::Frame { up, text, bytes } => {
            let old = read(up, text, &bytes);
            let frame = if text {
                Frame::Text(std::str::from_utf8(&bytes).unwrap())
            } else {
                Frame::Binary(&bytes)
            };
            let verdict = if up {
                session.client_frame(env, frame)
            } else {
                session.server_frame(env, frame)
            };
            let out = match verdict.unwrap() {
                Verdict::Keep => Some(bytes.clone()),
                Verdict::Drop => None,
                Verdict::Binary(new) => Some(new),
                Verdict::Text(new) => Some(new.into_bytes()),
            };
            let new = out.as_ref().map(|out| read(up, text, out));
            let shown = String::from_utf8_lossy(&bytes);
            Some(Passed {
                up,
                sdps: pair(old, new.unwrap_or_default()),
                is_trickle: shown.contains("candidateInit") || shown.contains("{\"candidate\":"),
                out,
            })
        }
    }
}

fn holds(bytes: &[u8], secret: &str) -> bool {
    bytes.windows(secret.len()).any(|w| w == secret.as_bytes())
}

#[test]
fn real_clients_and_server_see_only_the_sidecar() {
    for name in ALL {
        for policy in [Policy::default(), lean(RedPolicy::Auto)] {
            let (mut session, mut env) = session(policy);
            // What either side said of its transport, and what the other was told instead.
            let mut told: [HashMap<(String, bool), HashSet<String>>; 2] = Default::default();
            let mut secrets: [HashSet<String>; 2] = Default::default();
            let mut outs: [Vec<Vec<u8>>; 2] = Default::default();
            let mut server_sdps = HashSet::new();
            let (mut trickles, mut syncs, mut descriptions) = (0, 0, Vec::new());
            for entry in golden(name) {
                let Some(passed) = pass(&mut session, &mut env, name, entry) else {
                    continue;
                };
                if passed.is_trickle && passed.sdps.is_empty() {
                    trickles += 1;
                    assert!(passed.out.is_none(), "{name}: a trickled candidate passed");
                }
                for (slot, old, new) in passed.sdps {
                    let dual = slot == SdpSlot::SyncOffer && session_is_dual(name);
                    let from_server = match slot {
                        SdpSlot::SyncOffer => dual,
                        SdpSlot::SyncAnswer => !session_is_dual(name),
                        SdpSlot::Offer | SdpSlot::Answer => !passed.up,
                    };
                    let is_sync = matches!(slot, SdpSlot::SyncOffer | SdpSlot::SyncAnswer);
                    syncs += usize::from(is_sync);
                    if is_sync && from_server {
                        assert!(
                            server_sdps.contains(&new),
                            "{name}: {slot:?} is what it said"
                        );
                        continue;
                    }
                    if from_server {
                        server_sdps.insert(old.clone());
                    }
                    let side = usize::from(from_server);
                    let (o, n) = (Described::read(&old), Described::read(&new));
                    let target = match slot {
                        SdpSlot::Offer | SdpSlot::SyncOffer => passed.up,
                        SdpSlot::Answer | SdpSlot::SyncAnswer => !passed.up,
                    };
                    if !is_sync {
                        told[side]
                            .entry((o.pwd.clone(), target))
                            .or_default()
                            .insert(n.pwd.clone());
                    }
                    secrets[side].extend([o.pwd.clone(), o.fingerprint.clone()]);
                    let ours = if from_server { front() } else { back() };
                    assert_eq!(n.candidates.len(), 1, "{name} {slot:?}");
                    assert_eq!(n.first_address(), Some(ours), "{name} {slot:?}");
                    assert_eq!(n.fingerprint, FINGERPRINT);
                    assert_eq!(n.setup, o.setup, "{name}");
                    assert_eq!(n.lite, from_server, "{name} {slot:?}");
                    assert_eq!(
                        n.ufrag.starts_with("0a"),
                        from_server,
                        "it names the worker"
                    );
                    for line in new.lines() {
                        assert!(!line.contains("goog-sped"), "{name}: {line}");
                        assert!(!line.starts_with("a=sctp-init"), "{name}: {line}");
                        let foreign = ["192.0.2.", "fd00::", "10.0."];
                        assert!(!foreign.iter().any(|f| line.contains(f)), "{name}: {line}");
                    }
                }
                if let Some(out) = passed.out {
                    outs[usize::from(!passed.up)].push(out);
                }
                while let Some(update) = session.poll_update() {
                    descriptions.push(update);
                }
            }
            assert!(trickles > 0, "{name}");
            assert!(
                name == "json" || syncs >= 2,
                "{name}: {syncs} in sync_state"
            );
            for side in [0, 1] {
                // One to one: the same in, the same out; another in, another out.
                let mut seen = HashSet::new();
                for (old, new) in &told[side] {
                    assert_eq!(new.len(), 1, "{name} side {side} {old:?}: {new:?}");
                    assert!(
                        seen.insert(new.iter().next().unwrap()),
                        "{name}: told twice"
                    );
                }
                assert!(!told[side].is_empty());
                // What one side sent (0: client) never stands in what the other was sent (0: server).
                for secret in &secrets[side] {
                    let leaked = outs[side].iter().any(|out| holds(out, secret));
                    assert!(!leaked, "{name}: {secret} reached the other side");
                }
            }
            if name != "json" {
                let restarted = told.iter().all(|side| side.len() >= 2);
                assert!(restarted, "{name}: resuming restarts ICE on both legs");
                assert!(session.facts().participant_sid.starts_with("PA_"), "{name}");
            }
            let targets: HashSet<Target> = descriptions.iter().map(|d| d.target).collect();
            assert_eq!(
                env.bound.len(),
                targets.len(),
                "{name}: one set of sockets each"
            );
            let last = descriptions
                .iter()
                .rev()
                .find(|d| d.target == Target::Publisher);
            let last = last.unwrap_or_else(|| panic!("{name}: no publisher"));
            assert!(last.server.remote_candidates.len() < 33);
            if policy.mode == Mode::Off {
                for d in &descriptions {
                    assert!(
                        d.up.is_empty() && d.down.is_empty(),
                        "{name}: off has no rules"
                    );
                }
            }
        }
    }
}

fn session_is_dual(name: &str) -> bool {
    name.ends_with("dual")
}

#[test]
fn with_off_every_other_line_of_an_sdp_stays() {
    let transport = [
        "m=",
        "c=",
        "a=rtcp:",
        "a=ice-",
        "a=fingerprint:",
        "a=candidate:",
        "a=end-of-candidates",
        "a=sctp-init:",
    ];
    let rest = |sdp: &str| {
        sdp.lines()
            .filter(|line| !transport.iter().any(|prefix| line.starts_with(prefix)))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for name in ALL {
        let (mut session, mut env) = session(Policy::default());
        for entry in golden(name) {
            let Some(passed) = pass(&mut session, &mut env, name, entry) else {
                continue;
            };
            for (slot, old, new) in passed.sdps {
                if matches!(slot, SdpSlot::Offer | SdpSlot::Answer) {
                    assert_eq!(rest(&old), rest(&new), "{name} {slot:?}");
                    // M-lines keep everything but the port.
                    let m = |sdp: &str| {
                        let lines = sdp.lines().filter(|line| line.starts_with("m="));
                        lines
                            .map(|line| {
                                line.split(' ')
                                    .enumerate()
                                    .filter(|(n, _)| *n != 1)
                                    .map(|(_, w)| w.to_owned())
                                    .collect()
                            })
                            .collect::<Vec<Vec<String>>>()
                    };
                    assert_eq!(m(&old), m(&new), "{name}");
                }
            }
        }
    }
}

#[test]
fn a_stranger_to_this_process_is_known_by_what_it_resumes() {
    assert_eq!(
        resumed_sid("version=1&reconnect=1&sid=PA_abc").as_deref(),
        Some("PA_abc")
    );
    assert_eq!(resumed_sid("version=1&sid=PA_abc"), None);
    assert_eq!(resumed_sid("join_request=%%%"), None);
    for name in ALL {
        let sids: Vec<_> = golden(name)
            .into_iter()
            .filter_map(|entry| match entry {
                Entry::Query(value) => Some(resumed_sid(&format!("join_request={value}"))),
                _ => None,
            })
            .collect();
        if let [first, second] = sids.as_slice() {
            assert_eq!(*first, None, "{name} joins first");
            assert!(second.as_ref().unwrap().starts_with("PA_"), "{name}");
        }
    }
}

fn answer_of(options: Options) -> (World, String) {
    let world = World::connected(50, options);
    let answer = world.at_client.last().unwrap().clone();
    (world, answer)
}

fn section(sdp: &str, mid: &str) -> String {
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
            stereo: false,
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
