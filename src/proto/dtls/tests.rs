//! What a stranger makes the gate read.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::*;
use messages::READ;

#[test]
fn a_message_that_is_whole_is_read_once_however_often_its_parts_come() {
    const CERTIFICATE_REQUEST: u8 = 13;
    let identity = Identity::generate().unwrap();
    let now = Instant::now();
    let mut dtls = Dtls::new(now, DtlsRole::Client, &identity, false).unwrap();
    // Types of certificates, algorithms, no authorities.
    let body = [1, 1, 0, 2, 4, 3, 0, 0];
    let part = |body: &[u8], from: usize| {
        let header = reassembly::header(CERTIFICATE_REQUEST, 3, body.len(), from);
        [&header, &body[from..]].concat()
    };
    let mut read = |part: Vec<u8>| {
        let before = READ.get();
        for number in 0..10 {
            let mut datagram = Vec::new();
            let parts = part.repeat(1300 / part.len());
            record::write(&mut datagram, HANDSHAKE, number, &[&parts]);
            dtls.handle(now, &datagram, |_| {});
        }
        READ.get() - before
    };
    assert_eq!(read(part(&body, 8)), 0, "nothing of it came yet");
    assert_eq!(read(part(&body, 0)), 1);
    assert_eq!(read(part(&body, 8)), 0);
    assert_eq!(read(part(&body, 7)), 0);
    // Another message in its place is read for itself.
    assert_eq!(read(part(&[1, 1, 0, 2, 4, 1, 0, 0], 0)), 1);
}
