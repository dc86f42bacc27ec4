//! The admin listener: `/healthz`, `/readyz`, `/metrics`, `/status.json` and the status page.
//!
//! Read-only, HTTP/1.1, without access control: it belongs on loopback or a network of its own.
//! What it shows comes through [`StatusSource`]; it knows nothing of signalling, media or
//! configuration.

pub mod hop;
pub mod metrics;
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
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Connections at a time: a scraper, probes and a few people. Further ones wait in the backlog.
const MAX_CONNECTIONS: usize = 64;

/// For a request's headers, and between two requests on a connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);

/// Enough for any request that has an answer here.
const MAX_HEADER_BYTES: usize = 16 << 10;

/// How often histograms are folded, so that they do not grow between scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// What the listener shows. Called from its own tasks: must not block.
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
pub async fn bind(listen: SocketAddr) -> io::Result<Bound> {
    let listener = TcpListener::bind(listen).await.map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("admin.listen: {listen} cannot be listened on: {e}"),
        )
    })?;
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

/// Serves until it is dropped; connections end with it. It goes on during a drain, so that the
/// drain can be watched.
pub async fn serve(bound: Bound, admin: Arc<Admin>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut upkeep = tokio::time::interval(UPKEEP);
    loop {
        let accepted = async {
            let permit = Arc::clone(&room).acquire_owned().await;
            (permit, bound.0.accept().await)
        };
        tokio::select! {
            (permit, accepted) = accepted => match accepted {
                Ok((stream, _)) => {
                    let admin = Arc::clone(&admin);
                    connections.spawn(async move {
                        let _permit = permit;
                        connection(stream, admin).await;
                    });
                }
                Err(error) => {
                    // Such as no file descriptors left: trying again at once would only burn CPU.
                    tracing::warn!(%error, "admin listener cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = upkeep.tick() => admin.metrics.run_upkeep(),
        }
    }
}

async fn connection(stream: TcpStream, admin: Arc<Admin>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = respond(&admin, request.method(), request.uri().path());
        async move { Ok::<_, Infallible>(response) }
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

fn respond(admin: &Admin, method: &Method, path: &str) -> Reply {
    if method != Method::GET && method != Method::HEAD {
        let mut reply = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        reply
            .headers_mut()
            .insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return reply;
    }
    match path {
        "/healthz" => text(StatusCode::OK, "ok\n"),
        "/readyz" => {
            let readiness = admin.source.readiness();
            let ready = readiness.ready();
            let status = if ready {
                StatusCode::OK
            } else {
                StatusCode::SERVICE_UNAVAILABLE
            };
            json(status, &status::ReadyReport { ready, readiness })
        }
        "/metrics" => {
            metrics::publish(&admin.source.snapshot());
            let mut body = admin.metrics.render();
            admin.rooms.render(&mut body);
            let mut reply = text(StatusCode::OK, body);
            let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            reply.headers_mut().insert(header::CONTENT_TYPE, kind);
            reply
        }
        "/status.json" => json(StatusCode::OK, &admin.source.snapshot()),
        "/" | "/status" => page(),
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /healthz /readyz /metrics /status.json and /status\n",
        ),
    }
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

fn page() -> Reply {
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
