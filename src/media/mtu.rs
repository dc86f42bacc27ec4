//! What happens to datagrams that are longer than the path takes.
//!
//! quinn-udp is made for QUIC, which finds out itself what a path takes: it forbids fragments. WebRTC doesn't find out; what is too long
//! for a tunnel on the way would vanish. So sockets of media keep what the system gives every socket, as the stock server's have it:
//! on Linux the kernel learns what the path takes, and fragments what is longer (`IP_PMTUDISC_WANT`, ip(7)).
#![allow(
    unsafe_code,
    reason = "nix has no names for these options; its macro makes the calls"
)]

use nix::sys::socket::{getsockopt, setsockopt};
// What the macro names without a path.
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};
use std::io;
use std::os::fd::AsFd;

sockopt_impl!(
    /// What is done about what an IPv4 path takes.
    Ipv4,
    Both,
    libc::IPPROTO_IP,
    libc::IP_MTU_DISCOVER,
    libc::c_int
);
sockopt_impl!(
    /// What is done about what an IPv6 path takes.
    Ipv6,
    Both,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU_DISCOVER,
    libc::c_int
);
sockopt_impl!(
    /// Whether IPv6 fragments are forbidden.
    Ipv6Forbidden,
    Both,
    libc::IPPROTO_IPV6,
    libc::IPV6_DONTFRAG,
    libc::c_int
);

/// How a socket stands to fragments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fragments {
    ipv4: libc::c_int,
    /// What is done about the path, and whether fragments are forbidden.
    ipv6: Option<[libc::c_int; 2]>,
}

impl Fragments {
    /// As it is on a socket.
    pub(super) fn of(socket: &impl AsFd, is_ipv6: bool) -> io::Result<Self> {
        Ok(Self {
            ipv4: getsockopt(socket, Ipv4)?,
            ipv6: if is_ipv6 {
                Some([
                    getsockopt(socket, Ipv6)?,
                    getsockopt(socket, Ipv6Forbidden)?,
                ])
            } else {
                None
            },
        })
    }

    /// Makes it so.
    pub(super) fn apply(&self, socket: &impl AsFd) -> io::Result<()> {
        setsockopt(socket, Ipv4, &self.ipv4)?;
        if let Some([discover, forbidden]) = &self.ipv6 {
            setsockopt(socket, Ipv6, discover)?;
            setsockopt(socket, Ipv6Forbidden, forbidden)?;
        }
        Ok(())
    }
}
