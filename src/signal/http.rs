//! The listener: TCP or TLS, HTTP/1.1, and the drain.
//!
//! One connection of a client has at most one to the upstream (reused while the client keeps its own alive), so requests of
//! different clients never share one. Bodies stream both ways under TCP's own backpressure; nothing is held back or stored.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::forward::{Client, Kind, pass};
use super::upstream::{Dialer, provider, tune};
use super::ws::leaving;
use super::{
    Drain, HANDSHAKE_SECONDS, HTTP_CONNECTIONS, HTTP_REQUESTS, Limits, Sessions, SignalConfig,
    TlsFiles,
};
use crate::fault::{Fault, What};

/// An upstream's answer as it streams in, or a few bytes of the sidecar's own.
pub(super) type Body = Either<Incoming, Full<Bytes>>;

/// Room for the request line and the path in hyper's buffer, beside query and header fields.
const REQUEST_LINE: usize = 1 << 10;
/// hyper refuses a smaller buffer.
const MIN_BUFFER: usize = 8 << 10;
/// For requests that are being answered when the sidecar leaves; then they break off, and [`serve`] returns in any case.
const LEAVE_WAIT: Duration = Duration::from_secs(5);
/// After a failed accept (no file descriptors left): a pause instead of a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A port that is taken and a configuration that is read, ready to [`serve`](super::serve).
pub struct Bound {
    listener: TcpListener,
    local: SocketAddr,
    tls: Option<TlsAcceptor>,
    pub(super) dialer: Dialer,
    limits: Limits,
}

impl Bound {
    /// Where clients can dial: the real port where the configuration said 0.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

pub(super) async fn bind(config: SignalConfig) -> Result<Bound, Fault> {
    let tls = config.tls.as_ref().map(acceptor).transpose()?;
    let dialer = Dialer::new(config.upstream)?;
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
    Ok(Bound {
        listener,
        local,
        tls,
        dialer,
        limits: config.limits,
    })
}

fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, Fault> {
    let bad = |file: &std::path::Path, wanted: &str, e: String| {
        Fault::internal(
            What::Config,
            format!("tls: {}: {e}; wanted is {wanted} in PEM", file.display()),
        )
    };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(&files.cert)
        .and_then(Iterator::collect)
        .map_err(|e| bad(&files.cert, "a certificate with its chain", e.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|e| bad(&files.key, "the certificate's private key", e.to_string()))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| Fault::internal(What::Config, e.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|e| {
            bad(
                &files.cert,
                "a certificate that fits the key",
                e.to_string(),
            )
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// What all connections share.
pub(super) struct Shared {
    pub(super) dialer: Dialer,
    pub(super) limits: Limits,
    pub(super) sessions: Arc<dyn Sessions>,
    pub(super) drain: watch::Receiver<Drain>,
    pub(super) handshakes: Arc<Semaphore>,
    pub(super) upgraded: Arc<Semaphore>,
    /// `auralink-` and 8 random hex digits: this process in a Via header.
    pub(super) pseudonym: String,
    pub(super) secure: bool,
    /// Held by every task that serves somebody; [`serve`] waits for the last one to go.
    pub(super) alive: mpsc::WeakSender<Infallible>,
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
    let connections = Arc::new(Semaphore::new(
        bound.limits.connections.min(Semaphore::MAX_PERMITS),
    ));
    let shared = Arc::new(Shared {
        handshakes: Arc::new(Semaphore::new(
            bound.limits.handshakes.min(Semaphore::MAX_PERMITS),
        )),
        upgraded: Arc::new(Semaphore::new(
            bound.limits.sessions.min(Semaphore::MAX_PERMITS),
        )),
        dialer: bound.dialer,
        limits: bound.limits,
        sessions,
        drain: drain.clone(),
        pseudonym: format!("auralink-{:08x}", u32::from_be_bytes(id)),
        secure: bound.tls.is_some(),
        alive: alive.downgrade(),
    });
    loop {
        let accepted = async {
            // Never closed, so this is always a permit.
            let permit = connections.clone().acquire_owned().await.ok()?;
            Some((permit, bound.listener.accept().await))
        };
        let (permit, accepted) = tokio::select! {
            Some(accepted) = accepted => accepted,
            () = leaving(&mut drain) => break,
        };
        let (tcp, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                Fault::internal(What::Lost, "a client's connection can't be accepted")
                    .because(format!(
                        "{e}; if it is about files, raise the limit (ulimit -n)"
                    ))
                    .report("", "");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        tune(&tcp);
        let (shared, alive, tls) = (shared.clone(), alive.clone(), bound.tls.clone());
        tokio::spawn(async move {
            let held = Held::new(permit, alive, metrics::gauge!(HTTP_CONNECTIONS));
            match tls {
                None => connection(tcp, peer, shared, held).await,
                Some(tls) => match timeout(shared.limits.header_timeout, tls.accept(tcp)).await {
                    Ok(Ok(stream)) => connection(stream, peer, shared, held).await,
                    Ok(Err(e)) => Fault::client(What::Malformed, "the TLS handshake failed")
                        .because(e)
                        .report("", ""),
                    Err(_) => Fault::client(What::Timeout, "the TLS handshake took too long")
                        .report("", ""),
                },
            }
        });
    }
    drop((bound.listener, alive));
    while ended.recv().await.is_some() {}
}

/// What a task that serves somebody holds for as long as it does: a permit, a sign of life, and one in a gauge.
pub(super) struct Held {
    _permit: OwnedSemaphorePermit,
    _alive: mpsc::Sender<Infallible>,
    gauge: metrics::Gauge,
}

impl Held {
    pub(super) fn new(
        permit: OwnedSemaphorePermit,
        alive: mpsc::Sender<Infallible>,
        gauge: metrics::Gauge,
    ) -> Held {
        gauge.increment(1.0);
        Held {
            _permit: permit,
            _alive: alive,
            gauge,
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.gauge.decrement(1.0);
    }
}

/// Serves one connection of a client's until it ends or is upgraded.
async fn connection<S>(stream: S, peer: SocketAddr, shared: Arc<Shared>, held: Held)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = &shared.limits;
    let head = limits.max_header_bytes + limits.max_query_bytes + REQUEST_LINE;
    let client = Arc::new(Client::new(peer, held));
    let service = service_fn(|request| {
        let (shared, client) = (shared.clone(), client.clone());
        async move { Ok::<_, Infallible>(answer(request, &client, &shared).await) }
    });
    let mut builder = server::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(head.max(MIN_BUFFER))
        .max_header_size(head)
        .preserve_header_case(true)
        .auto_date_header(false);
    let connection = builder
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let mut drain = shared.drain.clone();
    let result = tokio::select! {
        result = &mut connection => result,
        () = leaving(&mut drain) => {
            connection.as_mut().graceful_shutdown();
            match timeout(LEAVE_WAIT, connection).await {
                Ok(result) => result,
                Err(_) => return,
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

/// Answers one request, whatever happens.
async fn answer(
    request: Request<Incoming>,
    client: &Client,
    shared: &Arc<Shared>,
) -> Response<Body> {
    let kind = Kind::of(&request);
    let path = request.uri().path().to_owned();
    let started = Instant::now();
    let response = match pass(request, kind, client, shared).await {
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
