//! WHIP sessions (RFC 9725): as any other, but without a signalling connection. They live as long as their media does.

use super::door::{Fields, fault};
use super::{App, Binding, Bound, Cell, LEFT_GRACE};
use crate::fault::{Fault, What};
use crate::signal::{Opening, Permit, Whip, WhipAnswer, WhipExchange, WhipMessage};
use auralink_proto::asked::whip_claims;
use auralink_proto::session::Session;
use auralink_proto::token::Claims;
use std::sync::Arc;
use std::time::Duration;

/// Media that isn't up by then never will be: as long as the DTLS handshake is tried.
const SETUP_LIMIT: Duration = Duration::from_secs(30);

/// What becomes of a WHIP request.
pub(super) fn prepare(
    app: &Arc<App>,
    opening: &Opening<'_>,
    message: WhipMessage<'_>,
) -> Result<Whip, Fault> {
    let fields = Fields::of(opening);
    let claims = whip_claims(&fields.request(opening.query))
        .map_err(|unclear| fault(&unclear.into(), true))?;
    let readable = claims.is_some();
    let claims = claims.unwrap_or_default();
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
                exchange: Box::new(Create {
                    app,
                    cell,
                    readable,
                }),
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
                failed: None,
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
        // LiveKit ends whomever the path names, with any WHIP participant's token.
        WhipMessage::Delete { resource }
            if app
                .registry()
                .by_sid
                .get(resource)
                .is_some_and(|cell| !cell.is_of(&claims)) =>
        {
            let detail = "the WHIP session is not here, or not the one that the token is for";
            Err(Fault::client(What::NotFound, detail))
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
        inner.whip && !inner.gone
    };
    (live && cell.is_of(claims)).then_some(cell)
}

struct Create {
    app: Arc<App>,
    cell: Arc<Cell>,
    /// The token could be read.
    readable: bool,
}

impl WhipExchange for Create {
    fn id(&self) -> &str {
        &self.cell.name
    }

    fn answered(
        self: Box<Self>,
        answer: WhipAnswer<'_>,
        place: Option<Permit>,
    ) -> Result<String, Fault> {
        let Self {
            app,
            cell,
            readable,
        } = *self;
        if !readable {
            let detail = "the media server accepted a token that can't be read";
            return Err(Fault::upstream(What::BadAnswer, detail));
        }
        let Some(sid) = answer.resource.filter(|sid| !sid.is_empty()) else {
            let detail = "the media server made a WHIP session without a Location";
            return Err(Fault::upstream(What::BadAnswer, detail));
        };
        {
            let mut inner = cell.lock();
            inner.place = place;
            inner.whip = true;
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
        _: Option<Permit>,
    ) -> Result<String, Fault> {
        let Some(mut restarted) = self.restarted else {
            return Ok(answer.body.to_owned());
        };
        {
            let inner = self.cell.lock();
            if inner.gone || inner.ended_pcs != self.ended_pcs {
                let detail = "the WHIP session ended in the meantime: POST a new offer";
                return Err(Fault::client(What::NotFound, detail));
            }
        }
        // An answer that can't be read leaves everything as it was: the server may go on with the credentials of before, and if
        // it doesn't, consent is lost.
        self.app
            .with(&self.cell, |session, env| {
                let body = restarted.whip_fragment_answer(env, session, answer.body)?;
                *session = *restarted;
                Ok(body)
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
        _: Option<Permit>,
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tests::app;
    use super::*;

    /// `{"iss":"devkey","sub":"cam","video":{"room":"r"}}`
    const QUERY: &str =
        "access_token=e30.eyJpc3MiOiJkZXZrZXkiLCJzdWIiOiJjYW0iLCJ2aWRlbyI6eyJyb29tIjoiciJ9fQ.x";

    fn request(app: &Arc<App>, message: WhipMessage<'_>) -> Whip {
        let opening = Opening {
            path: "/whip/v1",
            query: QUERY,
            headers: &hyper::HeaderMap::new(),
            peer: "127.0.0.1:9".parse().unwrap(),
        };
        prepare(app, &opening, message).unwrap_or_else(|fault| panic!("{fault:?}"))
    }

    fn answered(whip: Whip, body: &str) -> Result<String, Fault> {
        let place = crate::signal::Quota::new(1).take().unwrap();
        let answer = WhipAnswer {
            resource: Some("PA_1"),
            body,
        };
        whip.exchange.answered(answer, Some(place))
    }

    fn creds(ufrag: &str) -> String {
        let pwd = ufrag.repeat(5);
        format!("a=ice-ufrag:{ufrag}\r\na=ice-pwd:{pwd}\r\n")
    }

    fn sdp(ufrag: &str, setup: &str) -> String {
        format!(
            "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0\r\n\
             m=audio 9 UDP/TLS/RTP/SAVPF 111\r\nc=IN IP4 0.0.0.0\r\na=mid:0\r\n{}\
             a=fingerprint:sha-256 00:01\r\na=setup:{setup}\r\na=rtpmap:111 opus/48000/2\r\n",
            creds(ufrag)
        )
    }

    fn fragment(ufrag: &str) -> String {
        format!(
            "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n{}",
            creds(ufrag)
        )
    }

    #[tokio::test]
    async fn a_restart_whose_answer_cannot_be_read_leaves_everything_as_it_was() {
        let app = app();
        let offer = request(&app, WhipMessage::Offer(&sdp("client", "actpass")));
        let told = offer.body.clone().unwrap();
        answered(offer, &sdp("server", "active")).unwrap();
        let restart = |ufrag: &str| {
            let text = fragment(ufrag);
            let message = WhipMessage::Fragment {
                resource: "PA_1",
                restart: true,
                text: &text,
            };
            request(&app, message)
        };
        let trickled = || {
            let text = fragment("client");
            let message = WhipMessage::Fragment {
                resource: "PA_1",
                restart: false,
                text: &text,
            };
            request(&app, message).body.unwrap()
        };
        let line = |text: &str| -> String {
            let mut lines = text.lines();
            let line = lines.find(|line| line.starts_with("a=ice-ufrag:"));
            line.unwrap().to_owned()
        };
        assert_eq!(line(&trickled()), line(&told));
        for unreadable in ["", "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n"] {
            assert!(answered(restart("again"), unreadable).is_err());
            // The client's credentials of before are still those that the server knows under its own.
            assert_eq!(line(&trickled()), line(&told));
        }
        let back = answered(restart("again"), &fragment("server2")).unwrap();
        assert!(!back.contains("server2") && back.contains("a=ice-lite"));
        assert_eq!(line(&trickled()), "a=ice-ufrag:client", "it is over now");
    }
}
