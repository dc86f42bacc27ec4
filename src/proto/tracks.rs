//! What is known of the tracks of a session, and which of them an m-section is about.

use crate::description::MediaKind;
use crate::sdp::Media;
use crate::signal::{AddTrack, Participant, Track};
use std::collections::{HashMap, HashSet};

/// Tracks that a client has announced and not taken back. LiveKit names no limit; livekit-client publishes a camera, a
/// microphone and a screen with its sound, load tests and bridges some tens. Beyond so many the one announced first is forgotten,
/// and what isn't known is not steered.
const MAX_OWN: usize = 256;

/// Bytes of an id. RFC 8830 gives those in `a=msid` 64 characters, LiveKit makes its own of 15.
const MAX_ID: usize = 128;

/// Tracks of others: a room of 3,000 with a microphone each, and some cameras. What isn't remembered is not coded.
const MAX_OTHERS: usize = 4096;

/// Tracks that are known of one of the others, as many as of those whose speech the audit log names (`session/speakers.rs`):
/// people publish a handful, bridges some tens. One that announces more would otherwise take the places of all.
const MAX_PUBLISHED: usize = 64;

/// Codecs of a track beyond so many are none: LiveKit knows five for video.
const MAX_CODECS: usize = 8;

/// What is known of a track that the client publishes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Own {
    pub(crate) kind: MediaKind,
    pub(crate) source: i32,
    pub(crate) stereo: bool,
    pub(crate) encrypted: bool,
    pub(crate) disable_red: bool,
    pub(crate) disable_dtx: bool,
    cid: String,
    /// In AddTrackRequest, where a codec is added to a track.
    sid: String,
    /// What LiveKit called it when it took it.
    published: String,
    /// The lower, the sooner it was announced.
    turn: u64,
}

/// What is known of a track that others publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Other {
    pub(crate) source: i32,
    pub(crate) stereo: bool,
    pub(crate) encrypted: bool,
}

/// `ParticipantInfo.State` of one that has left.
const DISCONNECTED: i32 = 3;

/// The tracks that the client publishes, by what they are called, and those of others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tracks {
    /// What the client publishes, by the id (`cid`) of AddTrackRequest.
    own: HashMap<String, Own>,
    /// Other names of `own`: ids of further codecs, the sid, and what the SDP has in their place.
    names: HashMap<String, String>,
    /// Those of `own` that go by another name in the SDP.
    renamed: HashSet<String>,
    turn: u64,
    /// What others publish, by sid.
    others: HashMap<String, Other>,
    /// Sids of what each participant publishes, by the participant's.
    publishers: HashMap<String, Vec<String>>,
}

impl Tracks {
    pub(crate) fn add_own(&mut self, track: &AddTrack) {
        if track.cid.len() > MAX_ID || track.sid.len() > MAX_ID {
            return;
        }
        if self.own.len() >= MAX_OWN && !self.own.contains_key(&track.cid) {
            let first = self.own.values().min_by_key(|own| own.turn);
            if let Some(cid) = first.map(|own| own.cid.clone()) {
                self.forget_own(&cid);
            }
        }
        // A track that is published once more gets a new transceiver, and in Firefox another name.
        if track.sid.is_empty() && self.renamed.remove(&track.cid) {
            self.names.retain(|_, cid| *cid != track.cid);
        }
        self.turn += 1;
        let own = Own {
            kind: track.kind,
            source: track.source,
            stereo: track.stereo,
            encrypted: track.encrypted,
            disable_red: track.disable_red,
            disable_dtx: track.disable_dtx,
            cid: track.cid.clone(),
            sid: track.sid.clone(),
            published: String::new(),
            turn: self.turn,
        };
        let before = self.own.insert(track.cid.clone(), own);
        if !track.sid.is_empty()
            && let (Some(before), Some(own)) = (before, self.own.get_mut(&track.cid))
        {
            // A codec more; the track is the one that it was.
            own.published = before.published;
        }
        for id in track.simulcast_cids.iter().take(MAX_CODECS) {
            self.name(id, &track.cid);
        }
    }

    fn name(&mut self, name: &str, cid: &str) {
        if name != cid && name.len() <= MAX_ID && self.names.len() < MAX_OWN * MAX_CODECS {
            self.names.insert(name.to_owned(), cid.to_owned());
        }
    }

    /// The server has taken a track: an SDP whose msid uses the sid in place of the cid is found by it as well.
    pub(crate) fn published(&mut self, cid: &str, sid: &str) {
        let Some(own) = self.own.get_mut(cid) else {
            return;
        };
        if sid.len() <= MAX_ID {
            sid.clone_into(&mut own.published);
        }
        let announced = own.sid.clone();
        if !announced.is_empty() {
            self.name(&announced, cid);
        }
    }

    /// The server has let a track go.
    pub(crate) fn unpublished(&mut self, sid: &str) {
        // One that was announced once more meanwhile has no sid yet.
        let known = self.own.values().find(|own| own.published == sid);
        if let Some(cid) = known.filter(|_| !sid.is_empty()).map(|own| own.cid.clone()) {
            self.forget_own(&cid);
        }
    }

    fn forget_own(&mut self, cid: &str) {
        self.own.remove(cid);
        self.renamed.remove(cid);
        self.names.retain(|_, of| of != cid);
    }

    /// What a participant publishes now. Calls `changed` with the sid of each track of which something else is known than before.
    pub(crate) fn participant(&mut self, participant: &Participant, mut changed: impl FnMut(&str)) {
        let gone = participant.state == DISCONNECTED;
        let now: &[Track] = if gone { &[] } else { &participant.tracks };
        let now = now.get(..MAX_PUBLISHED).unwrap_or(now);
        let sids: HashSet<&str> = now.iter().map(|track| track.sid.as_str()).collect();
        let before = self.publishers.remove(&participant.sid).unwrap_or_default();
        for sid in &before {
            if !sids.contains(sid.as_str()) && self.others.remove(sid).is_some() {
                changed(sid);
            }
        }
        let mut publishes = Vec::new();
        for track in now.iter().filter(|track| track.sid.len() <= MAX_ID) {
            let other = Other {
                source: track.source,
                stereo: track.stereo,
                encrypted: track.encrypted,
            };
            let known = self.others.get(&track.sid).copied();
            if known.is_none() && self.others.len() >= MAX_OTHERS {
                continue;
            }
            publishes.push(track.sid.clone());
            if known != Some(other) {
                self.others.insert(track.sid.clone(), other);
                changed(&track.sid);
            }
        }
        if !publishes.is_empty() && participant.sid.len() <= MAX_ID {
            self.publishers.insert(participant.sid.clone(), publishes);
        }
    }

    /// What another publishes.
    pub(crate) fn other(&self, sid: &str) -> Option<Other> {
        self.others.get(sid).copied()
    }

    /// The participant is in another room.
    pub(crate) fn others_gone(&mut self) {
        self.others.clear();
        self.publishers.clear();
    }

    /// What the client said of the track in an m-section of its offer.
    pub(crate) fn own_of(&self, offered: &Media) -> Option<&Own> {
        self.named(id(offered)?)
    }

    fn named(&self, id: &str) -> Option<&Own> {
        self.own
            .get(id)
            .or_else(|| self.own.get(self.names.get(id)?))
    }

    /// Finds what an offer's sections mean whose tracks were announced by another id: in Firefox a track gets a new one when it is
    /// given to a transceiver. LiveKit takes such a section for any announced track of its kind that isn't published yet
    /// (`getPendingTrack`). So do we, where all that it may be are alike.
    pub(crate) fn bind(&mut self, offer: &[Media]) {
        let met: HashSet<String> = offer
            .iter()
            .filter_map(|media| Some(self.named(id(media)?)?.cid.clone()))
            .collect();
        for kind in [MediaKind::Audio, MediaKind::Video] {
            let sections = offer
                .iter()
                .filter(|m| m.kind == kind && m.direction.sends());
            let unnamed: Vec<&str> = sections
                .filter_map(|media| id(media).filter(|id| self.named(id).is_none()))
                .collect();
            if unnamed.is_empty() {
                continue;
            }
            let mut unmet: Vec<&Own> = self
                .own
                .values()
                .filter(|own| own.kind == kind)
                .filter(|own| !met.contains(&own.cid) && !self.renamed.contains(&own.cid))
                .collect();
            unmet.sort_unstable_by_key(|own| own.turn);
            let facts = |own: &Own| {
                let flags = (own.stereo, own.encrypted, own.disable_red, own.disable_dtx);
                (flags, own.source)
            };
            let alike = |pair: &[&Own]| matches!(pair, [one, other] if facts(one) == facts(other));
            if !unmet.windows(2).all(alike) {
                continue;
            }
            let cids: Vec<String> = unmet.iter().map(|own| own.cid.clone()).collect();
            for (id, cid) in unnamed.into_iter().zip(cids) {
                self.name(id, &cid);
                self.renamed.insert(cid);
            }
        }
    }
}

/// The track's id in `a=msid`.
fn id(media: &Media) -> Option<&str> {
    media.msid.as_ref().map(|(_, track)| track.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sdp::Direction;
    use crate::signal::{SOURCE_MICROPHONE, SOURCE_SCREEN_SHARE_AUDIO};

    fn announced(cid: &str, source: i32) -> AddTrack {
        AddTrack {
            cid: cid.to_owned(),
            kind: MediaKind::Audio,
            source,
            ..AddTrack::default()
        }
    }

    fn section(track: &str, direction: Direction) -> Media {
        Media {
            kind: MediaKind::Audio,
            direction,
            msid: Some(("-".to_owned(), track.to_owned())),
            ..Media::default()
        }
    }

    fn found(tracks: &Tracks, id: &str) -> Option<String> {
        let own = tracks.own_of(&section(id, Direction::SendOnly));
        own.map(|own| own.cid.clone())
    }

    fn offer(ids: &[&str]) -> Vec<Media> {
        ids.iter()
            .map(|id| section(id, Direction::SendOnly))
            .collect()
    }

    #[test]
    fn a_section_without_a_known_name_is_the_announced_track_that_no_other_has() {
        let mut tracks = Tracks::default();
        tracks.add_own(&announced("mic", SOURCE_MICROPHONE));
        tracks.bind(&offer(&["{x}"]));
        assert_eq!(found(&tracks, "{x}").as_deref(), Some("mic"));
        // What comes later is not the one that has a section.
        tracks.add_own(&announced("music", SOURCE_SCREEN_SHARE_AUDIO));
        tracks.bind(&offer(&["{x}", "{y}"]));
        assert_eq!(found(&tracks, "{x}").as_deref(), Some("mic"));
        assert_eq!(found(&tracks, "{y}").as_deref(), Some("music"));
        // Nor is one that has its own name in the offer.
        tracks.add_own(&announced("second", SOURCE_MICROPHONE));
        tracks.bind(&offer(&["{x}", "{y}", "second", "{z}"]));
        assert_eq!(found(&tracks, "{z}"), None);
    }

    #[test]
    fn of_tracks_that_differ_none_is_guessed() {
        let unlike = [
            announced("music", SOURCE_SCREEN_SHARE_AUDIO),
            AddTrack {
                stereo: true,
                ..announced("stereo", SOURCE_MICROPHONE)
            },
            AddTrack {
                encrypted: true,
                ..announced("encrypted", SOURCE_MICROPHONE)
            },
            AddTrack {
                disable_dtx: true,
                ..announced("no dtx", SOURCE_MICROPHONE)
            },
        ];
        for other in unlike {
            let mut tracks = Tracks::default();
            tracks.add_own(&announced("mic", SOURCE_MICROPHONE));
            tracks.add_own(&other);
            tracks.bind(&offer(&["{x}"]));
            assert_eq!(found(&tracks, "{x}"), None);
        }
        let mut tracks = Tracks::default();
        tracks.add_own(&announced("mic", SOURCE_MICROPHONE));
        tracks.add_own(&announced("second", SOURCE_MICROPHONE));
        tracks.bind(&offer(&["{x}", "{y}"]));
        assert_ne!(found(&tracks, "{x}"), found(&tracks, "{y}"));
        assert!(found(&tracks, "{x}").is_some());
    }

    #[test]
    fn only_what_sends_is_looked_for_and_of_its_kind() {
        let mut tracks = Tracks::default();
        tracks.add_own(&announced("mic", SOURCE_MICROPHONE));
        tracks.bind(&[section("{old}", Direction::Inactive)]);
        let video = Media {
            kind: MediaKind::Video,
            ..section("{camera}", Direction::SendOnly)
        };
        tracks.bind(&[video]);
        assert_eq!(found(&tracks, "{old}"), None);
        assert_eq!(found(&tracks, "{camera}"), None);
        tracks.bind(&offer(&["{new}"]));
        assert_eq!(found(&tracks, "{new}").as_deref(), Some("mic"));
    }

    #[test]
    fn a_track_that_is_published_once_more_gets_its_new_name() {
        let mut tracks = Tracks::default();
        tracks.add_own(&announced("mic", SOURCE_MICROPHONE));
        tracks.bind(&offer(&["{x}"]));
        tracks.add_own(&announced("mic", SOURCE_MICROPHONE));
        let again = [
            section("{x}", Direction::Inactive),
            section("{y}", Direction::SendOnly),
        ];
        tracks.bind(&again);
        assert_eq!(found(&tracks, "{y}").as_deref(), Some("mic"));
    }

    #[test]
    fn further_codecs_and_the_sid_are_names_too() {
        let mut tracks = Tracks::default();
        tracks.add_own(&AddTrack {
            simulcast_cids: (0..100).map(|n| format!("codec {n}")).collect(),
            sid: "TR_1".to_owned(),
            ..announced("camera", SOURCE_MICROPHONE)
        });
        tracks.published("camera", "TR_1");
        for (id, known) in [("codec 0", true), ("codec 99", false), ("TR_1", true)] {
            assert_eq!(found(&tracks, id).is_some(), known, "{id}");
        }
    }

    #[test]
    fn announcements_fill_nothing() {
        let mut tracks = Tracks::default();
        let long = "x".repeat(1 << 20);
        for n in 0..4096 {
            tracks.add_own(&AddTrack {
                name: long.clone(),
                simulcast_codecs: vec![long.clone()],
                simulcast_cids: (0..100).map(|c| format!("{n} {c}")).collect(),
                ..announced(&format!("track {n}"), SOURCE_MICROPHONE)
            });
            tracks.add_own(&announced(&format!("{n}{long}"), SOURCE_MICROPHONE));
        }
        assert_eq!(tracks.own.len(), MAX_OWN);
        let held = |text: &String| text.capacity();
        let own = tracks
            .own
            .values()
            .map(|own| own.cid.capacity() + own.sid.capacity());
        let names = tracks.names.iter().map(|(a, b)| held(a) + held(b));
        let bytes = own.chain(names).sum::<usize>();
        assert!(bytes < MAX_OWN * (1 + MAX_CODECS) * 2 * MAX_ID, "{bytes}");
        assert_eq!(found(&tracks, "track 0"), None);
        assert_eq!(found(&tracks, "track 4095").as_deref(), Some("track 4095"));
        assert_eq!(found(&tracks, "4095 0").as_deref(), Some("track 4095"));
    }

    #[test]
    fn what_is_unpublished_is_forgotten_unless_it_was_announced_again() {
        let mut tracks = Tracks::default();
        for n in 0..1000 {
            let sid = format!("TR_{n}");
            tracks.add_own(&announced("mic", SOURCE_MICROPHONE));
            tracks.published("mic", &sid);
            tracks.add_own(&announced("camera", SOURCE_MICROPHONE));
            tracks.published("camera", "TR_camera");
            tracks.unpublished(&sid);
            assert_eq!(found(&tracks, "mic"), None);
        }
        tracks.add_own(&announced("camera", SOURCE_MICROPHONE));
        tracks.unpublished("TR_camera");
        assert!(found(&tracks, "camera").is_some());
        tracks.unpublished("");
        assert_eq!((tracks.own.len(), tracks.names.len()), (1, 0));
    }

    fn others(sid: &str, state: i32, tracks: &[(&str, bool)]) -> Participant {
        let track = |(sid, muted): &(&str, bool)| Track {
            sid: (*sid).to_owned(),
            muted: *muted,
            ..Track::default()
        };
        Participant {
            sid: sid.to_owned(),
            state,
            tracks: tracks.iter().map(track).collect(),
            ..Participant::default()
        }
    }

    #[test]
    fn one_of_the_others_leaves_places_to_the_rest() {
        let mut tracks = Tracks::default();
        let sids: Vec<String> = (0..10_000).map(|n| format!("TR_{n}")).collect();
        let many = |from: usize| -> Vec<(&str, bool)> {
            sids[from..]
                .iter()
                .map(|sid| (sid.as_str(), false))
                .collect()
        };
        for from in [0, 32, 0] {
            tracks.participant(&others("PA_1", 2, &many(from)), |_| {});
            assert_eq!(tracks.others.len(), MAX_PUBLISHED);
            assert!(tracks.other(&sids[from]).is_some());
        }
        tracks.participant(&others("PA_2", 2, &[("mic", false)]), |_| {});
        assert!(tracks.other("mic").is_some());
        tracks.participant(&others("PA_1", 3, &many(0)), |_| {});
        assert_eq!((tracks.others.len(), tracks.publishers.len()), (1, 1));
    }

    #[test]
    fn of_others_only_what_changed_is_told_and_what_ended_is_forgotten() {
        let mut tracks = Tracks::default();
        let mut told = |participant: Participant| {
            let mut told = Vec::new();
            tracks.participant(&participant, |sid| told.push(sid.to_owned()));
            (told, tracks.others.len(), tracks.publishers.len())
        };
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let both = [("A", false), ("B", false)];
        assert_eq!(told(others("PA_1", 2, &both)), (names(&["A", "B"]), 2, 1));
        let muted = [("A", true), ("B", false)];
        assert_eq!(told(others("PA_1", 2, &muted)), (names(&[]), 2, 1));
        assert_eq!(told(others("PA_1", 2, &both[..1])), (names(&["B"]), 1, 1));
        assert_eq!(
            told(others("PA_2", 2, &[("C", false)])),
            (names(&["C"]), 2, 2)
        );
        assert_eq!(told(others("PA_1", 3, &both)), (names(&["A"]), 1, 1));
        for n in 0..10_000 {
            let (participant, track) = (format!("PA_x{n}"), format!("TR_{n}"));
            let (_, others, publishers) = told(others(&participant, 2, &[(&track, false)]));
            assert!(others <= MAX_OTHERS && publishers <= MAX_OTHERS);
        }
    }
}
