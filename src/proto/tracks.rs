//! What is known of the tracks of a session, and which of them an m-section is about.

use crate::sdp::Media;
use crate::signal::{AddTrack, Track};
use std::collections::{HashMap, HashSet};

/// Entries beyond so many are not remembered; what isn't remembered is not steered.
const MAX_TRACKS: usize = 4096;

/// Codecs of a track beyond so many are none: LiveKit knows five for video.
const MAX_CODECS: usize = 8;

/// The tracks that the client publishes, by what they are called, and those of others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tracks {
    /// What the client publishes, by the id (`cid`) of AddTrackRequest.
    own: HashMap<String, AddTrack>,
    /// Other names of `own`: ids of further codecs, the sid, and what the SDP has in their place.
    names: HashMap<String, String>,
    /// Those of `own` that go by another name in the SDP.
    renamed: HashSet<String>,
    /// What others publish, by sid.
    pub(crate) others: HashMap<String, Track>,
}

impl Tracks {
    pub(crate) fn add_own(&mut self, mut track: AddTrack) {
        if self.own.len() >= MAX_TRACKS && !self.own.contains_key(&track.cid) {
            return;
        }
        // A track that is published once more gets a new transceiver, and in Firefox another name.
        if track.sid.is_empty() && self.renamed.remove(&track.cid) {
            self.names.retain(|_, cid| *cid != track.cid);
        }
        track.simulcast_cids.truncate(MAX_CODECS);
        for id in &track.simulcast_cids {
            name(&mut self.names, id, &track.cid);
        }
        self.own.insert(track.cid.clone(), track);
    }

    /// The server has taken a track: an SDP whose msid uses the sid in place of the cid is found by it as well.
    pub(crate) fn published(&mut self, cid: &str) {
        if let Some(own) = self.own.get(cid)
            && !own.sid.is_empty()
        {
            name(&mut self.names, &own.sid, cid);
        }
    }

    pub(crate) fn add_other(&mut self, track: Track) {
        if self.others.len() < MAX_TRACKS || self.others.contains_key(&track.sid) {
            self.others.insert(track.sid.clone(), track);
        }
    }

    /// What the client said of the track in an m-section of its offer.
    pub(crate) fn own_of(&self, offered: &Media) -> Option<&AddTrack> {
        self.named(id(offered)?)
    }

    fn named(&self, id: &str) -> Option<&AddTrack> {
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
        for media in offer.iter().filter(|media| media.direction.sends()) {
            let Some(id) = id(media).filter(|id| self.named(id).is_none()) else {
                continue;
            };
            let mut unmet = self.own.values().filter(|own| {
                own.kind == media.kind
                    && !met.contains(&own.cid)
                    && !self.renamed.contains(&own.cid)
            });
            let Some(first) = unmet.next() else {
                continue;
            };
            let facts = |own: &AddTrack| {
                let flags = (own.stereo, own.encrypted, own.disable_red, own.disable_dtx);
                (flags, own.source)
            };
            if unmet.all(|own| facts(own) == facts(first)) {
                let cid = first.cid.clone();
                name(&mut self.names, id, &cid);
                self.renamed.insert(cid);
            }
        }
    }
}

/// The track's id in `a=msid`.
fn id(media: &Media) -> Option<&str> {
    media.msid.as_ref().map(|(_, track)| track.as_str())
}

fn name(names: &mut HashMap<String, String>, name: &str, cid: &str) {
    if name != cid && names.len() < MAX_TRACKS * MAX_CODECS {
        names.insert(name.to_owned(), cid.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::description::MediaKind;
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
        tracks.add_own(announced("mic", SOURCE_MICROPHONE));
        tracks.bind(&offer(&["{x}"]));
        assert_eq!(found(&tracks, "{x}").as_deref(), Some("mic"));
        // What comes later is not the one that has a section.
        tracks.add_own(announced("music", SOURCE_SCREEN_SHARE_AUDIO));
        tracks.bind(&offer(&["{x}", "{y}"]));
        assert_eq!(found(&tracks, "{x}").as_deref(), Some("mic"));
        assert_eq!(found(&tracks, "{y}").as_deref(), Some("music"));
        // Nor is one that has its own name in the offer.
        tracks.add_own(announced("second", SOURCE_MICROPHONE));
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
            tracks.add_own(announced("mic", SOURCE_MICROPHONE));
            tracks.add_own(other);
            tracks.bind(&offer(&["{x}"]));
            assert_eq!(found(&tracks, "{x}"), None);
        }
        let mut tracks = Tracks::default();
        tracks.add_own(announced("mic", SOURCE_MICROPHONE));
        tracks.add_own(announced("second", SOURCE_MICROPHONE));
        tracks.bind(&offer(&["{x}", "{y}"]));
        assert_ne!(found(&tracks, "{x}"), found(&tracks, "{y}"));
        assert!(found(&tracks, "{x}").is_some());
    }

    #[test]
    fn only_what_sends_is_looked_for_and_of_its_kind() {
        let mut tracks = Tracks::default();
        tracks.add_own(announced("mic", SOURCE_MICROPHONE));
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
        tracks.add_own(announced("mic", SOURCE_MICROPHONE));
        tracks.bind(&offer(&["{x}"]));
        tracks.add_own(announced("mic", SOURCE_MICROPHONE));
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
        tracks.add_own(AddTrack {
            simulcast_cids: (0..100).map(|n| format!("codec {n}")).collect(),
            sid: "TR_1".to_owned(),
            ..announced("camera", SOURCE_MICROPHONE)
        });
        tracks.published("camera");
        for (id, known) in [("codec 0", true), ("codec 99", false), ("TR_1", true)] {
            assert_eq!(found(&tracks, id).is_some(), known, "{id}");
        }
    }
}
