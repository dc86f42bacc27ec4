//! The registry of sessions: joins what signalling hears with what media does.

mod door;
#[cfg(test)]
mod tests;
mod whip;

use crate::audit::Note;
use crate::config::Live;
use crate::fault::{Fault, What};
use crate::media::{self, Media, MediaEvent, SessionId};
use crate::shown::Shown;
use crate::signal::Permit;
use auralink_proto::description::Target;
use auralink_proto::ladder::Rung;
use auralink_proto::policy::{Mode, Policy};
use auralink_proto::relay::Side;
use auralink_proto::session::{Env, Session, SessionConfig};
use auralink_proto::signal as proto;
use auralink_proto::token;
pub(crate) use door::Door;
use sha2::Digest;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// A session that said goodbye keeps its media for so long, so that close_notify crosses.
const LEFT_GRACE: Duration = Duration::from_secs(1);

/// Everything that one session is in this process.
pub(crate) struct Cell {
    pub(crate) id: SessionId,
    pub(crate) worker: usize,
    /// Given back when nobody knows the session any more.
    _place: media::Place,
    /// What the token says; in memory only, logs and pages have the hash.
    claims: token::Claims,
    pub(crate) identity_hash: String,
    pub(crate) policy: Policy,
    pub(crate) opened: Instant,
    name: String,
    inner: Mutex<Inner>,
}

struct Inner {
    session: Session,
    /// Counts signalling connections: a resume takes over from the one before.
    incarnation: u64,
    signalling_open: bool,
    /// LiveKit has answered 101 at least once.
    accepted: bool,
    open_pcs: u32,
    /// Peer connections that have ended.
    ended_pcs: u32,
    gone: bool,
    /// Legs that are up, until the first peer connection has both.
    legs_up: Vec<(Target, Side)>,
    joined: bool,
    /// The room was told that the participant's speech is coded.
    disclosed: bool,
    /// The last token that LiveKit accepted allows that.
    can_update_own_metadata: bool,
    /// Whose speech is coded on its way to the participant, by target, as the audit log was told.
    speakers: [BTreeSet<String>; 2],
    sockets: Bound,
    /// Its place among the sessions, until it is over.
    place: Option<Permit>,
    /// It is a WHIP session, which has no signalling connection.
    whip: bool,
}

impl Cell {
    /// The participant's identity: for the audit log alone.
    pub(crate) fn identity(&self) -> &str {
        &self.claims.identity
    }

    /// The room's name.
    pub(crate) fn room(&self) -> &str {
        &self.claims.room
    }

    /// Whether it is the session of the participant who has these claims: of the same room and identity, by LiveKit's own words
    /// where it has said them. By which key they are signed, and what they grant, may change in a session's life.
    fn is_of(&self, claims: &token::Claims) -> bool {
        let inner = self.lock();
        let facts = inner.session.facts();
        let (room, identity) = match facts.room.is_empty() {
            true => (&self.claims.room, &self.claims.identity),
            false => (&facts.room, &facts.identity),
        };
        !identity.is_empty() && (room, identity) == (&claims.room, &claims.identity)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// LiveKit's name of the participant, once it has said it.
    pub(crate) fn participant_sid(&self) -> Option<String> {
        let inner = self.lock();
        let sid = &inner.session.facts().participant_sid;
        (!sid.is_empty()).then(|| sid.clone())
    }

    /// For the status page: client SDK number and version, whether signalling is open.
    pub(crate) fn facts(&self) -> (i32, String, bool) {
        let inner = self.lock();
        let facts = inner.session.facts();
        (facts.sdk, facts.sdk_version.clone(), inner.signalling_open)
    }
}

/// Sessions opened since the start, by mode.
#[derive(Debug, Default)]
struct Opens {
    off: AtomicU64,
    lean: AtomicU64,
    neural: AtomicU64,
}

impl Opens {
    fn of(&self, mode: Mode) -> &AtomicU64 {
        match mode {
            Mode::Off => &self.off,
            Mode::Lean => &self.lean,
            Mode::Neural => &self.neural,
        }
    }
}

/// All sessions.
pub(crate) struct App {
    media: Arc<Media>,
    live: Arc<Live>,
    fingerprint: String,
    /// Makes identities in logs and on the status page unlinkable across restarts.
    salt: [u8; 16],
    next_id: AtomicU64,
    registry: Mutex<Registry>,
    opens: Opens,
    runtime: tokio::runtime::Handle,
    /// The audit log, where there is one.
    audit: OnceLock<tokio::sync::mpsc::UnboundedSender<Note>>,
}

#[derive(Default)]
struct Registry {
    all: HashMap<SessionId, Arc<Cell>>,
    by_sid: HashMap<String, Arc<Cell>>,
    /// The session that a participant joined last, by room and identity.
    newest: HashMap<(String, String), SessionId>,
}

/// Room and identity, which LiveKit has once at a time.
fn participant(cell: &Cell) -> (String, String) {
    (cell.claims.room.clone(), cell.claims.identity.clone())
}

impl App {
    /// A registry over running media.
    ///
    /// # Errors
    /// When the system has no randomness.
    pub(crate) fn new(
        media: Arc<Media>,
        live: Arc<Live>,
        fingerprint: String,
        runtime: tokio::runtime::Handle,
    ) -> Result<Arc<Self>, Fault> {
        let mut salt = [0; 16];
        getrandom::fill(&mut salt)
            .map_err(|error| Fault::internal(What::Defect, "no randomness").because(error))?;
        Ok(Arc::new(Self {
            media,
            live,
            fingerprint,
            salt,
            next_id: AtomicU64::new(1),
            registry: Mutex::default(),
            opens: Opens::default(),
            runtime,
            audit: OnceLock::new(),
        }))
    }

    /// From now on `notes` hears of every session and of what its peer connections have coded by their end.
    pub(crate) fn audited_by(&self, notes: tokio::sync::mpsc::UnboundedSender<Note>) {
        // There is one audit log in a process.
        let _ = self.audit.set(notes);
    }

    fn note(&self, note: impl FnOnce() -> Note) {
        if let Some(audit) = self.audit.get() {
            // It ends only with the process.
            let _ = audit.send(note());
        }
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Live sessions.
    pub(crate) fn cells(&self) -> Vec<Arc<Cell>> {
        self.registry().all.values().cloned().collect()
    }

    /// Sessions opened since the start, by mode.
    pub(crate) fn opened_by_mode(&self) -> BTreeMap<&'static str, u64> {
        [Mode::Off, Mode::Lean, Mode::Neural]
            .into_iter()
            .map(|mode| (mode.name(), self.opens.of(mode).load(Ordering::Relaxed)))
            .collect()
    }

    /// Whether the configuration in force has a session off that began otherwise.
    fn is_off_now(&self, cell: &Cell) -> bool {
        let claims = &cell.claims;
        let now = self
            .live
            .policy(&claims.room, &claims.identity, &claims.api_key);
        cell.policy.mode != Mode::Off && now.mode == Mode::Off
    }

    /// What a participant's own speech went through, a second ago at the latest: the rung of a hop, or enhancement.
    fn disclosure(&self, session: SessionId, rung: Rung) -> Option<String> {
        let snapshots = self.media.snapshots();
        let pcs = snapshots.iter().flat_map(|snapshot| &snapshot.pcs);
        let mut ups = pcs
            .filter(|pc| pc.session == session)
            .map(|pc| pc.hop[0].stats);
        if ups.clone().any(|up| up.coded + up.restored > 0) {
            return Some(rung.to_string());
        }
        ups.any(|up| up.recode.recoded > 0)
            .then(|| "enhanced".to_owned())
    }

    /// The session that a client who claims so much may resume, should LiveKit grant it.
    fn resumable(&self, sid: &str, claims: &token::Claims) -> Option<Arc<Cell>> {
        let cell = self.registry().by_sid.get(sid).cloned()?;
        // A WHIP session has no signalling.
        let signals = !cell.lock().whip;
        (signals && cell.is_of(claims)).then_some(cell)
    }

    fn identity_hash(&self, identity: &str) -> String {
        let mut hash = sha2::Sha256::new();
        hash.update(self.salt);
        hash.update(identity.as_bytes());
        hash.finalize()[..6]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    fn make(self: &Arc<Self>, claims: &token::Claims) -> Arc<Cell> {
        let policy = self
            .live
            .policy(&claims.room, &claims.identity, &claims.api_key);
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let place = self.media.place();
        let worker = place.worker();
        let session = Session::new(SessionConfig {
            policy,
            fingerprint: self.fingerprint.clone(),
            client_candidates: self.media.client_candidates(worker),
            ufrag_prefix: media::ufrag_prefix(worker),
            rungs: self.media.rungs(),
            models: self.media.models(),
        });
        Arc::new(Cell {
            id,
            worker,
            _place: place,
            claims: claims.clone(),
            identity_hash: self.identity_hash(&claims.identity),
            policy,
            opened: Instant::now(),
            name: id.to_string(),
            inner: Mutex::new(Inner {
                session,
                incarnation: 0,
                signalling_open: false,
                accepted: false,
                open_pcs: 0,
                ended_pcs: 0,
                gone: false,
                legs_up: Vec::new(),
                joined: false,
                disclosed: false,
                can_update_own_metadata: claims.can_update_own_metadata,
                speakers: Default::default(),
                sockets: [Vec::new(), Vec::new()],
                place: None,
                whip: false,
            }),
        })
    }

    /// Runs `f` on the session, then tells media what changed.
    fn with<T>(
        &self,
        cell: &Cell,
        f: impl FnOnce(&mut Session, &mut dyn Env) -> Result<T, proto::SignalError>,
    ) -> Result<T, proto::SignalError> {
        let mut inner = cell.lock();
        let inner = &mut *inner;
        let mut env = Binding {
            media: &self.media,
            bound: &mut inner.sockets,
            failed: None,
        };
        // A bundle may have been replaced while the call runs. One that is gone may come back, and until then reports say that it is.
        let rungs = self.media.rungs();
        if let Some(models) = self.media.models()
            && rungs.iter().any(Rung::is_neural)
        {
            inner.session.set_models(rungs, models);
        }
        let result = f(&mut inner.session, &mut env);
        let result = match (result, env.failed) {
            (Err(_), Some(why)) => Err(proto::SignalError::Unavailable(why)),
            (result, _) => result,
        }?;
        self.tell_media(cell, inner);
        Ok(result)
    }

    fn tell_media(&self, cell: &Cell, inner: &mut Inner) {
        // Nothing is told of a session that LiveKit has not accepted, or that is over.
        if !inner.accepted || inner.gone {
            return;
        }
        while let Some(description) = inner.session.poll_update() {
            let at = usize::from(description.target == Target::Subscriber);
            if let Some(audit) = self.audit.get() {
                let speakers = inner.session.speakers(&description);
                if inner.speakers[at] != speakers {
                    inner.speakers[at].clone_from(&speakers);
                    let all = inner.speakers.iter().flatten().cloned().collect();
                    // It ends only with the process.
                    let _ = audit.send(Note::Speakers(cell.id, all));
                }
            }
            let sockets = std::mem::take(&mut inner.sockets[at]);
            inner.open_pcs += u32::from(!sockets.is_empty());
            self.media
                .describe(cell.worker, cell.id, description, sockets);
        }
    }

    /// Takes what media workers report, until they are gone.
    pub(crate) async fn follow(
        self: Arc<Self>,
        mut events: tokio::sync::mpsc::UnboundedReceiver<MediaEvent>,
    ) {
        while let Some(event) = events.recv().await {
            match event {
                MediaEvent::Established {
                    session,
                    target,
                    side,
                    took,
                } => {
                    metrics::histogram!("auralink_leg_setup_seconds", "side" => side.name())
                        .record(took.as_secs_f64());
                    tracing::debug!(session, ?target, side = side.name(), ?took, "leg is up");
                    self.leg_up(session, target, side);
                }
                MediaEvent::Closed {
                    session,
                    target,
                    side,
                    reason,
                    hop,
                } => {
                    self.note(|| Note::Ended(session, target, hop));
                    metrics::counter!(
                        "auralink_legs_closed_total",
                        "side" => side.name(),
                        "reason" => reason.name(),
                    )
                    .increment(1);
                    tracing::info!(
                        session,
                        ?target,
                        side = side.name(),
                        ?reason,
                        "media is over"
                    );
                    self.pc_closed(session, target);
                }
            }
        }
    }

    fn leg_up(&self, session: SessionId, target: Target, side: Side) {
        let Some(cell) = self.registry().all.get(&session).cloned() else {
            return;
        };
        let mut inner = cell.lock();
        if inner.joined {
            return;
        }
        inner.legs_up.push((target, side));
        if inner.legs_up.contains(&(target, side.other())) {
            inner.joined = true;
            metrics::histogram!("auralink_join_seconds")
                .record(cell.opened.elapsed().as_secs_f64());
        }
    }

    fn pc_closed(&self, session: SessionId, target: Target) {
        let Some(cell) = self.registry().all.get(&session).cloned() else {
            return;
        };
        self.end_if(&cell, |inner| {
            inner.open_pcs = inner.open_pcs.saturating_sub(1);
            inner.ended_pcs += 1;
            inner.session.pc_closed(target);
            inner.open_pcs == 0 && !inner.signalling_open
        });
    }

    /// Puts a session that LiveKit has accepted among those that live.
    fn enter(&self, cell: &Arc<Cell>) {
        let known = self.registry().all.insert(cell.id, cell.clone());
        if known.is_none() {
            let opens = self.opens.of(cell.policy.mode);
            opens.fetch_add(1, Ordering::Relaxed);
            self.note(|| Note::Began(cell.clone()));
        }
        tracing::info!(
            session = cell.id,
            room = %Shown(cell.room()),
            identity = %cell.identity_hash,
            mode = %cell.policy.mode,
            generation = cell.policy.generation,
            resumed = known.is_some(),
            "session"
        );
    }

    /// The participant has joined anew: LiveKit has it once, so that nobody can come back to what it left behind, which would hold
    /// ports and memory for the rest of its grace.
    fn supersede(&self, cell: &Arc<Cell>) {
        let old = {
            let mut registry = self.registry();
            let old = registry.newest.insert(participant(cell), cell.id);
            old.filter(|old| *old != cell.id)
                .and_then(|old| registry.all.get(&old).cloned())
        };
        if let Some(old) = old {
            self.end_if(&old, |inner| !inner.signalling_open && !inner.whip);
        }
    }

    /// Frees everything of a session.
    fn end(&self, cell: &Arc<Cell>) {
        self.end_if(cell, |_| true);
    }

    /// Frees everything of a session where `over` says so, in one with the question: a resume comes before it or after.
    fn end_if(&self, cell: &Arc<Cell>, over: impl FnOnce(&mut Inner) -> bool) {
        let sid = {
            let mut inner = cell.lock();
            if !over(&mut inner) || inner.gone {
                return;
            }
            inner.gone = true;
            inner.sockets = [Vec::new(), Vec::new()];
            inner.place = None;
            inner.session.facts().participant_sid.clone()
        };
        self.note(|| Note::Gone(cell.id));
        self.media.close(cell.worker, cell.id);
        let mut registry = self.registry();
        registry.all.remove(&cell.id);
        if registry
            .by_sid
            .get(&sid)
            .is_some_and(|other| other.id == cell.id)
        {
            registry.by_sid.remove(&sid);
        }
        let participant = participant(cell);
        if registry.newest.get(&participant) == Some(&cell.id) {
            registry.newest.remove(&participant);
        }
        drop(registry);
        tracing::info!(session = cell.id, age = ?cell.opened.elapsed(), "session ended");
    }

    /// Ends what needs no renegotiation in sessions whose room is `off` now.
    pub(crate) fn policy_changed(&self) {
        for cell in self.cells() {
            if self.is_off_now(&cell) {
                let stopped = self.with(&cell, |session, _| {
                    session.stop_shedding();
                    Ok(())
                });
                if stopped.is_ok() {
                    tracing::info!(
                        session = cell.id,
                        "off by the new configuration: shedding ended"
                    );
                }
            }
        }
    }
}

/// Sockets of server legs that wait for the first description, by target.
type Bound = [Vec<UdpSocket>; 2];

/// What a session may do while it handles a message.
struct Binding<'a> {
    media: &'a Media,
    bound: &'a mut Bound,
    /// Why no socket could be had.
    failed: Option<String>,
}

impl Env for Binding<'_> {
    fn random(&mut self, bytes: &mut [u8]) {
        // App::new has proved that the system has randomness, and it does not lose it
        // (getrandom(2)). If it did, going on would mean credentials that anybody can guess.
        if let Err(error) = getrandom::fill(bytes) {
            tracing::error!(%error, "the system's randomness is gone; the process ends");
            std::process::exit(1);
        }
    }

    fn bind_server_leg(&mut self, target: Target) -> Result<Vec<SocketAddr>, String> {
        let bound = self.media.bind_server_leg().map_err(|error| {
            let why = error.to_string();
            self.failed = Some(why.clone());
            why
        })?;
        let (addresses, sockets) = bound.into_iter().unzip();
        self.bound[usize::from(target == Target::Subscriber)] = sockets;
        Ok(addresses)
    }
}
