//! What can go wrong with somebody's request, whose doing it is, and how each side is told.
//!
//! A [`Fault`] ends a request or a session. Its [`Side`] says who has to act: the operator reads `upstream` as "look at LiveKit",
//! `client` as noise to be counted, `internal` as a defect or a limit of the sidecar itself.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::shown::Shown;
use hyper::StatusCode;

/// Counter: faults. Labels `side` and `what`.
pub const FAULTS: &str = "auralink_faults_total";

/// Whose fault it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The client sent something that can't be accepted.
    Client,
    /// LiveKit (or the origin sidecar) is absent, late or answers nonsense.
    Upstream,
    /// The sidecar itself: a limit, a drain, its configuration or a defect.
    Internal,
}

impl Side {
    /// The name in metrics, logs and JSON bodies.
    pub fn as_str(self) -> &'static str {
        match self {
            Side::Client => "client",
            Side::Upstream => "upstream",
            Side::Internal => "internal",
        }
    }
}

/// What went wrong. A closed set: it is a metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum What {
    /// Bytes that break HTTP (RFC 9112) or WebSocket framing (RFC 6455).
    Malformed,
    /// A method that a gateway doesn't serve (CONNECT).
    Method,
    /// A text message that is no UTF-8.
    NotUtf8,
    /// A signal message, `join_request` or SDP which can't be read or patched.
    Undecodable,
    /// A WHIP session that isn't here, or is somebody else's.
    NotFound,
    /// A query over `max_query_bytes`.
    QueryTooLarge,
    /// Header fields over `max_header_bytes`.
    HeadersTooLarge,
    /// A WebSocket message over `max_frame_bytes`, or of LiveKit's over `max_upstream_frame_bytes`.
    TooLarge,
    /// Too many handshakes or sessions at this moment.
    Busy,
    /// The process or the system has no file descriptors, ports or memory left for a connection.
    Descriptors,
    /// The sidecar is about to stop and takes no new sessions.
    Draining,
    /// The request has come through this very sidecar before.
    Loop,
    /// No connection could be made.
    Unreachable,
    /// Nothing came within the time allowed.
    Timeout,
    /// An answer that breaks HTTP or the WebSocket handshake.
    BadAnswer,
    /// A connection was lost in the middle of something.
    Lost,
    /// Settings, a certificate or an address that can't be used.
    Config,
    /// A defect of the sidecar.
    Defect,
}

impl What {
    /// The name in metrics, logs and JSON bodies.
    pub fn as_str(self) -> &'static str {
        match self {
            What::Malformed => "malformed",
            What::Method => "method",
            What::NotUtf8 => "not_utf8",
            What::Undecodable => "undecodable",
            What::NotFound => "not_found",
            What::QueryTooLarge => "query_too_large",
            What::HeadersTooLarge => "headers_too_large",
            What::TooLarge => "too_large",
            What::Busy => "busy",
            What::Descriptors => "descriptors",
            What::Draining => "draining",
            What::Loop => "loop",
            What::Unreachable => "unreachable",
            What::Timeout => "timeout",
            What::BadAnswer => "bad_answer",
            What::Lost => "lost",
            What::Config => "config",
            What::Defect => "defect",
        }
    }
}

/// One thing that went wrong: whose fault, what, and a sentence for whoever has to act on it.
///
/// `detail` reaches strangers (HTTP body, close reason): no addresses of the inside, no tokens. `cause` is for the log alone, and
/// holds no tokens either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Who has to act.
    pub side: Side,
    /// The class of it.
    pub what: What,
    /// What, where, what to do.
    pub detail: Cow<'static, str>,
    /// The underlying error, for the log only.
    pub cause: Option<String>,
}

impl Fault {
    /// A fault of the client's.
    pub fn client(what: What, detail: impl Into<Cow<'static, str>>) -> Fault {
        Fault::new(Side::Client, what, detail)
    }

    /// A fault of the upstream's.
    pub fn upstream(what: What, detail: impl Into<Cow<'static, str>>) -> Fault {
        Fault::new(Side::Upstream, what, detail)
    }

    /// A fault of the sidecar's own.
    pub fn internal(what: What, detail: impl Into<Cow<'static, str>>) -> Fault {
        Fault::new(Side::Internal, what, detail)
    }

    /// A fault of `side`.
    pub fn new(side: Side, what: What, detail: impl Into<Cow<'static, str>>) -> Fault {
        Fault {
            side,
            what,
            detail: detail.into(),
            cause: None,
        }
    }

    /// The same with the underlying error, which only the log shows.
    #[must_use]
    pub fn because(mut self, cause: impl fmt::Display) -> Fault {
        self.cause = Some(cause.to_string());
        self
    }

    /// The HTTP status that tells the client.
    pub fn status(&self) -> StatusCode {
        match (self.side, self.what) {
            (_, What::Method) => StatusCode::METHOD_NOT_ALLOWED,
            (_, What::NotFound) => StatusCode::NOT_FOUND,
            (_, What::QueryTooLarge) => StatusCode::URI_TOO_LONG,
            (_, What::HeadersTooLarge) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            (_, What::Busy | What::Draining | What::Descriptors) => StatusCode::SERVICE_UNAVAILABLE,
            (_, What::Loop) => StatusCode::LOOP_DETECTED,
            (Side::Upstream, What::Timeout) => StatusCode::GATEWAY_TIMEOUT,
            (Side::Upstream, _) => StatusCode::BAD_GATEWAY,
            (Side::Client, What::TooLarge) => StatusCode::PAYLOAD_TOO_LARGE,
            (Side::Client, What::Timeout) => StatusCode::REQUEST_TIMEOUT,
            (Side::Client, _) => StatusCode::BAD_REQUEST,
            (Side::Internal, _) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The WebSocket close code for the side whose fault it is; for a fault of the sidecar's own, for both sides.
    pub fn close_code(&self) -> u16 {
        match self.what {
            What::Malformed | What::Method | What::BadAnswer => 1002,
            What::NotUtf8 | What::Undecodable => 1007,
            What::QueryTooLarge | What::HeadersTooLarge | What::TooLarge => 1009,
            What::Draining | What::Timeout | What::NotFound => 1001,
            What::Busy | What::Descriptors => 1013,
            What::Loop | What::Unreachable | What::Lost | What::Config | What::Defect => 1011,
        }
    }

    /// The WebSocket close code for the side which did nothing wrong. Towards a client not 1014 (bad gateway), which would say it
    /// best: Chromium takes that code for a protocol error.
    pub fn other_close_code(&self) -> u16 {
        match self.side {
            Side::Client => 1001,
            Side::Upstream => 1011,
            Side::Internal => self.close_code(),
        }
    }

    /// Seconds for `Retry-After`, where trying again makes sense.
    pub fn retry_after(&self) -> Option<u32> {
        match self.what {
            What::Busy | What::Descriptors => Some(1),
            What::Draining => Some(5),
            _ => None,
        }
    }

    /// The JSON body of an HTTP answer: `{"error":…,"side":…,"what":…}`.
    pub fn json(&self) -> String {
        serde_json::json!({"error": self.detail, "side": self.side.as_str(), "what": self.what.as_str()}).to_string()
    }

    /// Counts it and writes its log line, of each kind one in ten seconds with the number of those left out (`more`). `path` is
    /// the request's path without query; `session` the session's id, or "".
    /// Clients' faults go to debug: strangers must not be able to fill the log.
    pub fn report(&self, path: &str, session: &str) {
        metrics::counter!(FAULTS, "side" => self.side.as_str(), "what" => self.what.as_str())
            .increment(1);
        let (what, cause) = (self.what.as_str(), self.cause.as_deref().unwrap_or(""));
        // Never the whole of what a stranger may have made long; Debug escapes control characters.
        let path = path.get(..path.floor_char_boundary(96)).unwrap_or("");
        let (detail, cause) = (Shown(&self.detail), Shown(cause));
        let side = self.side.as_str();
        if self.side == Side::Client || matches!(self.what, What::Busy | What::Draining) {
            tracing::debug!(side, what, ?path, session, %cause, "{detail}");
            return;
        }
        let Some(more) = seldom((side, what)) else {
            tracing::debug!(side, what, ?path, session, %cause, "{detail}");
            return;
        };
        if self.side == Side::Upstream {
            tracing::warn!(side, what, ?path, session, %cause, more, "{detail}");
        } else {
            tracing::error!(side, what, ?path, session, %cause, more, "{detail}");
        }
    }
}

/// Of lines of one kind there is one in this time: what is wrong is said, and however many requests meet it, the log stays
/// readable. A scrape of the metrics comes about as often.
const SELDOM: Duration = Duration::from_secs(10);

type Kinds = HashMap<(&'static str, &'static str), (Instant, u64)>;

/// Whether a line of this kind may be written now, and how many were left out since the last one.
fn seldom(kind: (&'static str, &'static str)) -> Option<u64> {
    static LAST: LazyLock<Mutex<Kinds>> = LazyLock::new(Mutex::default);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    seldom_at(&mut last, kind, Instant::now())
}

fn seldom_at(last: &mut Kinds, kind: (&'static str, &'static str), now: Instant) -> Option<u64> {
    match last.get_mut(&kind) {
        Some((at, more)) if now.duration_since(*at) < SELDOM => {
            *more += 1;
            None
        }
        Some((at, more)) => {
            *at = now;
            Some(std::mem::take(more))
        }
        None => {
            last.insert(kind, (now, 0));
            Some(0)
        }
    }
}

/// Something that strangers bring about and an operator should know of, once in a while.
pub fn note(what: &'static str) {
    if let Some(more) = seldom(("note", what)) {
        tracing::info!(more, "{what}");
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({}): {}",
            self.what.as_str(),
            self.side.as_str(),
            self.detail
        )?;
        match &self.cause {
            Some(cause) => write!(f, ": {cause}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_tells_each_side_its_part() {
        let f = Fault::upstream(What::Unreachable, "LiveKit can't be reached")
            .because("10.0.0.7:7880 refused");
        assert_eq!(f.status(), 502);
        assert_eq!((f.close_code(), f.other_close_code()), (1011, 1011));
        assert_eq!(
            f.json(),
            r#"{"error":"LiveKit can't be reached","side":"upstream","what":"unreachable"}"#
        );
        assert!(
            !f.json().contains("10.0.0.7"),
            "inside addresses stay in the log"
        );
        assert!(f.to_string().contains("10.0.0.7"));
        assert_eq!(Fault::upstream(What::Timeout, "").status(), 504);
        assert_eq!(Fault::client(What::Timeout, "").status(), 408);
        assert_eq!(Fault::internal(What::Defect, "").status(), 500);
        let big = Fault::client(What::TooLarge, "");
        assert_eq!((big.close_code(), big.other_close_code()), (1009, 1001));
        let full = Fault::internal(What::Descriptors, "");
        assert_eq!((full.status().as_u16(), full.retry_after()), (503, Some(1)));
        let drain = Fault::internal(What::Draining, "");
        assert_eq!(
            (drain.status().as_u16(), drain.retry_after()),
            (503, Some(5))
        );
    }

    #[test]
    fn lines_of_a_kind_are_seldom_and_say_how_many_there_were() {
        let mut last = Kinds::new();
        let (start, kind) = (Instant::now(), ("upstream", "lost"));
        assert_eq!(seldom_at(&mut last, kind, start), Some(0));
        for _ in 0..1000 {
            assert_eq!(seldom_at(&mut last, kind, start + SELDOM / 2), None);
        }
        assert_eq!(
            seldom_at(&mut last, ("upstream", "timeout"), start),
            Some(0)
        );
        assert_eq!(seldom_at(&mut last, kind, start + SELDOM), Some(1000));
        assert_eq!(seldom_at(&mut last, kind, start + SELDOM), None);
        assert_eq!(seldom_at(&mut last, kind, start + SELDOM * 2), Some(1));
    }
}
