//! Outgoing datagrams of a turn, collected so that many leave in one system call: runs to one peer
//! by GSO, datagrams to different peers by sendmmsg. The kernel's send path is most of what a
//! relayed packet costs (docs/benchmarks.md).

use super::mtu::Fragments;
use auralink_proto::stun::Path;
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg, sendmsg,
};
use quinn_udp::{UdpSockRef, UdpSocketState};
use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;

/// Bytes of a run: the kernel takes at most 64 KiB in one GSO send.
const MAX_RUN: usize = 60 * 1024;

/// Bytes of the longest datagram in a run: what every IPv6 path takes (RFC 8200 section 5: 1,280), without the headers. Longer
/// ones go by themselves, because the kernel fragments no run.
const MAX_SEGMENT: usize = 1280 - 40 - 8;

/// Runs that wait at most: a batch is sent when it has so many, or at the end of the turn.
const MAX_RUNS: usize = 64;

thread_local! {
    /// Holds raw pointers, so it cannot move between threads with its worker.
    static HEADERS: RefCell<MultiHeaders<SockaddrStorage>> =
        RefCell::new(MultiHeaders::preallocate(MAX_RUNS, None));
}

/// A UDP socket and what quinn-udp knows of it.
pub(super) struct Udp {
    /// The socket.
    pub(super) socket: mio::net::UdpSocket,
    /// Offload capabilities.
    pub(super) state: UdpSocketState,
    /// The device takes no runs.
    no_runs: Cell<bool>,
    /// The address that peers know it by.
    pub(super) local: SocketAddr,
}

impl Udp {
    /// Wraps a bound, non-blocking socket.
    pub(super) fn new(socket: std::net::UdpSocket, local: SocketAddr) -> io::Result<Self> {
        let fragments = Fragments::of(&socket, local.is_ipv6())?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        fragments.apply(&socket)?;
        Ok(Self {
            no_runs: Cell::new(false),
            socket: mio::net::UdpSocket::from_std(socket),
            state,
            local,
        })
    }

    /// Datagrams of the longest run that it takes.
    pub(super) fn max_segments(&self) -> usize {
        if self.no_runs.get() {
            return 1;
        }
        self.state.max_gso_segments()
    }
}

/// Equally long datagrams (the last may be shorter) to one peer.
struct Run {
    remote: SocketAddr,
    start: usize,
    end: usize,
    segment: usize,
    count: usize,
}

/// What waits to be sent on one socket.
#[derive(Default)]
pub(super) struct Batch {
    runs: Vec<Run>,
    /// Where each run goes, as the kernel takes it.
    remotes: Vec<Option<SockaddrStorage>>,
    bytes: Vec<u8>,
}

impl Batch {
    /// Adds a datagram; `false`: the batch is full, send it first.
    pub(super) fn push(&mut self, path: &Path, datagram: &[u8], max_segments: usize) -> bool {
        if let Some(run) = self.runs.last_mut()
            && run.remote == path.remote
            && run.count < max_segments
            && run.segment <= MAX_SEGMENT
            && datagram.len() <= run.segment
            // Nothing may follow a shorter one.
            && run.end - run.start == run.count * run.segment
            && run.end - run.start + datagram.len() <= MAX_RUN
        {
            self.bytes.extend_from_slice(datagram);
            run.end += datagram.len();
            run.count += 1;
            return true;
        }
        if self.runs.len() >= MAX_RUNS {
            return false;
        }
        let start = self.bytes.len();
        self.bytes.extend_from_slice(datagram);
        self.remotes.push(Some(path.remote.into()));
        self.runs.push(Run {
            remote: path.remote,
            start,
            end: self.bytes.len(),
            segment: datagram.len(),
            count: 1,
        });
        true
    }

    /// Whether anything waits.
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Sends all of it. Returns datagrams sent and dropped: full buffers and unreachable peers lose
    /// datagrams, as networks do; ICE notices.
    pub(super) fn flush(&mut self, udp: &Udp) -> (u64, u64) {
        let (mut sent, mut dropped) = (0, 0);
        let mut rest = &self.runs[..];
        while let Some(first) = rest.first() {
            let remotes = &self.remotes[self.runs.len() - rest.len()..];
            let singles = rest.iter().take_while(|run| run.count == 1).count();
            let (tried, went) = if singles > 1 {
                let went = send_each(udp, &rest[..singles], remotes, &self.bytes);
                // An error ends sendmmsg at the datagram it is about: that one is lost.
                (went.max(1), went)
            } else {
                let (there, not) = send_run(udp, first, remotes.first(), &self.bytes);
                (sent, dropped) = (sent + there, dropped + not);
                rest = &rest[1..];
                continue;
            };
            for (index, run) in rest[..tried].iter().enumerate() {
                if index < went {
                    sent += run.count as u64;
                } else {
                    dropped += run.count as u64;
                }
            }
            rest = &rest[tried..];
        }
        self.runs.clear();
        self.remotes.clear();
        self.bytes.clear();
        (sent, dropped)
    }
}

/// Sends a run; how many of its datagrams went, and how many didn't. `remote` is where.
fn send_run(
    udp: &Udp,
    run: &Run,
    remote: Option<&Option<SockaddrStorage>>,
    bytes: &[u8],
) -> (u64, u64) {
    let Some(Some(remote)) = remote else {
        return (0, run.count as u64);
    };
    let bytes = &bytes[run.start..run.end];
    let send = |bytes: &[u8], control: &[ControlMessage<'_>]| {
        let (fd, bytes) = (udp.socket.as_raw_fd(), [IoSlice::new(bytes)]);
        sendmsg(fd, &bytes, control, MsgFlags::MSG_DONTWAIT, Some(remote))
    };
    if run.count == 1 {
        let went = u64::from(send(bytes, &[]).is_ok());
        return (went, 1 - went);
    }
    let failed = u16::try_from(run.segment)
        .map_err(|_| Errno::EMSGSIZE)
        .and_then(|segment| send(bytes, &[ControlMessage::UdpGsoSegments(&segment)]));
    match failed {
        Ok(_) => return (run.count as u64, 0),
        // Longer than the path is known to take: one by one they are fragmented.
        Err(Errno::EMSGSIZE | Errno::EINVAL) => {}
        // A device that computes no checksums (udp(7), UDP_SEGMENT).
        Err(Errno::EIO) => udp.no_runs.set(true),
        Err(_) => return (0, run.count as u64),
    }
    let went = bytes
        .chunks(run.segment.max(1))
        .filter(|datagram| send(datagram, &[]).is_ok())
        .count();
    (went as u64, (run.count - went) as u64)
}

/// Sends single datagrams to different peers; how many went. `remotes` begin with those of the runs.
fn send_each(udp: &Udp, runs: &[Run], remotes: &[Option<SockaddrStorage>], bytes: &[u8]) -> usize {
    // One allocation a system call, as long as there are runs: room for the most that there can be,
    // on the stack, costs more to fill than a turn of a few datagrams has to spend.
    let slices: Vec<[IoSlice<'_>; 1]> = runs
        .iter()
        .map(|run| [IoSlice::new(&bytes[run.start..run.end])])
        .collect();
    HEADERS.with_borrow_mut(|headers| {
        sendmmsg(
            udp.socket.as_raw_fd(),
            headers,
            &slices,
            remotes,
            [],
            MsgFlags::MSG_DONTWAIT,
        )
        .map_or(0, |results| results.count())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::time::Duration;

    fn bound() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let addr = socket.local_addr().unwrap();
        (socket, addr)
    }

    #[test]
    fn every_datagram_of_a_batch_arrives_whole_and_in_order() {
        let (socket, local) = bound();
        socket.set_nonblocking(true).unwrap();
        let udp = Udp::new(socket, local).unwrap();
        let peers = [bound(), bound(), bound()];
        let mut expected: [Vec<Vec<u8>>; 3] = Default::default();
        let mut batch = Batch::default();
        // Singles, runs of equal ones, a shorter last one, and a longer one after it.
        let plan = [
            (0, 100),
            (1, 90),
            (2, 80),
            (0, 50),
            (0, 50),
            (0, 50),
            (0, 20),
            (0, 60),
            (1, 1200),
            (1, 1200),
            (2, 1),
            (1, 3),
        ];
        let mut n = 0u8;
        for (peer, len) in plan {
            n += 1;
            let datagram = vec![n; len];
            let path = Path {
                local,
                remote: peers[peer].1,
                tcp: false,
            };
            assert!(batch.push(&path, &datagram, udp.max_segments()));
            expected[peer].push(datagram);
        }
        assert_eq!(batch.flush(&udp), (plan.len() as u64, 0));
        assert!(batch.is_empty());
        for ((socket, _), expected) in peers.iter().zip(expected) {
            for datagram in expected {
                let mut buffer = [0; 2048];
                let len = socket.recv(&mut buffer).unwrap();
                assert_eq!(buffer[..len], datagram[..]);
            }
        }
    }

    #[test]
    fn a_datagram_that_cannot_be_sent_does_not_take_others_along() {
        let (socket, local) = bound();
        socket.set_nonblocking(true).unwrap();
        let udp = Udp::new(socket, local).unwrap();
        let (peer, remote) = bound();
        let mut batch = Batch::default();
        let to = |remote| Path {
            local,
            remote,
            tcp: false,
        };
        // Port 0 cannot be sent to.
        let nowhere = SocketAddr::new(remote.ip(), 0);
        assert!(batch.push(&to(remote), b"first", 1));
        assert!(batch.push(&to(nowhere), b"lost", 1));
        assert!(batch.push(&to(remote), b"second", 1));
        assert_eq!(batch.flush(&udp), (2, 1));
        for expected in [&b"first"[..], b"second"] {
            let mut buffer = [0; 64];
            let len = peer.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], expected);
        }
    }
}
