//! DTLS records (RFC 6347 section 4.1), read strictly.

/// Type (1), version (2), epoch (2), sequence number (6), length (2).
const HEADER: usize = 13;

/// Only ever made by us: the wire's are not needed, because the epoch of a record says the same.
pub(super) const CHANGE_CIPHER_SPEC: u8 = 20;
pub(super) const ALERT: u8 = 21;
pub(super) const HANDSHAKE: u8 = 22;
pub(super) const APPLICATION_DATA: u8 = 23;

/// Of a datagram. The smallest record that can bring a handshake on, one byte of a message, takes
/// 26 bytes: a path of 1,500 bytes has room for 56 of them.
const MAX_RECORDS: usize = 64;

/// One record.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record<'a> {
    pub(super) kind: u8,
    pub(super) epoch: u16,
    pub(super) number: u64,
    pub(super) body: &'a [u8],
    /// With its header.
    pub(super) bytes: &'a [u8],
}

fn first(datagram: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let header = datagram.first_chunk::<HEADER>()?;
    let [
        kind,
        major,
        minor,
        e0,
        e1,
        n0,
        n1,
        n2,
        n3,
        n4,
        n5,
        len0,
        len1,
    ] = *header;
    let end = HEADER + usize::from(u16::from_be_bytes([len0, len1]));
    let (bytes, rest) = datagram.split_at_checked(end)?;
    let record = Record {
        kind,
        epoch: u16::from_be_bytes([e0, e1]),
        number: u64::from_be_bytes([0, 0, n0, n1, n2, n3, n4, n5]),
        body: &bytes[HEADER..],
        bytes,
    };
    // DTLS 1.2; a ClientHello comes in records of 1.0, too.
    let version = matches!((major, minor), (0xfe, 0xfd | 0xff));
    // Nothing is ever rekeyed.
    let epoch = record.epoch <= 1;
    let kind = (CHANGE_CIPHER_SPEC..=APPLICATION_DATA).contains(&kind);
    (version && epoch && kind && !record.body.is_empty()).then_some((record, rest))
}

/// The records of a datagram; none, if not every byte of it belongs to one that a WebRTC endpoint
/// may send.
pub(super) fn records(datagram: &[u8]) -> impl Iterator<Item = Record<'_>> {
    let mut count = 0;
    let mut rest = datagram;
    while let Some((_, tail)) = first(rest)
        && count < MAX_RECORDS
    {
        rest = tail;
        count += 1;
    }
    let mut left = if rest.is_empty() { datagram } else { &[] };
    std::iter::from_fn(move || {
        let (record, tail) = first(left)?;
        left = tail;
        Some(record)
    })
}

/// Appends a record of epoch 0.
pub(super) fn write(datagram: &mut Vec<u8>, kind: u8, number: u64, body: &[&[u8]]) {
    let len: usize = body.iter().map(|part| part.len()).sum();
    datagram.extend_from_slice(&[kind, 0xfe, 0xfd, 0, 0]);
    datagram.extend_from_slice(&number.to_be_bytes()[2..]);
    // The longest message is far shorter.
    let len = u16::try_from(len).unwrap_or(u16::MAX);
    datagram.extend_from_slice(&len.to_be_bytes());
    for part in body {
        datagram.extend_from_slice(part);
    }
}

/// Gives the records of epoch 0 numbers from `next` on, which is counted up. A receiver drops a
/// record whose number it has had (RFC 6347 section 4.1.2.6), so what is repeated needs a new one.
pub(super) fn renumber(datagram: &mut [u8], next: &mut u64) {
    let mut at = 0;
    while let Some((record, _)) = datagram.get(at..).and_then(first) {
        let (epoch, len) = (record.epoch, record.bytes.len());
        if epoch == 0 {
            let number = next.to_be_bytes();
            datagram[at + 5..at + 11].copy_from_slice(&number[2..]);
            *next += 1;
        }
        at += len;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn record(kind: u8, epoch: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&mut bytes, kind, 7, &[body]);
        bytes[3..5].copy_from_slice(&epoch.to_be_bytes());
        bytes
    }

    #[test]
    fn a_datagram_is_read_whole_or_not_at_all() {
        let one = record(HANDSHAKE, 0, b"one");
        let two = record(APPLICATION_DATA, 1, b"two");
        let datagram = [&one[..], &two].concat();
        let read: Vec<_> = records(&datagram)
            .map(|r| (r.kind, r.epoch, r.number, r.body.to_vec()))
            .collect();
        assert_eq!(
            read,
            [(22, 0, 7, b"one".to_vec()), (23, 1, 7, b"two".to_vec())]
        );
        for cut in 1..two.len() {
            assert_eq!(records(&datagram[..datagram.len() - cut]).count(), 0);
        }
        let wrong_version = [254, 252];
        for (at, bytes) in [
            (0, &[19][..]),
            (0, &[24]),
            (1, &wrong_version),
            (3, &[0, 2]),
            (11, &[0, 0]),
        ] {
            let mut bad = datagram.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            assert_eq!(records(&bad).count(), 0, "{at}");
        }
        assert_eq!(records(&one.repeat(MAX_RECORDS)).count(), MAX_RECORDS);
        assert_eq!(records(&one.repeat(MAX_RECORDS + 1)).count(), 0);
    }

    #[test]
    fn repeated_records_get_new_numbers_but_for_the_encrypted_ones() {
        let mut datagram = [
            record(HANDSHAKE, 0, b"a"),
            record(HANDSHAKE, 1, b"b"),
            record(HANDSHAKE, 0, b"c"),
        ]
        .concat();
        let mut next = 40;
        renumber(&mut datagram, &mut next);
        let numbers: Vec<_> = records(&datagram).map(|r| r.number).collect();
        assert_eq!((numbers, next), (vec![40, 7, 41], 42));
    }
}
