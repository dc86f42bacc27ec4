//! A connection and its bodies, which tell its [`Seat`] what they see.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Phase, Seat};

/// Bytes that are read at a time before an upgrade. Under hyper's first buffer of 8 KiB: where a read fills it, hyper takes twice as
/// much for the next one, and keeps that.
const READ: usize = (8 << 10) - 1;

/// Bytes of the first head that there is room for before more is known of it: most requests are shorter.
const FIRST: usize = 512;

/// A client's connection.
pub(crate) struct Watched<S> {
    io: S,
    seat: Arc<Seat>,
    stalled: bool,
    /// The first request's head, with what came behind it, before hyper has it.
    ahead: Vec<u8>,
    /// Bytes of it that hyper has.
    taken: usize,
}

impl<S: AsyncRead + Unpin> Watched<S> {
    pub(crate) fn new(io: S, seat: Arc<Seat>) -> Watched<S> {
        Watched {
            io,
            seat,
            stalled: false,
            ahead: Vec::new(),
            taken: 0,
        }
    }

    /// Returns once there is something to parse: a head that is whole, or as long as may be, or that is none. `false`: the client
    /// went before that.
    pub(crate) async fn wakes(&mut self, most: usize) -> bool {
        use tokio::io::AsyncReadExt;
        loop {
            if self.ahead.len() == self.ahead.capacity() {
                self.ahead.reserve(self.ahead.len().max(FIRST));
            }
            match self.io.read_buf(&mut self.ahead).await {
                Ok(n @ 1..) => {
                    self.seat.received(n);
                    let new = self.ahead.len() - n;
                    if self.ahead.len() >= most || ends(&self.ahead, new) {
                        return true;
                    }
                }
                _ => return false,
            }
        }
    }
}

/// Whether there is an empty line that ends behind this place, or what can't be the beginning of a request.
fn ends(head: &[u8], from: usize) -> bool {
    let begins = head
        .first()
        .is_none_or(|b| b.is_ascii_alphabetic() || matches!(b, b'\r' | b'\n'));
    let new = &head[from.saturating_sub(3)..];
    let empty = |w: &[u8]| matches!(w, [b'\n', b'\n', ..] | [b'\n', b'\r', b'\n']);
    // Bare line feeds are line ends to hyper too.
    !begins || new.windows(3).any(empty) || new.ends_with(b"\n\n")
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.taken < this.ahead.len() {
            let rest = &this.ahead[this.taken..];
            let n = rest.len().min(buf.remaining());
            buf.put_slice(&rest[..n]);
            this.taken += n;
            if this.taken == this.ahead.len() {
                this.ahead = Vec::new();
                this.taken = 0;
            }
            return Poll::Ready(Ok(()));
        }
        let phase = this.seat.phase();
        let io = Pin::new(&mut this.io);
        if phase == Phase::Upgraded {
            return io.poll_read(cx, buf);
        }
        let most = buf.remaining().min(READ);
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(most));
        std::task::ready!(io.poll_read(cx, &mut part))?;
        let n = part.filled().len();
        if n == 0 && matches!(phase, Phase::Working | Phase::Asked) {
            // It may have asked all that it wants and wait for its answer: hyper would take it for gone.
            this.seat.half_closed();
            return Poll::Pending;
        }
        buf.advance(n);
        if n > 0 {
            this.seat.received(n);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> Watched<S> {
    fn wrote<T>(&mut self, poll: Poll<T>) -> Poll<T> {
        if poll.is_pending() != self.stalled {
            self.stalled = !self.stalled;
            self.seat.stalled(self.stalled);
        }
        poll
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.io).poll_write(cx, buf);
        this.wrote(poll)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.io).poll_write_vectored(cx, bufs);
        this.wrote(poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// A request's body on its way upstream.
pub(crate) struct Upload<B> {
    body: B,
    /// With the number of the request.
    seat: Option<(Arc<Seat>, u64)>,
}

impl<B: Body> Upload<B> {
    /// `seat` is told of waiting and of the end; none for a body that is here already.
    pub(crate) fn new(body: B, seat: Option<Arc<Seat>>) -> Upload<B> {
        let seat = seat.map(|seat| {
            let request = seat.request();
            if body.is_end_stream() {
                seat.asked(request);
            }
            (seat, request)
        });
        Upload { body, seat }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Upload<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        let poll = Pin::new(&mut this.body).poll_frame(cx);
        if let Some((seat, request)) = &this.seat {
            match &poll {
                Poll::Pending => seat.waits(*request),
                Poll::Ready(None) => seat.asked(*request),
                Poll::Ready(Some(_)) if this.body.is_end_stream() => seat.asked(*request),
                Poll::Ready(Some(_)) => seat.came(*request),
            }
        }
        poll
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body on its way to the client; when it goes, the answer is complete.
pub(crate) struct Answer<B> {
    body: B,
    seat: Arc<Seat>,
}

impl<B> Answer<B> {
    pub(crate) fn new(body: B, seat: Arc<Seat>) -> Answer<B> {
        Answer { body, seat }
    }
}

impl<B> Drop for Answer<B> {
    fn drop(&mut self) {
        self.seat.answered();
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Answer<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::ends;

    #[test]
    fn the_end_of_a_head_is_seen_wherever_it_is_cut() {
        for head in [
            "GET / HTTP/1.1\r\nHost: s\r\n\r\n",
            "GET / HTTP/1.1\nHost: s\n\n",
            "GET / HTTP/1.1\r\nHost: s\n\r\n",
        ] {
            let head = head.as_bytes();
            for cut in 1..head.len() {
                assert!(!ends(&head[..cut], 0), "{cut}");
                assert!(ends(head, cut), "{cut}");
                assert!(ends(&[head, b"more"].concat(), cut), "{cut}");
            }
        }
        // No request begins so: a TLS handshake, HTTP/2's frames.
        assert!(ends(b"\x16\x03\x01", 0) && ends(&[0, 0, 0x12, 4], 0));
    }
}
