//! Signalling: the HTTP/1.1 and WebSocket listener in front of LiveKit.
//!
//! Every request goes to the upstream and its answer comes back as it was, streamed both ways. On the two session paths (`/rtc`,
//! `/rtc/v1`, under any prefix) WebSocket messages pass one by one through a [`SignalSession`], which may change them; the
//! WebSockets of workers (`/agent`) are spliced as opaque bytes, and no other is served ([`path`]). A WHIP client's SDP, which travels in plain requests, passes through [`Sessions::whip`]. LiveKit's answer
//! decides whether a session exists: nothing but a 101, or WHIP's 201, makes one.
//!
//! Pings, pongs and close frames are never answered here: they pass to the other side, whose answer comes back. So a dead client
//! looks dead to the server, and the other way round, exactly as without a sidecar.

mod connections;
mod deflate;
mod forward;
mod frame;
#[doc(hidden)]
pub mod fuzz;
mod http;
mod large;
pub mod path;
mod quota;
#[cfg(test)]
mod tests;
mod upstream;
mod whip;
mod ws;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::HeaderMap;
use tokio::sync::watch;

use crate::fault::Fault;
use crate::tls::Certificate;

pub use http::{Bound, Control};
pub use quota::{Permit, Quota};
pub use upstream::{Prober, Upstream};

/// What the listener needs to know.
#[derive(Debug, Clone)]
pub struct SignalConfig {
    /// Address that clients dial. Port 0 takes a free one: see [`Bound::local_addr`].
    pub listen: SocketAddr,
    /// LiveKit, or the origin sidecar.
    pub upstream: Upstream,
    /// TLS on `listen`; plain HTTP without.
    pub tls: Option<Arc<Certificate>>,
    /// permessage-deflate is offered to the upstream where a client offers it. Of no use where the way to it is free.
    pub compress: bool,
    /// Bounds on what strangers may do.
    pub limits: Limits,
}

/// Bounds on memory and time that a stranger can take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Header fields of one request, names and values, in bytes. Over it: 431. Default 64 KiB.
    pub max_header_bytes: usize,
    /// Query of one request, in bytes; a `join_request` with offers takes some 5–30 kB. Over it: 414.
    /// Default and maximum [`Limits::QUERY_CEILING`].
    pub max_query_bytes: usize,
    /// One WebSocket message of a client's in a session, fragments put together, in bytes. Over it: close 1009. Default 1 MiB.
    pub max_frame_bytes: usize,
    /// One of the upstream's, in bytes. Over it: close 1009 towards the upstream, 1011 towards the client. Longer ones than
    /// `max_frame_bytes` have room for two of the longest in all sessions together. Default and maximum
    /// [`MAX_FRAME`](auralink_proto::signal::MAX_FRAME).
    pub max_upstream_frame_bytes: usize,
    /// For a client to take one that is longer than `max_frame_bytes`, where others wait for its room. Default 30 s.
    pub take_timeout: Duration,
    /// For the TLS handshake, for a request's header section to arrive from its first byte on, and between two parts of its body.
    /// Default 10 s.
    pub header_timeout: Duration,
    /// How long a connection may rest between two requests. Default 75 s: over the 60 s after which load balancers end an idle
    /// connection of theirs (AWS, Google and nginx), so that it is not this side that ends one in the moment in which it is used.
    pub keep_alive_timeout: Duration,
    /// For a connection to the upstream, TLS included. Over it: 504. Default 5 s.
    pub dial_timeout: Duration,
    /// For the upstream's answer to begin. Over it: 504. Generous, because Twirp calls that dial a phone wait for it to be
    /// picked up. Default 120 s.
    pub answer_timeout: Duration,
    /// Without a byte in either direction an upgraded connection is closed. LiveKit's clients ping every few seconds. Default 120 s.
    pub idle_timeout: Duration,
    /// Upgrades which wait for the upstream's answer at one time. Over it: 503 with Retry-After. Default 256.
    pub handshakes: usize,
    /// Upgraded connections at one time. Over it: 503 with Retry-After. Default 10,000.
    pub sessions: usize,
    /// TCP connections at one time, upgraded ones included. Where all are taken, the one whose client has kept us waiting longest
    /// goes; where nobody keeps us waiting, more wait in the kernel's accept queue. Default 20,000.
    pub connections: usize,
    /// Of these, those of one address (IPv6: of one /64) that are no sessions; 0: no bound, for a sidecar that sees all clients
    /// under the address of a load balancer. With it, an address has half of [`Limits::handshakes`] at most. Default 512.
    pub connections_per_address: usize,
}

impl Limits {
    /// The longest request target that the `http` crate can hold is 65,534 bytes; the rest is room for the path.
    pub const QUERY_CEILING: usize = 65_000;
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_header_bytes: 64 << 10,
            max_query_bytes: Limits::QUERY_CEILING,
            max_frame_bytes: 1 << 20,
            max_upstream_frame_bytes: auralink_proto::signal::MAX_FRAME,
            take_timeout: Duration::from_secs(30),
            header_timeout: Duration::from_secs(10),
            keep_alive_timeout: Duration::from_secs(75),
            dial_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_secs(120),
            idle_timeout: Duration::from_secs(120),
            handshakes: 256,
            sessions: 10_000,
            connections: 20_000,
            connections_per_address: 512,
        }
    }
}

/// A client's wish to open a session, before the upstream has been asked. Holds a token: never to be logged.
#[derive(Clone, Copy)]
pub struct Opening<'a> {
    /// `/rtc`, `/rtc/v1` or `/whip/v1`.
    pub path: &'a str,
    /// What stands after `?`, as the client sent it, or "".
    pub query: &'a str,
    /// The client's header fields.
    pub headers: &'a HeaderMap,
    /// Where the client's connection comes from.
    pub peer: SocketAddr,
}

/// Where sessions come from; one for the whole listener.
pub trait Sessions: Send + Sync + 'static {
    /// Prepares a session and, where needed, the query that goes upstream. Called on the signalling runtime: must not block.
    ///
    /// # Errors
    /// A fault is answered to the client as HTTP status and JSON body; the upstream is not asked.
    fn open(&self, opening: &Opening<'_>) -> Result<Opened, Fault>;

    /// A WHIP client's request (RFC 9725), before the upstream has been asked. Called on the signalling runtime: must not block.
    ///
    /// # Errors
    /// A fault is answered to the client as HTTP status and JSON body; the upstream is not asked.
    fn whip(&self, opening: &Opening<'_>, message: WhipMessage<'_>) -> Result<Whip, Fault>;
}

/// What a WHIP client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhipMessage<'a> {
    /// A session, with this SDP offer.
    Offer(&'a str),
    /// An SDP fragment (RFC 8840 section 9) for a session.
    Fragment {
        /// The session: the last part of the path.
        resource: &'a str,
        /// `If-Match: *`: it restarts ICE; otherwise it trickles candidates.
        restart: bool,
        /// The fragment.
        text: &'a str,
    },
    /// The end of a session.
    Delete {
        /// The session: the last part of the path.
        resource: &'a str,
    },
}

/// A WHIP request that goes upstream.
pub struct Whip {
    /// Told of the answer.
    pub exchange: Box<dyn WhipExchange>,
    /// The body for the upstream; `None` keeps the client's.
    pub body: Option<String>,
}

/// The upstream's answer to a WHIP request, with a status of 2xx.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WhipAnswer<'a> {
    /// The session that was made: the last part of its Location.
    pub resource: Option<&'a str>,
    /// SDP or a fragment; may be empty.
    pub body: &'a str,
}

/// A WHIP request on its way. Dropped without having been answered: the upstream refused, or nobody waits any more.
pub trait WhipExchange: Send {
    /// For log lines; must not identify the participant.
    fn id(&self) -> &str {
        ""
    }
    /// The upstream did what it was asked for. Returns the body for the client. `place` counts as one of [`Limits::sessions`]; a
    /// session that was made holds it until its end.
    ///
    /// # Errors
    /// A fault is answered to the client.
    fn answered(
        self: Box<Self>,
        answer: WhipAnswer<'_>,
        place: Option<Permit>,
    ) -> Result<String, Fault>;
}

/// A prepared session.
pub struct Opened {
    /// Told of all that happens from here on.
    pub session: Box<dyn SignalSession>,
    /// The query for the upstream, without `?`; `None` keeps the client's.
    pub query: Option<String>,
}

/// One WebSocket message of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<'a> {
    /// Protobuf.
    Binary(&'a [u8]),
    /// Protojson.
    Text(&'a str),
}

/// What becomes of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It passes byte for byte.
    Keep,
    /// It does not pass.
    Drop,
    /// This passes in its place.
    Binary(Vec<u8>),
    /// This passes in its place.
    Text(String),
}

/// One client's signalling connection.
///
/// Order of calls: at most one of `accepted` and `refused`; after `accepted` any number of frames; at the end `closed`, exactly
/// once, whatever happened (also when the client went away before the upstream answered). All from one task, so nothing blocks.
pub trait SignalSession: Send {
    /// For log lines; must not identify the participant.
    fn id(&self) -> &str {
        ""
    }
    /// The upstream answered 101: the token is good, the session exists. It has a place among the sessions for as long as it keeps
    /// `place`; dropped with it if it doesn't.
    fn accepted(&mut self, place: Option<Permit>);
    /// The upstream answered something else (passed on to the client unchanged), or nothing (502, 504).
    fn refused(&mut self, status: u16);
    /// A message from the client.
    ///
    /// # Errors
    /// A fault closes both sides with its close codes.
    fn client_frame(&mut self, frame: Frame<'_>) -> Result<Verdict, Fault>;
    /// A message from the upstream.
    ///
    /// # Errors
    /// A fault closes both sides with its close codes.
    fn server_frame(&mut self, frame: Frame<'_>) -> Result<Verdict, Fault>;
    /// A message of the sidecar's own to the upstream, asked for after each of the client's: `Binary` or `Text`.
    fn extra_frame(&mut self) -> Option<Verdict> {
        None
    }
    /// What to tell the client before the sidecar leaves: `Binary` or `Text`.
    fn leave_frame(&mut self) -> Option<Verdict>;
    /// The end.
    fn closed(&mut self, how: Closed);
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed {
    /// Who or what ended it.
    pub by: By,
    /// The close code that was received from that side or, for the sidecar's own reasons, sent to the client. `None`: no close
    /// frame, the connection broke off or never came to be.
    pub code: Option<u16>,
}

/// Who or what ended a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// The client closed, broke off, or was gone before the answer.
    Client,
    /// The upstream closed, broke off, or refused.
    Upstream,
    /// Nothing was sent for `idle_timeout`.
    Idle,
    /// The sidecar leaves.
    Drain,
    /// A [`Fault`].
    Fault,
}

/// How far the sidecar is on its way out. Only ever grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Drain {
    /// Serving.
    Running,
    /// New upgrades get 503; what runs, runs on; plain requests still pass.
    Draining,
    /// Clients are told to leave, everything is closed; [`serve`] returns when all is, within some 10 s even if a peer does
    /// not play along.
    Leaving,
}

/// File descriptors that the process takes where both limits are reached.
#[must_use]
pub fn descriptors(sessions: usize, connections: usize) -> u64 {
    http::OWN_DESCRIPTORS.saturating_add(http::wanted(sessions, connections))
}

/// Takes the port; nothing is served yet.
///
/// # Errors
/// [`Side::Internal`](crate::fault::Side::Internal) and `What::Config`: an address in use, no
/// trusted roots for an https upstream.
pub async fn bind(config: SignalConfig) -> Result<Bound, Fault> {
    http::bind(config).await
}

/// Serves until `drain` says [`Drain::Leaving`] and all connections have ended. A dropped sender means no drain will come.
pub async fn serve(bound: Bound, sessions: Arc<dyn Sessions>, drain: watch::Receiver<Drain>) {
    http::serve(bound, sessions, drain).await;
}

/// Counter: answers to HTTP requests. Labels `kind` (session, upgrade, plain) and `class` (1xx…5xx).
pub const HTTP_REQUESTS: &str = "auralink_http_requests_total";
/// Gauge: open TCP connections of clients, upgraded ones included.
pub const HTTP_CONNECTIONS: &str = "auralink_http_connections";
/// Counter: connections that had to go for others, or found no place. Label `why` (full, address, memory, refused).
pub const HTTP_EVICTED: &str = "auralink_http_evicted_total";
/// Gauge: open upgraded connections. Label `kind` (session, opaque).
pub const WS_OPEN: &str = "auralink_ws_open";
/// Counter: messages of sessions. Labels `from` (client, upstream) and `verdict` (keep, drop, replace).
pub const WS_MESSAGES: &str = "auralink_ws_messages_total";
/// Histogram, seconds: from a session's request to the upstream's answer.
pub const HANDSHAKE_SECONDS: &str = "auralink_handshake_seconds";
