//! What a session does with each part of a signal message that concerns it.

use super::{Env, Session, index};
use crate::aic::EXTENSION_URI;
use crate::description::Target;
use crate::policy::Mode;
use crate::sdp::{Edit, Sdp, rewrite};
use crate::signal::{
    ACTION_RESUME, AddTrack, Join, JoinEdit, MAX_JOIN_REQUEST, Participant, RequestVisitor,
    ResponseVisitor, SdpSlot, Track,
};

/// A session and its environment for the time of one message.
pub(super) struct Visit<'a> {
    pub(super) session: &'a mut Session,
    pub(super) env: &'a mut dyn Env,
}

impl RequestVisitor for Visit<'_> {
    fn sdp(&mut self, slot: SdpSlot, sdp: &str) -> Result<Option<String>, String> {
        if sdp.is_empty() {
            return Ok(None);
        }
        match slot {
            SdpSlot::Offer => self
                .session
                .client_sdp(self.env, Target::Publisher, sdp, true)
                .map(Some),
            SdpSlot::Answer => self
                .session
                .client_sdp(self.env, Target::Subscriber, sdp, false)
                .map(Some),
            SdpSlot::SyncOffer | SdpSlot::SyncAnswer => Ok(self.session.sync_sdp(slot, sdp)),
        }
    }

    fn trickle(&mut self, _target: Target, _candidate_init: &str) -> bool {
        // The server's peer is the sidecar; the client's own addresses are none of its business.
        false
    }

    fn add_track(&mut self, track: AddTrack) {
        self.session.tracks.add_own(&track);
    }

    fn leave(&mut self) {
        self.session.facts.left = true;
    }
}

/// A session at the moment in which it, or a copy of it that resumes another, is asked for.
pub(super) struct Opening<'a> {
    pub(super) visit: Visit<'a>,
    /// The session that is to go on.
    pub(super) resumed: Option<&'a Session>,
}

/// Most m-sections of an offer to join with; the stock clients' have up to 8. Later ones may have as many as [`crate::sdp::MAX_MEDIA`].
const MAX_FIRST_MEDIA: usize = 64;

/// Most lines of such an offer; the stock clients' longest have some 600.
const MAX_FIRST_LINES: usize = 8192;

/// Refuses what would be much work for somebody whom LiveKit doesn't know yet.
///
/// # Errors
/// When a first offer is longer than a `join_request` may be, or has too many m-sections.
pub(super) fn check_first(sdp: &str) -> Result<(), String> {
    let is_media = |line: &&str| line.starts_with("m=");
    if sdp.split('\n').nth(MAX_FIRST_LINES).is_some() {
        return Err(format!(
            "an offer to join with has more than {MAX_FIRST_LINES} lines"
        ));
    }
    if sdp.len() > MAX_JOIN_REQUEST {
        return Err(format!(
            "an offer to join with is longer than {MAX_JOIN_REQUEST} bytes"
        ));
    }
    if sdp
        .split('\n')
        .filter(is_media)
        .nth(MAX_FIRST_MEDIA)
        .is_some()
    {
        return Err(format!(
            "an offer to join with has more than {MAX_FIRST_MEDIA} m-sections"
        ));
    }
    Ok(())
}

impl RequestVisitor for Opening<'_> {
    fn sdp(&mut self, slot: SdpSlot, sdp: &str) -> Result<Option<String>, String> {
        check_first(sdp)?;
        match (slot, self.resumed) {
            (SdpSlot::SyncOffer | SdpSlot::SyncAnswer, Some(resumed)) => {
                Ok(resumed.sync_sdp(slot, sdp))
            }
            _ => RequestVisitor::sdp(&mut self.visit, slot, sdp),
        }
    }

    fn trickle(&mut self, target: Target, candidate_init: &str) -> bool {
        RequestVisitor::trickle(&mut self.visit, target, candidate_init)
    }

    fn add_track(&mut self, track: AddTrack) {
        self.visit.add_track(track);
    }
}

impl Session {
    /// SDP in a `sync_state`: the server's own is put back as it really was, the client's is
    /// rewritten as it was when it passed.
    fn sync_sdp(&self, slot: SdpSlot, text: &str) -> Option<String> {
        let sdp = Sdp::parse(text).ok()?;
        let dual = self.pcs[index(Target::Subscriber)].is_some();
        let pc = self.pcs[index(if dual {
            Target::Subscriber
        } else {
            Target::Publisher
        })]
        .as_ref()?;
        let from_server = dual == (slot == SdpSlot::SyncOffer);
        if from_server {
            return Some(pc.server_text.clone());
        }
        Some(rewrite(
            &sdp,
            &Edit {
                creds: pc.server.local.clone(),
                fingerprint: self.config.fingerprint.clone(),
                candidates: pc.server_candidates.clone(),
                ice_lite: false,
                setup: None,
                extmaps: Vec::new(),
                aic: Vec::new(),
                strip_extmap_uri: Some(EXTENSION_URI),
                strip_extmap_id: None,
                media: Vec::new(),
            },
        ))
    }
}

impl ResponseVisitor for Visit<'_> {
    fn sdp(
        &mut self,
        slot: SdpSlot,
        sdp: &str,
        mids: &[(String, String)],
    ) -> Result<Option<String>, String> {
        if sdp.is_empty() {
            return Ok(None);
        }
        let (target, is_offer) = match slot {
            SdpSlot::Offer | SdpSlot::SyncOffer => (Target::Subscriber, true),
            SdpSlot::Answer | SdpSlot::SyncAnswer => (Target::Publisher, false),
        };
        self.session
            .server_sdp(self.env, target, sdp, is_offer, mids)
            .map(Some)
    }

    fn trickle(&mut self, target: Target, candidate_init: &str) -> bool {
        let init: Option<serde_json::Value> = serde_json::from_str(candidate_init).ok();
        if let Some(candidate) = init
            .as_ref()
            .and_then(|init| init.get("candidate"))
            .and_then(serde_json::Value::as_str)
            && !candidate.is_empty()
        {
            self.session.add_candidate(target, candidate);
        }
        false
    }

    fn join(&mut self, join: Join) -> JoinEdit {
        let session = &mut *self.session;
        let facts = &mut session.facts;
        facts.participant_sid.clone_from(&join.participant_sid);
        facts.room.clone_from(&join.room_name);
        facts.identity.clone_from(&join.identity);
        session.tracks.others_gone();
        session.speakers = Default::default();
        for participant in &join.other_participants {
            session.speakers.set(participant);
        }
        session.tracks_changed(&join.other_participants);
        let wanted = session
            .config
            .policy
            .video
            .filter(|_| session.config.policy.mode != Mode::Off)
            .and_then(|video| video.codec.mime());
        let has = |mime: &str| {
            join.enabled_publish_codecs
                .iter()
                .any(|enabled| enabled.eq_ignore_ascii_case(mime))
        };
        // A server that doesn't have the codec would leave the client with none.
        let keep_publish_codecs = wanted.filter(|mime| has(mime)).map(|mime| {
            join.enabled_publish_codecs
                .iter()
                .filter(|enabled| {
                    !enabled.to_ascii_lowercase().starts_with("video/")
                        || enabled.eq_ignore_ascii_case(mime)
                })
                .cloned()
                .collect()
        });
        JoinEdit {
            keep_publish_codecs,
        }
    }

    fn participants(&mut self, participants: Vec<Participant>) {
        for participant in &participants {
            self.session.speakers.set(participant);
            let facts = &mut self.session.facts;
            // That one of the same identity has gone says nothing of who is there.
            if participant.has_gone() {
                continue;
            }
            if participant.identity == facts.identity && !facts.identity.is_empty() {
                facts.replaced = participant.sid != facts.participant_sid;
            }
        }
        self.session.tracks_changed(&participants);
    }

    fn track_published(&mut self, cid: &str, track: Track) {
        self.session.tracks.published(cid, &track.sid);
    }

    fn track_unpublished(&mut self, sid: &str) {
        self.session.tracks.unpublished(sid);
    }

    fn room_moved(&mut self, room_name: &str) {
        room_name.clone_into(&mut self.session.facts.room);
        self.session.tracks.others_gone();
    }

    fn leave(&mut self, action: i32, _reason: i32) {
        self.session.facts.left = action != ACTION_RESUME;
    }
}
