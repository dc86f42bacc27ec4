//! A worker's ICE-TCP connections.

use super::{Owner, State, TCP, now};
use crate::media::tcp::Connection;
use auralink_proto::stun::Path;
use mio::{Interest, Token};
use std::net::SocketAddr;

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
            return;
        }
        entry.insert((path, connection));
        self.out.tcp_by_path.insert(path, key);
        self.frames(key, path);
        if self.by_path.contains_key(&path) {
            self.tcp_event(key, false);
        } else {
            metrics::counter!("auralink_tcp_refused_total").increment(1);
            self.out.broken_tcp.push(key);
        }
    }

    /// A connection can be read or written.
    pub(super) fn tcp_event(&mut self, key: usize, writable: bool) {
        let Some((_, connection)) = self.out.tcp.get_mut(key) else {
            return;
        };
        if writable && connection.flush().is_err() {
            self.out.broken_tcp.push(key);
        }
        if !self.tcp_ready.contains(&key) {
            self.tcp_ready.push_back(key);
        }
    }

    /// Reads a connection; it stays in line while there is more.
    pub(super) fn read_tcp(&mut self, key: usize) {
        let Some((path, connection)) = self.out.tcp.get_mut(key) else {
            return;
        };
        let path = *path;
        match connection.fill() {
            Ok(true) => {}
            Ok(false) => self.tcp_ready.push_back(key),
            Err(_) => self.out.broken_tcp.push(key),
        }
        self.frames(key, path);
    }

    fn frames(&mut self, key: usize, path: Path) {
        let mut frame = Vec::new();
        let now = now();
        while self
            .out
            .tcp
            .get_mut(key)
            .is_some_and(|(_, connection)| connection.next_frame(&mut frame))
        {
            self.datagram(now, Owner::Clients, path, &frame);
        }
    }

    /// Frees connections that have ended.
    pub(super) fn drop_broken_tcp(&mut self) {
        while let Some(key) = self.out.broken_tcp.pop() {
            let Some((path, mut connection)) = self.out.tcp.try_remove(key) else {
                continue;
            };
            // Dropping it would do the same; this says it out loud.
            let _ = self.poll.registry().deregister(connection.stream());
            self.out.tcp_by_path.remove(&path);
            if let Some(pc) = self.by_path.remove(&path)
                && let Some(pc) = self.pcs.get_mut(pc)
            {
                pc.relay.path_lost(&path);
                pc.paths.retain(|known| *known != path);
            }
        }
    }
}
