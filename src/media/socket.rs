//! Sockets bound the way media wants them.

use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

/// Bytes asked of the kernel for each direction of a client-side port: half a second of 20 Mbit/s.
/// The kernel grants what net.core.rmem_max allows.
const BUFFER: usize = 4 << 20;

/// Binds a non-blocking UDP socket to an advertised address; where the address is not this
/// host's (NAT, Kubernetes with a public address), to all addresses of its family.
pub(super) fn bind_udp(addr: SocketAddr) -> io::Result<UdpSocket> {
    let make = |addr: SocketAddr| -> io::Result<UdpSocket> {
        let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        // Best effort: a smaller buffer works, with more loss under bursts.
        let _ = socket.set_recv_buffer_size(BUFFER);
        let _ = socket.set_send_buffer_size(BUFFER);
        socket.set_nonblocking(true)?;
        socket.bind(&addr.into())?;
        Ok(socket.into())
    };
    with_wildcard(addr, make).map_err(|error| named("UDP", addr, &error))
}

/// Binds a non-blocking TCP listener the same way.
pub(super) fn bind_tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    let make = |addr: SocketAddr| -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&addr.into())?;
        socket.listen(1024)?;
        Ok(socket.into())
    };
    with_wildcard(addr, make).map_err(|error| named("TCP", addr, &error))
}

fn with_wildcard<T>(addr: SocketAddr, make: impl Fn(SocketAddr) -> io::Result<T>) -> io::Result<T> {
    match make(addr) {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            let ip: IpAddr = match addr {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            make(SocketAddr::new(ip, addr.port()))
        }
        other => other,
    }
}

fn named(what: &str, addr: SocketAddr, error: &io::Error) -> io::Error {
    let advice = match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => {
            "no file descriptors are left: raise the limit (LimitNOFILE=, ulimit -n) or lower limits.sessions"
        }
        Some(libc::EADDRINUSE) if addr.port() == 0 => {
            "no port is left: widen net.ipv4.ip_local_port_range"
        }
        _ => "is another process using the port?",
    };
    io::Error::new(
        error.kind(),
        format!("media: cannot bind {what} {addr}: {error}; {advice}"),
    )
}
