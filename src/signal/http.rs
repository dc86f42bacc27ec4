//! The listener: TCP or TLS, HTTP/1.1, and the drain.
//!
//! One connection of a client has at most one to the upstream (reused while the client keeps its own alive), so requests of
//! different clients never share one. Bodies stream both ways under TCP's own backpressure; nothing is held back or stored.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;

use super::connections::{Answer, Connections, Due, Full as NoPlace, Seat, Watched};
use super::forward::{Client, Kind, REUSE, pass};
use super::large::Large;
use super::path::{self, Place, Refused};
use super::upstream::{Dialer, out_of_descriptors, tune};
use super::ws::leaving;
use super::{
    Drain, HANDSHAKE_SECONDS, HTTP_CONNECTIONS, HTTP_EVICTED, HTTP_REQUESTS, Limits, Quota,
    Sessions, SignalConfig,
};
use crate::fault::{Fault, What, note};
use crate::tls::Certificate;

/// An upstream's answer as it streams in, or a few bytes of the sidecar's own.
pub(super) type Body = Either<Incoming, Full<Bytes>>;

/// Room for the request line and the path in hyper's buffer, beside query and header fields.
const REQUEST_LINE: usize = 1 << 10;
/// hyper refuses a smaller buffer.
const MIN_BUFFER: usize = 8 << 10;
/// For requests that are being answered when the sidecar leaves; then they break off, and [`serve`] returns in any case.
const LEAVE_WAIT: Duration = Duration::from_secs(5);
/// After a failed accept (no file descriptors left): a pause instead of a busy loop. The same for those who had to go to end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Descriptors that are no connections of clients: listeners, media workers, log, models, and what is dialled for health.
pub(super) const OWN_DESCRIPTORS: u64 = 128;
/// A connection of a client's and, while it is asked something, one to the upstream.
const DESCRIPTORS_A_CONNECTION: u64 = 2;
/// The sockets of a session's server legs: two peer connections over one address.
const DESCRIPTORS_A_SESSION: u64 = 2;
/// Of WHIP requests that are under way at one time to handshakes: each may hold two SDPs of 256 KiB.
const WHIP_SHARE: usize = 4;
/// Of the longest messages that LiveKit may send there is room for so many, of all sessions together.
const LARGE_AT_A_TIME: usize = 2;

/// A port that is taken and a configuration that is read, ready to [`serve`](super::serve).
pub struct Bound {
    listener: TcpListener,
    local: SocketAddr,
    pub(super) dialer: Arc<Dialer>,
    changing: Arc<Changing>,
    compress: bool,
}

impl Bound {
    /// Where clients can dial: the real port where the configuration said 0.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Changes what can be changed while it serves.
    pub fn control(&self) -> Control {
        Control {
            changing: self.changing.clone(),
            dialer: self.dialer.clone(),
        }
    }
}

/// What a listener goes by and a reload may change.
struct Changing {
    limits: ArcSwap<Limits>,
    tls: Option<ArcSwap<rustls::ServerConfig>>,
    connections: Arc<Connections>,
    quotas: Quotas,
}

/// How many may be under way.
pub(super) struct Quotas {
    pub(super) handshakes: Arc<Quota>,
    /// WHIP requests whose SDP is here; of their own, so that they take nothing from WebSockets.
    pub(super) whips: Arc<Quota>,
    pub(super) upgraded: Arc<Quota>,
}

impl Quotas {
    fn set(&self, limits: &Limits) {
        self.handshakes.set(limits.handshakes);
        self.whips.set((limits.handshakes / WHIP_SHARE).max(1));
        self.upgraded.set(limits.sessions);
    }
}

/// Changes a listener that serves. Whatever runs goes on as it began: only what comes is measured by the new.
#[derive(Clone)]
pub struct Control {
    changing: Arc<Changing>,
    dialer: Arc<Dialer>,
}

impl Control {
    /// The limits from now on. Where fewer are allowed than there are, nobody goes for it, and there is room when enough have gone.
    pub fn set_limits(&self, limits: &Limits) {
        let changing = &self.changing;
        if **changing.limits.load() == *limits {
            return;
        }
        let places = places(limits, descriptors(limits));
        changing.limits.store(Arc::new(limits.clone()));
        changing.quotas.set(limits);
        changing.connections.set(limits, places);
    }

    /// The certificate of the next connections. Without effect on a listener of plain HTTP.
    pub fn set_certificate(&self, certificate: &Certificate) {
        if let Some(tls) = &self.changing.tls {
            tls.store(certificate.server());
        }
    }

    /// Whom the next connections to an https upstream trust.
    ///
    /// # Errors
    /// The crypto library can't use them; those that are in force stay.
    pub fn trust(&self, roots: &rustls::RootCertStore) -> Result<(), Fault> {
        self.dialer.trust(roots.clone())
    }
}

pub(super) async fn bind(config: SignalConfig) -> Result<Bound, Fault> {
    let tls = config.tls.map(|tls| ArcSwap::from(tls.server()));
    let dialer = Arc::new(Dialer::new(config.upstream)?);
    let taken = |e: io::Error| {
        Fault::internal(
            What::Config,
            format!(
                "listen: {} can't be taken: {e}; free it or set another address",
                config.listen
            ),
        )
    };
    let listener = TcpListener::bind(config.listen).await.map_err(taken)?;
    let local = listener.local_addr().map_err(taken)?;
    let places = places(&config.limits, descriptors(&config.limits));
    let quotas = Quotas {
        handshakes: Quota::new(0),
        whips: Quota::new(0),
        upgraded: Quota::new(0),
    };
    quotas.set(&config.limits);
    let changing = Changing {
        connections: Connections::new(&config.limits, places, REUSE),
        limits: ArcSwap::from_pointee(config.limits),
        tls,
        quotas,
    };
    Ok(Bound {
        listener,
        local,
        dialer,
        changing: Arc::new(changing),
        compress: config.compress,
    })
}

/// Descriptors that the process may have: as many as the limits call for, if the system allows so many.
fn descriptors(limits: &Limits) -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return OWN_DESCRIPTORS + wanted(limits.sessions, limits.connections);
    };
    // The soft limit is low for the sake of programs that use select(2). More than Linux' fs.nr_open can't be had.
    let most = hard.min(1 << 20);
    if soft < most && setrlimit(Resource::RLIMIT_NOFILE, most, hard).is_ok() {
        return most;
    }
    soft
}

/// Descriptors that connections and media take where all limits are reached.
pub(super) fn wanted(sessions: usize, connections: usize) -> u64 {
    let media = (sessions as u64).saturating_mul(DESCRIPTORS_A_SESSION);
    let connections = (connections as u64).saturating_mul(DESCRIPTORS_A_CONNECTION);
    media.saturating_add(connections).max(1)
}

/// Connections that fit into so many descriptors. Where they are too few, media keeps its share of them.
fn places(limits: &Limits, descriptors: u64) -> usize {
    let there = u128::from(descriptors.saturating_sub(OWN_DESCRIPTORS));
    let fit = there * limits.connections as u128
        / u128::from(wanted(limits.sessions, limits.connections));
    let fit = usize::try_from(fit).unwrap_or(usize::MAX).max(1);
    if fit < limits.connections {
        tracing::warn!(
            descriptors,
            connections = fit,
            configured = limits.connections,
            sessions = limits.sessions,
            "limits.connections can't be reached: each takes up to {DESCRIPTORS_A_CONNECTION} file descriptors, and a session's \
             media {DESCRIPTORS_A_SESSION} for each address; raise the hard limit (LimitNOFILE=, ulimit -Hn) or lower limits.sessions"
        );
    }
    fit.min(limits.connections)
}

/// What all connections share.
pub(super) struct Shared {
    pub(super) dialer: Arc<Dialer>,
    changing: Arc<Changing>,
    pub(super) sessions: Arc<dyn Sessions>,
    pub(super) drain: watch::Receiver<Drain>,
    /// For messages of LiveKit's that are longer than a client's may be.
    pub(super) large: Arc<Large>,
    /// `auralink-` and 8 random hex digits: this process in a Via header.
    pub(super) pseudonym: String,
    pub(super) secure: bool,
    /// The upstream is offered permessage-deflate where a client offers it.
    pub(super) compress: bool,
    /// Held by every task that serves somebody; [`serve`] waits for the last one to go.
    pub(super) alive: mpsc::WeakSender<Infallible>,
}

impl Shared {
    /// Those in force. Who asks twice may get two answers.
    pub(super) fn limits(&self) -> Arc<Limits> {
        self.changing.limits.load_full()
    }

    pub(super) fn quotas(&self) -> &Quotas {
        &self.changing.quotas
    }
}

pub(super) async fn serve(
    bound: Bound,
    sessions: Arc<dyn Sessions>,
    mut drain: watch::Receiver<Drain>,
) {
    let (alive, mut ended) = mpsc::channel::<Infallible>(1);
    let mut id = [0; 4];
    // Without entropy every instance is 00000000, and a chain of two would look like a loop: any other number does as well.
    if getrandom::fill(&mut id).is_err() {
        id = std::process::id().to_be_bytes();
    }
    let connections = bound.changing.connections.clone();
    let began = bound.changing.limits.load_full();
    let shared = Arc::new(Shared {
        // A reload changes how long a message may be, not the room for all of them: one that is longer has all of it.
        large: Large::new(
            began
                .max_upstream_frame_bytes
                .saturating_mul(LARGE_AT_A_TIME),
            began.take_timeout,
        ),
        dialer: bound.dialer,
        changing: bound.changing.clone(),
        sessions,
        drain: drain.clone(),
        pseudonym: format!("auralink-{:08x}", u32::from_be_bytes(id)),
        secure: bound.changing.tls.is_some(),
        compress: bound.compress,
        alive: alive.downgrade(),
    });
    loop {
        let accepted = async {
            // Whoever had to go and doesn't must not keep new ones out.
            let _ = tokio::time::timeout(ACCEPT_PAUSE, connections.settled()).await;
            let (tcp, peer) = bound.listener.accept().await?;
            loop {
                match connections.admit(peer.ip()) {
                    Ok(seat) => return Ok(Some((tcp, peer, seat))),
                    Err(NoPlace::Address) => return Ok(None),
                    // More wait in the kernel's accept queue.
                    Err(NoPlace::All) => connections.freed().await,
                }
            }
        };
        let accepted: io::Result<_> = tokio::select! {
            accepted = accepted => accepted,
            () = leaving(&mut drain) => break,
        };
        let (tcp, peer, seat) = match accepted {
            Ok(Some(accepted)) => accepted,
            Ok(None) => {
                metrics::counter!(HTTP_EVICTED, "why" => "refused").increment(1);
                note(
                    "one address has all connections that limits.connections_per_address allows; if it is a proxy's, set that to 0",
                );
                continue;
            }
            Err(e) => {
                let fault = match out_of_descriptors(&e) {
                    Some(fault) => fault,
                    // The client went before it was accepted (ECONNABORTED), or its network did.
                    None => Fault::client(What::Lost, "a client's connection can't be accepted"),
                };
                fault.because(e).report("", "");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        tune(&tcp);
        let tls = bound.changing.tls.as_ref();
        let tls = tls.map(|tls| TlsAcceptor::from(tls.load_full()));
        let (shared, alive) = (shared.clone(), alive.clone());
        tokio::spawn(async move {
            let held = Held::new(seat.clone(), alive, metrics::gauge!(HTTP_CONNECTIONS));
            match tls {
                None => connection(tcp, peer, seat, shared, held).await,
                // On the heap: plain connections must not carry the room for it.
                Some(tls) => Box::pin(secured(tls, tcp, peer, seat, shared, held)).await,
            }
        });
    }
    drop((bound.listener, alive));
    while ended.recv().await.is_some() {}
}

/// Serves a connection over TLS.
async fn secured(
    tls: TlsAcceptor,
    tcp: TcpStream,
    peer: SocketAddr,
    seat: Arc<Seat>,
    shared: Arc<Shared>,
    held: Held<Arc<Seat>>,
) {
    let accepted = tokio::select! {
        accepted = tls.accept(tcp) => accepted,
        _ = seat.due() => {
            Fault::client(What::Timeout, "the TLS handshake took too long").report("", "");
            return;
        }
    };
    match accepted {
        Ok(stream) => {
            seat.secured();
            connection(stream, peer, seat, shared, held).await;
        }
        Err(e) => Fault::client(What::Malformed, "the TLS handshake failed")
            .because(e)
            .report("", ""),
    }
}

/// What a task that serves somebody holds for as long as it does: a place, a sign of life, and one in a gauge.
pub(super) struct Held<P> {
    _place: P,
    _alive: mpsc::Sender<Infallible>,
    gauge: metrics::Gauge,
}

impl<P> Held<P> {
    pub(super) fn new(place: P, alive: mpsc::Sender<Infallible>, gauge: metrics::Gauge) -> Self {
        gauge.increment(1.0);
        Held {
            _place: place,
            _alive: alive,
            gauge,
        }
    }
}

impl<P> Drop for Held<P> {
    fn drop(&mut self) {
        self.gauge.decrement(1.0);
    }
}

/// Serves one connection of a client's until it ends or is upgraded.
async fn connection<S>(
    stream: S,
    peer: SocketAddr,
    seat: Arc<Seat>,
    shared: Arc<Shared>,
    held: Held<Arc<Seat>>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut stream = Watched::new(stream, seat.clone());
    // Nothing is in memory for somebody who says nothing.
    let mut drain = shared.drain.clone();
    let wakes = tokio::select! {
        wakes = stream.wakes(head_limit(&shared.limits())) => wakes,
        _ = seat.due() => false,
        () = leaving(&mut drain) => false,
    };
    if wakes {
        Box::pin(requests(stream, peer, seat, shared, held)).await;
    }
}

/// The longest head of a request.
fn head_limit(limits: &Limits) -> usize {
    limits.max_header_bytes + limits.max_query_bytes + REQUEST_LINE
}

/// Serves a connection on which the first request begins.
async fn requests<S>(
    stream: Watched<S>,
    peer: SocketAddr,
    seat: Arc<Seat>,
    shared: Arc<Shared>,
    held: Held<Arc<Seat>>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let head = head_limit(&shared.limits());
    let client = Arc::new(Client::new(peer, seat.clone(), held));
    let service = service_fn(|request| {
        let (shared, client) = (shared.clone(), client.clone());
        // At once, before anything more is read.
        let asked = Asked::of(&request);
        let large = client.seat.working(asked.kind == Kind::Plain);
        async move {
            // On the heap, and so only while there is a request.
            let mut answer = Box::pin(answer(request, asked, &client, &shared)).await;
            if large && answer.status() != StatusCode::SWITCHING_PROTOCOLS {
                // hyper would keep the large buffer for as long as the connection rests.
                let close = HeaderValue::from_static("close");
                answer.headers_mut().insert(header::CONNECTION, close);
            }
            Ok::<_, Infallible>(answer.map(|body| Answer::new(body, client.seat.clone())))
        }
    });
    let mut builder = server::Builder::new();
    builder
        .timer(TokioTimer::new())
        // The seat's deadlines tell a request that doesn't end from a connection that rests.
        .header_read_timeout(None)
        .max_buf_size(head.max(MIN_BUFFER))
        .max_header_size(head)
        .preserve_header_case(true)
        .auto_date_header(false);
    let connection = builder
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let mut drain = shared.drain.clone();
    let result = loop {
        tokio::select! {
            result = &mut connection => break result,
            due = seat.due() => match due {
                Due::Rest => client.forget_upstream(),
                Due::Over => {
                    Fault::client(What::Timeout, "a client took too long, or another one needed its place")
                        .report("", "");
                    return;
                }
            },
            () = leaving(&mut drain) => {
                connection.as_mut().graceful_shutdown();
                match timeout(LEAVE_WAIT, connection).await {
                    Ok(result) => break result,
                    Err(_) => return,
                }
            }
        }
    };
    if let Err(e) = result
        && (e.is_parse() || e.is_timeout())
    {
        let what = if e.is_timeout() {
            What::Timeout
        } else {
            What::Malformed
        };
        Fault::client(what, "a request could not be read")
            .because(e)
            .report("", "");
    }
}

/// What a request is for.
struct Asked {
    place: Result<Place, Refused>,
    kind: Kind,
}

impl Asked {
    fn of(request: &Request<Incoming>) -> Asked {
        let place = path::read(request.method(), request.uri().path());
        let kind = Kind::of(request, place.as_ref().ok());
        Asked { place, kind }
    }
}

/// Answers one request, whatever happens.
async fn answer(
    request: Request<Incoming>,
    Asked { place, kind }: Asked,
    client: &Client,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let started = Instant::now();
    let passed = match place {
        Ok(place) => pass(request, kind, place, client, shared).await,
        Err(refused) => {
            let fault = Fault::client(What::Malformed, refused.detail());
            Err((fault, String::new()))
        }
    };
    let response = match passed {
        Ok(response) => response,
        Err((fault, session)) => {
            fault.report(&path, &session);
            own_answer(&fault)
        }
    };
    let class = ["1xx", "2xx", "3xx", "4xx", "5xx"]
        .get(usize::from(response.status().as_u16() / 100).wrapping_sub(1))
        .unwrap_or(&"other");
    metrics::counter!(HTTP_REQUESTS, "kind" => kind.as_str(), "class" => *class).increment(1);
    if kind == Kind::Session {
        metrics::histogram!(HANDSHAKE_SECONDS).record(started.elapsed().as_secs_f64());
    }
    response
}

/// A fault as an HTTP answer. Readable by scripts of any origin, as LiveKit's own answers are: livekit-client shows it.
fn own_answer(fault: &Fault) -> Response<Body> {
    let mut response = Response::new(Either::Right(Full::new(Bytes::from(fault.json()))));
    *response.status_mut() = fault.status();
    let h = response.headers_mut();
    h.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    h.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    h.insert(
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        HeaderValue::from_static("*"),
    );
    if let Some(seconds) = fault.retry_after() {
        h.insert(header::RETRY_AFTER, seconds.into());
    }
    response
}
