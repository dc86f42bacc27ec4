//! One participant's session as signalling sees it: reads every message on its way, puts the
//! sidecar into each SDP, and says what media is to do.
//!
//! Credentials map one to one: for every generation of the client's ICE credentials the server is
//! told one of ours, and the other way round, so that a repeated SDP is rewritten to the same
//! text and an ICE restart of either side is an ICE restart of both legs.

mod hop;
mod speakers;
#[cfg(test)]
mod tests;
mod visit;
mod whip;

use crate::aic::EXTENSION_URI;
use crate::asked::{Asked, Request};
use crate::description::{
    Creds, DtlsRole, HostCandidate, LegDescription, PcDescription, Target, TrackRule,
};
use crate::ladder::{Rung, Rungs};
use crate::policy::{Mode, Policy};
use crate::sdp::{AicLine, Edit, Media, MediaSteer, Sdp, Setup, rewrite};
use crate::signal::{Frame, Participant, SignalError, Verdict, edit_request, edit_response};
use crate::steering::{Hop, MID_URI, down_rules, steer, up_rules};
use crate::tracks::Tracks;
use hop::{aic_extmaps, aic_pts, answered_aic, answered_extmaps, offered_aic, unanswered_id};
use speakers::Speakers;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use visit::{Opening, Visit};

/// Candidates of LiveKit's that are remembered for a peer connection: the newest. It has one or two for each of its
/// addresses, UDP and TCP.
const MAX_CANDIDATES: usize = 32;

/// Bytes of a candidate. With an IPv6 address, a related one and all extensions that libwebrtc and Pion know it has some 250.
const MAX_CANDIDATE: usize = 512;

/// A candidate of LiveKit's.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Candidate {
    /// Without its `ufrag`.
    text: String,
    /// The generation of ICE that it said it belongs to.
    ufrag: Option<String>,
}

/// What a session needs from outside.
pub trait Env {
    /// Fills `bytes` with cryptographically secure randomness.
    fn random(&mut self, bytes: &mut [u8]);
    /// Binds the sockets of a server leg; their advertised addresses.
    ///
    /// # Errors
    /// Why it cannot, in words for the log.
    fn bind_server_leg(&mut self, target: Target) -> Result<Vec<SocketAddr>, String>;
}

/// What does not change in a session's life.
#[derive(Debug, Clone)]
pub struct SessionConfig {
    /// Resolved for this participant.
    pub policy: Policy,
    /// Value of our `a=fingerprint`.
    pub fingerprint: String,
    /// Where clients of the session's worker dial.
    pub client_candidates: Vec<HostCandidate>,
    /// Our username fragments begin with it: it names the worker.
    pub ufrag_prefix: String,
    /// Rungs that our engine decodes.
    pub rungs: Rungs,
    /// Its models ([`AicLine::models`]).
    pub models: Option<u32>,
}

#[derive(Debug, Clone)]
struct Pc {
    client: LegDescription,
    server: LegDescription,
    server_candidates: Vec<HostCandidate>,
    /// M-sections as the client and as the server last wrote them.
    from_client: Vec<Media>,
    from_server: Vec<Media>,
    /// What the server last wrote, whole: a `sync_state` must say what it really said.
    server_text: String,
    steered: Vec<MediaSteer>,
    /// What each side was last told of the framed packets that we take, by mid.
    client_told: Vec<(String, AicLine)>,
    server_told: Vec<(String, AicLine)>,
    /// Of what the client receives, by mid.
    track_sids: HashMap<String, String>,
    /// Sids of the same.
    heard: HashSet<String>,
    changed: bool,
    /// What media was told last.
    told: Option<Box<PcDescription>>,
}

/// One participant's session. After every call, drain [`Session::poll_update`].
#[derive(Debug, Clone)]
pub struct Session {
    config: SessionConfig,
    pcs: [Option<Pc>; 2],
    /// The server's candidates, per target, from SDP and trickle.
    candidates: [VecDeque<Candidate>; 2],
    tracks: Tracks,
    speakers: Speakers,
    facts: Facts,
    sheds: bool,
}

/// What was learned of the session from its messages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// `PA_…`, by which the client resumes.
    pub participant_sid: String,
    /// The room, as LiveKit calls it.
    pub room: String,
    /// The participant, as LiveKit calls it.
    pub identity: String,
    /// Under that identity LiveKit has another participant, by its sid.
    pub replaced: bool,
    /// Client SDK as a LiveKit `ClientInfo.SDK` number; 0 unknown.
    pub sdk: i32,
    /// Its version.
    pub sdk_version: String,
    /// Either side said that the session is over for good.
    pub left: bool,
    /// The client speaks protojson.
    pub json: bool,
}

fn index(target: Target) -> usize {
    match target {
        Target::Publisher => 0,
        Target::Subscriber => 1,
    }
}

impl Session {
    /// A session of which nothing is known yet.
    #[must_use]
    pub fn new(config: SessionConfig) -> Self {
        Self {
            sheds: config.policy.mode != Mode::Off,
            config,
            pcs: [None, None],
            candidates: [VecDeque::new(), VecDeque::new()],
            tracks: Tracks::default(),
            speakers: Speakers::default(),
            facts: Facts::default(),
        }
    }

    /// What was learned.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// [`Session::open`] of a query alone.
    ///
    /// # Errors
    /// When it is not what LiveKit would take.
    pub fn query(&mut self, env: &mut dyn Env, query: &str) -> Result<Option<String>, SignalError> {
        let asked = Asked::read(&Request::of(query))?;
        self.open(env, &asked, None)
    }

    /// Edits the query of the signalling request: its `join_request` holds the first offer. `resumed` is the session that is to go
    /// on, if there is one; it stays as it is, and the SDP that the client tells of it is put back as it was.
    ///
    /// # Errors
    /// When it is not what LiveKit would take.
    pub fn open(
        &mut self,
        env: &mut dyn Env,
        asked: &Asked<'_>,
        resumed: Option<&Self>,
    ) -> Result<Option<String>, SignalError> {
        let Some(request) = asked.join_request() else {
            asked.version().clone_into(&mut self.facts.sdk_version);
            return Ok(None);
        };
        self.facts.sdk = request.info().sdk;
        self.facts
            .sdk_version
            .clone_from(&request.info().sdk_version);
        let visit = Visit { session: self, env };
        let new = request.edit(&mut Opening { visit, resumed })?;
        Ok(new.map(|new| asked.with_join_request(&new)).transpose()?)
    }

    /// Edits a message from the client.
    ///
    /// # Errors
    /// When it is malformed, or its SDP is.
    pub fn client_frame(
        &mut self,
        env: &mut dyn Env,
        frame: Frame<'_>,
    ) -> Result<Verdict, SignalError> {
        self.facts.json = matches!(frame, Frame::Text(_));
        edit_request(frame, &mut Visit { session: self, env })
    }

    /// Edits a message from the server.
    ///
    /// # Errors
    /// When it is malformed, or its SDP is.
    pub fn server_frame(
        &mut self,
        env: &mut dyn Env,
        frame: Frame<'_>,
    ) -> Result<Verdict, SignalError> {
        edit_response(frame, &mut Visit { session: self, env })
    }

    /// The engine's models are these now, and with them it decodes so much: from the next SDP on, that is what peers are told.
    pub fn set_models(&mut self, rungs: Rungs, models: u32) {
        self.config.rungs = rungs;
        self.config.models = Some(models);
    }

    /// Ends everything that needs no renegotiation: the room was switched off while the call runs.
    pub fn stop_shedding(&mut self) {
        self.sheds = false;
        for pc in self.pcs.iter_mut().flatten() {
            pc.changed = true;
        }
    }

    /// Forgets a peer connection whose legs are over.
    pub fn pc_closed(&mut self, target: Target) {
        self.pcs[index(target)] = None;
        self.candidates[index(target)].clear();
    }

    /// The next peer connection whose description changed.
    pub fn poll_update(&mut self) -> Option<PcDescription> {
        for target in [Target::Publisher, Target::Subscriber] {
            let at = index(target);
            if let Some(pc) = &mut self.pcs[at]
                && std::mem::take(&mut pc.changed)
            {
                let candidates = self.candidates[at].iter();
                pc.server.remote_candidates = candidates.map(|known| known.text.clone()).collect();
                let pc = self.pcs[at].as_ref()?;
                let description = self.describe(target, pc);
                if pc.told.as_deref() == Some(&description) {
                    continue;
                }
                if let Some(pc) = &mut self.pcs[at] {
                    pc.told = Some(Box::new(description.clone()));
                }
                return Some(description);
            }
        }
        None
    }

    /// Whose speech is coded on its way to the client, by the rules of a peer connection.
    #[must_use]
    pub fn speakers(&self, description: &PcDescription) -> BTreeSet<String> {
        let Some(pc) = &self.pcs[index(description.target)] else {
            return BTreeSet::new();
        };
        let coded = |rule: &&TrackRule| {
            rule.pack.is_some() || rule.restore.is_some() || rule.recode.is_some()
        };
        let rules = description.down.iter().filter(coded);
        rules
            .filter_map(|rule| {
                let track = pc.track_sids.get(&rule.mid).or_else(|| {
                    let mut media = pc.from_server.iter();
                    let media = media.find(|media| media.mid == rule.mid)?;
                    media.msid.as_ref().map(|(_, track)| track)
                })?;
                self.speakers.of(track).map(str::to_owned)
            })
            .collect()
    }

    fn describe(&self, target: Target, pc: &Pc) -> PcDescription {
        let policy = &self.config.policy;
        let from_client = Hop {
            policy,
            told: &pc.client_told,
        };
        let from_server = Hop {
            policy,
            told: &pc.server_told,
        };
        let mut up = if target == Target::Publisher {
            let (offer, answer) = (&pc.from_client, &pc.from_server);
            up_rules(&from_client, &self.tracks, offer, answer, &pc.steered)
        } else {
            Vec::new()
        };
        let mut down = down_rules(
            &from_server,
            &self.tracks,
            &pc.from_server,
            &pc.from_client,
            &pc.track_sids,
        );
        if !self.sheds {
            for rule in up.iter_mut().chain(&mut down) {
                rule.shed_red = None;
                rule.recode = None;
                // The stream stays framed: an SRTP index must not be used twice.
                if let Some(pack) = &mut rule.pack {
                    pack.rung = Rung::NATIVE;
                }
            }
            down.retain(|rule: &TrackRule| rule.pack.is_some() || rule.restore.is_some());
        }
        PcDescription {
            target,
            client: pc.client.clone(),
            server: pc.server.clone(),
            up,
            down,
            mid_ext_id: pc
                .from_client
                .iter()
                .find_map(|media| media.extmap_id(MID_URI))
                .and_then(|id| u8::try_from(id).ok()),
        }
    }

    fn creds(&self, env: &mut dyn Env, prefix: &str) -> Creds {
        Creds {
            ufrag: format!("{prefix}{}", ice_chars(env, 10)),
            pwd: ice_chars(env, 24),
        }
    }

    /// The peer connection of `target`, made where there was none.
    fn pc(&mut self, env: &mut dyn Env, target: Target) -> Result<&mut Pc, String> {
        let at = index(target);
        if self.pcs[at].is_none() {
            let addresses = env.bind_server_leg(target)?;
            let prefix = self.config.ufrag_prefix.clone();
            let leg = |local, short_tags| LegDescription {
                local,
                short_tags,
                aic_pts: (None, None),
                remote: None,
                fingerprints: Vec::new(),
                dtls: None,
                remote_candidates: Vec::new(),
                remote_lite: false,
                controlling: false,
            };
            // The client's wire is the one that costs.
            let lean = self.config.policy.mode != Mode::Off;
            let client = leg(self.creds(env, &prefix), lean);
            let mut server = leg(self.creds(env, ""), false);
            // The offerer controls (RFC 8445 section 6.1.1), and towards LiveKit we stand in for
            // the client.
            server.controlling = target == Target::Publisher;
            self.pcs[at] = Some(Pc {
                client,
                server,
                server_candidates: addresses
                    .into_iter()
                    .map(|addr| HostCandidate { addr, tcp: false })
                    .collect(),
                from_client: Vec::new(),
                from_server: Vec::new(),
                server_text: String::new(),
                steered: Vec::new(),
                client_told: Vec::new(),
                server_told: Vec::new(),
                track_sids: HashMap::new(),
                heard: HashSet::new(),
                changed: false,
                told: None,
            });
        }
        self.pcs[at].as_mut().ok_or_else(|| "no session".to_owned())
    }

    /// An SDP of the client's, on its way to the server.
    fn client_sdp(
        &mut self,
        env: &mut dyn Env,
        target: Target,
        text: &str,
        is_offer: bool,
    ) -> Result<String, String> {
        let sdp = Sdp::parse(text).map_err(|error| error.to_string())?;
        let fresh = self.creds(env, "");
        let on = self.config.policy.mode != Mode::Off;
        let ours = (self.config.rungs, self.config.models);
        let fingerprint = self.config.fingerprint.clone();
        let taken = (is_offer && self.config.policy.mode == Mode::Neural)
            .then(|| unanswered_id(&sdp))
            .flatten();
        if on && is_offer {
            self.tracks.bind(sdp.media());
        }
        let pc = self.pc(env, target)?;
        if let Some(creds) = sdp.creds() {
            if pc.client.remote.as_ref().is_some_and(|old| *old != creds) {
                pc.server.local = fresh;
            }
            pc.client.remote = Some(creds);
        }
        let theirs = sdp.fingerprints();
        if !theirs.is_empty() {
            pc.client.fingerprints = theirs;
        }
        if !is_offer && let Some((client, server)) = roles(sdp.setup()) {
            pc.client.dtls = Some(client);
            pc.server.dtls = Some(server);
        }
        pc.from_client = sdp.media().to_vec();
        pc.changed = true;
        let extmaps = match (on, is_offer) {
            (false, _) => Vec::new(),
            (true, true) => aic_extmaps(&sdp, taken),
            (true, false) => answered_extmaps(&pc.from_server),
        };
        pc.server_told = match (on, is_offer) {
            (false, _) => Vec::new(),
            (true, true) => offered_aic(&sdp, &extmaps, &pc.server_told, ours),
            (true, false) => answered_aic(&pc.from_server, ours),
        };
        pc.server.aic_pts = aic_pts(&pc.server_told, &pc.from_server);
        pc.client.aic_pts = aic_pts(&pc.client_told, &pc.from_client);
        Ok(rewrite(
            &sdp,
            &Edit {
                creds: pc.server.local.clone(),
                fingerprint,
                candidates: pc.server_candidates.clone(),
                ice_lite: false,
                setup: None,
                // An answer has it only where the server offered it, with the server's own id.
                strip_extmap_uri: (!is_offer).then_some(EXTENSION_URI),
                strip_extmap_id: taken,
                extmaps,
                aic: pc.server_told.clone(),
                media: Vec::new(),
            },
        ))
    }

    /// An SDP of the server's, on its way to the client.
    fn server_sdp(
        &mut self,
        env: &mut dyn Env,
        target: Target,
        text: &str,
        is_offer: bool,
        mids: &[(String, String)],
    ) -> Result<String, String> {
        let sdp = Sdp::parse(text).map_err(|error| error.to_string())?;
        let prefix = self.config.ufrag_prefix.clone();
        let fresh = self.creds(env, &prefix);
        if let Some(creds) = sdp.creds() {
            self.begin_generation(target, &creds);
        }
        for candidate in sdp.candidates() {
            self.add_candidate(target, &candidate);
        }
        let on = self.config.policy.mode != Mode::Off;
        let config = self.config.clone();
        self.pc(env, target)?;
        let tracks = &mut self.tracks;
        let Some(pc) = self.pcs[index(target)].as_mut() else {
            return Err("no session".to_owned());
        };
        if let Some(creds) = sdp.creds() {
            if pc.server.remote.as_ref().is_some_and(|old| *old != creds) {
                pc.client.local = fresh;
            }
            pc.server.remote = Some(creds);
        }
        let theirs = sdp.fingerprints();
        if !theirs.is_empty() {
            pc.server.fingerprints = theirs;
        }
        pc.server.remote_lite = sdp.ice_lite();
        if !is_offer && let Some((server, client)) = roles(sdp.setup()) {
            pc.server.dtls = Some(server);
            pc.client.dtls = Some(client);
        }
        pc.from_server = sdp.media().to_vec();
        text.clone_into(&mut pc.server_text);
        pc.track_sids.extend(mids.iter().cloned());
        let kept: HashSet<&str> = pc.from_server.iter().map(|m| m.mid.as_str()).collect();
        pc.track_sids.retain(|mid, _| kept.contains(mid.as_str()));
        let said = pc
            .from_server
            .iter()
            .filter_map(|media| media.msid.as_ref());
        let said = said.map(|(_, track)| track);
        pc.heard = pc.track_sids.values().chain(said).cloned().collect();
        pc.changed = true;
        let extmaps = match (on, is_offer) {
            (false, _) => Vec::new(),
            (true, true) => aic_extmaps(&sdp, None),
            (true, false) => answered_extmaps(&pc.from_client),
        };
        let ours = (config.rungs, config.models);
        pc.client_told = match (on, is_offer) {
            (false, _) => Vec::new(),
            (true, true) => offered_aic(&sdp, &extmaps, &pc.client_told, ours),
            (true, false) => answered_aic(&pc.from_client, ours),
        };
        pc.client.aic_pts = aic_pts(&pc.client_told, &pc.from_client);
        pc.server.aic_pts = aic_pts(&pc.server_told, &pc.from_server);
        if !is_offer {
            // AddTrack may have come after the offer, both in one `join_request`.
            if on {
                tracks.bind(&pc.from_client);
            }
            pc.steered = steer(&config.policy, tracks, &pc.from_client, &pc.from_server);
        }
        Ok(rewrite(
            &sdp,
            &Edit {
                creds: pc.client.local.clone(),
                fingerprint: config.fingerprint,
                candidates: config.client_candidates,
                ice_lite: true,
                setup: None,
                extmaps,
                aic: pc.client_told.clone(),
                strip_extmap_uri: Some(EXTENSION_URI),
                strip_extmap_id: None,
                media: pc.steered.clone(),
            },
        ))
    }

    /// The server's credentials are these: with others than it had, what belongs to those is of no use any more.
    fn begin_generation(&mut self, target: Target, creds: &Creds) {
        let Some(pc) = &mut self.pcs[index(target)] else {
            return;
        };
        if pc.server.remote.as_ref().is_some_and(|old| old != creds) {
            // Some may have been faster than the credentials that they belong to.
            self.candidates[index(target)]
                .retain(|candidate| candidate.ufrag.as_deref() == Some(creds.ufrag.as_str()));
            pc.changed = true;
        }
    }

    fn add_candidate(&mut self, target: Target, candidate: &str) {
        if candidate.len() > MAX_CANDIDATE {
            return;
        }
        let known = &mut self.candidates[index(target)];
        let new = generation(candidate);
        if let Some(old) = known.iter_mut().find(|old| old.text == new.text) {
            // The same address serves every generation.
            old.ufrag = new.ufrag;
            return;
        }
        if known.len() >= MAX_CANDIDATES {
            known.pop_front();
        }
        known.push_back(new);
        if let Some(pc) = &mut self.pcs[index(target)] {
            pc.changed = true;
        }
    }

    /// What these participants publish now. Only peer connections that carry what changed are described anew.
    fn tracks_changed(&mut self, participants: &[Participant]) {
        let pcs = &mut self.pcs;
        for participant in participants {
            self.tracks.participant(participant, |sid| {
                for pc in pcs.iter_mut().flatten() {
                    pc.changed |= pc.heard.contains(sid);
                }
            });
        }
    }
}

/// Roles of the leg to the answerer and of the leg to the offerer, from the answer's `a=setup`:
/// it passes unchanged, so the roles of the two legs mirror each other.
fn roles(setup: Option<Setup>) -> Option<(DtlsRole, DtlsRole)> {
    match setup? {
        Setup::Active => Some((DtlsRole::Server, DtlsRole::Client)),
        Setup::Passive => Some((DtlsRole::Client, DtlsRole::Server)),
        _ => None,
    }
}

/// A candidate apart from the generation that it belongs to. LiveKit's trickled ones name it; checks are told apart by
/// credentials.
fn generation(candidate: &str) -> Candidate {
    let mut words: Vec<&str> = candidate.split_ascii_whitespace().collect();
    let mut ufrag = None;
    if let Some(at) = words.iter().position(|word| *word == "ufrag") {
        let drained = words.drain(at..(at + 2).min(words.len()));
        ufrag = drained.skip(1).map(str::to_owned).next();
    }
    Candidate {
        text: words.join(" "),
        ufrag,
    }
}

/// Random ice-chars (RFC 8839 section 5.4), six bits each.
fn ice_chars(env: &mut dyn Env, count: usize) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = vec![0; count];
    env.random(&mut bytes);
    bytes
        .into_iter()
        .map(|byte| char::from(ALPHABET[usize::from(byte & 63)]))
        .collect()
}
