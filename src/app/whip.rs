//! WHIP sessions (RFC 9725): as any other, but without a signalling connection. They live as long as their media does.

use super::{App, Binding, Bound, Cell, LEFT_GRACE, fault};
use crate::fault::{Fault, What};
use crate::signal::{Opening, Whip, WhipAnswer, WhipExchange, WhipMessage};
use auralink_proto::session::Session;
use auralink_proto::token::{self, Claims};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

/// Media that isn't up by then never will be: as long as the DTLS handshake is tried.
const SETUP_LIMIT: Duration = Duration::from_secs(30);

/// What becomes of a WHIP request.
pub(super) fn prepare(
    app: &Arc<App>,
    opening: &Opening<'_>,
    message: WhipMessage<'_>,
) -> Result<Whip, Fault> {
    let claims = token::find(opening.authorization, opening.query)
        .map(token::claims)
        .unwrap_or_default();
    match message {
        // The server refuses it, in its own words.
        WhipMessage::Offer(offer) if offer.trim().is_empty() => Ok(Whip {
            exchange: Box::new(End {
                app: app.clone(),
                cell: None,
            }),
            body: None,
        }),
        WhipMessage::Offer(offer) => {
            let cell = app.make(&claims);
            let body = app
                .with(&cell, |session, env| session.whip_offer(env, offer))
                .map_err(|error| fault(&error, true))?;
            let app = app.clone();
            Ok(Whip {
                exchange: Box::new(Create { app, cell }),
                body: Some(body),
            })
        }
        WhipMessage::Fragment {
            resource,
            restart,
            text,
        } => {
            let cell = find(app, resource, &claims).ok_or_else(|| {
                Fault::client(
                    What::NotFound,
                    "the WHIP session is not here: POST a new offer",
                )
            })?;
            let (mut session, ended_pcs) = {
                let inner = cell.lock();
                (inner.session.clone(), inner.ended_pcs)
            };
            let mut sockets = Bound::default();
            let mut env = Binding {
                media: &app.media,
                bound: &mut sockets,
            };
            let body = session
                .whip_fragment(&mut env, text, restart)
                .map_err(|error| fault(&error, true))?;
            let exchange = Patch {
                app: app.clone(),
                cell,
                restarted: restart.then_some(Box::new(session)),
                ended_pcs,
            };
            Ok(Whip {
                exchange: Box::new(exchange),
                body: Some(body),
            })
        }
        WhipMessage::Delete { resource } => Ok(Whip {
            exchange: Box::new(End {
                app: app.clone(),
                cell: find(app, resource, &claims),
            }),
            body: None,
        }),
    }
}

/// A live WHIP session, for the one whose it is: every participant of a room knows the others' sids.
fn find(app: &App, sid: &str, claims: &Claims) -> Option<Arc<Cell>> {
    let cell = app.registry().by_sid.get(sid).cloned()?;
    let live = {
        let inner = cell.lock();
        inner.whip.is_some() && !inner.gone
    };
    (live && cell.claims == *claims).then_some(cell)
}

struct Create {
    app: Arc<App>,
    cell: Arc<Cell>,
}

impl WhipExchange for Create {
    fn id(&self) -> &str {
        &self.cell.name
    }

    fn answered(
        self: Box<Self>,
        answer: WhipAnswer<'_>,
        place: Option<OwnedSemaphorePermit>,
    ) -> Result<String, Fault> {
        let Self { app, cell } = *self;
        let Some(sid) = answer.resource.filter(|sid| !sid.is_empty()) else {
            let detail = "the media server made a WHIP session without a Location";
            return Err(Fault::upstream(What::BadAnswer, detail));
        };
        {
            let mut inner = cell.lock();
            inner.whip = place;
            inner.accepted = true;
        }
        // Before media hears of it, so that its events find it.
        app.enter(&cell);
        let body = app
            .with(&cell, |session, env| {
                session.whip_answer(env, answer.body, sid)
            })
            .inspect_err(|_| app.end(&cell))
            .map_err(|error| fault(&error, false))?;
        app.registry().by_sid.insert(sid.to_owned(), cell.clone());
        let (later, watched) = (app.clone(), cell);
        app.runtime.spawn(async move {
            tokio::time::sleep(SETUP_LIMIT).await;
            later.end_if(&watched, |inner| !inner.joined);
        });
        Ok(body)
    }
}

struct Patch {
    app: Arc<App>,
    cell: Arc<Cell>,
    /// The session as the restart makes it, once the server has taken it.
    restarted: Option<Box<Session>>,
    /// As it was when the copy was made.
    ended_pcs: u32,
}

impl WhipExchange for Patch {
    fn id(&self) -> &str {
        &self.cell.name
    }

    fn answered(
        self: Box<Self>,
        answer: WhipAnswer<'_>,
        _: Option<OwnedSemaphorePermit>,
    ) -> Result<String, Fault> {
        let Some(session) = self.restarted else {
            return Ok(answer.body.to_owned());
        };
        let before = {
            let mut inner = self.cell.lock();
            if inner.gone || inner.ended_pcs != self.ended_pcs {
                let detail = "the WHIP session ended in the meantime: POST a new offer";
                return Err(Fault::client(What::NotFound, detail));
            }
            std::mem::replace(&mut inner.session, *session)
        };
        self.app
            .with(&self.cell, |session, env| {
                session.whip_fragment_answer(env, &before, answer.body)
            })
            .map_err(|error| fault(&error, false))
    }
}

/// Ends a session, if there is one.
struct End {
    app: Arc<App>,
    cell: Option<Arc<Cell>>,
}

impl WhipExchange for End {
    fn id(&self) -> &str {
        self.cell.as_ref().map_or("", |cell| &cell.name)
    }

    fn answered(
        self: Box<Self>,
        answer: WhipAnswer<'_>,
        _: Option<OwnedSemaphorePermit>,
    ) -> Result<String, Fault> {
        if let Some(cell) = self.cell {
            let app = self.app.clone();
            // So that the server's close_notify crosses.
            self.app.runtime.spawn(async move {
                tokio::time::sleep(LEFT_GRACE).await;
                app.end(&cell);
            });
        }
        Ok(answer.body.to_owned())
    }
}
