//! ICE-TCP, passive side (RFC 6544), framed by RFC 4571: two bytes of length before each datagram.

use super::arrivals::{Arrivals, Origin};
use super::{Command, Media, worker_of_ufrag};
use auralink_proto::framing::{Deframer, PREFIX};
use auralink_proto::stun::addressed_ufrag;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// A connection must show whom it is for within this time.
const FIRST_FRAME: Duration = Duration::from_secs(10);

/// The first frame is a STUN binding request; none is longer.
const MAX_FIRST_FRAME: usize = 1024;

/// Bytes that a slow connection may have waiting: two seconds of 2 Mbit/s. What comes beyond them is lost, as on a slow path.
const MAX_QUEUED: usize = 512 * 1024;

/// A connection that takes not a byte for so long while some wait is of no use for a call: LiveKit's clients have given it up
/// by then (they reconnect when ICE has been disconnected for 5 to 10 s).
const TAKES_NOTHING: Duration = Duration::from_secs(10);

/// Bytes that are read of a connection at once.
const READ: usize = 16 * 1024;

/// Connections that have not yet shown whom they are for; dropping a sender ends its connection.
pub(super) type Waiting = Mutex<Arrivals<oneshot::Sender<()>>>;

/// A place among those that wait.
struct Place<'a>(&'a Waiting, u64);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        lock(self.0).leave(self.1);
    }
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, Arrivals<oneshot::Sender<()>>> {
    // What it guards is whole between any two statements.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Accepts connections and hands each to the worker that its first STUN request names.
pub(super) async fn accept(listener: &TcpListener, advertised: SocketAddr, media: &Arc<Media>) {
    loop {
        let Ok((stream, remote)) = listener.accept().await else {
            // Out of descriptors, most likely: wait for some to be freed.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (stays, must_go) = oneshot::channel();
        let (place, gone) = lock(&media.arrivals).enter(Origin::of(remote.ip()), stays);
        drop(gone);
        let media = media.clone();
        tokio::spawn(async move {
            let _place = Place(&media.arrivals, place);
            let handed = hand_over(stream, advertised, remote, &media);
            let handed = tokio::select! {
                handed = tokio::time::timeout(FIRST_FRAME, handed) => matches!(handed, Ok(Ok(()))),
                _ = must_go => false,
            };
            // The client's UDP candidates remain.
            if !handed {
                metrics::counter!("auralink_tcp_refused_total").increment(1);
            }
        });
    }
}

async fn hand_over(
    mut stream: TcpStream,
    local: SocketAddr,
    remote: SocketAddr,
    media: &Media,
) -> io::Result<()> {
    let refused = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut received = vec![0; PREFIX];
    stream.read_exact(&mut received).await?;
    let len = usize::from(u16::from_be_bytes([received[0], received[1]]));
    if len > MAX_FIRST_FRAME {
        return Err(refused("first frame too long for STUN"));
    }
    received.resize(PREFIX + len, 0);
    stream.read_exact(&mut received[PREFIX..]).await?;
    let worker = addressed_ufrag(&received[PREFIX..])
        .and_then(worker_of_ufrag)
        .filter(|worker| *worker < media.workers())
        .ok_or_else(|| refused("first frame is no STUN for us"))?;
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    let command = Command::Tcp {
        stream,
        local,
        remote,
        received,
    };
    media
        .hand_over(worker, command)
        .map_err(|()| refused("its worker has too many to look at"))
}

/// What became of a datagram that was to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// It is on its way, or waits for it.
    Taken,
    /// There is no room for it.
    Dropped,
}

/// An accepted connection on its worker.
pub(super) struct Connection {
    stream: mio::net::TcpStream,
    /// What was read of it.
    pub(super) input: Deframer,
    output: Backlog,
    /// It stands in line to be read.
    pub(super) queued: bool,
}

impl Connection {
    /// Takes over a connection of which `received` has been read.
    pub(super) fn new(stream: std::net::TcpStream, received: Vec<u8>) -> Self {
        Self {
            stream: mio::net::TcpStream::from_std(stream),
            input: Deframer::new(received),
            output: Backlog::default(),
            queued: false,
        }
    }

    /// For registering with mio.
    pub(super) fn stream(&mut self) -> &mut mio::net::TcpStream {
        &mut self.stream
    }

    /// Reads once; how much came, none where there is nothing now. An error ends the connection.
    pub(super) fn read(&mut self) -> io::Result<Option<usize>> {
        let mut chunk = [0; READ];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    self.input.push(&chunk[..n]);
                    return Ok(Some(n));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Queues and sends a datagram. An error ends the connection.
    pub(super) fn send(&mut self, now: Instant, datagram: &[u8]) -> io::Result<Sent> {
        let sent = self.output.push(datagram);
        self.output.flush(now, &mut self.stream)?;
        Ok(sent)
    }

    /// The kernel takes bytes again.
    pub(super) fn writable(&mut self, now: Instant) -> io::Result<()> {
        self.output.full = false;
        self.output.flush(now, &mut self.stream)
    }
}

/// Whole frames that wait for the kernel to take them.
#[derive(Debug, Default)]
struct Backlog {
    bytes: Vec<u8>,
    /// Up to here they have gone.
    gone: usize,
    /// The kernel takes nothing for now.
    full: bool,
    /// Since when it has taken not a byte.
    still: Option<Instant>,
}

impl Backlog {
    /// Adds a frame. One for which there is no room is left out whole, so that those around it can be read.
    fn push(&mut self, datagram: &[u8]) -> Sent {
        let Ok(len) = u16::try_from(datagram.len()) else {
            return Sent::Dropped;
        };
        if self.bytes.len() - self.gone + PREFIX + datagram.len() > MAX_QUEUED {
            return Sent::Dropped;
        }
        // As in `Deframer`: a byte moves no more often than bytes went.
        if self.gone >= self.bytes.len() - self.gone {
            self.bytes.drain(..self.gone);
            self.gone = 0;
        }
        self.bytes.extend_from_slice(&len.to_be_bytes());
        self.bytes.extend_from_slice(datagram);
        Sent::Taken
    }

    /// Sends as much as is taken. While nothing is, nothing is tried until the kernel says so.
    fn flush(&mut self, now: Instant, out: &mut impl Write) -> io::Result<()> {
        while !self.full && self.gone < self.bytes.len() {
            match out.write(&self.bytes[self.gone..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    self.gone += n;
                    self.still = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.full = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.gone == self.bytes.len() {
            self.still = None;
            return Ok(());
        }
        let since = *self.still.get_or_insert(now);
        if now.saturating_duration_since(since) > TAKES_NOTHING {
            return Err(io::Error::other("the peer takes nothing"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes so many bytes, then blocks; counts how often it was asked.
    struct Pipe {
        room: usize,
        taken: Vec<u8>,
        asked: usize,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.asked += 1;
            if self.room == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let n = bytes.len().min(self.room);
            self.room -= n;
            self.taken.extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    /// A client that takes too little loses datagrams, whole ones, and keeps its connection while it takes any.
    #[test]
    fn who_is_behind_loses_datagrams_and_not_the_connection() {
        let (mut now, mut backlog) = (Instant::now(), Backlog::default());
        let mut pipe = Pipe {
            room: 0,
            taken: Vec::new(),
            asked: 0,
        };
        let mut dropped = 0;
        for n in 0..2000u32 {
            let mut datagram = n.to_be_bytes().to_vec();
            datagram.resize(1000, 0);
            dropped += usize::from(backlog.push(&datagram) == Sent::Dropped);
            backlog.flush(now, &mut pipe).unwrap();
        }
        assert!(dropped > 1000, "{dropped}");
        assert!(backlog.bytes.capacity() <= 2 * MAX_QUEUED);
        assert_eq!(pipe.asked, 1, "who said that it is full isn't asked again");
        // Nine seconds later it takes a little, and again.
        for _ in 0..5 {
            now += SECOND * 9;
            pipe.room = 10_000;
            backlog.full = false;
            backlog.flush(now, &mut pipe).unwrap();
        }
        pipe.room = usize::MAX;
        backlog.full = false;
        backlog.flush(now, &mut pipe).unwrap();
        let mut stream = Deframer::new(pipe.taken);
        let mut next = 0;
        while let Some(frame) = stream.next_frame().unwrap() {
            assert_eq!(
                (frame.len(), &frame[..4]),
                (1000, &u32::to_be_bytes(next)[..])
            );
            next += 1;
        }
        assert_eq!((next as usize, stream.waiting()), (2000 - dropped, 0));
    }

    #[test]
    fn who_takes_nothing_is_left() {
        let (now, mut backlog) = (Instant::now(), Backlog::default());
        let mut pipe = Pipe {
            room: 100,
            taken: Vec::new(),
            asked: 0,
        };
        assert_eq!(backlog.push(&[0; 1000]), Sent::Taken);
        assert!(backlog.flush(now, &mut pipe).is_ok());
        assert!(backlog.flush(now + TAKES_NOTHING, &mut pipe).is_ok());
        assert!(
            backlog
                .flush(now + TAKES_NOTHING + SECOND, &mut pipe)
                .is_err()
        );
    }
}
