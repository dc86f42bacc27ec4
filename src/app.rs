//! The registry of sessions: joins what signalling hears with what media does.

mod whip;

use crate::config::Live;
use crate::fault::{Fault, What};
use crate::media::{self, Media, MediaEvent, SessionId};
use crate::signal::{
    self, By, Closed, Frame, Opened, Opening, Sessions, SignalSession, Verdict, Whip, WhipMessage,
};
use auralink_proto::description::Target;
use auralink_proto::policy::{Mode, Policy};
use auralink_proto::relay::Side;
use auralink_proto::session::{Env, Session, SessionConfig, resumed_sid};
use auralink_proto::signal as proto;
use auralink_proto::token;
use sha2::Digest;
use std::collections::{BTreeMap, HashMap};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A session that said goodbye keeps its media for so long, so that close_notify crosses.
const LEFT_GRACE: Duration = Duration::from_secs(1);

/// Everything that one session is in this process.
pub(crate) struct Cell {
    pub(crate) id: SessionId,
    pub(crate) worker: usize,
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
    /// The participant's own speech is coded.
    coded: bool,
    /// And the room was told so.
    disclosed: bool,
    sockets: Bound,
    /// A WHIP session, which has no signalling connection, holds its place among the sessions by it.
    whip: Option<tokio::sync::OwnedSemaphorePermit>,
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

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the status page: client SDK number and version, whether signalling is open.
    pub(crate) fn facts(&self) -> (i32, String, bool) {
        let inner = self.lock();
        let facts = inner.session.facts();
        (facts.sdk, facts.sdk_version.clone(), inner.signalling_open)
    }
}

/// The participant attribute by which `disclose: true` tells the room that a participant's speech is
/// coded; its value is the rung that policy wants.
const DISCLOSED: &str = "auralink.aic";

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
}

#[derive(Default)]
struct Registry {
    all: HashMap<SessionId, Arc<Cell>>,
    by_sid: HashMap<String, Arc<Cell>>,
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
        }))
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
        let worker = self.media.least_loaded();
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
                coded: false,
                disclosed: false,
                sockets: [Vec::new(), Vec::new()],
                whip: None,
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
        };
        let result = f(&mut inner.session, &mut env)?;
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
            let sockets = std::mem::take(&mut inner.sockets[at]);
            inner.open_pcs += u32::from(!sockets.is_empty());
            inner.coded |= description
                .up
                .iter()
                .any(|rule| rule.pack.is_some() || rule.restore.is_some());
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
                } => {
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
        let over = {
            let mut inner = cell.lock();
            inner.open_pcs = inner.open_pcs.saturating_sub(1);
            inner.ended_pcs += 1;
            inner.session.pc_closed(target);
            inner.open_pcs == 0 && !inner.signalling_open
        };
        if over {
            self.end(&cell);
        }
    }

    /// Puts a session that LiveKit has accepted among those that live.
    fn enter(&self, cell: &Arc<Cell>) {
        let known = self.registry().all.insert(cell.id, cell.clone());
        if known.is_none() {
            let opens = self.opens.of(cell.policy.mode);
            opens.fetch_add(1, Ordering::Relaxed);
        }
        tracing::info!(
            session = cell.id,
            room = %cell.room(),
            identity = %cell.identity_hash,
            mode = %cell.policy.mode,
            generation = cell.policy.generation,
            resumed = known.is_some(),
            "session"
        );
    }

    /// Frees everything of a session.
    fn end(&self, cell: &Arc<Cell>) {
        let sid = {
            let mut inner = cell.lock();
            if std::mem::replace(&mut inner.gone, true) {
                return;
            }
            inner.sockets = [Vec::new(), Vec::new()];
            inner.whip = None;
            inner.session.facts().participant_sid.clone()
        };
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
        tracing::info!(session = cell.id, age = ?cell.opened.elapsed(), "session ended");
    }

    /// Ends what needs no renegotiation in sessions whose room is `off` now.
    pub(crate) fn policy_changed(&self) {
        for cell in self.cells() {
            if cell.policy.mode == Mode::Off {
                continue;
            }
            let claims = &cell.claims;
            let now = self
                .live
                .policy(&claims.room, &claims.identity, &claims.api_key);
            if now.mode == Mode::Off {
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

/// A session as its resume would make it.
struct Resumed {
    session: Session,
    sockets: Bound,
    /// As it was when the copy was made: a peer connection that has ended since cannot be resumed.
    ended_pcs: u32,
}

/// What a session may do while it handles a message.
struct Binding<'a> {
    media: &'a Media,
    bound: &'a mut Bound,
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
        let bound = self
            .media
            .bind_server_leg()
            .map_err(|error| error.to_string())?;
        let (addresses, sockets) = bound.into_iter().unzip();
        self.bound[usize::from(target == Target::Subscriber)] = sockets;
        Ok(addresses)
    }
}

fn fault(error: &proto::SignalError, client: bool) -> Fault {
    let text = error.to_string();
    if client {
        Fault::client(What::Undecodable, text)
    } else {
        Fault::upstream(What::Undecodable, text)
    }
}

/// The sessions of a listener.
pub(crate) struct Door(pub(crate) Arc<App>);

impl Sessions for Door {
    fn open(&self, opening: &Opening<'_>) -> Result<Opened, Fault> {
        let app = &self.0;
        let claims = token::find(opening.authorization, opening.query)
            .map(token::claims)
            .unwrap_or_default();
        let resumed = resumed_sid(opening.query);
        // Every participant of a room knows the others' sids: only the one whose session it is
        // may touch it, and only once LiveKit has accepted the token (see `accepted`).
        let known = resumed
            .as_ref()
            .and_then(|sid| app.registry().by_sid.get(sid).cloned())
            .filter(|cell| cell.claims == claims);
        let unknown_resume = resumed.is_some() && known.is_none();
        let (cell, query, resumed) = if let Some(cell) = known {
            // The token is not checked yet: a copy of the session edits the query, and takes the
            // session's place if LiveKit accepts.
            let (mut copy, ended_pcs) = {
                let inner = cell.lock();
                (inner.session.clone(), inner.ended_pcs)
            };
            let mut sockets = Bound::default();
            let mut env = Binding {
                media: &app.media,
                bound: &mut sockets,
            };
            let query = copy.query(&mut env, opening.query);
            (
                cell,
                query,
                Some(Resumed {
                    session: copy,
                    sockets,
                    ended_pcs,
                }),
            )
        } else {
            let cell = app.make(&claims);
            let query = app.with(&cell, |session, env| session.query(env, opening.query));
            (cell, query, None)
        };
        Ok(Opened {
            query: query.map_err(|error| fault(&error, true))?,
            session: Box::new(Signal {
                app: app.clone(),
                cell,
                incarnation: 0,
                accepted: false,
                resumed,
                unknown_resume,
                sid: String::new(),
            }),
        })
    }

    fn whip(&self, opening: &Opening<'_>, message: WhipMessage<'_>) -> Result<Whip, Fault> {
        whip::prepare(&self.0, opening, message)
    }
}

/// One signalling connection of a session.
struct Signal {
    app: Arc<App>,
    cell: Arc<Cell>,
    incarnation: u64,
    accepted: bool,
    /// What becomes of the session that it resumes, if LiveKit accepts.
    resumed: Option<Resumed>,
    /// It resumes a session that this process does not know.
    unknown_resume: bool,
    sid: String,
}

impl Signal {
    fn note_sid(&mut self) {
        if self.sid.is_empty() {
            let sid = self.cell.lock().session.facts().participant_sid.clone();
            if !sid.is_empty() {
                self.app
                    .registry()
                    .by_sid
                    .insert(sid.clone(), self.cell.clone());
                self.sid = sid;
            }
        }
    }
}

impl SignalSession for Signal {
    fn id(&self) -> &str {
        &self.cell.name
    }

    fn accepted(&mut self) {
        self.accepted = true;
        {
            let mut inner = self.cell.lock();
            let outdated = |resumed: &Resumed| resumed.ended_pcs != inner.ended_pcs;
            if inner.gone || self.resumed.as_ref().is_some_and(outdated) {
                // It, or media of it, ended while LiveKit was being asked: the client has to join anew.
                self.unknown_resume = true;
                return;
            }
            if let Some(Resumed {
                session, sockets, ..
            }) = self.resumed.take()
            {
                inner.session = session;
                for (slot, bound) in inner.sockets.iter_mut().zip(sockets) {
                    if !bound.is_empty() {
                        *slot = bound;
                    }
                }
            }
            inner.incarnation += 1;
            self.incarnation = inner.incarnation;
            inner.signalling_open = true;
            inner.accepted = true;
            self.app.tell_media(&self.cell, &mut inner);
        }
        self.app.enter(&self.cell);
    }

    fn refused(&mut self, status: u16) {
        tracing::info!(
            session = self.cell.id,
            status,
            "the server refused the session"
        );
    }

    fn client_frame(&mut self, frame: Frame<'_>) -> Result<Verdict, Fault> {
        self.app
            .with(&self.cell, |session, env| {
                session.client_frame(env, frame.into())
            })
            .map(Verdict::from)
            .map_err(|error| fault(&error, true))
    }

    fn server_frame(&mut self, frame: Frame<'_>) -> Result<Verdict, Fault> {
        if std::mem::take(&mut self.unknown_resume) {
            // Its keys went with another process: the client has to join anew, as LiveKit itself
            // tells a client whose session it doesn't know.
            return Ok(self.leave(proto::ACTION_RECONNECT));
        }
        let verdict = self
            .app
            .with(&self.cell, |session, env| {
                session.server_frame(env, frame.into())
            })
            .map(Verdict::from)
            .map_err(|error| fault(&error, false))?;
        self.note_sid();
        Ok(verdict)
    }

    fn extra_frame(&mut self) -> Option<Verdict> {
        let cell = &self.cell;
        let mut inner = cell.lock();
        if !cell.policy.disclose || !inner.coded || inner.disclosed {
            return None;
        }
        inner.disclosed = true;
        if !cell.claims.can_update_own_metadata {
            tracing::warn!(
                session = cell.id,
                "disclose: the token lacks canUpdateOwnMetadata, so the room cannot be told that this participant's speech is coded"
            );
            return None;
        }
        let attributes = [(DISCLOSED, &*cell.policy.rung().to_string())];
        Some(if inner.session.facts().json {
            Verdict::Text(proto::update_attributes_json(&attributes))
        } else {
            Verdict::Binary(proto::update_attributes(&attributes))
        })
    }

    fn leave_frame(&mut self) -> Option<Verdict> {
        self.accepted.then(|| self.leave(proto::ACTION_RECONNECT))
    }

    fn closed(&mut self, how: Closed) {
        if !self.accepted {
            // Nothing was told to media, and what it prepared goes with it.
            return;
        }
        let left = {
            let mut inner = self.cell.lock();
            if inner.incarnation != self.incarnation || inner.gone {
                return;
            }
            inner.signalling_open = false;
            inner.session.facts().left || how.by == By::Drain
        };
        tracing::info!(session = self.cell.id, by = ?how.by, code = how.code, left, "signalling closed");
        let grace = if left {
            LEFT_GRACE
        } else {
            self.app.live.load().session.resume_grace
        };
        let (app, cell, incarnation) = (self.app.clone(), self.cell.clone(), self.incarnation);
        self.app.runtime.spawn(async move {
            tokio::time::sleep(grace).await;
            let resumed = cell.lock().incarnation != incarnation;
            if !resumed {
                app.end(&cell);
            }
        });
    }
}

impl Signal {
    fn leave(&self, action: i32) -> Verdict {
        let reason = proto::REASON_SERVER_SHUTDOWN;
        if self.cell.lock().session.facts().json {
            Verdict::Text(proto::leave_response_json(action, reason))
        } else {
            Verdict::Binary(proto::leave_response(action, reason))
        }
    }
}

impl<'a> From<signal::Frame<'a>> for proto::Frame<'a> {
    fn from(frame: signal::Frame<'a>) -> Self {
        match frame {
            signal::Frame::Binary(bytes) => Self::Binary(bytes),
            signal::Frame::Text(text) => Self::Text(text),
        }
    }
}

impl From<proto::Verdict> for Verdict {
    fn from(verdict: proto::Verdict) -> Self {
        match verdict {
            proto::Verdict::Keep => Self::Keep,
            proto::Verdict::Drop => Self::Drop,
            proto::Verdict::Binary(bytes) => Self::Binary(bytes),
            proto::Verdict::Text(text) => Self::Text(text),
        }
    }
}
