//! The way of one request to the upstream and back.
//!
//! What is changed on the way, and nothing else: hop-by-hop fields (RFC 9110 section 7.6.1), Host (the upstream's, so that name-based
//! routers and LiveKit Cloud work; the client's goes into X-Forwarded-Host), X-Forwarded-For, X-Forwarded-Proto, Via, and on
//! sessions the query and Sec-WebSocket-Extensions. Answers lose their hop-by-hop fields only, and on sessions have their own extension.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::{Either, Full};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, timeout};

use super::connections::{Seat, Share, Upload};
use super::deflate;
use super::http::{Body, Held, Shared};
use super::path::{self, Place};
use super::upstream::Conn;
use super::whip::{self, Route};
use super::ws::{Guard, Terms, pump, splice};
use super::{By, Drain, Opening, Permit, Quota, WS_OPEN};
use crate::fault::{Fault, What, note};

type Sender = http1::SendRequest<Upload<Body>>;

/// A kept upstream connection is not used again after this: servers and load balancers close idle ones without notice, and a
/// request written into that moment is lost. All known defaults are above it.
pub(super) const REUSE: Duration = Duration::from_secs(4);

/// Bytes of a request's body that wait for an upstream which doesn't read it, and the longest head of an answer.
const UPSTREAM_BUFFER: usize = 64 << 10;

/// For the answer to a request for a WebSocket. Clients give up after 10 to 15 s; what takes longer must not hold a place that
/// others could have.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// Options of `Connection`, and fields that are for one connection by their nature.
const FOR_THE_CONNECTION: [&str; 8] = [
    "close",
    "http2-settings",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What belongs to one connection of a client's.
pub(super) struct Client {
    pub(super) peer: SocketAddr,
    /// The upstream connection of the last request, and since when it is idle.
    pub(super) kept: Mutex<Option<(Sender, Instant)>>,
    pub(super) seat: Arc<Seat>,
    /// Goes over to the pump when the connection is upgraded.
    held: Mutex<Option<Held<Arc<Seat>>>>,
}

impl Client {
    pub(super) fn new(peer: SocketAddr, seat: Arc<Seat>, held: Held<Arc<Seat>>) -> Client {
        Client {
            peer,
            kept: Mutex::default(),
            seat,
            held: Mutex::new(Some(held)),
        }
    }

    /// The kept upstream connection is too old to be used again.
    pub(super) fn forget_upstream(&self) {
        drop(self.slot().take());
    }

    fn slot(&self) -> MutexGuard<'_, Option<(Sender, Instant)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What kind of request it is: metrics' label, and what becomes of a 101.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A WebSocket upgrade on a session path.
    Session,
    /// A WebSocket upgrade on any other path.
    Upgrade,
    /// Anything else.
    Plain,
}

impl Kind {
    pub(super) fn of(request: &Request<Incoming>, place: Option<&Place>) -> Kind {
        let h = request.headers();
        let websocket = request.method() == Method::GET
            && request.version() == Version::HTTP_11
            && has_token(h, &header::CONNECTION, "upgrade")
            && has_token(h, &header::UPGRADE, "websocket");
        match (websocket, place) {
            (true, Some(Place::Session(_))) => Kind::Session,
            (true, _) => Kind::Upgrade,
            (false, _) => Kind::Plain,
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Kind::Session => "session",
            Kind::Upgrade => "upgrade",
            Kind::Plain => "plain",
        }
    }
}

/// Sends a request upstream and brings the answer back. An error names the session too, for the log.
pub(super) async fn pass(
    mut request: Request<Incoming>,
    kind: Kind,
    place: Place,
    client: &Client,
    shared: &Arc<Shared>,
) -> Result<Response<Body>, (Fault, String)> {
    drop_named(request.headers_mut());
    if let Some(route) = Route::of(request.method(), &place) {
        return whip::pass(request, route, client, shared).await;
    }
    let none = |fault| (fault, String::new());
    check(&request, shared).map_err(none)?;
    if kind != Kind::Plain && !request.body().is_end_stream() {
        // LiveKit reads a body before it answers, however long that takes to arrive: a handshake that never ends.
        let detail = "a request for a WebSocket has a body; send it without one";
        return Err(none(Fault::client(What::Malformed, detail)));
    }
    let permits = match kind {
        Kind::Plain => None,
        Kind::Session | Kind::Upgrade => {
            Some(permits(shared, &shared.quotas().handshakes, client).map_err(none)?)
        }
    };
    let (guard, query) = match (kind, &place) {
        (Kind::Session, Place::Session(path)) => {
            let opening = Opening {
                path,
                query: request.uri().query().unwrap_or(""),
                headers: request.headers(),
                peer: client.peer,
            };
            let opened = shared.sessions.open(&opening).map_err(none)?;
            (Some(Guard::new(opened.session)), opened.query)
        }
        _ => (None, None),
    };
    let id = guard.as_ref().map(Guard::id).unwrap_or_default();
    let client_deflates = guard.is_some() && deflate::offered(request.headers());
    let compress = client_deflates && shared.compress;
    let path = request.uri().path().to_owned();
    let sent = async {
        let upgrade = (kind != Kind::Plain).then(|| hyper::upgrade::on(&mut request));
        rewrite(&mut request, kind, query.as_deref(), client.peer, shared)?;
        if compress {
            let h = request.headers_mut();
            h.insert(header::SEC_WEBSOCKET_EXTENSIONS, deflate::TERMS);
        }
        // Of an upgrade the client's end of stream is the end.
        let seat = (kind == Kind::Plain).then(|| client.seat.clone());
        let request = request.map(|body| Upload::new(Either::Left(body), seat));
        let patience = match kind {
            Kind::Plain => shared.limits().answer_timeout,
            Kind::Session | Kind::Upgrade => shared.limits().answer_timeout.min(HANDSHAKE),
        };
        let response = exchange(request, shared, client, patience).await?;
        Ok::<_, Fault>((upgrade, response))
    };
    let (upgrade, mut response) = match sent.await {
        Ok(sent) => sent,
        Err(fault) => {
            if let Some(guard) = guard {
                guard.refused(fault.status().as_u16(), By::Upstream);
            }
            return Err((fault, id));
        }
    };
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        if let Some(guard) = guard {
            let status = response.status().as_u16();
            guard.refused(status, By::Upstream);
            note(
                "the media server refuses sessions; counted in auralink_http_requests_total{kind=\"session\"}",
            );
        }
        strip_hop_by_hop(response.headers_mut());
        if makes_whip_session(&response) {
            // By a path that only the upstream understands: its media would go past the sidecar.
            let detail = "WHIP is not served at this path: it is /whip/v1, under any prefix";
            return Err((Fault::client(What::NotFound, detail), id));
        }
        return Ok(response.map(Either::Left));
    }
    let nonsense = |detail: &'static str| Fault::upstream(What::BadAnswer, detail);
    let (Some(upgrade), Some((_handshake, permit))) = (upgrade, permits) else {
        return Err((
            nonsense("the media server switched protocols without being asked to"),
            id,
        ));
    };
    if guard.is_none() && place != Place::Agent {
        // It may be a session by a path that only the upstream understands: its media would go past the sidecar.
        let detail = "no WebSocket is served at this path: sessions' are /rtc and /rtc/v1, workers' is /agent, under any prefix";
        return Err((Fault::client(What::NotFound, detail), id));
    }
    let upstream_deflates = match deflate::agreed(response.headers()) {
        Ok(agreed) if compress || !agreed => agreed,
        _ if guard.is_none() => false,
        _ => {
            let fault = nonsense(
                "the media server answers with a WebSocket extension that was not offered",
            );
            if let Some(guard) = guard {
                guard.refused(fault.status().as_u16(), By::Upstream);
            }
            return Err((fault, id));
        }
    };
    let upstream = hyper::upgrade::on(&mut response);
    let Some(alive) = shared.alive.upgrade() else {
        return Err((
            Fault::internal(
                What::Draining,
                "the sidecar is about to stop; try again elsewhere",
            ),
            id,
        ));
    };
    client.seat.upgraded();
    let is_session = guard.is_some();
    let label = if is_session { "session" } else { "opaque" };
    // The TCP connection's own permit lives on with the pump.
    let connection = client
        .held
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    let shared = shared.clone();
    // A session keeps its place until it is over, which is later than its connection; what is spliced until that ends.
    let mut permit = Some(permit);
    let guard = guard.map(|mut guard| {
        guard.accepted(permit.take());
        guard
    });
    let open = Held::new(permit, alive, metrics::gauge!(WS_OPEN, "kind" => label));
    let deflates = (client_deflates, upstream_deflates);
    tokio::spawn(async move {
        run_upgraded(upgrade, upstream, guard, &path, deflates, &shared).await;
        drop((open, connection));
    });
    let h = response.headers_mut();
    strip_hop_by_hop(h);
    h.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    h.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    if is_session {
        h.remove(header::SEC_WEBSOCKET_EXTENSIONS);
        if client_deflates {
            h.insert(header::SEC_WEBSOCKET_EXTENSIONS, deflate::TERMS);
        }
    }
    Ok(response.map(|_| Either::Right(Full::default())))
}

/// What a request must be before anybody is asked.
pub(super) fn check(request: &Request<Incoming>, shared: &Shared) -> Result<(), Fault> {
    let limits = shared.limits();
    if request.method() == Method::CONNECT {
        return Err(Fault::client(
            What::Method,
            "CONNECT is not served: this is a gateway",
        ));
    }
    let query = request.uri().query().map_or(0, str::len);
    if query > limits.max_query_bytes {
        return Err(Fault::client(
            What::QueryTooLarge,
            format!(
                "a query of {query} bytes is over the limit of {}",
                limits.max_query_bytes
            ),
        ));
    }
    let h = request.headers();
    // As on the wire: `name: value\r\n`.
    let size: usize = h.iter().map(|(n, v)| n.as_str().len() + v.len() + 4).sum();
    if size > limits.max_header_bytes {
        return Err(Fault::client(
            What::HeadersTooLarge,
            format!(
                "header fields of {size} bytes are over the limit of {}",
                limits.max_header_bytes
            ),
        ));
    }
    let me = |v: &HeaderValue| v.to_str().is_ok_and(|v| v.contains(&shared.pseudonym));
    if h.get_all(header::VIA).iter().any(me) {
        return Err(Fault::internal(
            What::Loop,
            "the request has come through here before: `upstream` leads back to this sidecar",
        ));
    }
    Ok(())
}

/// Whether an answer makes a WHIP session, wherever the request for it went.
fn makes_whip_session(response: &Response<Incoming>) -> bool {
    let location = response.headers().get(header::LOCATION);
    let location = location.and_then(|location| location.to_str().ok()?.parse::<Uri>().ok());
    response.status() == StatusCode::CREATED
        && location.is_some_and(|location| {
            matches!(
                path::read(&Method::POST, location.path()),
                Ok(Place::WhipSession(_))
            )
        })
}

/// One handshake under way: of all, and of its address.
pub(super) type Handshake = (Permit, Share);

/// Room for one more handshake.
pub(super) fn handshake(
    shared: &Shared,
    of: &Arc<Quota>,
    client: &Client,
) -> Result<Handshake, Fault> {
    const BUSY: &str = "too many sessions are being opened at this moment; try again";
    let busy = || Fault::internal(What::Busy, BUSY);
    if *shared.drain.borrow() != Drain::Running {
        return Err(Fault::internal(
            What::Draining,
            "the sidecar is about to stop and takes no new sessions; try again",
        ));
    }
    let share = client.seat.handshake().ok_or_else(busy)?;
    let permit = of.take().ok_or_else(busy)?;
    Ok((permit, share))
}

/// Room for one more handshake and one more session.
pub(super) fn permits(
    shared: &Shared,
    of: &Arc<Quota>,
    client: &Client,
) -> Result<(Handshake, Permit), Fault> {
    let handshake = handshake(shared, of, client)?;
    let place = shared.quotas().upgraded.take().ok_or_else(|| {
        Fault::internal(
            What::Busy,
            "no more sessions fit; try again later or elsewhere",
        )
    })?;
    Ok((handshake, place))
}

/// Makes the client's request the upstream's.
pub(super) fn rewrite<B>(
    request: &mut Request<B>,
    kind: Kind,
    query: Option<&str>,
    peer: SocketAddr,
    shared: &Shared,
) -> Result<(), Fault> {
    let upstream = &shared.dialer.upstream;
    let query = query.or(request.uri().query());
    let target = path::target(upstream.base(), request.uri().path(), query);
    let length = target.len();
    *request.uri_mut() = Uri::try_from(target).map_err(|e| {
        // The `http` crate's own limit, which base path or rewriting may have gone over.
        if length >= usize::from(u16::MAX) {
            let detail = format!("the upstream's request target would be {length} bytes long");
            Fault::client(What::QueryTooLarge, detail)
        } else {
            Fault::internal(What::Defect, "the rewritten query is no part of a URL").because(e)
        }
    })?;
    *request.version_mut() = Version::HTTP_11;
    let h = request.headers_mut();
    let chunked = has_token(h, &header::TRANSFER_ENCODING, "chunked");
    strip_hop_by_hop(h);
    if chunked && kind == Kind::Plain {
        // hyper leaves out a body of unknown length where the method is one that rarely has any.
        h.insert(
            header::TRANSFER_ENCODING,
            HeaderValue::from_static("chunked"),
        );
    }
    if kind != Kind::Plain {
        h.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        h.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    }
    if kind == Kind::Session {
        // The pump reads messages: what it can't is offered by nobody. Spliced bytes may be compressed as they like.
        h.remove(header::SEC_WEBSOCKET_EXTENSIONS);
    }
    if let Some(host) = h.insert(header::HOST, upstream.authority().clone()) {
        h.entry(HeaderName::from_static("x-forwarded-host"))
            .or_insert(host);
    }
    let ip: IpAddr = peer.ip().to_canonical();
    append(
        h,
        HeaderName::from_static("x-forwarded-for"),
        &ip.to_string(),
    );
    let proto = if shared.secure { "https" } else { "http" };
    h.entry(HeaderName::from_static("x-forwarded-proto"))
        .or_insert(HeaderValue::from_static(proto));
    append(h, header::VIA, &format!("1.1 {}", shared.pseudonym));
    Ok(())
}

/// Adds an element to a list field, in one line with those that are there.
fn append(h: &mut HeaderMap, name: HeaderName, element: &str) {
    let mut list: Vec<u8> = Vec::new();
    for value in h.get_all(&name) {
        list.extend_from_slice(value.as_bytes());
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(element.as_bytes());
    // Values that were valid before stay so when joined.
    if let Ok(value) = HeaderValue::from_bytes(&list) {
        h.insert(name, value);
    }
}

/// Removes the fields that `Connection` names (RFC 9110 section 7.6.1), before anybody reads one: a token there would be one that is
/// believed here and that LiveKit never sees. Those that the sidecar itself acts upon stay until [`strip_hop_by_hop`].
fn drop_named(h: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(h, &header::CONNECTION)
        .filter(|name| {
            !FOR_THE_CONNECTION
                .iter()
                .any(|known| known.eq_ignore_ascii_case(name))
        })
        .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
        .collect();
    for name in named {
        h.remove(name);
    }
}

/// Removes what is meant for one connection only: RFC 9110 section 7.6.1. hyper writes its own Transfer-Encoding and Connection.
pub(super) fn strip_hop_by_hop(h: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(h, &header::CONNECTION)
        .filter_map(|t| HeaderName::from_bytes(t.as_bytes()).ok())
        .collect();
    for name in named {
        h.remove(name);
    }
    for name in [
        header::CONNECTION,
        header::TE,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ] {
        h.remove(name);
    }
    h.remove("keep-alive");
    h.remove("proxy-connection");
    h.remove("http2-settings");
}

fn tokens<'a>(h: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    h.get_all(name)
        .into_iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
}

fn has_token(h: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    tokens(h, name).any(|t| t.eq_ignore_ascii_case(token))
}

/// One request and the head of its answer, over the kept connection if there is a good one, else over a new one.
pub(super) async fn exchange(
    request: Request<Upload<Body>>,
    shared: &Shared,
    client: &Client,
    patience: Duration,
) -> Result<Response<Incoming>, Fault> {
    let good = |(sender, since): &(Sender, Instant)| sender.is_ready() && since.elapsed() < REUSE;
    let mut request = request;
    let reused = client.slot().take().filter(good).map(|(sender, _)| sender);
    for reused in [reused, None] {
        let fresh = reused.is_none();
        let mut sender = match reused {
            Some(sender) => sender,
            None => connect(shared).await?,
        };
        let sent = timeout(patience, sender.try_send_request(request));
        match sent.await {
            Ok(Ok(response)) => {
                if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                    *client.slot() = Some((sender, Instant::now()));
                }
                return Ok(response);
            }
            Ok(Err(mut failed)) => match failed.take_message() {
                // Not a byte of it was sent: the kept connection was closed in the meantime.
                Some(back) if !fresh => request = back,
                _ => return Err(no_answer(failed.error(), shared)),
            },
            Err(_) => {
                return Err(Fault::upstream(
                    What::Timeout,
                    "the media server did not answer in time",
                )
                .because(format!("{} took over {patience:?}", shared.dialer.upstream)));
            }
        }
        if fresh {
            break;
        }
    }
    Err(Fault::internal(
        What::Defect,
        "a request was neither sent nor refused",
    ))
}

fn no_answer(error: &hyper::Error, shared: &Shared) -> Fault {
    let because = format!("{}: {error}", shared.dialer.upstream);
    if error.is_parse() {
        Fault::upstream(What::BadAnswer, "the media server's answer is not HTTP").because(because)
    } else if error.is_user() || error.is_body_write_aborted() {
        Fault::client(What::Lost, "the request broke off").because(because)
    } else {
        Fault::upstream(
            What::Lost,
            "the media server closed the connection without an answer; try again",
        )
        .because(because)
    }
}

async fn connect(shared: &Shared) -> Result<Sender, Fault> {
    let conn: Conn = shared.dialer.dial(&shared.limits()).await?;
    let (sender, connection) = http1::Builder::new()
        .preserve_header_case(true)
        .max_buf_size(UPSTREAM_BUFFER)
        .handshake(TokioIo::new(conn))
        .await
        .map_err(|e| no_answer(&e, shared))?;
    // Errors of the connection come out at the sender; the task ends with it.
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

/// From the 101 on: waits until both connections are free of HTTP, then pumps or splices.
async fn run_upgraded(
    client: hyper::upgrade::OnUpgrade,
    upstream: hyper::upgrade::OnUpgrade,
    guard: Option<Guard>,
    path: &str,
    (client_deflates, upstream_deflates): (bool, bool),
    shared: &Shared,
) {
    // What is in force now is in force for this connection until it ends.
    let limits = shared.limits();
    let both = timeout(limits.header_timeout, async {
        tokio::try_join!(client, upstream)
    });
    let Ok(Ok((client, upstream))) = both.await else {
        // The client did not stay for its 101; the guard's drop says so to the session.
        return;
    };
    let (client, upstream) = (TokioIo::new(client), TokioIo::new(upstream));
    match guard {
        Some(guard) => {
            let terms = Terms {
                limits: &limits,
                large: &shared.large,
                client_deflates,
                upstream_deflates,
            };
            let drain = shared.drain.clone();
            pump(client, upstream, guard, path, &terms, drain).await;
        }
        None => splice(client, upstream, &limits, shared.drain.clone()).await,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn hop_by_hop_fields_go_and_the_rest_stays() {
        let mut h = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, X-Mine"),
            ("connection", "upgrade"),
            ("keep-alive", "timeout=5"),
            ("x-mine", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("proxy-connection", "close"),
            ("authorization", "Bearer x"),
            ("origin", "https://example"),
        ] {
            h.append(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            );
        }
        strip_hop_by_hop(&mut h);
        let mut left: Vec<_> = h.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "origin"]);
    }

    #[test]
    fn list_fields_grow_in_one_line() {
        let name = || HeaderName::from_static("x-forwarded-for");
        let mut h = HeaderMap::new();
        append(&mut h, name(), "127.0.0.1");
        assert_eq!(h[name()], "127.0.0.1");
        h.append(name(), HeaderValue::from_static("10.0.0.2"));
        append(&mut h, name(), "::1");
        assert_eq!(h.get_all(name()).iter().count(), 1);
        assert_eq!(h[name()], "127.0.0.1, 10.0.0.2, ::1");
    }
}
