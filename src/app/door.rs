//! What signalling sees of the registry: a session for each participant who dials.

use super::{App, Cell, LEFT_GRACE, whip};
use crate::fault::{Fault, What};
use crate::shown::Shown;
use crate::signal::{
    self, By, Closed, Frame, Opened, Opening, Permit, Sessions, SignalSession, Verdict, Whip,
    WhipMessage,
};
use auralink_proto::asked::{Asked, Request};
use auralink_proto::signal as proto;
use hyper::header::{self, HeaderValue};
use std::sync::Arc;

/// The participant attribute by which `disclose: true` tells the room that a participant's speech is
/// coded; its value is the rung that policy wants.
const DISCLOSED: &str = "auralink.aic";

pub(super) fn fault(error: &proto::SignalError, client: bool) -> Fault {
    let text = error.to_string();
    if matches!(error, proto::SignalError::Unavailable(_)) {
        let detail = "the sidecar has no socket for the media of one more session; try again";
        Fault::internal(What::Descriptors, detail).because(text)
    } else if client {
        Fault::client(What::Undecodable, text)
    } else {
        Fault::upstream(What::Undecodable, text)
    }
}

/// The header fields by which LiveKit knows who asks.
pub(super) struct Fields<'a> {
    authorization: Vec<&'a [u8]>,
    content_type: Vec<&'a [u8]>,
}

impl<'a> Fields<'a> {
    pub(super) fn of(opening: &Opening<'a>) -> Self {
        let headers = opening.headers;
        let values = |name| {
            let values = headers.get_all(name).iter();
            values.map(HeaderValue::as_bytes).collect()
        };
        Self {
            authorization: values(header::AUTHORIZATION),
            content_type: values(header::CONTENT_TYPE),
        }
    }

    pub(super) fn request<'b>(&'b self, query: &'b str) -> Request<'b> {
        Request {
            query,
            authorization: &self.authorization,
            content_type: &self.content_type,
        }
    }
}

/// The sessions of a listener.
pub(crate) struct Door(pub(crate) Arc<App>);

impl Sessions for Door {
    fn open(&self, opening: &Opening<'_>) -> Result<Opened, Fault> {
        let app = &self.0;
        let fields = Fields::of(opening);
        let asked = Asked::read(&fields.request(opening.query)).map_err(|e| fault(&e, true))?;
        let claims = asked.claims().cloned().unwrap_or_default();
        // The claims are not checked yet. So a resume gets a session of its own, which edits its query, and the one that is to go on
        // stays as it is until the server's first message says that it does.
        let cell = app.make(&claims);
        let resumes = asked.resumes().map(|sid| app.resumable(sid, &claims));
        let query = {
            let resumed = resumes.as_ref().and_then(Option::as_ref);
            let resumed = resumed.map(|cell| cell.lock());
            let resumed = resumed.as_ref().map(|inner| &inner.session);
            app.with(&cell, |session, env| session.open(env, &asked, resumed))
        };
        Ok(Opened {
            query: query.map_err(|error| fault(&error, true))?,
            session: Box::new(Signal {
                app: app.clone(),
                cell,
                resumes,
                readable: asked.claims().is_some(),
                phase: Phase::Asked,
                incarnation: 0,
                sid: String::new(),
                place: None,
            }),
        })
    }

    fn whip(&self, opening: &Opening<'_>, message: WhipMessage<'_>) -> Result<Whip, Fault> {
        whip::prepare(&self.0, opening, message)
    }
}

/// How far a signalling connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The server has not answered.
    Asked,
    /// It has accepted a client who wants to resume; its first message tells whether that is granted.
    Resuming,
    /// The connection is that of `cell`.
    Live,
    /// It is over.
    Over,
}

/// One signalling connection of a session.
struct Signal {
    app: Arc<App>,
    cell: Arc<Cell>,
    /// The client wants to resume: this session, if there is one.
    resumes: Option<Option<Arc<Cell>>>,
    /// The token could be read.
    readable: bool,
    phase: Phase,
    incarnation: u64,
    sid: String,
    /// Until it is the session's.
    place: Option<Permit>,
}

impl Signal {
    /// Makes the connection that of its session. False: the session is over.
    fn take(&mut self) -> bool {
        {
            let mut inner = self.cell.lock();
            // A peer connection that has ended here can't go on at the server.
            if inner.gone || inner.ended_pcs > 0 || inner.session.facts().left {
                return false;
            }
            inner.incarnation += 1;
            self.incarnation = inner.incarnation;
            inner.signalling_open = true;
            inner.accepted = true;
            // A session that goes on gives back the place that it has had.
            inner.place = self.place.take();
            // The configuration may have changed while LiveKit was being asked.
            if self.app.is_off_now(&self.cell) {
                inner.session.stop_shedding();
            }
            self.app.tell_media(&self.cell, &mut inner);
        }
        self.phase = Phase::Live;
        self.app.enter(&self.cell);
        true
    }

    /// The server's first message to a client who wants to resume. `None`: it passes.
    fn resume(&mut self, frame: proto::Frame<'_>) -> Result<Option<Verdict>, Fault> {
        match proto::answer(frame).map_err(|error| fault(&error, false))? {
            proto::Answer::Left => return Ok(None),
            // The server began anew with it, and so do we.
            proto::Answer::Joined => {
                self.take();
                return Ok(None);
            }
            proto::Answer::Resumed => {}
        }
        // The server has checked the token, and by it the client is the participant whose session this is.
        if let Some(known) = self.resumes.take().flatten() {
            let asked = std::mem::replace(&mut self.cell, known);
            if self.take() {
                let grants = &asked.claims;
                self.cell.lock().can_update_own_metadata = grants.can_update_own_metadata;
                return Ok(None);
            }
        }
        Ok(Some(self.join_anew(frame)))
    }

    /// Tells the client that its session is not here, as LiveKit does that of a session which it doesn't know.
    fn join_anew(&mut self, like: proto::Frame<'_>) -> Verdict {
        self.phase = Phase::Over;
        let json = matches!(like, proto::Frame::Text(_));
        leave(proto::ACTION_RECONNECT, json)
    }

    /// Whether the server has the client for whom its token says that it is.
    fn check_join(&self) -> bool {
        let inner = self.cell.lock();
        let (facts, claims) = (inner.session.facts(), &self.cell.claims);
        facts.room == claims.room && facts.identity == claims.identity
    }

    fn note_sid(&mut self) -> Result<(), Fault> {
        if !self.sid.is_empty() {
            return Ok(());
        }
        let sid = self.cell.lock().session.facts().participant_sid.clone();
        if sid.is_empty() {
            return Ok(());
        }
        if self.incarnation == 1 && !self.check_join() {
            self.phase = Phase::Over;
            self.app.end(&self.cell);
            let detail =
                "the media server takes the client for another participant than its token says";
            return Err(Fault::upstream(What::BadAnswer, detail));
        }
        self.app
            .registry()
            .by_sid
            .insert(sid.clone(), self.cell.clone());
        self.app.supersede(&self.cell);
        tracing::debug!(session = self.cell.id, sid = %Shown(&sid), "participant");
        self.sid = sid;
        Ok(())
    }
}

impl SignalSession for Signal {
    fn id(&self) -> &str {
        &self.cell.name
    }

    fn accepted(&mut self, place: Option<Permit>) {
        self.place = place;
        if !self.readable {
            self.phase = Phase::Over;
        } else if self.resumes.is_some() {
            self.phase = Phase::Resuming;
        } else {
            self.take();
        }
    }

    fn refused(&mut self, status: u16) {
        // Anybody can have that written: at debug.
        tracing::debug!(
            session = self.cell.id,
            status,
            "the server refused the session"
        );
    }

    fn client_frame(&mut self, frame: Frame<'_>) -> Result<Verdict, Fault> {
        if self.phase == Phase::Over {
            return Err(over());
        }
        self.app
            .with(&self.cell, |session, env| {
                session.client_frame(env, frame.into())
            })
            .map(Verdict::from)
            .map_err(|error| fault(&error, true))
    }

    fn server_frame(&mut self, frame: Frame<'_>) -> Result<Verdict, Fault> {
        match self.phase {
            Phase::Over if !self.readable => {
                let detail = "the media server accepted a token that can't be read";
                return Err(Fault::upstream(What::BadAnswer, detail));
            }
            Phase::Over => return Err(over()),
            Phase::Resuming => {
                if let Some(verdict) = self.resume(frame.into())? {
                    return Ok(verdict);
                }
            }
            Phase::Asked | Phase::Live => {}
        }
        let verdict = self
            .app
            .with(&self.cell, |session, env| {
                session.server_frame(env, frame.into())
            })
            .map(Verdict::from)
            .map_err(|error| fault(&error, false))?;
        if self.phase == Phase::Live {
            self.note_sid()?;
            if self.incarnation > 1 && self.cell.lock().session.facts().replaced {
                // The server knows participants by their identity, not by the sid that a resume names: this one is another by now.
                self.app.end(&self.cell);
                return Ok(self.join_anew(frame.into()));
            }
        }
        Ok(verdict)
    }

    fn extra_frame(&mut self) -> Option<Verdict> {
        if self.phase != Phase::Live {
            return None;
        }
        let cell = &self.cell;
        let mut inner = cell.lock();
        if !cell.policy.disclose || inner.disclosed {
            return None;
        }
        let what = self.app.disclosure(cell.id, cell.policy.rung())?;
        inner.disclosed = true;
        if !inner.can_update_own_metadata {
            tracing::warn!(
                session = cell.id,
                "disclose: the token lacks canUpdateOwnMetadata, so the room cannot be told that this participant's speech is coded"
            );
            return None;
        }
        let attributes = [(DISCLOSED, &*what)];
        Some(if inner.session.facts().json {
            Verdict::Text(proto::update_attributes_json(&attributes))
        } else {
            Verdict::Binary(proto::update_attributes(&attributes))
        })
    }

    fn leave_frame(&mut self) -> Option<Verdict> {
        let json = self.cell.lock().session.facts().json;
        (self.phase != Phase::Asked).then(|| leave(proto::ACTION_RECONNECT, json))
    }

    fn closed(&mut self, how: Closed) {
        if self.incarnation == 0 {
            // It became nobody's: nothing was told to media, and what it prepared goes with it.
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
        // Nobody can come back to a session whose sid nobody was told.
        let grace = if left || self.sid.is_empty() {
            LEFT_GRACE
        } else {
            self.app.live.load().session.resume_grace
        };
        let (app, cell, incarnation) = (self.app.clone(), self.cell.clone(), self.incarnation);
        self.app.runtime.spawn(async move {
            tokio::time::sleep(grace).await;
            app.end_if(&cell, |inner| inner.incarnation == incarnation);
        });
    }
}

fn leave(action: i32, json: bool) -> Verdict {
    let reason = proto::REASON_SERVER_SHUTDOWN;
    if json {
        Verdict::Text(proto::leave_response_json(action, reason))
    } else {
        Verdict::Binary(proto::leave_response(action, reason))
    }
}

/// What a client is told that goes on in a session which is over.
fn over() -> Fault {
    Fault::client(What::NotFound, "the session is not here: join anew")
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

#[cfg(test)]
#[path = "door/tests.rs"]
mod tests;
