//! Two DTLS ends without the rest of a leg, and the link between them.

use crate::net::Rng;
use auralink_proto::description::DtlsRole;
use auralink_proto::dtls::{Dtls, DtlsEvent, Identity};
use rtc_dtls::cipher_suite::{CipherSuite, cipher_suite_for_id};
use rtc_dtls::content::ContentType;
use rtc_dtls::record_layer::record_layer_header::{PROTOCOL_VERSION1_2, RecordLayerHeader};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

static IDENTITY: LazyLock<Identity> = LazyLock::new(|| Identity::generate().expect("certificate"));

pub(crate) const SERVER: usize = 0;
pub(crate) const CLIENT: usize = 1;

/// One end and what it has had.
pub(crate) struct End {
    pub(crate) dtls: Dtls,
    pub(crate) up: bool,
    pub(crate) closed: bool,
    pub(crate) data: Vec<Vec<u8>>,
    pub(crate) failed: bool,
    /// The most that it has held of an unfinished handshake.
    pub(crate) held: usize,
}

impl End {
    pub(crate) fn receive(&mut self, now: Instant, datagram: &[u8]) {
        let (up, closed, data) = (&mut self.up, &mut self.closed, &mut self.data);
        self.dtls.handle(now, datagram, |event| match event {
            DtlsEvent::Complete => {
                assert!(!*up, "complete twice");
                *up = true;
            }
            DtlsEvent::Data(bytes) => data.push(bytes.to_vec()),
            DtlsEvent::Closed => *closed = true,
        });
        self.held = self.held.max(self.dtls.held());
    }

    pub(crate) fn sent(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.dtls.poll_transmit())
            .map(|datagram| datagram.to_vec())
            .collect()
    }
}

pub(crate) struct Pair {
    pub(crate) now: Instant,
    pub(crate) ends: [End; 2],
    /// Random values of both hellos, as they crossed the link.
    randoms: [Vec<u8>; 2],
}

impl Pair {
    pub(crate) fn new() -> Self {
        // The only real time: everything after it is counted.
        #[allow(clippy::disallowed_methods)]
        let now = Instant::now();
        let end = |role| End {
            dtls: Dtls::new(now, role, &IDENTITY, true).expect("an association"),
            up: false,
            closed: false,
            data: Vec::new(),
            failed: false,
            held: 0,
        };
        Self {
            now,
            ends: [end(DtlsRole::Server), end(DtlsRole::Client)],
            randoms: [Vec::new(), Vec::new()],
        }
    }

    /// A pair whose handshake is complete.
    pub(crate) fn connected() -> Self {
        let mut pair = Self::new();
        pair.exchange(|_, datagrams| datagrams);
        assert!(pair.up());
        pair
    }

    pub(crate) fn up(&self) -> bool {
        self.ends.iter().all(|end| end.up)
    }

    /// What an end has sent; `from` is its index.
    pub(crate) fn take(&mut self, from: usize) -> Vec<Vec<u8>> {
        let sent = self.ends[from].sent();
        for datagram in &sent {
            // Record header, message header, version: a hello in one piece.
            let hello = [2, 1][from];
            if datagram[..5] == [22, 254, 253, 0, 0] && datagram[13] == hello {
                self.randoms[from] = datagram[27..59].to_vec();
            }
        }
        sent
    }

    /// Lets both ends talk until they have nothing to say, through a link that may do anything to
    /// what each has sent at a time.
    pub(crate) fn exchange(&mut self, mut link: impl FnMut(usize, Vec<Vec<u8>>) -> Vec<Vec<u8>>) {
        loop {
            let mut quiet = true;
            for from in [CLIENT, SERVER] {
                let sent = self.take(from);
                quiet &= sent.is_empty();
                for datagram in link(from, sent) {
                    self.ends[1 - from].receive(self.now, &datagram);
                }
            }
            if quiet {
                return;
            }
        }
    }

    /// Lets time pass for both.
    pub(crate) fn tick(&mut self, time: Duration) {
        self.now += time;
        for end in &mut self.ends {
            end.failed |= end.dtls.handle_timeout(self.now).is_err();
        }
    }

    /// Runs for at most so long over a link with losses, in steps of 10 ms, of which a datagram takes
    /// one to four; whether both ends are complete then.
    pub(crate) fn run(
        &mut self,
        rng: &mut Rng,
        loss: f64,
        seconds: u64,
        mut each: impl FnMut(&mut Pair, &mut Rng),
    ) -> bool {
        let mut way: Vec<(u64, usize, Vec<u8>)> = Vec::new();
        for step in 0..seconds * 100 {
            for from in [CLIENT, SERVER] {
                for datagram in self.take(from) {
                    for _ in 0..1 + usize::from(rng.chance(loss / 3.0)) {
                        if !rng.chance(loss) {
                            let after = 1 + rng.next() % 4;
                            way.push((step + after, from, datagram.clone()));
                        }
                    }
                }
            }
            let (due, later) = way.into_iter().partition(|(at, _, _)| *at <= step);
            way = later;
            for (_, from, datagram) in due {
                self.ends[1 - from].receive(self.now, &datagram);
            }
            each(self, rng);
            if self.up() {
                return true;
            }
            self.tick(Duration::from_millis(10));
        }
        false
    }

    /// What it takes to write records in the name of an end that has keys.
    pub(crate) fn keys(&self, of: usize) -> Keys {
        let state = self.ends[of].dtls.connection_state().expect("a state");
        let id = state.cipher_suite().expect("a cipher").id();
        let saved = state.marshal_binary().expect("a whole state");
        let provider = rtc_crypto::default_provider().expect("ring");
        // It begins with the master secret.
        let mut suite = cipher_suite_for_id(id).expect("a known suite");
        suite
            .init(
                provider,
                &saved[..48],
                &self.randoms[CLIENT],
                &self.randoms[SERVER],
                of == CLIENT,
            )
            .expect("keys");
        Keys { suite, number: 30 }
    }
}

/// Encrypts records as the end that it was taken from would.
pub(crate) struct Keys {
    suite: Box<dyn CipherSuite>,
    /// Of the next record.
    pub(crate) number: u64,
}

impl Keys {
    pub(crate) fn seal(&mut self, kind: u8, plain: &[u8]) -> Vec<u8> {
        let header = RecordLayerHeader {
            content_type: ContentType::from(kind),
            protocol_version: PROTOCOL_VERSION1_2,
            epoch: 1,
            sequence_number: self.number,
            content_len: u16::try_from(plain.len()).expect("a record"),
        };
        self.number += 1;
        let mut raw = Vec::new();
        header.marshal(&mut raw).expect("a header");
        raw.extend_from_slice(plain);
        self.suite.encrypt(&header, &raw).expect("a record")
    }
}

/// A record in the clear.
pub(crate) fn record(kind: u8, epoch: u8, number: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 254, 253, 0, epoch];
    bytes.extend_from_slice(&number.to_be_bytes()[2..]);
    bytes.extend_from_slice(&u16::try_from(body.len()).expect("a record").to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// A fragment of a handshake message, with its header.
pub(crate) fn fragment(kind: u8, number: u16, total: usize, offset: usize, body: &[u8]) -> Vec<u8> {
    let u24 = |n: usize| [(n >> 16) as u8, (n >> 8) as u8, n as u8];
    let parts = [
        &[kind][..],
        &u24(total),
        &number.to_be_bytes(),
        &u24(offset),
        &u24(body.len()),
        body,
    ];
    parts.concat()
}

/// Cuts the handshake messages in the clear of what one end sent into fragments of a size, each in a
/// record of its own; everything else stays.
pub(crate) fn cut(datagrams: &[Vec<u8>], size: usize, next: &mut u64) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    for datagram in datagrams {
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let len = rest.get(11..13).map_or(rest.len(), |len| {
                13 + usize::from(u16::from_be_bytes([len[0], len[1]]))
            });
            let (bytes, tail) = rest.split_at(len.min(rest.len()));
            rest = tail;
            let Some((header, body)) = bytes
                .get(13..)
                .filter(|_| bytes[0] == 22 && bytes[4] == 0)
                .and_then(|message| message.split_first_chunk::<12>())
            else {
                records.push(bytes.to_vec());
                continue;
            };
            let u24 = |at: usize| {
                u32::from_be_bytes([0, header[at], header[at + 1], header[at + 2]]) as usize
            };
            let number = u16::from_be_bytes([header[4], header[5]]);
            for at in (0..body.len().max(1)).step_by(size) {
                let piece = &body[at..(at + size).min(body.len())];
                let fragment = fragment(header[0], number, u24(1), u24(6) + at, piece);
                records.push(record(22, 0, *next, &fragment));
                *next += 1;
            }
        }
    }
    records
}
