//! ICE-TCP, passive side (RFC 6544), framed by RFC 4571: two bytes of length before each datagram.

use super::{Command, Media, worker_of_ufrag};
use auralink_proto::stun::addressed_ufrag;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

/// A connection must show whom it is for within this time.
const FIRST_FRAME: Duration = Duration::from_secs(10);

/// The first frame is a STUN binding request; none is longer.
const MAX_FIRST_FRAME: usize = 1024;

/// Connections that have not yet shown whom they are for.
const MAX_PENDING: usize = 256;

/// Bytes that a slow connection may have waiting; one that takes less than it is sent for this
/// long is no use for a call.
const MAX_QUEUED: usize = 512 * 1024;

/// Accepts connections and hands each to the worker that its first STUN request names.
pub(super) async fn accept(
    listener: &TcpListener,
    advertised: SocketAddr,
    media: &std::sync::Arc<Media>,
) {
    let pending = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_PENDING));
    loop {
        let Ok((stream, remote)) = listener.accept().await else {
            // Out of descriptors, most likely: wait for some to be freed.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // Beyond the bound the connection is dropped: the client's UDP candidates remain.
        let Ok(permit) = pending.clone().try_acquire_owned() else {
            metrics::counter!("auralink_tcp_refused_total").increment(1);
            continue;
        };
        let media = media.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let handed =
                tokio::time::timeout(FIRST_FRAME, hand_over(stream, advertised, remote, &media))
                    .await;
            if !matches!(handed, Ok(Ok(()))) {
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
    let mut received = vec![0; 2];
    stream.read_exact(&mut received).await?;
    let len = usize::from(u16::from_be_bytes([received[0], received[1]]));
    if len > MAX_FIRST_FRAME {
        return Err(refused("first frame too long for STUN"));
    }
    received.resize(2 + len, 0);
    stream.read_exact(&mut received[2..]).await?;
    let worker = addressed_ufrag(&received[2..])
        .and_then(worker_of_ufrag)
        .filter(|worker| *worker < media.workers())
        .ok_or_else(|| refused("first frame is no STUN for us"))?;
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    media.send(
        worker,
        Command::Tcp {
            stream,
            local,
            remote,
            received,
        },
    );
    Ok(())
}

/// An accepted connection on its worker.
pub(super) struct Connection {
    stream: mio::net::TcpStream,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl Connection {
    /// Takes over a connection of which `received` has been read.
    pub(super) fn new(stream: std::net::TcpStream, received: Vec<u8>) -> Self {
        Self {
            stream: mio::net::TcpStream::from_std(stream),
            input: received,
            output: Vec::new(),
        }
    }

    /// For registering with mio.
    pub(super) fn stream(&mut self) -> &mut mio::net::TcpStream {
        &mut self.stream
    }

    /// Reads what there is, up to a bound; `Ok(false)`: there may be more. An error ends the
    /// connection.
    pub(super) fn fill(&mut self) -> io::Result<bool> {
        let mut chunk = [0; 16 * 1024];
        for _ in 0..8 {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.input.len() > 2 * usize::from(u16::MAX) {
                break;
            }
        }
        Ok(false)
    }

    /// The next whole frame, moved to `frame`.
    pub(super) fn next_frame(&mut self, frame: &mut Vec<u8>) -> bool {
        let Some(prefix) = self.input.first_chunk::<2>() else {
            return false;
        };
        let len = usize::from(u16::from_be_bytes(*prefix));
        let Some(body) = self.input.get(2..2 + len) else {
            return false;
        };
        frame.clear();
        frame.extend_from_slice(body);
        self.input.drain(..2 + len);
        true
    }

    /// Queues and sends a datagram. An error ends the connection.
    pub(super) fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        let len = u16::try_from(datagram.len()).map_err(io::Error::other)?;
        if self.output.len() + datagram.len() > MAX_QUEUED {
            return Err(io::Error::other("the peer takes less than it is sent"));
        }
        self.output.extend_from_slice(&len.to_be_bytes());
        self.output.extend_from_slice(datagram);
        self.flush()
    }

    /// Sends what is queued, as far as it goes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let mut sent = 0;
        while sent < self.output.len() {
            match self.stream.write(&self.output[sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => sent += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.output.drain(..sent);
        Ok(())
    }
}
