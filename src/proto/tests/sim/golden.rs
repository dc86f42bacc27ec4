//! What real clients and livekit-server said to each other (tests/golden), through a session.

use crate::media::lean;
use crate::sdp::Described;
use crate::session::{FINGERPRINT, section, session};
use crate::world::{TestEnv, back, front};
use auralink_proto::asked::{Asked, Request};
use auralink_proto::description::Target;
use auralink_proto::policy::{Mode, Policy, RedPolicy};
use auralink_proto::session::Session;
use auralink_proto::signal::{
    Frame, RequestVisitor, ResponseVisitor, SdpSlot, Verdict, edit_join_request, edit_request,
    edit_response, wire,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::collections::{HashMap, HashSet};
use std::io::Read;

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

pub(crate) enum Entry {
    Connect,
    Query(String),
    Frame {
        up: bool,
        text: bool,
        bytes: Vec<u8>,
    },
}

pub(crate) fn golden(name: &str) -> Vec<Entry> {
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

/// The `JoinRequest` in the value of a query, unzipped.
pub(crate) fn read_query(value: &str) -> Vec<u8> {
    let wrapped = base64::engine::general_purpose::URL_SAFE
        .decode(value)
        .unwrap();
    let inner = wire::Fields::new(&wrapped).find_map(|field| field.unwrap().bytes());
    let mut plain = Vec::new();
    match flate2::read::GzDecoder::new(inner.unwrap()).read_to_end(&mut plain) {
        Ok(_) => plain,
        Err(_) => inner.unwrap().to_vec(),
    }
}

const ALL: [&str; 9] = [
    "python-single",
    "python-dual",
    "node-single",
    "go-dual",
    "chromium-single",
    "chromium-dual",
    "chromium-voice-single",
    "firefox-single",
    "json",
];

/// A frame as it goes in and as it comes out; the latter's SDPs are paired with the former's.
pub(crate) struct Passed {
    up: bool,
    pub(crate) sdps: Vec<(SdpSlot, String, String)>,
    out: Option<Vec<u8>>,
    is_trickle: bool,
}

pub(crate) fn read(up: bool, text: bool, bytes: &[u8]) -> Vec<(SdpSlot, String)> {
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

pub(crate) fn pass(
    session: &mut Session,
    env: &mut TestEnv,
    name: &str,
    entry: Entry,
) -> Option<Passed> {
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

pub(crate) fn holds(bytes: &[u8], secret: &str) -> bool {
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
    let resumed_sid = |query: &str| {
        let asked = Asked::read(&Request::of(query)).ok()?;
        asked.resumes().map(str::to_owned)
    };
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
                Entry::Query(value) => Some(resumed_sid(&format!(
                    "join_request={}",
                    value.replace('=', "%3D")
                ))),
                _ => None,
            })
            .collect();
        if let [first, second] = sids.as_slice() {
            assert_eq!(*first, None, "{name} joins first");
            assert!(second.as_ref().unwrap().starts_with("PA_"), "{name}");
        }
    }
}

/// Chromium offers `stereo=1` whatever it sends; only what the client says of the track tells.
#[test]
fn real_voice_is_steered_though_it_offers_stereo_and_real_stereo_is_not() {
    for (name, steered) in [
        ("python-single", true),
        ("python-dual", true),
        ("chromium-voice-single", true),
        ("chromium-single", false),
        ("chromium-dual", true),
        // Its SDP has another id for the track than AddTrack.
        ("firefox-single", true),
    ] {
        let (mut session, mut env) = session(lean(RedPolicy::Auto));
        let mut offer = String::new();
        let mut voices = 0;
        for entry in golden(name) {
            let Some(passed) = pass(&mut session, &mut env, name, entry) else {
                continue;
            };
            for (slot, old, new) in passed.sdps {
                match slot {
                    SdpSlot::Offer if passed.up => offer = old,
                    SdpSlot::Answer if !passed.up => {
                        for (mid, said) in sent_voices(&offer) {
                            let chromium = name.starts_with("chromium");
                            assert!(said.contains(";stereo=1") || !chromium, "{name}: {said}");
                            assert!(!said.contains("sprop-stereo"), "{name}: {said}");
                            // One that crossed the offer answers the offer before.
                            if !new.contains(&format!("a=mid:{mid}\r\n")) {
                                continue;
                            }
                            let answer = section(&new, &mid);
                            let says = |line: &str| answer.contains(line);
                            assert_eq!(says("b=TIAS:12000"), steered, "{name}: {answer}");
                            assert_eq!(says("maxaveragebitrate=12000"), steered, "{name}");
                            assert_eq!(says("a=ptime:40"), steered, "{name}");
                            assert_eq!(!says("red/48000"), steered, "{name}: {answer}");
                            voices += 1;
                        }
                    }
                    _ => {}
                }
            }
        }
        assert!(voices > 0, "{name}: no voice was published");
    }
}

/// MID and text of each audio section of an offer that sends.
fn sent_voices(offer: &str) -> Vec<(String, String)> {
    offer
        .split("\r\nm=")
        .filter(|part| part.starts_with("audio") && part.contains("a=msid:"))
        .filter(|part| part.contains("a=sendonly") || part.contains("a=sendrecv"))
        .map(|part| {
            let mid = part.lines().find_map(|line| line.strip_prefix("a=mid:"));
            (mid.unwrap().to_owned(), part.to_owned())
        })
        .collect()
}
