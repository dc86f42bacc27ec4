//! A worker's ICE-TCP connections.

use super::{Owner, State, TCP, now};
use crate::media::tcp::Connection;
use auralink_proto::framing::{MAX_FRAME, PREFIX};
use auralink_proto::stun::{Path, addressed_ufrag};
use mio::{Interest, Token};
use std::net::SocketAddr;
use std::time::Instant;

/// Frames of one connection in one turn, empty ones too: as many as of a UDP socket.
const FRAMES_A_TURN: usize = 128;

/// Bytes that are read of one connection in one turn: in a quarter of a millisecond, ten times what the fastest call sends.
const BYTES_A_TURN: usize = 64 * 1024;

impl State {
    /// Takes over an accepted connection. It stays only if its first frame is an authentic check:
    /// anybody can write a username fragment that names this worker.
    pub(super) fn add_tcp(
        &mut self,
        stream: std::net::TcpStream,
        local: SocketAddr,
        remote: SocketAddr,
        received: Vec<u8>,
    ) {
        let refused = || metrics::counter!("auralink_tcp_refused_total").increment(1);
        // Who names nobody costs no more than this.
        let named = received.get(PREFIX..).and_then(addressed_ufrag);
        if !named.is_some_and(|ufrag| self.by_ufrag.contains_key(ufrag)) {
            self.out.counters.dropped_unknown_ufrag += 1;
            return refused();
        }
        let path = Path {
            local,
            remote,
            tcp: true,
        };
        let mut connection = Connection::new(stream, received);
        let entry = self.out.tcp.vacant_entry();
        let key = entry.key();
        let interest = Interest::READABLE | Interest::WRITABLE;
        if self
            .poll
            .registry()
            .register(connection.stream(), Token(TCP | key), interest)
            .is_err()
        {
            return refused();
        }
        entry.insert((path, connection));
        self.out.tcp_by_path.insert(path, key);
        let mut left = 1;
        self.frames(key, path, &mut left);
        if self.by_path.contains_key(&path) {
            self.tcp_event(key, now().instant, false);
        } else {
            refused();
            self.out.broken_tcp.push(key);
        }
    }

    /// A connection can be read or written.
    pub(super) fn tcp_event(&mut self, key: usize, now: Instant, writable: bool) {
        let Some((_, connection)) = self.out.tcp.get_mut(key) else {
            return;
        };
        if writable && connection.writable(now).is_err() {
            self.out.broken_tcp.push(key);
        }
        if !connection.queued {
            connection.queued = true;
            self.tcp_ready.push_back(key);
        }
    }

    /// Reads a connection; it stays in line while there is more.
    pub(super) fn read_tcp(&mut self, key: usize) {
        let Some((path, _)) = self.out.tcp.get(key) else {
            return;
        };
        let path = *path;
        let (mut frames, mut bytes) = (FRAMES_A_TURN, 0);
        let more = loop {
            // Frames first: what was read waits for no more than its turn, and nothing is read on top of it.
            if !self.frames(key, path, &mut frames) {
                break false;
            }
            if frames == 0 || bytes >= BYTES_A_TURN {
                break true;
            }
            let Some((_, connection)) = self.out.tcp.get_mut(key) else {
                return;
            };
            debug_assert!(connection.input.waiting() < PREFIX + MAX_FRAME);
            match connection.read() {
                Ok(Some(read)) => bytes += read,
                Ok(None) => break false,
                Err(_) => {
                    self.out.broken_tcp.push(key);
                    break false;
                }
            }
        };
        if let Some((_, connection)) = self.out.tcp.get_mut(key) {
            connection.queued = more;
            if more {
                self.tcp_ready.push_back(key);
            }
        }
    }

    /// Handles whole frames, `left` at most; `false`: the connection is over, because they can't be told apart any more.
    fn frames(&mut self, key: usize, path: Path, left: &mut usize) -> bool {
        let now = now();
        let Some((_, connection)) = self.out.tcp.get_mut(key) else {
            return false;
        };
        // Whoever is called for a frame may end the connection.
        let mut input = std::mem::take(&mut connection.input);
        let mut readable = true;
        self.guarded(|state| {
            while *left > 0 {
                match input.next_frame() {
                    Ok(Some(frame)) => {
                        *left -= 1;
                        state.datagram(now, Owner::Clients, path, frame);
                    }
                    Ok(None) => return,
                    Err(_) => {
                        readable = false;
                        return;
                    }
                }
            }
        });
        if let Some((_, connection)) = self.out.tcp.get_mut(key) {
            connection.input = input;
        }
        if !readable {
            self.out.broken_tcp.push(key);
        }
        readable
    }

    /// Frees connections that have ended.
    pub(super) fn drop_broken_tcp(&mut self) {
        while let Some(key) = self.out.broken_tcp.pop() {
            self.at = None;
            let Some((path, mut connection)) = self.out.tcp.try_remove(key) else {
                continue;
            };
            // Dropping it would do the same; this says it out loud.
            let _ = self.poll.registry().deregister(connection.stream());
            // The same address may have come again before the end of the one before was seen.
            if self.out.tcp_by_path.get(&path) != Some(&key) {
                continue;
            }
            self.out.tcp_by_path.remove(&path);
            if let Some(pc) = self.by_path.remove(&path)
                && let Some(found) = self.pcs.get_mut(pc)
            {
                self.at = Some(pc);
                found.relay.path_lost(&path);
                found.paths.retain(|known| *known != path);
            }
        }
    }
}
