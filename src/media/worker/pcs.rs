//! Peer connections of a worker: how they come, what is published of them, how they go.

use super::super::{HopSnapshot, LegSnapshot, MediaEvent, PcSnapshot, SessionId, Snapshot};
use super::{Owner, Pc, SNAPSHOT_EVERY, State, codecs, now};
use auralink_proto::coding::HopStats;
use auralink_proto::description::{PcDescription, Target};
use auralink_proto::leg::CloseReason;
use auralink_proto::relay::{Now, Relay, Side};
use std::io;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

impl State {
    pub(super) fn describe(
        &mut self,
        session: SessionId,
        description: &PcDescription,
        sockets: Vec<std::net::UdpSocket>,
    ) {
        let now = now();
        let id = (session, description.target);
        let key = match self.by_session.get(&id) {
            Some(key) => *key,
            // Its sockets come with the first description; without them it is one for a peer
            // connection that has ended.
            None if sockets.is_empty() => return,
            None => match self.open(now, id, description, sockets) {
                Ok(key) => key,
                Err(error) => {
                    tracing::error!(session, %error, "cannot open a peer connection; it ends");
                    self.report_defect(session, description.target, Box::default());
                    return;
                }
            },
        };
        let Some(pc) = self.pcs.get_mut(key) else {
            return;
        };
        self.at = Some(key);
        pc.relay
            .describe(now, description, &mut self.scratch, &mut self.out);
        for old in std::mem::take(&mut pc.ufrags) {
            self.by_ufrag.remove(&old);
        }
        pc.ufrags = pc
            .relay
            .leg(Side::Client)
            .lite_ufrags()
            .map(str::to_owned)
            .collect();
        for ufrag in &pc.ufrags {
            self.by_ufrag.insert(ufrag.clone(), key);
        }
        self.after(key);
    }

    pub(super) fn open(
        &mut self,
        now: Now,
        id: (SessionId, Target),
        description: &PcDescription,
        sockets: Vec<std::net::UdpSocket>,
    ) -> io::Result<usize> {
        let key = self.pcs.vacant_key();
        let mut keys = Vec::new();
        let opened = self.open_sockets(key, sockets, &mut keys);
        self.next_id += 1;
        // The engine is shared by all workers.
        let pc_id = (self.setup.index as u64) << 40 | self.next_id;
        let made = opened.and_then(|locals| {
            catch_unwind(AssertUnwindSafe(|| {
                Relay::new(
                    pc_id,
                    self.rungs,
                    now.instant,
                    &self.setup.identity,
                    self.setup.consent.timeout(),
                    locals,
                    description,
                )
            }))
            .map_err(|_| io::Error::other("making its relay panicked"))
        });
        let relay = match made {
            Ok(relay) => relay,
            Err(error) => {
                self.close_sockets(&keys);
                return Err(error);
            }
        };
        self.by_session.insert(id, key);
        self.by_id.insert(pc_id, key);
        self.pcs.insert(Pc {
            id: pc_id,
            session: id.0,
            relay,
            sockets: keys,
            paths: Vec::new(),
            ufrags: Vec::new(),
            due: None,
        });
        Ok(key)
    }

    /// Takes over the sockets of a server leg. `keys` are those taken over so far, also where the next cannot be.
    fn open_sockets(
        &mut self,
        key: usize,
        sockets: Vec<std::net::UdpSocket>,
        keys: &mut Vec<usize>,
    ) -> io::Result<Vec<SocketAddr>> {
        let mut locals = Vec::new();
        for socket in sockets {
            let mut local = socket.local_addr()?;
            // Bound to all addresses because the advertised one is not this host's: checks
            // leave from whatever the route says, and the peer learns it from them.
            if local.ip().is_unspecified()
                && let Some(client) = self.out.sockets.iter().find_map(|(_, client)| {
                    (client.udp.local.is_ipv4() == local.is_ipv4()).then_some(client.udp.local)
                })
            {
                local.set_ip(client.ip());
            }
            keys.push(self.add_socket(Owner::Pc(key), local, socket)?);
            locals.push(local);
        }
        Ok(locals)
    }

    fn close_sockets(&mut self, keys: &[usize]) {
        for key in keys {
            if let Some(mut socket) = self.out.sockets.try_remove(*key) {
                self.out.by_local.remove(&socket.udp.local);
                // Closing it would do the same; this says it out loud.
                let _ = self.poll.registry().deregister(&mut socket.udp.socket);
            }
        }
    }

    /// Ends a peer connection that panicked while it was handled.
    pub(super) fn fell(&mut self, key: usize) {
        self.out.counters.panics += 1;
        let Some(pc) = self.pcs.get_mut(key) else {
            return;
        };
        let (session, target) = (pc.session, pc.relay.target());
        tracing::error!(
            session,
            ?target,
            "handling a peer connection panicked; it ends"
        );
        // Its peers should hear of it, so that the client comes again at once; but nothing of it can be relied on.
        let (scratch, out) = (&mut self.scratch, &mut self.out);
        let goodbye = catch_unwind(AssertUnwindSafe(|| {
            pc.relay.close(now(), scratch, out);
            Box::new(hop(&pc.relay))
        }));
        self.report_defect(session, target, goodbye.unwrap_or_default());
        self.remove(key);
    }

    fn report_defect(&self, session: SessionId, target: Target, hop: Box<[HopSnapshot; 2]>) {
        // The receiver goes only when the process does.
        let _ = self.setup.events.send(MediaEvent::Closed {
            session,
            target,
            side: Side::Server,
            reason: CloseReason::Defect,
            hop,
        });
    }

    /// For tests: a mistake in the code that handles a peer connection, or in the worker's own.
    #[cfg(test)]
    pub(super) fn fall(&mut self, session: Option<SessionId>) {
        self.at =
            session.and_then(|session| self.by_session.get(&(session, Target::Publisher)).copied());
        panic!("as this test wants it");
    }

    pub(super) fn close(&mut self, key: usize) {
        if let Some(pc) = self.pcs.get_mut(key) {
            self.at = Some(key);
            pc.relay.close(now(), &mut self.scratch, &mut self.out);
        }
        self.after(key);
    }

    /// Frees everything a peer connection had.
    pub(super) fn remove(&mut self, key: usize) {
        // Its goodbyes may still be in the run, for a socket that is about to go.
        self.out.flush();
        let Some(mut pc) = self.pcs.try_remove(key) else {
            return;
        };
        self.by_id.remove(&pc.id);
        // What it leaves behind here goes in any case; what it has to say counts as far as it still works.
        let last = catch_unwind(AssertUnwindSafe(|| {
            for side in [Side::Client, Side::Server] {
                self.ended_hop += HopStats {
                    // Of present streams only.
                    jitter: 0,
                    ..pc.relay.coding_from(side).stats()
                };
            }
            self.ended[0] += pc.relay.flow_from(Side::Client).stats;
            self.ended[1] += pc.relay.flow_from(Side::Server).stats;
            pc.relay.end_coding();
            codecs::jobs(
                &mut pc,
                &self.codecs,
                &mut self.closes,
                &mut self.scratch,
                &mut self.out,
            );
        }));
        self.out.counters.panics += u64::from(last.is_err());
        self.by_session.remove(&(pc.session, pc.relay.target()));
        for ufrag in &pc.ufrags {
            if self.by_ufrag.get(ufrag) == Some(&key) {
                self.by_ufrag.remove(ufrag);
            }
        }
        for path in &pc.paths {
            if self.by_path.get(path) == Some(&key) {
                self.by_path.remove(path);
            }
            if let Some(tcp) = self.out.tcp_by_path.get(path) {
                self.out.broken_tcp.push(*tcp);
            }
        }
        self.close_sockets(&pc.sockets);
    }

    pub(super) fn publish(&mut self) {
        self.next_snapshot = now().instant + SNAPSHOT_EVERY;
        let leg = |relay: &Relay, side: Side| {
            let leg = relay.leg(side);
            LegSnapshot {
                state: leg.state(),
                remote: leg.path().map(|path| (path.remote, path.tcp)),
                srtp: leg.srtp_profile(),
            }
        };
        let pcs = self
            .pcs
            .iter()
            .map(|(_, pc)| PcSnapshot {
                session: pc.session,
                target: pc.relay.target(),
                client: leg(&pc.relay, Side::Client),
                server: leg(&pc.relay, Side::Server),
                up: pc.relay.flow_from(Side::Client).stats,
                down: pc.relay.flow_from(Side::Server).stats,
                shedding: pc.relay.flow_from(Side::Server).shedding(),
                hop: hop(&pc.relay),
            })
            .collect();
        self.setup.snapshot.store(Arc::new(Snapshot {
            counters: self.out.counters,
            pcs,
            ended_up: self.ended[0],
            ended_down: self.ended[1],
            ended_hop: self.ended_hop,
        }));
    }

    pub(super) fn stop(&mut self) {
        let keys: Vec<usize> = self.pcs.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.close(key);
        }
        self.out.flush();
        self.publish();
    }
}

/// What the hop of a peer connection is doing, client to server and server to client.
pub(super) fn hop(relay: &Relay) -> [HopSnapshot; 2] {
    [Side::Client, Side::Server].map(|side| {
        let coding = relay.coding_from(side);
        let (rung, streams) = coding.in_use();
        HopSnapshot {
            rung,
            streams,
            stats: coding.stats(),
        }
    })
}
