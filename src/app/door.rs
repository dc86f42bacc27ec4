//! What signalling sees of the registry: a session for each participant who dials.

use super::{App, Binding, Bound, Cell, LEFT_GRACE, Resumed, whip};
use crate::fault::{Fault, What};
use crate::signal::{
    self, By, Closed, Frame, Opened, Opening, Sessions, SignalSession, Verdict, Whip, WhipMessage,
};
use auralink_proto::session::resumed_sid;
use auralink_proto::signal as proto;
use auralink_proto::token;
use std::sync::Arc;

/// The participant attribute by which `disclose: true` tells the room that a participant's speech is
/// coded; its value is the rung that policy wants.
const DISCLOSED: &str = "auralink.aic";

pub(super) fn fault(error: &proto::SignalError, client: bool) -> Fault {
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
            // The configuration may have changed while LiveKit was being asked.
            if self.app.is_off_now(&self.cell) {
                inner.session.stop_shedding();
            }
            self.app.tell_media(&self.cell, &mut inner);
        }
        self.app.enter(&self.cell);
    }

    fn refused(&mut self, status: u16) {
        tracing::debug!(
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
        if !cell.policy.disclose || inner.disclosed {
            return None;
        }
        let what = self.app.disclosure(cell.id, cell.policy.rung())?;
        inner.disclosed = true;
        if !cell.claims.can_update_own_metadata {
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
            app.end_if(&cell, |inner| inner.incarnation == incarnation);
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tests::app;
    use super::*;
    use std::time::Duration;

    fn signal(app: &Arc<App>, cell: &Arc<Cell>, resumed: Option<Resumed>) -> Signal {
        Signal {
            app: app.clone(),
            cell: cell.clone(),
            incarnation: 0,
            accepted: false,
            resumed,
            unknown_resume: false,
            sid: String::new(),
        }
    }

    /// A resume in the very moment in which the grace is over finds the session, or is told that it is gone.
    #[tokio::test(flavor = "multi_thread", worker_threads = 3)]
    async fn a_resume_as_the_grace_ends_is_taken_or_refused() {
        let app = app();
        let mut resumes = Vec::new();
        for _ in 0..2_000 {
            let cell = app.make(&token::Claims::default());
            let mut first = signal(&app, &cell, None);
            first.accepted();
            let copy = Resumed {
                session: cell.lock().session.clone(),
                sockets: Bound::default(),
                ended_pcs: 0,
            };
            let mut second = signal(&app, &cell, Some(copy));
            first.closed(Closed {
                by: By::Client,
                code: None,
            });
            // The end is on its way on another thread; that some come too late must not depend on how fast that is.
            if resumes.len() % 100 == 99 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            for _ in 0..resumes.len() % 997 {
                std::hint::spin_loop();
            }
            second.accepted();
            resumes.push(second);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let mut taken = 0;
        for resume in &resumes {
            let gone = resume.cell.lock().gone;
            assert!(resume.unknown_resume || !gone, "it was taken and is ended");
            taken += usize::from(!gone);
        }
        assert_eq!(app.cells().len(), taken, "who lives is in the registry");
        assert!(taken > 0 && taken < resumes.len(), "{taken} were in time");
    }

    /// That the grace is over and that the session ends is one thing: nobody can take it in between.
    #[tokio::test]
    async fn nobody_resumes_what_is_being_ended() {
        let app = app();
        let cell = app.make(&token::Claims::default());
        signal(&app, &cell, None).accepted();
        let mut resume = signal(&app, &cell, None);
        let mut resuming = None;
        app.end_if(&cell, |_| {
            resuming = Some(std::thread::spawn(move || {
                resume.accepted();
                resume
            }));
            std::thread::sleep(Duration::from_millis(100));
            true
        });
        let resume = resuming.unwrap().join().unwrap();
        assert!(resume.unknown_resume, "it must join anew");
        assert!(cell.lock().gone && app.cells().is_empty());
    }
}
