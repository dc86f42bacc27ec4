//! What real clients and livekit-server 1.13.5 said to each other (tests/golden/README.md).

use std::io::Read;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::*;
use crate::description::{Creds, HostCandidate};
use crate::sdp::{Edit, Sdp, rewrite};

enum Entry {
    Path(String),
    Query(String),
    Up(Vec<u8>),
    Down(Vec<u8>),
    UpText(String),
    DownText(String),
}

fn golden(name: &str) -> Vec<Entry> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let file = std::fs::File::open(folder.join(format!("{name}.txt.gz"))).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(file)
        .read_to_string(&mut text)
        .unwrap();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let bytes = |text: &str| STANDARD.decode(text).unwrap();
            let string = |text: &str| String::from_utf8(bytes(text)).unwrap();
            match words.as_slice() {
                ["path", path] => Entry::Path((*path).to_owned()),
                ["query", value] => Entry::Query((*value).to_owned()),
                ["up", "binary", data] => Entry::Up(bytes(data)),
                ["down", "binary", data] => Entry::Down(bytes(data)),
                ["up", "text", data] => Entry::UpText(string(data)),
                ["down", "text", data] => Entry::DownText(string(data)),
                _ => panic!("{name}: {line}"),
            }
        })
        .collect()
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

fn ours() -> Edit {
    Edit {
        creds: Creds {
            ufrag: "oursours".to_owned(),
            pwd: "ourpasswordourpasswordour".to_owned(),
        },
        fingerprint: format!("sha-256 {}AA", "AA:".repeat(31)),
        candidates: vec![HostCandidate {
            addr: "203.0.113.77:7982".parse().unwrap(),
            tcp: false,
        }],
        ice_lite: true,
        setup: None,
        extmaps: Vec::new(),
        aic: Vec::new(),
        strip_extmap_uri: None,
        strip_extmap_id: None,
        media: Vec::new(),
    }
}

/// Replaces SDP by what `rewrite` makes of it, or by what is on the list.
#[derive(Default)]
struct Munger {
    seen: Vec<(SdpSlot, String)>,
    put_back: Option<std::vec::IntoIter<(SdpSlot, String)>>,
    all: Recorder,
}

impl Munger {
    fn munge(&mut self, slot: SdpSlot, sdp: &str) -> Result<Option<String>, String> {
        self.seen.push((slot, sdp.to_owned()));
        if let Some(list) = &mut self.put_back {
            return Ok(list.next().map(|(_, sdp)| sdp));
        }
        let parsed = Sdp::parse(sdp).map_err(|e| e.to_string())?;
        Ok(Some(rewrite(&parsed, &ours())))
    }
}

impl RequestVisitor for Munger {
    fn sdp(&mut self, slot: SdpSlot, sdp: &str) -> Result<Option<String>, String> {
        self.munge(slot, sdp)
    }
    fn trickle(&mut self, target: Target, init: &str) -> bool {
        RequestVisitor::trickle(&mut self.all, target, init)
    }
    fn add_track(&mut self, track: AddTrack) {
        self.all.added.push(track);
    }
}

impl ResponseVisitor for Munger {
    fn sdp(
        &mut self,
        slot: SdpSlot,
        sdp: &str,
        mids: &[(String, String)],
    ) -> Result<Option<String>, String> {
        self.all.mids.extend_from_slice(mids);
        self.munge(slot, sdp)
    }
    fn trickle(&mut self, target: Target, init: &str) -> bool {
        ResponseVisitor::trickle(&mut self.all, target, init)
    }
    fn join(&mut self, join: Join) -> JoinEdit {
        self.all.join(join)
    }
    fn reconnect(&mut self) {
        self.all.reconnects += 1;
    }
    fn participants(&mut self, participants: Vec<Participant>) {
        self.all.participants.extend(participants);
    }
    fn track_published(&mut self, cid: &str, track: Track) {
        self.all.published.push((cid.to_owned(), track));
    }
}

/// Edits an entry and, with the old SDP put back, gets the old bytes again.
fn round_trip(name: &str, entry: &Entry) -> Munger {
    let mut munger = Munger::default();
    let frame = |up, frame: Frame<'_>, munger: &mut Munger| {
        if up {
            edit_request(frame, munger).unwrap()
        } else {
            edit_response(frame, munger).unwrap()
        }
    };
    match entry {
        Entry::Path(_) => {}
        Entry::Query(value) => {
            let (new, info) = edit_join_request(value, &mut munger).unwrap();
            assert_eq!(new.is_some(), !munger.seen.is_empty(), "{name}");
            assert_eq!(info.has_offer, !munger.seen.is_empty(), "{name}");
            if let Some(new) = new {
                let mut back = Munger {
                    put_back: Some(munger.seen.clone().into_iter()),
                    ..Munger::default()
                };
                let (old, _) = edit_join_request(&new, &mut back).unwrap();
                let mut third = Munger {
                    put_back: Some(Vec::new().into_iter()),
                    ..Munger::default()
                };
                let (kept, _) = edit_join_request(&old.unwrap(), &mut third).unwrap();
                assert_eq!((kept, &third.seen), (None, &munger.seen), "{name}");
            }
        }
        Entry::Up(bytes) | Entry::Down(bytes) => {
            let up = matches!(entry, Entry::Up(_));
            match frame(up, Frame::Binary(bytes), &mut munger) {
                Verdict::Keep => assert!(munger.seen.is_empty()),
                Verdict::Binary(new) => {
                    let mut back = Munger {
                        put_back: Some(munger.seen.clone().into_iter()),
                        ..Munger::default()
                    };
                    let old = frame(up, Frame::Binary(&new), &mut back);
                    assert_eq!(old, Verdict::Binary(bytes.clone()), "{name}");
                    let text = String::from_utf8_lossy(&new);
                    assert!(!text.contains(" typ host generation"), "{name}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
        Entry::UpText(text) | Entry::DownText(text) => {
            let up = matches!(entry, Entry::UpText(_));
            match frame(up, Frame::Text(text), &mut munger) {
                Verdict::Keep => assert!(munger.seen.is_empty()),
                Verdict::Text(new) => {
                    let mut back = Munger {
                        put_back: Some(munger.seen.clone().into_iter()),
                        ..Munger::default()
                    };
                    let old = frame(up, Frame::Text(&new), &mut back);
                    assert_eq!(old, Verdict::Text(text.clone()), "{name}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }
    munger
}

#[test]
fn frames_of_real_clients_are_edited_and_only_where_they_should_be() {
    for name in ALL {
        let mut slots = std::collections::HashSet::new();
        let mut seen = Munger::default();
        let mut paths = Vec::new();
        for entry in golden(name) {
            if let Entry::Path(path) = &entry {
                paths.push(path.clone());
            }
            let up = matches!(entry, Entry::Up(_) | Entry::UpText(_) | Entry::Query(_));
            let one = round_trip(name, &entry);
            slots.extend(one.seen.iter().map(|(slot, _)| (up, *slot)));
            seen.seen.extend(one.seen);
            seen.all.added.extend(one.all.added);
            seen.all.joins.extend(one.all.joins);
            seen.all.published.extend(one.all.published);
            seen.all.participants.extend(one.all.participants);
            seen.all.mids.extend(one.all.mids);
            seen.all.trickles.extend(one.all.trickles);
            seen.all.reconnects += one.all.reconnects;
        }
        let single = name.ends_with("single");
        assert!(slots.contains(&(true, SdpSlot::Offer)), "{name}");
        assert!(slots.contains(&(false, SdpSlot::Answer)), "{name}");
        assert!(
            seen.all
                .trickles
                .iter()
                .all(|(_, init)| init.contains("candidate"))
        );
        assert!(!seen.all.trickles.is_empty(), "{name}");
        assert!(!seen.all.participants.is_empty(), "{name}");
        if name == "json" {
            continue;
        }
        // A resume repeats its SDPs, and two peer connections have an offer from the server.
        assert!(slots.contains(&(true, SdpSlot::SyncOffer)), "{name}");
        assert!(slots.contains(&(true, SdpSlot::SyncAnswer)), "{name}");
        assert_eq!(slots.contains(&(false, SdpSlot::Offer)), !single, "{name}");
        assert!(!seen.all.mids.is_empty(), "{name}: mid_to_track_id");
        assert!(seen.all.reconnects >= 1, "{name}");
        assert!(!seen.all.published.is_empty(), "{name}");
        assert!(
            seen.all
                .added
                .iter()
                .any(|t| t.source == SOURCE_MICROPHONE && !t.cid.is_empty()),
            "{name}"
        );
        let join = &seen.all.joins[0];
        assert!(join.room_name.starts_with("cap-"), "{name}");
        assert_eq!(join.server_version, "1.13.5");
        assert_eq!(join.subscriber_primary, !single, "{name}");
        assert!(
            join.enabled_publish_codecs
                .contains(&"video/AV1".to_owned())
        );
        assert!(join.participant_sid.starts_with("PA_"));
        let wanted = if single { "/rtc/v1" } else { "/rtc" };
        assert!(paths.iter().all(|path| path == wanted), "{name}: {paths:?}");
    }
}

#[test]
fn sdps_of_real_clients_are_rewritten_line_by_line() {
    let touched = [
        "m=",
        "c=",
        "a=rtcp:",
        "a=ice-",
        "a=fingerprint:",
        "a=candidate:",
        "a=end-of-candidates",
        "a=sctp-init:",
    ];
    let rest = |text: &str| {
        text.lines()
            .filter(|line| !touched.iter().any(|prefix| line.starts_with(prefix)))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let mut count = 0;
    for name in ALL {
        for entry in golden(name) {
            for (slot, old) in round_trip(name, &entry).seen {
                count += 1;
                let sdp = Sdp::parse(&old).unwrap();
                assert!(sdp.creds().is_some(), "{name} {slot:?}");
                assert_eq!(sdp.fingerprints()[0].digest.len(), 32, "{name}");
                assert!(sdp.setup().is_some(), "{name}");
                assert_eq!(sdp.bundles().len(), 1, "{name}");
                let new = rewrite(&sdp, &ours());
                assert_eq!(
                    rest(&old),
                    rest(&new)
                        .into_iter()
                        .filter(|l| l != "a=ice-lite")
                        .collect::<Vec<_>>()
                );
                let read = Sdp::parse(&new).unwrap();
                assert_eq!(read.candidates().len(), 1, "{name} {slot:?}: {new}");
                assert!(read.candidates()[0].contains("203.0.113.77 7982"));
                assert_eq!(read.creds().unwrap(), ours().creds);
                assert!(read.ice_lite());
                // Whatever still names an address names ours or none, but for the origin.
                for line in new.lines().filter(|line| !line.starts_with("o=")) {
                    for foreign in ["192.0.2.", "fd00::", "127.0.0.1"] {
                        assert!(!line.contains(foreign), "{name}: {line}");
                    }
                }
                // The tracks are told as before.
                for (old, new) in sdp.media().iter().zip(read.media()) {
                    assert_eq!(old.rejected, new.rejected);
                    let plain = |m: &crate::sdp::Media| crate::sdp::Media {
                        port: 0,
                        ..m.clone()
                    };
                    assert_eq!(plain(old), plain(new), "{name}");
                }
                assert_eq!(rewrite(&read, &ours()), new);
            }
        }
    }
    assert!(count > 60, "{count} SDPs");
}
