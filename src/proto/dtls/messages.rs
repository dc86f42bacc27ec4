//! What a handshake message of a WebRTC peer may look like (RFC 5246 section 7.4, RFC 8422): read
//! strictly before `rtc-dtls` reads it, which takes lengths on trust, reads an extension beyond its
//! end, and does not know all of TLS.

use super::COOKIE;

pub(super) const CLIENT_HELLO: u8 = 1;
pub(super) const SERVER_HELLO: u8 = 2;
pub(super) const HELLO_VERIFY_REQUEST: u8 = 3;
pub(super) const CERTIFICATE: u8 = 11;
const SERVER_KEY_EXCHANGE: u8 = 12;
const CERTIFICATE_REQUEST: u8 = 13;
const SERVER_HELLO_DONE: u8 = 14;
const CERTIFICATE_VERIFY: u8 = 15;
const CLIENT_KEY_EXCHANGE: u8 = 16;

/// The messages with which a server answers our ClientHello, in their order. Both ends of WebRTC
/// have certificates (RFC 8827 section 6.5), so none is left out.
pub(super) const OF_SERVER: &[u8] = &[
    SERVER_HELLO,
    CERTIFICATE,
    SERVER_KEY_EXCHANGE,
    CERTIFICATE_REQUEST,
    SERVER_HELLO_DONE,
];

/// The messages with which a client answers our ServerHello.
pub(super) const OF_CLIENT: &[u8] = &[CERTIFICATE, CLIENT_KEY_EXCHANGE, CERTIFICATE_VERIFY];

/// Extensions of a hello: browsers send up to 20, a few of them made up (RFC 8701).
const MAX_EXTENSIONS: usize = 64;

/// Certificates of a peer. WebRTC makes its own, which nobody else signs: one. More come where an
/// application brought a chain.
const MAX_CERTIFICATES: usize = 4;

/// Bytes of a signature: RSA with 8192 bits, the longest that `ring` verifies.
const MAX_SIGNATURE: usize = 1024;

/// Bytes that a message may have.
pub(super) fn max_len(kind: u8) -> usize {
    match kind {
        // A key share of post-quantum TLS 1.3 takes 1.2 kB, all the rest some 300 bytes.
        CLIENT_HELLO => 4096,
        SERVER_HELLO => 1024,
        // Version, length and cookie.
        HELLO_VERIFY_REQUEST => 3 + 255,
        // ECDSA: 300 to 400 bytes each, RSA with 4096 bits 1.4 kB.
        CERTIFICATE => 8192,
        // Curve, P-384 point, algorithm.
        SERVER_KEY_EXCHANGE => 4 + 97 + 4 + MAX_SIGNATURE,
        // Some 50 bytes, and names of authorities where an application brought some.
        CERTIFICATE_REQUEST => 2048,
        CERTIFICATE_VERIFY => 4 + MAX_SIGNATURE,
        CLIENT_KEY_EXCHANGE => 1 + 97,
        _ => 0,
    }
}

/// Bytes that are taken off the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    /// A big-endian number of `size` bytes.
    fn number(&mut self, size: usize) -> Option<usize> {
        let bytes = self.bytes(size)?;
        Some(
            bytes
                .iter()
                .fold(0, |number, byte| number << 8 | usize::from(*byte)),
        )
    }

    /// A vector whose length is in the `size` bytes before it.
    fn vector(&mut self, size: usize) -> Option<Reader<'a>> {
        let len = self.number(size)?;
        self.bytes(len).map(Reader)
    }

    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

/// A vector of `item` bytes each, at least one, behind a length of `size` bytes.
fn list<'a>(reader: &mut Reader<'a>, size: usize, item: usize) -> Option<&'a [u8]> {
    let Reader(list) = reader.vector(size)?;
    (!list.is_empty() && list.len().is_multiple_of(item)).then_some(list)
}

#[cfg(test)]
thread_local! {
    /// Messages that were read, for tests of what it costs.
    pub(super) static READ: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// Whether a message is one that `rtc-dtls` may see.
pub(super) fn valid(kind: u8, body: &[u8]) -> bool {
    #[cfg(test)]
    READ.set(READ.get() + 1);
    let mut reader = Reader(body);
    let read = match kind {
        SERVER_HELLO => server_hello(&mut reader),
        HELLO_VERIFY_REQUEST => hello_verify_request(&mut reader),
        CERTIFICATE => certificate(&mut reader),
        SERVER_KEY_EXCHANGE => server_key_exchange(&mut reader),
        CERTIFICATE_REQUEST => certificate_request(&mut reader),
        SERVER_HELLO_DONE => Some(()),
        CERTIFICATE_VERIFY => signature(&mut reader),
        CLIENT_KEY_EXCHANGE => client_key_exchange(&mut reader),
        _ => None,
    };
    read.and_then(|()| reader.end()).is_some()
}

/// A ClientHello that has our cookie: what it was without one, which is what `rtc-dtls` wants to
/// have seen before it.
pub(super) fn client_hello(body: &[u8], cookie: &[u8; COOKIE]) -> Option<Vec<u8>> {
    let mut reader = Reader(body);
    let version_and_random = reader.bytes(2 + 32)?;
    // `rtc-dtls` cannot read a session's id, and there is none to be resumed.
    if !version_and_random.starts_with(&[0xfe, 0xfd]) || reader.number(1)? != 0 {
        return None;
    }
    if reader.vector(1)?.0 != cookie {
        return None;
    }
    let rest = reader.0;
    // Cipher suites, compression methods, extensions.
    list(&mut reader, 2, 2)?;
    list(&mut reader, 1, 1)?;
    extensions(&mut reader)?;
    reader.end()?;
    let mut bare = Vec::with_capacity(body.len());
    bare.extend_from_slice(version_and_random);
    bare.extend_from_slice(&[0, 0]);
    bare.extend_from_slice(rest);
    Some(bare)
}

fn server_hello(reader: &mut Reader) -> Option<()> {
    if !reader.bytes(2 + 32)?.starts_with(&[0xfe, 0xfd]) {
        return None;
    }
    let session = reader.vector(1)?;
    // Cipher suite, then no compression.
    reader.bytes(2)?;
    if session.0.len() > 32 || reader.number(1)? != 0 {
        return None;
    }
    extensions(reader)
}

/// The extensions of a hello. `rtc-dtls` would read each as far as the numbers inside it tell, up
/// to the end of all: a work that grows with the square of their number.
fn extensions(reader: &mut Reader) -> Option<()> {
    let mut all = reader.vector(2)?;
    let mut seen = [0usize; MAX_EXTENSIONS];
    for count in 0.. {
        if all.0.is_empty() {
            return Some(());
        }
        let kind = all.number(2)?;
        let mut body = all.vector(2)?;
        // None comes twice (RFC 5246 section 7.4.1.4).
        if seen[..count].contains(&kind) {
            return None;
        }
        *seen.get_mut(count)? = kind;
        let body = &mut body;
        match kind {
            // server_name: in a list, the type of a name and the name. A server's is empty.
            0 if !body.0.is_empty() => {
                let mut names = body.vector(2)?;
                names.bytes(1)?;
                names.vector(2)?;
                names.end()?;
            }
            // supported_groups, signature_algorithms, use_srtp; ec_point_formats.
            10 | 13 => {
                list(body, 2, 2)?;
            }
            11 => {
                list(body, 1, 1)?;
            }
            14 => {
                list(body, 2, 2)?;
                body.vector(1)?;
            }
            // extended_master_secret is empty, renegotiation_info says that it is no renegotiation.
            23 => {}
            0xff01 => {
                if body.number(1)? != 0 {
                    return None;
                }
            }
            // Unknown ones are nobody's business.
            _ => continue,
        }
        body.end()?;
    }
    None
}

fn hello_verify_request(reader: &mut Reader) -> Option<()> {
    reader.bytes(2)?;
    reader.vector(1).map(drop)
}

fn certificate(reader: &mut Reader) -> Option<()> {
    let mut all = reader.vector(3)?;
    for _ in 0..MAX_CERTIFICATES {
        if all.vector(3)?.0.is_empty() {
            return None;
        }
        if all.0.is_empty() {
            return Some(());
        }
    }
    None
}

/// A public key on a curve, uncompressed.
fn point(reader: &mut Reader) -> Option<usize> {
    let len = reader.vector(1)?.0.len();
    // X25519, P-256, P-384.
    matches!(len, 32 | 65 | 97).then_some(len)
}

/// Hash, algorithm, signature.
fn signature(reader: &mut Reader) -> Option<()> {
    reader.bytes(2)?;
    let len = list(reader, 2, 1)?.len();
    (len <= MAX_SIGNATURE).then_some(())
}

fn server_key_exchange(reader: &mut Reader) -> Option<()> {
    /// `rtc-dtls` takes a message of this length for the hint of a pre-shared key, because it
    /// reads "named curve, first byte" (3, 0) as the hint's length.
    const LIKE_A_HINT: usize = 2 + 0x0300;
    if reader.0.len() == LIKE_A_HINT || reader.number(1)? != 3 {
        return None;
    }
    let curve = reader.number(2)?;
    let len = point(reader)?;
    if !matches!((curve, len), (29, 32) | (23, 65) | (24, 97)) {
        return None;
    }
    signature(reader)
}

fn certificate_request(reader: &mut Reader) -> Option<()> {
    list(reader, 1, 1)?;
    list(reader, 2, 2)?;
    reader.vector(2).map(drop)
}

fn client_key_exchange(reader: &mut Reader) -> Option<()> {
    point(reader).map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn vector(size: usize, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(body.len()).unwrap().to_be_bytes();
        [&len[4 - size..], body].concat()
    }

    fn extension(kind: u16, body: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &vector(2, body)].concat()
    }

    fn hello(cookie: &[u8], extensions: &[u8]) -> Vec<u8> {
        let parts = [
            vec![0xfe, 0xfd],
            vec![7; 32],
            vector(1, b""),
            vector(1, cookie),
            vector(2, &[0xc0, 0x2b]),
            vector(1, &[0]),
            vector(2, extensions),
        ];
        parts.concat()
    }

    #[test]
    fn a_client_hello_is_one_that_has_our_cookie() {
        let cookie = [9; COOKIE];
        let srtp = extension(14, &[0, 2, 0, 1, 0]);
        let bare = hello(b"", &srtp);
        assert_eq!(client_hello(&hello(&cookie, &srtp), &cookie), Some(bare));
        for wrong in [&[][..], &[9; COOKIE - 1], &[9; COOKIE + 1], &[8; COOKIE]] {
            assert_eq!(client_hello(&hello(wrong, &srtp), &cookie), None);
        }
        let mut session = hello(&cookie, &srtp);
        session.splice(34..35, [1, 1]);
        assert_eq!(client_hello(&session, &cookie), None);
    }

    #[test]
    fn extensions_end_where_they_say() {
        let cookie = [9; COOKIE];
        let takes = |extensions: &[Vec<u8>]| {
            client_hello(&hello(&cookie, &extensions.concat()), &cookie).is_some()
        };
        let unknown = |kind| extension(kind, b"anything");
        assert!(takes(&[
            extension(0, &vector(2, &[&[0][..], &vector(2, b"host")].concat())),
            extension(10, &[0, 2, 0, 29]),
            extension(11, &[1, 0]),
            extension(13, &[0, 2, 4, 3]),
            extension(14, &[0, 4, 0, 7, 0, 1, 0]),
            extension(23, b""),
            extension(0xff01, &[0]),
            unknown(43),
            unknown(0x1a1a),
        ]));
        for bad in [
            extension(10, &[0, 4, 0, 29]),
            extension(10, &[0xff, 0xfe]),
            extension(10, &[]),
            extension(11, &[2, 0]),
            extension(14, &[0, 2, 0, 1]),
            extension(0xff01, &[1, 0]),
            extension(0, &vector(2, &[0, 0xff, 0xff])),
        ] {
            assert!(!takes(std::slice::from_ref(&bad)), "{bad:02x?}");
        }
        assert!(!takes(&[unknown(43), unknown(43)]), "twice");
        let many = |count: u16| (0..count).map(|n| unknown(1000 + n)).collect::<Vec<_>>();
        assert!(takes(&many(64)) && !takes(&many(65)));
    }

    #[test]
    fn certificates_are_few_and_add_up() {
        let chain = |count: usize| vector(3, &vector(3, b"DER").repeat(count));
        assert!(valid(CERTIFICATE, &chain(1)) && valid(CERTIFICATE, &chain(4)));
        assert!(!valid(CERTIFICATE, &chain(0)) && !valid(CERTIFICATE, &chain(5)));
        assert!(!valid(CERTIFICATE, &vector(3, &vector(3, b""))));
        // 16 MB, says the length, and the library would make room for them.
        assert!(!valid(CERTIFICATE, &vector(3, &[0xff, 0xff, 0xff, 1])));
    }

    #[test]
    fn key_exchanges_are_points_of_their_curve() {
        let exchange = |curve: u8, point: usize, signature: usize| {
            let parts = [
                vec![3, 0, curve],
                vector(1, &vec![4; point]),
                vec![4, 3],
                vector(2, &vec![5; signature]),
            ];
            parts.concat()
        };
        for (curve, point) in [(29, 32), (23, 65), (24, 97)] {
            assert!(valid(SERVER_KEY_EXCHANGE, &exchange(curve, point, 70)));
            assert!(!valid(SERVER_KEY_EXCHANGE, &exchange(curve, point + 1, 70)));
            assert!(!valid(SERVER_KEY_EXCHANGE, &exchange(25, point, 70)));
            assert!(valid(CLIENT_KEY_EXCHANGE, &vector(1, &vec![4; point])));
        }
        assert!(!valid(CLIENT_KEY_EXCHANGE, &vector(1, &[4; 33])));
        assert!(!valid(SERVER_KEY_EXCHANGE, &exchange(29, 32, 1025)));
        // 770 bytes in all: taken for something else, and never sent.
        assert!(!valid(SERVER_KEY_EXCHANGE, &exchange(29, 32, 730)));
        assert!(valid(
            CERTIFICATE_VERIFY,
            &[&[4, 3][..], &vector(2, &[5; 70])].concat()
        ));
        assert!(!valid(CERTIFICATE_VERIFY, &[4, 3, 0, 0]));
    }

    proptest! {
        #[test]
        fn anything_is_read_without_a_panic(
            kind in 0u8..25,
            body in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            valid(kind, &body);
            client_hello(&body, &[0; COOKIE]);
        }
    }
}
