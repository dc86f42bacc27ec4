//! WHIP (RFC 9725): publishing with one POST, ICE by PATCH, the end by DELETE. Its bodies are SDP and name addresses, so they are
//! read whole and shown to [`Sessions::whip`]; all else of request and answer passes as it does for any other.

use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response};
use std::sync::Arc;
use tokio::time::timeout;

use super::connections::{Seat, Upload};
use super::forward::{
    Client, Kind, check, exchange, handshake, permits, rewrite, strip_hop_by_hop,
};
use super::http::{Body, Shared};
use super::path::Place;
use super::{Opening, WhipAnswer, WhipMessage};
use crate::fault::{Fault, Side, What};

/// Offers of LiveKit's clients take up to 30 kB; the server itself reads 1 MiB.
const MAX_BODY: usize = 256 << 10;

/// LiveKit's answer to an offer of [`MAX_BODY`] may be longer than it: an m-section of few lines is answered with all of its codecs.
const MAX_ANSWER: usize = 1 << 20;

/// What a request is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Route {
    /// An offer.
    Create,
    /// A fragment for this session.
    Patch(String),
    /// The end of this session.
    Delete(String),
}

impl Route {
    /// By method and place.
    pub(super) fn of(method: &Method, place: &Place) -> Option<Self> {
        match (method, place) {
            (&Method::POST, Place::Whip) => Some(Self::Create),
            (&Method::PATCH, Place::WhipSession(id)) => Some(Self::Patch(id.clone())),
            (&Method::DELETE, Place::WhipSession(id)) => Some(Self::Delete(id.clone())),
            _ => None,
        }
    }
}

/// Sends a request upstream, its SDP rewritten, and brings the answer back, its SDP rewritten too. An error names the session.
pub(super) async fn pass(
    request: Request<Incoming>,
    route: Route,
    client: &Client,
    shared: &Arc<Shared>,
) -> Result<Response<Body>, (Fault, String)> {
    let none = |fault| (fault, String::new());
    check(&request, shared).map_err(none)?;
    let (parts, incoming) = request.into_parts();
    let reading = read(incoming, Some(&client.seat));
    let reading = timeout(shared.limits().header_timeout, reading);
    let text = match reading.await {
        Ok(text) => text.map_err(|unread| none(unread.fault(true)))?,
        Err(_) => {
            let fault = Fault::client(What::Timeout, "the SDP took too long to arrive");
            return Err(none(fault));
        }
    };
    // Only now that nothing of the client is waited for. A session takes a place as one over a WebSocket does, and keeps it until
    // its media ends.
    let (_handshake, place) = match route {
        Route::Create => {
            let (handshake, place) =
                permits(shared, &shared.quotas().whips, client).map_err(none)?;
            (handshake, Some(place))
        }
        Route::Patch(_) | Route::Delete(_) => (
            handshake(shared, &shared.quotas().whips, client).map_err(none)?,
            None,
        ),
    };
    let text_field = |name: &header::HeaderName| parts.headers.get(name)?.to_str().ok();
    if let Route::Patch(id) | Route::Delete(id) = &route
        && !id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
    {
        // LiveKit's sids have no others. It would decode them and take the path for another's, whom it doesn't ask for a token of its own.
        let detail = "no WHIP session has such a name";
        return Err(none(Fault::client(What::NotFound, detail)));
    }
    let restart = text_field(&header::IF_MATCH).is_some_and(|tag| tag.trim() == "*");
    let opening = Opening {
        path: "/whip/v1",
        query: parts.uri.query().unwrap_or(""),
        headers: &parts.headers,
        peer: client.peer,
    };
    let message = match &route {
        Route::Create => WhipMessage::Offer(&text),
        Route::Patch(resource) => WhipMessage::Fragment {
            resource,
            restart,
            text: &text,
        },
        Route::Delete(resource) => WhipMessage::Delete { resource },
    };
    let whip = shared.sessions.whip(&opening, message).map_err(none)?;
    let id = whip.exchange.id().to_owned();
    let named = |fault| (fault, id.clone());

    let mut request = Request::from_parts(parts, ());
    rewrite(&mut request, Kind::Plain, None, client.peer, shared).map_err(named)?;
    // An answer that is compressed could not be read.
    request.headers_mut().remove(header::ACCEPT_ENCODING);
    request.headers_mut().remove(header::EXPECT);
    let body = whip.body.unwrap_or(text);
    set_length(request.headers_mut(), body.len());
    let body = Either::Right(Full::new(Bytes::from(body)));
    let request = request.map(|()| Upload::new(body, None));
    let patience = shared.limits().answer_timeout;
    let sent = exchange(request, shared, client, patience).await;
    let mut response = sent.map_err(named)?;
    strip_hop_by_hop(response.headers_mut());
    if !response.status().is_success() {
        return Ok(response.map(Either::Left));
    }
    let (mut parts, incoming) = response.into_parts();
    let reading = timeout(shared.limits().answer_timeout, read(incoming, None));
    let answer = match reading.await {
        Ok(text) => text.map_err(|unread| named(unread.fault(false)))?,
        Err(_) => {
            let detail = "the media server's answer took too long to arrive";
            return Err(named(Fault::upstream(What::Timeout, detail)));
        }
    };
    let location = parts
        .headers
        .get(header::LOCATION)
        .and_then(|location| location.to_str().ok());
    let edited = whip
        .exchange
        .answered(
            WhipAnswer {
                resource: location.and_then(|location| location.rsplit('/').next()),
                body: &answer,
            },
            place,
        )
        .map_err(named)?;
    if !answer.is_empty() {
        set_length(&mut parts.headers, edited.len());
    }
    let body = Full::new(Bytes::from(edited));
    Ok(Response::from_parts(parts, Either::Right(body)))
}

fn set_length(headers: &mut header::HeaderMap, length: usize) {
    // Nothing needs none: DELETE, and 204 which may not have one.
    headers.remove(header::CONTENT_LENGTH);
    if length > 0 {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
}

/// Why a body could not be read.
enum Unread {
    /// Over this many bytes.
    TooLong(usize),
    NotUtf8,
    Lost(String),
}

impl Unread {
    /// Of the client's request, or of the upstream's answer.
    fn fault(self, client: bool) -> Fault {
        let side = if client { Side::Client } else { Side::Upstream };
        match self {
            Self::TooLong(most) => Fault::new(
                side,
                What::TooLarge,
                format!("SDP of more than {most} bytes is not taken"),
            ),
            Self::NotUtf8 => Fault::new(side, What::NotUtf8, "the SDP is not UTF-8"),
            Self::Lost(cause) => Fault::new(side, What::Lost, "the SDP broke off").because(cause),
        }
    }
}

/// All of a body, of the client's who has the seat or of the upstream's, copied together: a piece of it keeps the whole buffer that it came in, so that a body in single bytes would hold
/// thousands of times its length.
async fn read(mut body: Incoming, seat: Option<&Arc<Seat>>) -> Result<String, Unread> {
    if let Some(seat) = seat {
        seat.collects();
    }
    // Only a client's is waited for, and counted.
    let most = if seat.is_some() { MAX_BODY } else { MAX_ANSWER };
    let mut text = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Unread::Lost(error.to_string()))?;
        let Some(data) = frame.data_ref() else {
            continue;
        };
        if text.len() + data.len() > most {
            return Err(Unread::TooLong(most));
        }
        text.extend_from_slice(data);
        if let Some(seat) = seat {
            seat.hold_more(data.len());
        }
    }
    if let Some(seat) = seat {
        seat.collected();
    }
    String::from_utf8(text).map_err(|_| Unread::NotUtf8)
}
