//! Who speaks in which track, as LiveKit tells it: for the audit log, which has to say whose speech was coded on its way to a listener.

use crate::signal::Participant;
use std::collections::HashMap;

/// Participants whose tracks are remembered; rooms of real-time speech are smaller.
const MAX_PARTICIPANTS: usize = 4096;

/// Tracks that are remembered of each.
const MAX_TRACKS: usize = 64;

/// `ParticipantInfo.State.DISCONNECTED`.
const DISCONNECTED: i32 = 3;

/// Whose a track is.
#[derive(Debug, Clone)]
struct Speaker {
    /// Of the participant: one who joins again has the same identity and another sid.
    sid: String,
    identity: String,
}

/// Speakers by track sid.
#[derive(Debug, Clone, Default)]
pub(super) struct Speakers {
    by_track: HashMap<String, Speaker>,
    /// Track sids by the participant's. Not by its identity: that the former self of one who joined again has left is often told after
    /// the new one came.
    tracks: HashMap<String, Vec<String>>,
}

impl Speakers {
    /// What a participant publishes now; nothing, once it is gone.
    pub(super) fn set(&mut self, participant: &Participant) {
        let Participant {
            sid: own,
            identity,
            tracks,
            ..
        } = participant;
        for track in self.tracks.remove(own).into_iter().flatten() {
            // Another participant may have taken it over.
            if self.by_track.get(&track).is_some_and(|s| s.sid == *own) {
                self.by_track.remove(&track);
            }
        }
        if participant.state == DISCONNECTED
            || tracks.is_empty()
            || self.tracks.len() >= MAX_PARTICIPANTS
        {
            return;
        }
        let sids: Vec<String> = tracks
            .iter()
            .map(|track| track.sid.clone())
            .take(MAX_TRACKS)
            .collect();
        for sid in &sids {
            let speaker = Speaker {
                sid: own.clone(),
                identity: identity.clone(),
            };
            self.by_track.insert(sid.clone(), speaker);
        }
        self.tracks.insert(own.clone(), sids);
    }

    /// Whose track it is.
    pub(super) fn of(&self, track: &str) -> Option<&str> {
        self.by_track.get(track).map(|s| s.identity.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signal::Track;

    fn participant(identity: &str, state: i32, sids: &[&str]) -> Participant {
        Participant {
            sid: format!("PA_{identity}"),
            identity: identity.to_owned(),
            state,
            tracks: sids
                .iter()
                .map(|sid| Track {
                    sid: (*sid).to_owned(),
                    ..Track::default()
                })
                .collect(),
            ..Participant::default()
        }
    }

    #[test]
    fn what_ended_is_forgotten() {
        let mut speakers = Speakers::default();
        speakers.set(&participant("anna", 2, &["TR_1", "TR_2"]));
        speakers.set(&participant("bert", 2, &["TR_3"]));
        assert_eq!(speakers.of("TR_2"), Some("anna"));
        speakers.set(&participant("anna", 2, &["TR_2"]));
        assert_eq!(
            (speakers.of("TR_1"), speakers.of("TR_2")),
            (None, Some("anna"))
        );
        speakers.set(&participant("anna", DISCONNECTED, &["TR_2"]));
        speakers.set(&participant("bert", 2, &[]));
        assert!(speakers.by_track.is_empty() && speakers.tracks.is_empty());
    }

    #[test]
    fn who_joins_again_keeps_the_new_tracks_when_the_former_self_leaves() {
        let mut speakers = Speakers::default();
        let before = participant("anna", 2, &["TR_1", "TR_2"]);
        let again = Participant {
            sid: "PA_again".to_owned(),
            ..participant("anna", 2, &["TR_2", "TR_3"])
        };
        speakers.set(&before);
        speakers.set(&again);
        for tracks in [before.tracks.clone(), Vec::new()] {
            speakers.set(&Participant {
                state: DISCONNECTED,
                tracks,
                ..before.clone()
            });
            assert_eq!(speakers.of("TR_1"), None);
            assert_eq!(speakers.of("TR_2"), Some("anna"));
            assert_eq!(speakers.of("TR_3"), Some("anna"));
        }
        speakers.set(&Participant {
            state: DISCONNECTED,
            ..again
        });
        assert!(speakers.by_track.is_empty() && speakers.tracks.is_empty());
    }

    #[test]
    fn a_room_of_any_size_takes_bounded_memory() {
        let mut speakers = Speakers::default();
        let sids: Vec<String> = (0..1000).map(|n| format!("TR_{n}")).collect();
        let sids: Vec<&str> = sids.iter().map(String::as_str).collect();
        for n in 0..MAX_PARTICIPANTS + 10 {
            speakers.set(&participant(&format!("p{n}"), 2, &sids));
        }
        assert_eq!(speakers.tracks.len(), MAX_PARTICIPANTS);
        assert!(
            speakers
                .tracks
                .values()
                .all(|sids| sids.len() <= MAX_TRACKS)
        );
    }
}
