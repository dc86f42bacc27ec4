//! The pump of an upgraded connection: messages of a session, bytes of anything else.
//!
//! Each direction is one loop: read one message, show it to the session, write it out, and only then read the next. So a slow
//! reader holds back the sender through TCP, and a session's memory is bounded by one message each way (`max_frame_bytes`). What
//! LiveKit says may be longer (`max_upstream_frame_bytes`), where there is room for it among the long messages of all ([`large`](super::large)).
//!
//! Endings pass as they are. A Close goes to the other side with its code and reason, and the answer comes back; a connection that
//! breaks off without one breaks off on the other side too, so that clients see the 1006 that they would see without a sidecar.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::frame::{Mask, Message, Op, Peer, ReadError, Reader, Writer};
use super::large::Large;
use super::{By, Closed, Drain, Frame, Limits, Permit, SignalSession, Verdict, WS_MESSAGES};
use crate::fault::{Fault, Side, What};

/// For the other side's answer to a Close. Browsers and LiveKit answer at once; RFC 6455 names no time.
const CLOSE_WAIT: Duration = Duration::from_secs(5);
/// For last words to be taken, and for the peer to end its stream, before the socket goes.
const LINGER: Duration = Duration::from_secs(2);

/// Keeps the contract of [`SignalSession`]: `closed` is called exactly once, at the latest when this is dropped.
pub(super) struct Guard {
    session: Box<dyn SignalSession>,
    closed: bool,
}

impl Guard {
    pub(super) fn new(session: Box<dyn SignalSession>) -> Guard {
        Guard {
            session,
            closed: false,
        }
    }

    pub(super) fn id(&self) -> String {
        self.session.id().to_owned()
    }

    pub(super) fn accepted(&mut self, place: Option<Permit>) {
        self.session.accepted(place);
    }

    pub(super) fn refused(mut self, status: u16, by: By) {
        self.session.refused(status);
        self.close(Closed { by, code: None });
    }

    pub(super) fn close(&mut self, how: Closed) {
        if !self.closed {
            self.closed = true;
            self.session.closed(how);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The request was given up before the upstream answered: hyper does that when the client is gone.
        self.close(Closed {
            by: By::Client,
            code: None,
        });
    }
}

/// When something was last read, for both directions together.
struct Activity {
    start: Instant,
    /// Milliseconds after `start`.
    last: AtomicU64,
}

impl Activity {
    fn new() -> Activity {
        Activity {
            start: Instant::now(),
            last: AtomicU64::new(0),
        }
    }

    fn touch(&self) {
        // Millions of years fit.
        self.last
            .store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Returns once nothing was read for `limit`.
    async fn quiet(&self, limit: Duration) {
        loop {
            let until =
                self.start + Duration::from_millis(self.last.load(Ordering::Relaxed)) + limit;
            if Instant::now() >= until {
                return;
            }
            sleep_until(until).await;
        }
    }
}

/// Returns once the sidecar leaves; never if nobody is left who could say so.
pub(super) async fn leaving(drain: &mut watch::Receiver<Drain>) {
    let dropped = drain.wait_for(|d| *d == Drain::Leaving).await.is_err();
    if dropped {
        std::future::pending::<()>().await;
    }
}

/// Why a session's pump stopped.
enum End {
    /// A Close came from this side and was passed on.
    Close(By, Option<u16>),
    /// The connection of this side broke off or ended without a Close.
    Lost(By),
    Fault(Fault),
    Idle,
    Drain,
}

/// One side of a session.
struct Half<S> {
    reader: Reader<ReadHalf<S>>,
    writer: Writer<WriteHalf<S>>,
}

impl<S: AsyncRead + AsyncWrite> Half<S> {
    fn new(stream: S, peer: Peer, max: usize) -> Half<S> {
        let (r, w) = tokio::io::split(stream);
        Half {
            reader: Reader::new(r, peer, max),
            writer: Writer::new(w),
        }
    }

    fn deflating(&mut self, deflates: bool) {
        self.reader.deflating(deflates);
        self.writer.deflating(deflates);
    }
}

/// What holds for a session's two connections.
pub(super) struct Terms<'a> {
    pub(super) limits: &'a Limits,
    pub(super) large: &'a Arc<Large>,
    /// permessage-deflate was agreed on with the client.
    pub(super) client_deflates: bool,
    /// And with the upstream.
    pub(super) upstream_deflates: bool,
}

/// Runs one accepted session to its end.
pub(super) async fn pump<C, U>(
    client: C,
    upstream: U,
    guard: Guard,
    path: &str,
    terms: &Terms<'_>,
    mut drain: watch::Receiver<Drain>,
) where
    C: AsyncRead + AsyncWrite + Send,
    U: AsyncRead + AsyncWrite + Send,
{
    let Terms { limits, large, .. } = *terms;
    let guard = Mutex::new(guard);
    // A resume goes by its session's name as soon as the server has said that it is one.
    let id = || lock(&guard).id();
    let activity = Activity::new();
    let mut client = Half::new(client, Peer::Client, limits.max_frame_bytes);
    client.deflating(terms.client_deflates);
    let mut server = Half::new(upstream, Peer::Server, limits.max_upstream_frame_bytes);
    server.deflating(terms.upstream_deflates);
    let ordinary = limits.max_frame_bytes;
    server.reader.takes_room(ordinary, large.clone());
    let end = tokio::select! {
        end = forward(&mut client.reader, &mut server.writer, By::Client, &guard, &activity, large) => end,
        end = forward(&mut server.reader, &mut client.writer, By::Upstream, &guard, &activity, large) => end,
        () = activity.quiet(limits.idle_timeout) => End::Idle,
        () = leaving(&mut drain) => End::Drain,
    };
    // Both loops are dropped here; what they had queued but not written is still in the writers.
    let how = match end {
        End::Close(By::Client, code) => {
            let answer = forward(
                &mut server.reader,
                &mut client.writer,
                By::Upstream,
                &guard,
                &activity,
                large,
            );
            let _ = timeout(CLOSE_WAIT, answer).await;
            Closed {
                by: By::Client,
                code,
            }
        }
        End::Close(by, code) => {
            let answer = forward(
                &mut client.reader,
                &mut server.writer,
                By::Client,
                &guard,
                &activity,
                large,
            );
            let _ = timeout(CLOSE_WAIT, answer).await;
            Closed { by, code }
        }
        End::Lost(by) => Closed { by, code: None },
        End::Fault(fault) => {
            fault.report(path, &id());
            let (to_client, to_server) = match fault.side {
                Side::Upstream => (fault.other_close_code(), fault.close_code()),
                Side::Client | Side::Internal => (fault.close_code(), fault.other_close_code()),
            };
            client.writer.queue_close(to_client, &fault.detail, None);
            server
                .writer
                .queue_close(to_server, &fault.detail, Some(random_mask()));
            last_words(&mut client, &mut server).await;
            Closed {
                by: By::Fault,
                code: Some(to_client),
            }
        }
        End::Idle => {
            let reason = "nothing was sent for too long";
            client.writer.queue_close(1001, reason, None);
            server.writer.queue_close(1001, reason, Some(random_mask()));
            last_words(&mut client, &mut server).await;
            Closed {
                by: By::Idle,
                code: Some(1001),
            }
        }
        End::Drain => {
            match lock(&guard).session.leave_frame() {
                Some(Verdict::Binary(bytes)) => client.writer.queue(Op::Binary, &bytes, None),
                Some(Verdict::Text(text)) => client.writer.queue(Op::Text, text.as_bytes(), None),
                Some(Verdict::Keep | Verdict::Drop) | None => {}
            }
            client
                .writer
                .queue_close(1001, "the server is going away", None);
            server.writer.queue_close(1000, "", Some(random_mask()));
            last_words(&mut client, &mut server).await;
            Closed {
                by: By::Drain,
                code: Some(1001),
            }
        }
    };
    lock(&guard).close(how);
    tracing::debug!(?path, session = %id(), by = ?how.by, code = how.code, "signalling closed");
    let linger = async {
        tokio::join!(client.writer.shutdown(), server.writer.shutdown());
        tokio::join!(client.reader.discard(), server.reader.discard());
    };
    let _ = timeout(LINGER, linger).await;
}

/// Writes what is queued on both sides; a peer that doesn't take it in time goes without.
async fn last_words<C: AsyncRead + AsyncWrite, U: AsyncRead + AsyncWrite>(
    client: &mut Half<C>,
    server: &mut Half<U>,
) {
    let _ = timeout(LINGER, async {
        let _ = tokio::join!(client.writer.flush(), server.writer.flush());
    })
    .await;
}

/// One direction. Returns when it can't go on; may be dropped at any time and called again.
async fn forward<R, W>(
    from: &mut Reader<R>,
    to: &mut Writer<W>,
    sender: By,
    guard: &Mutex<Guard>,
    activity: &Activity,
    large: &Arc<Large>,
) -> End
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let receiver = if sender == By::Client {
        By::Upstream
    } else {
        By::Client
    };
    loop {
        let flushed = match to.long_since() {
            None => to.flush().await,
            Some(since) => tokio::select! {
                flushed = to.flush() => flushed,
                () = large.clone().overdue(since) => {
                    let detail = "a long message was not taken in time, and others waited for its room";
                    return End::Fault(blame(receiver, What::Timeout, detail.to_owned()));
                }
            },
        };
        if flushed.is_err() {
            return End::Lost(receiver);
        }
        let mut message = match from.next().await {
            Ok(Some(message)) => message,
            Ok(None) | Err(ReadError::Io) => return End::Lost(sender),
            Err(ReadError::Violation(why)) => {
                return End::Fault(blame(sender, What::Malformed, why.to_owned()));
            }
            Err(ReadError::TooLarge(len)) => {
                let key = if sender == By::Client {
                    "limits.max_frame_bytes"
                } else {
                    "limits.max_upstream_frame_bytes"
                };
                let detail = format!("a message of {len} bytes or more is over the limit ({key})");
                return End::Fault(blame(sender, What::TooLarge, detail));
            }
        };
        activity.touch();
        match message.op {
            Op::Ping | Op::Pong => to.queue(message.op, &message.payload, message.mask),
            Op::Close => {
                let code = message.close_code();
                to.queue(Op::Close, &message.payload, message.mask);
                // If this fails the other side is gone already: the Close counts all the same.
                let _ = to.flush().await;
                return End::Close(sender, code);
            }
            Op::Text | Op::Binary => {
                if let Err(fault) = judge(&message, to, sender, guard) {
                    return End::Fault(fault);
                }
                if let Some(room) = message.room.take() {
                    to.keep(room);
                }
            }
        }
    }
}

/// Shows a data message to the session and queues what becomes of it. No await in here: a dropped loop never loses a message that
/// the session has seen.
fn judge<W: AsyncWrite + Unpin>(
    message: &Message,
    to: &mut Writer<W>,
    sender: By,
    guard: &Mutex<Guard>,
) -> Result<(), Fault> {
    let frame = match message.op {
        Op::Text => Frame::Text(std::str::from_utf8(&message.payload).map_err(|_| {
            blame(
                sender,
                What::NotUtf8,
                "a text message is not UTF-8 (RFC 6455 section 8.1)".to_owned(),
            )
        })?),
        _ => Frame::Binary(&message.payload),
    };
    let (verdict, extra) = {
        let mut guard = lock(guard);
        match sender {
            By::Client => (
                guard.session.client_frame(frame)?,
                guard.session.extra_frame(),
            ),
            _ => (guard.session.server_frame(frame)?, None),
        }
    };
    let name = match verdict {
        Verdict::Keep => {
            // With the client's own key: what isn't changed goes upstream byte for byte.
            to.queue(message.op, &message.payload, message.mask);
            "keep"
        }
        Verdict::Drop => "drop",
        Verdict::Binary(bytes) => {
            to.queue(Op::Binary, &bytes, message.mask);
            "replace"
        }
        Verdict::Text(text) => {
            to.queue(Op::Text, text.as_bytes(), message.mask);
            "replace"
        }
    };
    match extra {
        Some(Verdict::Binary(bytes)) => to.queue(Op::Binary, &bytes, Some(random_mask())),
        Some(Verdict::Text(text)) => to.queue(Op::Text, text.as_bytes(), Some(random_mask())),
        Some(Verdict::Keep | Verdict::Drop) | None => {}
    }
    let from = if sender == By::Client {
        "client"
    } else {
        "upstream"
    };
    metrics::counter!(WS_MESSAGES, "from" => from, "verdict" => name).increment(1);
    Ok(())
}

fn blame(sender: By, what: What, detail: String) -> Fault {
    match sender {
        By::Client => Fault::client(what, detail),
        _ => Fault::upstream(what, detail),
    }
}

/// A session that panicked has poisoned the lock; its `closed` is still owed.
fn lock(guard: &Mutex<Guard>) -> MutexGuard<'_, Guard> {
    guard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For frames that the sidecar itself sends to a server. Unpredictable by RFC 6455 section 10.3; but such frames hold nothing of a
/// stranger's choice, so a system without entropy may as well send zeros.
fn random_mask() -> Mask {
    let mut mask = [0; 4];
    let _ = getrandom::fill(&mut mask);
    mask
}

/// Passes bytes both ways until both sides have ended, nothing came for `idle_timeout`, or the sidecar leaves. One side's end of
/// stream is passed on and the other may go on sending.
pub(super) async fn splice<C, U>(
    client: C,
    upstream: U,
    limits: &Limits,
    mut drain: watch::Receiver<Drain>,
) where
    C: AsyncRead + AsyncWrite + Send,
    U: AsyncRead + AsyncWrite + Send,
{
    let activity = Activity::new();
    let (cr, cw) = tokio::io::split(client);
    let (ur, uw) = tokio::io::split(upstream);
    let both = async { tokio::join!(carry(cr, uw, &activity), carry(ur, cw, &activity)) };
    tokio::select! {
        _ = both => {}
        () = activity.quiet(limits.idle_timeout) => {}
        () = leaving(&mut drain) => {}
    }
}

async fn carry<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    mut from: R,
    mut to: W,
    activity: &Activity,
) {
    let mut buf = vec![0; 16 << 10];
    loop {
        match from.read(&mut buf).await {
            Ok(n) if n > 0 => {
                activity.touch();
                let written = async {
                    to.write_all(&buf[..n]).await?;
                    to.flush().await
                };
                if written.await.is_err() {
                    return;
                }
            }
            _ => break,
        }
    }
    let _ = to.shutdown().await;
}
