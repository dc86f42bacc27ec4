//! The admin listener: `/healthz`, `/readyz`, `/metrics`, `/status.json` and the status page.
//!
//! Read-only, HTTP/1.1, without access control: it belongs on loopback or a network of its own. It has a thread of its own, and
//! what it has to ask others for is asked on further ones, so that `/healthz` is answered whatever the rest of the process does.
//! What it shows comes through [`StatusSource`]; it knows nothing of signalling, media or
//! configuration.

pub mod hop;
pub mod metrics;
mod process;
pub mod rooms;
pub mod status;

pub use rooms::{RoomMeter, Rooms};
pub use status::{Check, CheckState, Readiness, Status};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, Id, JoinSet};

/// Connections at a time: a scraper, probes and a few people. A further one takes the place of the one that has been silent longest.
const MAX_CONNECTIONS: usize = 64;

/// Questions to the rest of the process at a time.
const MAX_QUESTIONS: usize = 4;

/// For the rest of the process to say how it is. Probes and scrapers wait no longer: Prometheus 10 s, Kubernetes 1 s.
const PATIENCE: Duration = Duration::from_secs(5);

/// For a request's headers, and between two requests on a connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);

/// Enough for any request that has an answer here.
const MAX_HEADER_BYTES: usize = 16 << 10;

/// How often histograms are folded, so that they do not grow between scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// What the listener shows. Called from threads for that: may wait for locks.
pub trait StatusSource: Send + Sync + 'static {
    /// Every live session, and totals since the start.
    fn snapshot(&self) -> Status;
    /// Whether new sessions should be sent here.
    fn readiness(&self) -> Readiness;
}

/// What the listener serves from.
pub struct Admin {
    /// Sessions and readiness.
    pub source: Arc<dyn StatusSource>,
    /// From [`metrics::install`].
    pub metrics: PrometheusHandle,
    /// Savings by room.
    pub rooms: Arc<Rooms>,
}

/// A port taken, nothing served yet.
pub struct Bound(TcpListener);

/// Takes the port.
///
/// # Errors
/// The system's, naming the key and the address.
pub fn bind(listen: SocketAddr) -> io::Result<Bound> {
    let taken = |e: io::Error| {
        io::Error::new(
            e.kind(),
            format!("admin.listen: {listen} cannot be listened on: {e}"),
        )
    };
    let listener = TcpListener::bind(listen).map_err(taken)?;
    listener.set_nonblocking(true).map_err(taken)?;
    Ok(Bound(listener))
}

impl Bound {
    /// Where; the port is the real one even where the configuration left it to the system.
    ///
    /// # Errors
    /// The system's.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// Serves on a thread of its own until the process ends. It goes on during a drain, so that the drain can be watched. The future
/// ends with the thread, however that ends.
///
/// # Errors
/// The system has no thread for it.
pub fn start(bound: Bound, admin: Arc<Admin>) -> io::Result<impl Future<Output = ()> + use<>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_QUESTIONS)
        .thread_name("admin-ask")
        .build()?;
    let (alive, ended) = tokio::sync::oneshot::channel::<()>();
    let serving = move || {
        // Dropped when the thread ends, by a panic too.
        let _alive = alive;
        if let Err(error) = runtime.block_on(serve(bound, admin)) {
            tracing::error!(%error, "the admin listener has ended");
        }
    };
    std::thread::Builder::new()
        .name("admin".into())
        .spawn(serving)?;
    Ok(async move {
        // Nothing is ever sent: this is the sender's end.
        let _ = ended.await;
    })
}

/// One connection, and whether a request of it is being answered.
struct Guest {
    task: AbortHandle,
    busy: Arc<AtomicBool>,
}

/// Who is connected, in the order in which they came.
#[derive(Default)]
struct Guests(VecDeque<(Id, Guest)>);

impl Guests {
    /// Makes room for one more: of those that ask nothing the one that came first goes, else the first of all.
    fn make_room(&mut self) {
        while self.0.len() >= MAX_CONNECTIONS {
            let idle = |(_, guest): &(Id, Guest)| !guest.busy.load(Ordering::Relaxed);
            let at = self.0.iter().position(idle).unwrap_or(0);
            if let Some((_, guest)) = self.0.remove(at) {
                guest.task.abort();
            }
        }
    }
}

/// Serves until it is dropped; connections end with it.
async fn serve(bound: Bound, admin: Arc<Admin>) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(bound.0)?;
    let asking = Arc::new(Semaphore::new(MAX_QUESTIONS));
    let mut guests = Guests::default();
    let mut connections = JoinSet::new();
    let mut upkeep = tokio::time::interval(UPKEEP);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    guests.make_room();
                    let busy = Arc::new(AtomicBool::new(false));
                    let desk = Desk { admin: admin.clone(), asking: asking.clone(), busy: busy.clone() };
                    let task = connections.spawn(connection(stream, desk));
                    guests.0.push_back((task.id(), Guest { task, busy }));
                }
                Err(error) => {
                    // Such as no file descriptors left: trying again at once would only burn CPU.
                    tracing::debug!(%error, "admin listener cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(ended) = connections.join_next_with_id() => {
                let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
                guests.0.retain(|(other, _)| *other != id);
            }
            _ = upkeep.tick() => admin.metrics.run_upkeep(),
        }
    }
}

/// What a connection needs to answer.
struct Desk {
    admin: Arc<Admin>,
    asking: Arc<Semaphore>,
    busy: Arc<AtomicBool>,
}

impl Desk {
    /// What the rest of the process says; `None` if it doesn't in time. A question that hangs keeps its thread, so that there are
    /// never more than a few.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&dyn StatusSource) -> T + Send + 'static,
    ) -> Option<T> {
        let source = self.admin.source.clone();
        let asking = async {
            let permit = self.asking.clone().acquire_owned().await.ok()?;
            let answer = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                question(&*source)
            });
            answer.await.ok()
        };
        tokio::time::timeout(PATIENCE, asking).await.ok().flatten()
    }
}

async fn connection(stream: TcpStream, desk: Desk) {
    let desk = Arc::new(desk);
    let service = service_fn(move |request: Request<Incoming>| {
        let desk = desk.clone();
        async move {
            desk.busy.store(true, Ordering::Relaxed);
            let reply = respond(&desk, request.method(), request.uri().path()).await;
            desk.busy.store(false, Ordering::Relaxed);
            Ok::<_, Infallible>(reply)
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "admin connection");
    }
}

type Reply = Response<Full<Bytes>>;

/// Methods that are answered. HAProxy checks health with OPTIONS unless it is told otherwise.
const METHODS: &str = "GET, HEAD, OPTIONS";

async fn respond(desk: &Desk, method: &Method, path: &str) -> Reply {
    let mut reply = match *method {
        Method::GET | Method::HEAD => return page(desk, path).await,
        // As HEAD is, so that a check of /readyz with it says what a check has to say.
        Method::OPTIONS => {
            let mut reply = page(desk, path).await;
            *reply.body_mut() = Full::default();
            reply.headers_mut().remove(header::CONTENT_TYPE);
            reply
        }
        _ => text(StatusCode::METHOD_NOT_ALLOWED, format!("only {METHODS}\n")),
    };
    reply
        .headers_mut()
        .insert(header::ALLOW, HeaderValue::from_static(METHODS));
    reply
}

async fn page(desk: &Desk, path: &str) -> Reply {
    let admin = &desk.admin;
    match path {
        "/healthz" => text(StatusCode::OK, "ok\n"),
        "/readyz" => {
            let Some(readiness) = desk.ask(|source| source.readiness()).await else {
                return unanswered();
            };
            let ready = readiness.ready();
            let status = if ready {
                StatusCode::OK
            } else {
                StatusCode::SERVICE_UNAVAILABLE
            };
            json(status, &status::ReadyReport { ready, readiness })
        }
        "/metrics" => {
            let Some(status) = desk.ask(|source| source.snapshot()).await else {
                return unanswered();
            };
            metrics::publish(&status);
            let mut body = admin.metrics.render();
            admin.rooms.render(&mut body);
            process::render(&mut body);
            let mut reply = text(StatusCode::OK, body);
            let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            reply.headers_mut().insert(header::CONTENT_TYPE, kind);
            reply
        }
        "/status.json" => match desk.ask(|source| source.snapshot()).await {
            Some(status) => json(StatusCode::OK, &status),
            None => unanswered(),
        },
        "/" | "/status" => status_page(),
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /healthz /readyz /metrics /status.json and /status\n",
        ),
    }
}

/// The process is up, but what was asked for hangs.
fn unanswered() -> Reply {
    text(
        StatusCode::SERVICE_UNAVAILABLE,
        format!("signalling or media did not answer within {PATIENCE:?}\n"),
    )
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(body.into()));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    reply
}

fn json<T: Serialize>(status: StatusCode, body: &T) -> Reply {
    match serde_json::to_vec(body) {
        Ok(body) => {
            let mut reply = text(status, body);
            let kind = HeaderValue::from_static("application/json");
            reply.headers_mut().insert(header::CONTENT_TYPE, kind);
            reply
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn status_page() -> Reply {
    let mut reply = text(StatusCode::OK, include_str!("status.html"));
    let headers = reply.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/html; charset=utf-8"),
    );
    // The page shows names that strangers chose: nothing but its own script may run.
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
             connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
    );
    reply
}

#[cfg(test)]
mod tests;
