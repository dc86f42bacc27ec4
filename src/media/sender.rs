//! Outgoing datagrams, collected so that runs to one peer leave in one system call (GSO).

use auralink_proto::stun::Path;
use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};
use std::io;

/// Bytes of a run: the kernel takes at most 64 KiB in one GSO send.
const MAX_RUN: usize = 60 * 1024;

/// A UDP socket and what quinn-udp knows of it.
pub(super) struct Udp {
    /// The socket.
    pub(super) socket: mio::net::UdpSocket,
    /// Offload capabilities.
    pub(super) state: UdpSocketState,
    /// The address that peers know it by.
    pub(super) local: std::net::SocketAddr,
}

impl Udp {
    /// Wraps a bound, non-blocking socket.
    pub(super) fn new(
        socket: std::net::UdpSocket,
        local: std::net::SocketAddr,
    ) -> io::Result<Self> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        Ok(Self {
            socket: mio::net::UdpSocket::from_std(socket),
            state,
            local,
        })
    }

    fn send(&self, path: Path, contents: &[u8], segment_size: Option<usize>) -> io::Result<()> {
        self.state.try_send(
            UdpSockRef::from(&self.socket),
            &Transmit {
                destination: path.remote,
                ecn: None,
                contents,
                segment_size,
                src_ip: None,
            },
        )
    }
}

/// A run of equally long datagrams (the last may be shorter) for one path of one socket.
#[derive(Default)]
pub(super) struct Run {
    target: Option<(usize, Path)>,
    segment: usize,
    count: usize,
    bytes: Vec<u8>,
    closed: bool,
}

impl Run {
    /// Whether a datagram can join the run.
    pub(super) fn takes(&self, socket: usize, path: Path, len: usize, max_segments: usize) -> bool {
        self.target == Some((socket, path))
            && !self.closed
            && len <= self.segment
            && self.count < max_segments
            && self.bytes.len() + len <= MAX_RUN
    }

    /// Adds a datagram that [`Run::takes`], or starts a run with it.
    pub(super) fn push(&mut self, socket: usize, path: Path, datagram: &[u8]) {
        if self.count == 0 {
            self.target = Some((socket, path));
            self.segment = datagram.len();
            self.closed = false;
        }
        self.closed |= datagram.len() < self.segment;
        self.bytes.extend_from_slice(datagram);
        self.count += 1;
    }

    /// The socket of the run, while there is one.
    pub(super) fn socket(&self) -> Option<usize> {
        (self.count > 0).then_some(self.target?.0)
    }

    /// Sends the run. Returns datagrams sent and dropped.
    pub(super) fn flush(&mut self, udp: &Udp) -> (u64, u64) {
        let Some((_, path)) = self.target.take() else {
            return (0, 0);
        };
        let count = self.count as u64;
        let segment_size = (self.count > 1).then_some(self.segment);
        let result = udp.send(path, &self.bytes, segment_size);
        self.count = 0;
        self.bytes.clear();
        match result {
            Ok(()) => (count, 0),
            // Full buffers and unreachable peers lose datagrams, as networks do; ICE notices.
            Err(_) => (0, count),
        }
    }
}
