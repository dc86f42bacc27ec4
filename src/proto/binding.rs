//! STUN as a client uses it to learn its own address as others see it (RFC 8489): a binding request and what is read of its answer.
//!
//! Nothing is authentic here. An answer is believed that repeats the transaction's 96 random bits, so that only who has seen the
//! request could have written it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// The transaction's number: random.
pub type Id = [u8; 12];

const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const REQUEST: [u8; 2] = [0x00, 0x01];
const SUCCESS: [u8; 2] = [0x01, 0x01];
const ERROR: [u8; 2] = [0x01, 0x11];
const MAPPED_ADDRESS: u16 = 0x0001;
const ERROR_CODE: u16 = 0x0009;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;

/// When a request is sent again, after its beginning; and the time after the last until it is given up: RFC 8489 section 6.2.1 with
/// fewer requests, because several servers are asked.
pub const SENT_AT: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(500),
    Duration::from_millis(1500),
    Duration::from_millis(3500),
];
/// After its beginning a request has failed.
pub const GIVEN_UP_AT: Duration = Duration::from_secs(5);

/// A binding request without attributes.
#[must_use]
pub fn request(id: Id) -> [u8; 20] {
    let mut out = [0; 20];
    out[..2].copy_from_slice(&REQUEST);
    out[4..8].copy_from_slice(&COOKIE);
    out[8..].copy_from_slice(&id);
    out
}

/// What a server says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The request came from this address.
    Mapped(SocketAddr),
    /// It doesn't serve us; the code (RFC 8489 section 14.8), 0 if it says none.
    Refused(u16),
}

/// Reads the answer to a request. `None`: it is none to this one, or its lengths don't add up, or it holds no address.
#[must_use]
pub fn answer(datagram: &[u8], id: Id) -> Option<Answer> {
    let (header, mut rest) = datagram.split_first_chunk::<20>()?;
    let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[4..8] != COOKIE || header[8..] != id || len != rest.len() {
        return None;
    }
    let kind = [header[0], header[1]];
    let (mut plain, mut code) = (None, 0);
    while !rest.is_empty() {
        let (&[t1, t0, l1, l0], tail) = rest.split_first_chunk()?;
        let len = usize::from(u16::from_be_bytes([l1, l0]));
        let value = tail.get(..len)?;
        rest = tail.get(len.next_multiple_of(4)..)?;
        match u16::from_be_bytes([t1, t0]) {
            XOR_MAPPED_ADDRESS if kind == SUCCESS => {
                let mut mask = [0; 16];
                mask[..4].copy_from_slice(&COOKIE);
                mask[4..].copy_from_slice(&id);
                return address(value, mask).map(Answer::Mapped);
            }
            // Of servers of RFC 3489; routers may have rewritten it.
            MAPPED_ADDRESS if plain.is_none() => plain = address(value, [0; 16]),
            ERROR_CODE if value.len() >= 4 => {
                code = u16::from(value[2] & 7) * 100 + u16::from(value[3]);
            }
            _ => {}
        }
    }
    match kind {
        SUCCESS => plain.map(Answer::Mapped),
        ERROR => Some(Answer::Refused(code)),
        _ => None,
    }
}

/// Family, port and address of RFC 8489 section 14.1, under a mask.
fn address(value: &[u8], mask: [u8; 16]) -> Option<SocketAddr> {
    let (&[_, family, p1, p0], ip) = value.split_first_chunk()?;
    let port = u16::from_be_bytes([p1 ^ mask[0], p0 ^ mask[1]]);
    let unmasked = |at: usize| ip[at] ^ mask[at];
    let ip: IpAddr = match (family, ip.len()) {
        (1, 4) => Ipv4Addr::from(std::array::from_fn(unmasked)).into(),
        (2, 16) => Ipv6Addr::from(std::array::from_fn::<u8, 16, _>(unmasked)).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const ID: Id = *b"\xb7\xe7\xa7\x01\xbc\x34\xd6\x86\xfa\x87\xdf\xae";

    fn message(kind: [u8; 2], attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (name, value) in attributes {
            body.extend_from_slice(&name.to_be_bytes());
            body.extend_from_slice(&(value.len() as u16).to_be_bytes());
            body.extend_from_slice(value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let mut out = request(ID).to_vec();
        out[..2].copy_from_slice(&kind);
        out[2..4].copy_from_slice(&(body.len() as u16).to_be_bytes());
        out.extend_from_slice(&body);
        out
    }

    /// RFC 5769 sections 2.2 and 2.3: the attributes of its sample responses, which have this transaction.
    #[test]
    fn the_addresses_of_the_rfcs_samples() {
        let v4 = b"\x00\x01\xa1\x47\xe1\x12\xa6\x43";
        let got = answer(
            &message(SUCCESS, &[(0x8022, b"test vector"), (0x20, v4)]),
            ID,
        );
        assert_eq!(
            got,
            Some(Answer::Mapped("192.0.2.1:32853".parse().unwrap()))
        );
        let v6 =
            b"\x00\x02\xa1\x47\x01\x13\xa9\xfa\xa5\xd3\xf1\x79\xbc\x25\xf4\xb5\xbe\xd2\xb9\xd9";
        let got = answer(&message(SUCCESS, &[(0x20, v6)]), ID);
        let wanted = "[2001:db8:1234:5678:11:2233:4455:6677]:32853";
        assert_eq!(got, Some(Answer::Mapped(wanted.parse().unwrap())));
    }

    #[test]
    fn an_old_server_and_one_that_refuses() {
        let plain: &[u8] = b"\x00\x01\x80\x55\xc0\x00\x02\x01";
        let got = answer(&message(SUCCESS, &[(1, plain)]), ID);
        assert_eq!(
            got,
            Some(Answer::Mapped("192.0.2.1:32853".parse().unwrap()))
        );
        let got = answer(&message(ERROR, &[(9, b"\x00\x00\x04\x01no")]), ID);
        assert_eq!(got, Some(Answer::Refused(401)));
        assert_eq!(answer(&message(ERROR, &[]), ID), Some(Answer::Refused(0)));
    }

    #[test]
    fn what_is_no_answer_is_none() {
        let v4: &[u8] = b"\x00\x01\xa1\x47\xe1\x12\xa6\x43";
        let good = message(SUCCESS, &[(0x20, v4)]);
        assert!(answer(&good, ID).is_some());
        assert_eq!(answer(&good, [7; 12]), None, "another transaction");
        assert_eq!(answer(&request(ID), ID), None, "our own request");
        assert_eq!(answer(&message(SUCCESS, &[]), ID), None);
        assert_eq!(
            answer(&message(SUCCESS, &[(0x20, b"\x00\x03\x00\x00\x01")]), ID),
            None
        );
        for cut in 0..good.len() {
            assert_eq!(answer(&good[..cut], ID), None, "{cut}");
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bent = good.clone();
                bent[at] ^= 1 << bit;
                // Whatever comes of it.
                let _ = answer(&bent, ID);
            }
        }
        let mut long = good;
        long[23] = 0xff;
        assert_eq!(answer(&long, ID), None);
    }
}
