//! Which address the world sees behind a NAT: asked of STUN servers before the first port is taken, as LiveKit's `use_external_ip`
//! does. Blocking: for the start of the process.
//!
//! Clouds give a host a private address and map a public one to it, port for port; that is what this is for. What a mapping leads to
//! is tried by sending a datagram to it. Not every router brings back what is for itself, so that a failed try is only a warning.

use auralink_proto::binding::{self, Answer, GIVEN_UP_AT, SENT_AT};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant};

/// For a datagram that a router sends back: it has one hop to go.
const HAIRPIN: Duration = Duration::from_millis(500);

/// An address of this host, and how the world calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Where sockets are bound.
    pub local: IpAddr,
    /// What clients are told.
    pub external: IpAddr,
    /// What was found when it was tried.
    pub proof: Proof,
}

/// How sure it is that what is sent to the external address comes here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// It is this host's own address.
    Same,
    /// A datagram came.
    Arrived,
    /// None came: the router doesn't send back what is for itself, or nothing is forwarded.
    Untold,
    /// The mapping has another port, as of a NAT that gives each connection one: such a one forwards nothing by itself.
    OtherPort(u16),
}

/// Asks for the external address of each IPv4 address in `ips`; where there is none in it, of the one that leads to the servers. IPv6
/// addresses are not mapped. The port is that of the first media worker, so that the mapping that is tried is one that is used.
///
/// # Errors
/// In words for the operator: no server answers, and why for each; an address is not this host's.
pub fn discover(ips: &[IpAddr], port: u16, servers: &[String]) -> io::Result<Vec<Mapping>> {
    discover_within(ips, port, servers, GIVEN_UP_AT)
}

fn discover_within(
    ips: &[IpAddr],
    port: u16,
    servers: &[String],
    patience: Duration,
) -> io::Result<Vec<Mapping>> {
    let mut asked: Vec<Server<'_>> = servers.iter().map(|name| Server::find(name)).collect();
    let mut locals = ips.to_vec();
    if locals.is_empty() {
        let reached = asked.iter().find_map(|server| server.at);
        locals.extend(reached.map(route).transpose()?);
    }
    if locals.is_empty() {
        return Err(nobody(&asked, None));
    }
    let mut mappings = Vec::new();
    for local in locals {
        if local.is_ipv6() {
            mappings.push(Mapping {
                local,
                external: local,
                proof: Proof::Same,
            });
            continue;
        }
        let socket = bind(local, port)?;
        let Some(mapped) = ask(&socket, &mut asked, patience)? else {
            return Err(nobody(&asked, Some(local)));
        };
        let external = mapped.ip().to_canonical();
        let own = socket.local_addr()?.port();
        let proof = if external == local {
            Proof::Same
        } else if mapped.port() != own {
            Proof::OtherPort(mapped.port())
        } else if comes_back(&socket, local, mapped)? {
            Proof::Arrived
        } else {
            Proof::Untold
        };
        mappings.push(Mapping {
            local,
            external,
            proof,
        });
    }
    Ok(mappings)
}

/// One that is asked.
struct Server<'a> {
    name: &'a str,
    at: Option<SocketAddr>,
    id: binding::Id,
    /// Why it has not told.
    why: String,
}

impl<'a> Server<'a> {
    fn find(name: &'a str) -> Self {
        let (at, why) = match name.to_socket_addrs() {
            Ok(mut found) => match found.find(SocketAddr::is_ipv4) {
                Some(at) => (Some(at), format!("no answer from {at}")),
                None => (None, "it has no IPv4 address".to_owned()),
            },
            Err(error) => (None, error.to_string()),
        };
        Self {
            name,
            at,
            id: [0; 12],
            why,
        }
    }
}

fn nobody(asked: &[Server<'_>], local: Option<IpAddr>) -> io::Error {
    let each: Vec<_> = asked
        .iter()
        .map(|server| format!("{}: {}", server.name, server.why))
        .collect();
    let from = local.map_or_else(String::new, |local| format!(" from {local}"));
    io::Error::other(format!(
        "media.use_external_ip: no STUN server told the external address{from} ({}); let UDP to media.stun_servers pass, name others, \
         or set media.ip to the external address and media.use_external_ip to false",
        each.join("; ")
    ))
}

/// The address from which this host would send there.
fn route(to: SocketAddr) -> io::Result<IpAddr> {
    // Nothing is sent by that.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let connected = socket.connect(to).and_then(|()| socket.local_addr());
    connected.map(|local| local.ip()).map_err(|error| {
        io::Error::other(format!(
            "media.use_external_ip: there is no way to {to} ({error}); set media.ip to the local address"
        ))
    })
}

fn bind(local: IpAddr, port: u16) -> io::Result<UdpSocket> {
    UdpSocket::bind((local, port)).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::AddrNotAvailable => {
                "with media.use_external_ip, media.ip is the local address; leave it out for the one that leads to the STUN servers"
            }
            _ => "is another process using the port?",
        };
        let what = format!("media: cannot bind UDP {local}:{port}: {error}; {advice}");
        io::Error::new(error.kind(), what)
    })
}

/// Asks all at once; the first who tells is believed.
fn ask(
    socket: &UdpSocket,
    asked: &mut [Server<'_>],
    patience: Duration,
) -> io::Result<Option<SocketAddr>> {
    for server in asked.iter_mut() {
        getrandom::fill(&mut server.id).map_err(io::Error::other)?;
    }
    let began = Instant::now();
    let mut sends = SENT_AT.iter().filter(|at| **at < patience).peekable();
    let mut buffer = [0; 1500];
    loop {
        let now = began.elapsed();
        if now >= patience {
            return Ok(None);
        }
        if sends.next_if(|at| **at <= now).is_some() {
            for server in asked.iter_mut() {
                let Some(at) = server.at else { continue };
                if let Err(error) = socket.send_to(&binding::request(server.id), at) {
                    server.why = format!("{at}: {error}");
                }
            }
        }
        let next = sends.peek().map_or(patience, |at| **at).min(patience);
        let wait = next.saturating_sub(began.elapsed());
        socket.set_read_timeout(Some(wait.max(Duration::from_millis(1))))?;
        let Ok((len, from)) = socket.recv_from(&mut buffer) else {
            // Nothing came, or an ICMP error did, by which nobody is named.
            continue;
        };
        let Some(server) = asked.iter_mut().find(|server| server.at == Some(from)) else {
            continue;
        };
        match binding::answer(&buffer[..len], server.id) {
            Some(Answer::Mapped(mapped)) => return Ok(Some(mapped)),
            Some(Answer::Refused(code)) => server.why = format!("{from} refuses (error {code})"),
            None => {}
        }
    }
}

/// Whether a datagram to the external address comes to the socket.
fn comes_back(socket: &UdpSocket, local: IpAddr, external: SocketAddr) -> io::Result<bool> {
    let mut secret = [0; 16];
    getrandom::fill(&mut secret).map_err(io::Error::other)?;
    let other = UdpSocket::bind((local, 0))?;
    let began = Instant::now();
    let mut buffer = [0; 1500];
    socket.set_read_timeout(Some(HAIRPIN / 4))?;
    while began.elapsed() < HAIRPIN {
        if other.send_to(&secret, external).is_err() {
            return Ok(false);
        }
        // An answer of a server may come late.
        while let Ok((len, _)) = socket.recv_from(&mut buffer) {
            if buffer[..len] == secret {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::thread;

    const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    /// A STUN server that says to who asks: `say(source)`; none: nothing. It ends when nobody asks any more.
    fn server(say: impl Fn(SocketAddr, &[u8]) -> Option<Vec<u8>> + Send + 'static) -> String {
        let socket = UdpSocket::bind((LOCAL, 0)).unwrap();
        let at = socket.local_addr().unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                if let Some(answer) = say(from, &buffer[..len]) {
                    socket.send_to(&answer, from).unwrap();
                }
            }
        });
        at.to_string()
    }

    /// A success response (RFC 8489 section 14.2), written byte by byte.
    fn mapped(request: &[u8], to: SocketAddr) -> Vec<u8> {
        let IpAddr::V4(ip) = to.ip() else {
            return Vec::new();
        };
        let cookie = [0x21, 0x12, 0xa4, 0x42];
        let mut out = vec![1, 1, 0, 12];
        out.extend_from_slice(&request[4..20]);
        out.extend_from_slice(&[0, 0x20, 0, 8, 0, 1]);
        let port = to.port().to_be_bytes();
        out.extend_from_slice(&[port[0] ^ cookie[0], port[1] ^ cookie[1]]);
        out.extend(ip.octets().iter().zip(cookie).map(|(a, b)| a ^ b));
        out
    }

    fn at(ip: [u8; 4], port: u16) -> SocketAddr {
        SocketAddr::from((ip, port))
    }

    const QUICK: Duration = Duration::from_secs(2);

    #[test]
    fn the_first_who_tells_is_believed() {
        let silent = server(|_, _| None);
        let refuses = server(|_, request| {
            let mut out = vec![1, 0x11, 0, 8];
            out.extend_from_slice(&request[4..20]);
            out.extend_from_slice(b"\x00\x09\x00\x04\x00\x00\x04\x01");
            Some(out)
        });
        // Of another transaction, from the right address; and nonsense.
        let forged = server(|from, request| {
            let mut out = mapped(request, at([203, 0, 113, 9], from.port()));
            out[10] ^= 1;
            Some(out)
        });
        let good = server(|from, request| Some(mapped(request, at([203, 0, 113, 7], from.port()))));
        let servers = [silent, refuses, forged, good];
        let v6: IpAddr = "2001:db8::7".parse().unwrap();
        let found = discover_within(&[LOCAL, v6], 0, &servers, QUICK).unwrap();
        assert_eq!(found[0].external, IpAddr::from([203, 0, 113, 7]));
        assert_eq!(found[0].local, LOCAL);
        // Nothing leads from here to an address that is kept for documents.
        assert_eq!(found[0].proof, Proof::Untold);
        assert_eq!((found[1].external, found[1].proof), (v6, Proof::Same));
        // Without an address: that which leads to the server.
        let found = discover_within(&[], 0, &servers[3..], QUICK).unwrap();
        assert_eq!((found.len(), found[0].local), (1, LOCAL));
    }

    #[test]
    fn a_mapping_is_tried() {
        let same = server(|from, request| Some(mapped(request, from)));
        let found = discover_within(&[LOCAL], 0, &[same], QUICK).unwrap();
        assert_eq!((found[0].external, found[0].proof), (LOCAL, Proof::Same));
        let other =
            server(|from, request| Some(mapped(request, at([203, 0, 113, 7], from.port() ^ 1))));
        let found = discover_within(&[LOCAL], 0, &[other], QUICK).unwrap();
        assert!(matches!(found[0].proof, Proof::OtherPort(_)));
        // All of 127.0.0.0/8 is this host's, but a socket at .1 doesn't hear what is for .2: one at 0.0.0.0 does, as behind a NAT.
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(comes_back(&socket, LOCAL, at([127, 0, 0, 2], port)).unwrap());
        let socket = UdpSocket::bind((LOCAL, 0)).unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(!comes_back(&socket, LOCAL, at([127, 0, 0, 2], port)).unwrap());
    }

    #[test]
    fn who_does_not_tell_is_named_with_the_reason() {
        let silent = server(|_, _| None);
        let refuses = server(|_, request| {
            let mut out = vec![1, 0x11, 0, 0];
            out.extend_from_slice(&request[4..20]);
            Some(out)
        });
        let servers = [
            silent.clone(),
            refuses.clone(),
            "no-such-host.invalid:3478".to_owned(),
        ];
        let error = discover_within(&[LOCAL], 0, &servers, Duration::from_millis(300))
            .unwrap_err()
            .to_string();
        for part in [
            "media.use_external_ip",
            "from 127.0.0.1",
            &format!("{silent}: no answer"),
            &format!("{refuses}: {refuses} refuses (error 0)"),
            "no-such-host.invalid:3478: ",
            "set media.ip",
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let error =
            discover_within(&[IpAddr::from([203, 0, 113, 7])], 0, &[silent], QUICK).unwrap_err();
        assert!(
            error.to_string().contains("media.ip is the local address"),
            "{error}"
        );
    }
}
