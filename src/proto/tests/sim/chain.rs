//! Two sidecars in a row, `client ⇄ edge ⇄ origin ⇄ LiveKit`: what they agree on about framed packets,
//! from what real clients and livekit-server said to each other.

use crate::golden::{Entry, golden};
use crate::session::session;
use crate::world::TestEnv;
use auralink_proto::description::{MediaKind, PcDescription, Target, TrackRule};
use auralink_proto::ladder::{Rung, Rungs};
use auralink_proto::policy::{Mode, Policy};
use auralink_proto::session::Session;
use auralink_proto::signal::{Frame, Verdict};

/// One sidecar of the two.
struct Sidecar {
    session: Session,
    env: TestEnv,
    described: Vec<PcDescription>,
}

impl Sidecar {
    fn new(policy: Policy) -> Self {
        let (session, env) = session(policy);
        Self {
            session,
            env,
            described: Vec::new(),
        }
    }

    fn query(&mut self, query: &str) -> String {
        let new = self.session.query(&mut self.env, query).unwrap();
        self.note();
        new.unwrap_or_else(|| query.to_owned())
    }

    fn frame(&mut self, up: bool, text: bool, bytes: &[u8]) -> Option<Vec<u8>> {
        let frame = if text {
            Frame::Text(std::str::from_utf8(bytes).unwrap())
        } else {
            Frame::Binary(bytes)
        };
        let verdict = if up {
            self.session.client_frame(&mut self.env, frame)
        } else {
            self.session.server_frame(&mut self.env, frame)
        };
        self.note();
        match verdict.unwrap() {
            Verdict::Keep => Some(bytes.to_vec()),
            Verdict::Drop => None,
            Verdict::Binary(bytes) => Some(bytes),
            Verdict::Text(text) => Some(text.into_bytes()),
        }
    }

    /// Keeps what media is told. The calls of the captures end, and then nobody speaks any more: what counts is the most that
    /// was coded.
    fn note(&mut self) {
        let coded = |pc: &PcDescription| {
            let rules = pc.up.iter().chain(&pc.down);
            let hop = |rule: &&TrackRule| rule.pack.is_some() || rule.restore.is_some();
            let alone = |rule: &&TrackRule| rule.recode.is_some();
            (
                rules.clone().filter(hop).count(),
                rules.filter(alone).count(),
            )
        };
        while let Some(update) = self.session.poll_update() {
            let known = self.described.iter_mut();
            match known.into_iter().find(|old| old.target == update.target) {
                Some(old) if coded(old) > coded(&update) => {}
                Some(old) => *old = update,
                None => self.described.push(update),
            }
        }
    }

    fn rules(&self, up: bool) -> impl Iterator<Item = &TrackRule> {
        self.described
            .iter()
            .flat_map(move |pc| if up { &pc.up } else { &pc.down })
            .filter(|rule| rule.kind == MediaKind::Audio)
    }
}

/// What LiveKit was told, and both sidecars at the end.
fn call(name: &str, edge: Policy, origin: Policy) -> (Sidecar, Sidecar, Vec<u8>) {
    let (mut edge, mut origin) = (Sidecar::new(edge), Sidecar::new(origin));
    let mut told_client = Vec::new();
    for entry in golden(name) {
        match entry {
            Entry::Connect => {}
            Entry::Query(value) => {
                let query = format!("join_request={}", value.replace('=', "%3D"));
                origin.query(&edge.query(&query));
            }
            Entry::Frame {
                up: true,
                text,
                bytes,
            } => {
                if let Some(bytes) = edge.frame(true, text, &bytes) {
                    origin.frame(true, text, &bytes);
                }
            }
            Entry::Frame {
                up: false,
                text,
                bytes,
            } => {
                if let Some(bytes) = origin.frame(false, text, &bytes)
                    && let Some(bytes) = edge.frame(false, text, &bytes)
                {
                    told_client.extend(bytes);
                }
            }
        }
    }
    (edge, origin, told_client)
}

fn neural() -> Policy {
    Policy {
        mode: Mode::Neural,
        ..Policy::default()
    }
}

#[test]
fn speech_is_packed_at_one_side_and_restored_at_the_other() {
    // Captures leave out repeated frames, and with them most answers of two peer connections.
    for (name, up) in [
        ("python-single", true),
        ("python-single", false),
        ("node-single", true),
        ("node-single", false),
        ("python-dual", true),
        ("firefox-single", true),
    ] {
        let (edge, origin, _) = call(name, neural(), neural());
        let (sender, receiver) = if up {
            (&edge, &origin)
        } else {
            (&origin, &edge)
        };
        let packed = sender.rules(up).filter(|rule| rule.pack.is_some());
        let packed: Vec<_> = packed.collect();
        assert!(!packed.is_empty(), "{name}");
        for rule in packed {
            let pack = rule.pack.unwrap();
            assert_eq!((pack.rung, pack.rungs), (Rung::L2, Rungs::ALL), "{name}");
            assert!(rule.opus_pts.0.is_some(), "{name}");
            assert!(pack.hint_id < 15, "{name}: one-byte headers are shorter");
            let other = receiver.rules(up).find(|other| other.mid == rule.mid);
            let other = other.unwrap();
            let restore = other.restore.unwrap();
            let (theirs, ours) = ((restore.pt, restore.hint_id), (pack.pt, pack.hint_id));
            assert_eq!(theirs, ours, "{name}");
            assert_eq!(other.opus_pts, rule.opus_pts, "{name}");
        }
        // The tag is cut on the hop, and nowhere else.
        let publishers = edge.described.iter();
        for edge in publishers.filter(|pc| pc.target == Target::Publisher) {
            let same = |pc: &&PcDescription| pc.target == edge.target;
            let origin = origin.described.iter().find(same).unwrap();
            assert_eq!(edge.server.aic_pts, origin.client.aic_pts, "{name}");
            assert!(edge.server.aic_pts.0.is_some(), "{name}");
            assert_eq!(edge.client.aic_pts, (None, None), "{name}");
            assert_eq!(origin.server.aic_pts, (None, None), "{name}");
        }
    }
}

#[test]
fn nothing_is_packed_towards_a_side_that_does_not_take_it() {
    let off = Policy::default();
    for (edge, origin) in [(neural(), off), (off, neural()), (off, off)] {
        let (edge, origin, told_client) = call("python-single", edge, origin);
        for sidecar in [&edge, &origin] {
            for up in [true, false] {
                let coded = sidecar
                    .rules(up)
                    .filter(|rule| rule.pack.is_some() || rule.restore.is_some());
                assert_eq!(coded.count(), 0);
            }
        }
        assert!(!told_client.is_empty());
    }
}

#[test]
fn a_lean_room_packs_what_it_does_not_steer() {
    let lean = Policy {
        mode: Mode::Lean,
        ..Policy::default()
    };
    let (edge, origin, _) = call("python-single", lean, lean);
    let steered = |rule: &&TrackRule| rule.default_bytes_per_second > 0;
    let steered = edge.rules(true).find(steered).unwrap();
    assert_eq!(steered.pack, None, "it is sent at a low rate already");
    let down = origin.rules(false).find_map(|rule| rule.pack).unwrap();
    assert_eq!(down.rung, Rung::L4);
}

#[test]
fn a_room_switched_off_goes_native_and_stays_framed() {
    let (mut edge, ..) = call("python-single", neural(), neural());
    edge.session.stop_shedding();
    edge.note();
    let pack = edge.rules(true).find_map(|rule| rule.pack).unwrap();
    assert_eq!(pack.rung, Rung::NATIVE);
}

/// A lean room in which speech is enhanced on its way up and coded anew on its way down.
fn recoding() -> Policy {
    let mut policy = Policy {
        mode: Mode::Lean,
        ..Policy::default()
    };
    policy.audio.enhance = true;
    policy.audio.recode = Rung::L4;
    policy
}

#[test]
fn a_sidecar_alone_enhances_what_it_steers_and_codes_what_others_say_anew() {
    for name in ["python-single", "node-single", "python-dual"] {
        let (alone, _, _) = call(name, recoding(), Policy::default());
        let down: Vec<_> = alone.rules(false).collect();
        assert!(!down.is_empty(), "{name}");
        for rule in down {
            let recode = rule.recode.unwrap();
            assert_eq!((recode.rung, recode.lossy_only), (Some(Rung::L4), true));
            assert!(recode.key.is_some(), "{name}: the track has no sid");
            assert!(rule.opus_pts.0.is_some(), "{name}");
        }
        let up: Vec<_> = alone.rules(true).collect();
        let steered = up.iter().filter(|rule| rule.default_bytes_per_second > 0);
        let enhanced = up.iter().filter_map(|rule| rule.recode);
        assert_eq!(steered.count(), enhanced.clone().count(), "{name}");
        for recode in enhanced {
            assert_eq!((recode.rung, recode.key), (None, None), "{name}");
        }
    }
    let (off, _, _) = call(
        "python-single",
        Policy {
            mode: Mode::Off,
            ..recoding()
        },
        Policy::default(),
    );
    let all = off.rules(true).chain(off.rules(false));
    assert_eq!(all.filter(|rule| rule.recode.is_some()).count(), 0);
}

#[test]
fn where_there_is_a_hop_nothing_else_is_coded() {
    let (edge, origin, _) = call("python-single", recoding(), recoding());
    for sidecar in [&edge, &origin] {
        let all = sidecar.rules(true).chain(sidecar.rules(false));
        assert_eq!(all.filter(|rule| rule.recode.is_some()).count(), 0);
    }
    assert!(origin.rules(false).any(|rule| rule.pack.is_some()));
}
