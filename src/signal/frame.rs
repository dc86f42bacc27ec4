//! WebSocket framing (RFC 6455 section 5) for a proxy: whole messages out of one side, into the other.
//!
//! Written here and not taken from tungstenite, because its connection type answers every ping by itself: a client that is gone
//! would look alive to the server for as long as its TCP connection lasts. Here control frames are data like any other.
//!
//! The only extension is permessage-deflate ([`deflate`](super::deflate)), whose bit may be set where that was agreed on. All other
//! reserved bits must be zero.

use std::io;
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::deflate::{self, Bad};
use super::large::{Large, Room};

/// A masking key: clients mask every frame, servers none.
pub(super) type Mask = [u8; 4];

/// Opcodes that leave the reader; continuation frames never do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Text = 1,
    Binary = 2,
    Close = 8,
    Ping = 9,
    Pong = 10,
}

impl Op {
    fn is_control(self) -> bool {
        self as u8 >= 8
    }
}

/// One message, or one control frame.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) op: Op,
    /// Unmasked. A Close holds 2 bytes of code and a reason, or nothing.
    pub(super) payload: BytesMut,
    /// The key that it came with.
    pub(super) mask: Option<Mask>,
    /// What it took of the room for long messages: to be kept for as long as it is in memory.
    pub(super) room: Option<Room>,
}

impl Message {
    /// Code of a Close.
    pub(super) fn close_code(&self) -> Option<u16> {
        match (self.op, self.payload.first_chunk::<2>()) {
            (Op::Close, Some(code)) => Some(u16::from_be_bytes(*code)),
            _ => None,
        }
    }
}

/// Why no further message can be read.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The connection broke.
    Io,
    /// The peer breaks RFC 6455: the reason, for close code 1002.
    Violation(&'static str),
    /// The message would be longer than allowed: its length as far as known.
    TooLarge(u64),
}

/// Which end of a WebSocket the peer is: it decides about masking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    Client,
    Server,
}

/// Bytes that are read at least at a time.
const READ: usize = 2048;

/// Reads messages from `io`. Dropping a pending [`Reader::next`] loses nothing.
pub(super) struct Reader<R> {
    io: R,
    peer: Peer,
    /// Longest message, bytes of payload.
    max: usize,
    /// A message that is longer than this needs room.
    ordinary: Option<(usize, Arc<Large>)>,
    /// For the message that is being read.
    room: Option<Room>,
    buf: BytesMut,
    /// The beginning of a fragmented message.
    partial: Option<Message>,
    /// permessage-deflate was agreed on.
    deflates: bool,
    /// The message that is being read is compressed.
    packed: bool,
    /// A compressed message that is whole and waits for room.
    waiting: Option<Message>,
}

/// What is in the buffer.
enum Part<T> {
    Whole(T),
    /// Nothing whole yet.
    More,
    /// A message that needs room first: bytes.
    Long(usize),
}

/// Opcode (known), FIN, mask, payload (unmasked).
type Frame = (u8, bool, Option<Mask>, BytesMut);

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(super) fn new(io: R, peer: Peer, max: usize) -> Reader<R> {
        Reader {
            io,
            peer,
            max,
            ordinary: None,
            room: None,
            buf: BytesMut::new(),
            partial: None,
            deflates: false,
            packed: false,
            waiting: None,
        }
    }

    /// permessage-deflate was agreed on.
    pub(super) fn deflating(&mut self, deflates: bool) {
        self.deflates = deflates;
    }

    /// Messages longer than `ordinary` are not read before there is room for them.
    pub(super) fn takes_room(&mut self, ordinary: usize, large: Arc<Large>) {
        self.ordinary = Some((ordinary, large));
    }

    /// The next message; `None` once the peer has ended the stream, in the middle of a frame or not.
    pub(super) async fn next(&mut self) -> Result<Option<Message>, ReadError> {
        loop {
            if let Some(message) = self.waiting.take() {
                if let Some(message) = self.unpack(message)? {
                    return Ok(Some(message));
                }
                // It gets longer than what needs no room: as long as it may be, for all that is known.
                if let Some((_, large)) = &self.ordinary {
                    self.room = Some(large.room(self.max).await);
                }
                continue;
            }
            match self.parse()? {
                Part::Whole(message) if self.packed && !message.op.is_control() => {
                    self.packed = false;
                    self.waiting = Some(message);
                    continue;
                }
                Part::Whole(message) => return Ok(Some(message)),
                Part::More => {}
                Part::Long(bytes) => {
                    if let Some((_, large)) = &self.ordinary {
                        self.room = Some(large.room(bytes).await);
                    }
                    continue;
                }
            }
            if self.buf.is_empty() && self.buf.capacity() > (64 << 10) {
                // One big message must not hold its memory for the rest of a quiet session.
                self.buf = BytesMut::new();
            }
            self.buf.reserve(READ);
            if self
                .io
                .read_buf(&mut self.buf)
                .await
                .map_err(|_| ReadError::Io)?
                == 0
            {
                return Ok(None);
            }
        }
    }

    /// Decompresses a message. `None`: there has to be room for it first, and it waits.
    fn unpack(&mut self, mut message: Message) -> Result<Option<Message>, ReadError> {
        let room = message.room.take().or(self.room.take());
        let most = match &self.ordinary {
            Some((ordinary, _)) if room.is_none() => self.max.min(*ordinary),
            _ => self.max,
        };
        match deflate::decompressed(&message.payload, most) {
            Ok(payload) => {
                message.payload = payload;
                message.room = room;
                Ok(Some(message))
            }
            Err(Bad::TooLong) if most < self.max => {
                self.waiting = Some(message);
                Ok(None)
            }
            Err(Bad::TooLong) => Err(ReadError::TooLarge(most as u64 + 1)),
            Err(Bad::Malformed) => Err(ReadError::Violation(
                "a compressed message can't be decompressed",
            )),
        }
    }

    /// Bytes of memory that are held between two messages.
    pub(super) fn memory(&self) -> usize {
        let partial = self.partial.as_ref();
        self.buf.capacity() + partial.map_or(0, |partial| partial.payload.capacity())
    }

    /// Reads and forgets until the peer ends the stream, so that closing ours doesn't reset the connection and with it take away
    /// from the peer what it has not read yet.
    pub(super) async fn discard(&mut self) {
        loop {
            self.buf.clear();
            self.buf.reserve(READ);
            match self.io.read_buf(&mut self.buf).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    /// Takes one message out of the buffer if it is whole. Frames of a fragmented message are taken as they come.
    fn parse(&mut self) -> Result<Part<Message>, ReadError> {
        loop {
            let (op, fin, mask, payload) = match self.frame()? {
                Part::Whole(frame) => frame,
                Part::More => return Ok(Part::More),
                Part::Long(bytes) => return Ok(Part::Long(bytes)),
            };
            let mut message = match op {
                0 => {
                    let Some(mut whole) = self.partial.take() else {
                        return Err(ReadError::Violation(
                            "a continuation frame without a beginning",
                        ));
                    };
                    whole.payload.extend_from_slice(&payload);
                    whole
                }
                8 if payload.len() == 1 => {
                    return Err(ReadError::Violation("a close frame with half a code"));
                }
                8 => return Ok(Part::Whole(message(Op::Close, payload, mask))),
                9 => return Ok(Part::Whole(message(Op::Ping, payload, mask))),
                10 => return Ok(Part::Whole(message(Op::Pong, payload, mask))),
                _ if self.partial.is_some() => {
                    return Err(ReadError::Violation(
                        "a new message inside a fragmented one",
                    ));
                }
                1 => message(Op::Text, payload, mask),
                _ => message(Op::Binary, payload, mask),
            };
            if fin {
                message.room = self.room.take();
                if message.room.is_some() {
                    // What came behind it must not keep the whole of it in memory.
                    self.buf = BytesMut::from(&self.buf[..]);
                }
                return Ok(Part::Whole(message));
            }
            self.partial = Some(message);
        }
    }

    /// Takes one frame out of the buffer if it is whole.
    fn frame(&mut self) -> Result<Part<Frame>, ReadError> {
        let Some(&[first, second]) = self.buf.first_chunk::<2>() else {
            return Ok(Part::More);
        };
        let (op, fin) = (first & 0x0f, first & 0x80 != 0);
        // RFC 7692 section 6: the first frame of a message says that it is compressed.
        let packed = first & 0x40 != 0;
        if first & 0x30 != 0 || packed && !(self.deflates && matches!(op, 1 | 2)) {
            return Err(ReadError::Violation(
                "a reserved bit is set, for which nothing was agreed on",
            ));
        }
        if !matches!(op, 0 | 1 | 2 | 8 | 9 | 10) {
            return Err(ReadError::Violation("an unknown opcode"));
        }
        if (second & 0x80 != 0) != (self.peer == Peer::Client) {
            return Err(ReadError::Violation(match self.peer {
                Peer::Client => "a client's frame is not masked",
                Peer::Server => "a server's frame is masked",
            }));
        }
        let (len, mut header) = match second & 0x7f {
            126 => match self.buf.get(2..).and_then(<[u8]>::first_chunk::<2>) {
                Some(len) => (u64::from(u16::from_be_bytes(*len)), 4),
                None => return Ok(Part::More),
            },
            127 => match self.buf.get(2..).and_then(<[u8]>::first_chunk::<8>) {
                Some(len) => (u64::from_be_bytes(*len), 10),
                None => return Ok(Part::More),
            },
            short => (u64::from(short), 2),
        };
        // By the first length byte: a longer form of a short length is none either (RFC 6455 section 5.2).
        if op >= 8 && (second & 0x7f > 125 || !fin) {
            return Err(ReadError::Violation(
                "a control frame that is fragmented or over 125 bytes",
            ));
        }
        let before = match (op, &self.partial) {
            (0, Some(partial)) => partial.payload.len(),
            _ => 0,
        };
        // Said as soon as the header is there: nothing of what is too long is ever kept.
        let whole = len.saturating_add(before as u64);
        if op < 8 && whole > self.max as u64 {
            return Err(ReadError::TooLarge(whole));
        }
        if op < 8
            && self.room.is_none()
            && let Some((ordinary, _)) = &self.ordinary
            && whole > *ordinary as u64
        {
            // How long it gets in the end a fragment doesn't say, nor what is compressed. At most max.
            let plain = fin && !packed && !self.packed;
            let whole = if plain { whole as usize } else { self.max };
            return Ok(Part::Long(whole));
        }
        // At most max (a usize), so this loses nothing.
        let len = len as usize;
        let mask = match self.peer {
            Peer::Server => None,
            Peer::Client => match self.buf.get(header..).and_then(<[u8]>::first_chunk::<4>) {
                Some(key) => {
                    header += 4;
                    Some(*key)
                }
                None => return Ok(Part::More),
            },
        };
        if self.buf.len() - header < len {
            // What is there is doubled, and not made as large as the header says: only who sends bytes takes memory.
            let missing = header + len - self.buf.len();
            self.buf.reserve(missing.min(self.buf.len().max(READ)));
            return Ok(Part::More);
        }
        if matches!(op, 1 | 2) && self.partial.is_none() {
            self.packed = packed;
        }
        self.buf.advance(header);
        let mut payload = self.buf.split_to(len);
        if let Some(key) = mask {
            apply(key, &mut payload);
        }
        Ok(Part::Whole((op, fin, mask, payload)))
    }
}

fn message(op: Op, payload: BytesMut, mask: Option<Mask>) -> Message {
    Message {
        op,
        payload,
        mask,
        room: None,
    }
}

/// XORs with the key; its own inverse.
fn apply(key: Mask, payload: &mut [u8]) {
    for (i, byte) in payload.iter_mut().enumerate() {
        *byte ^= key[i & 3];
    }
}

/// Writes frames to `io`. A dropped [`Writer::flush`] goes on with the next one at the byte where it was.
pub(super) struct Writer<W> {
    io: W,
    out: BytesMut,
    /// permessage-deflate was agreed on.
    deflates: bool,
    /// What a long message in `out` took of the room for such, and since when.
    room: Option<(Room, Instant)>,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(super) fn new(io: W) -> Writer<W> {
        Writer {
            io,
            out: BytesMut::new(),
            deflates: false,
            room: None,
        }
    }

    /// permessage-deflate was agreed on.
    pub(super) fn deflating(&mut self, deflates: bool) {
        self.deflates = deflates;
    }

    /// Keeps the room of a long message that was queued until all is flushed.
    pub(super) fn keep(&mut self, room: Room) {
        self.room = Some((room, Instant::now()));
    }

    /// Since when a long message waits to be taken, if one does.
    pub(super) fn long_since(&self) -> Option<Instant> {
        self.room.as_ref().map(|(_, since)| *since)
    }

    /// Appends one unfragmented frame to what is to be flushed. Towards a server `mask` must be given.
    pub(super) fn queue(&mut self, op: Op, payload: &[u8], mask: Option<Mask>) {
        let masked = if mask.is_some() { 0x80 } else { 0 };
        let packed = if self.deflates && !op.is_control() {
            deflate::compressed(payload)
        } else {
            None
        };
        let bit = if packed.is_some() { 0x40 } else { 0 };
        let payload = packed.as_deref().unwrap_or(payload);
        self.out.reserve(payload.len() + 14);
        self.out.extend_from_slice(&[0x80 | bit | op as u8]);
        match payload.len() {
            len @ 0..=125 => self.out.extend_from_slice(&[masked | len as u8]),
            len @ 126..=0xffff => {
                self.out.extend_from_slice(&[masked | 126]);
                self.out.extend_from_slice(&(len as u16).to_be_bytes());
            }
            len => {
                self.out.extend_from_slice(&[masked | 127]);
                self.out.extend_from_slice(&(len as u64).to_be_bytes());
            }
        }
        if let Some(key) = mask {
            self.out.extend_from_slice(&key);
        }
        let start = self.out.len();
        self.out.extend_from_slice(payload);
        if let Some(key) = mask {
            apply(key, &mut self.out[start..]);
        }
    }

    /// Appends a Close; the reason is cut to what fits a control frame.
    pub(super) fn queue_close(&mut self, code: u16, reason: &str, mask: Option<Mask>) {
        let reason = &reason[..reason.floor_char_boundary(123)];
        let mut payload = code.to_be_bytes().to_vec();
        payload.extend_from_slice(reason.as_bytes());
        self.queue(Op::Close, &payload, mask);
    }

    /// Hands all that is queued to the connection.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            if self.io.write_buf(&mut self.out).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        if self.out.capacity() > (64 << 10) {
            self.out = BytesMut::new();
        }
        self.room = None;
        self.io.flush().await
    }

    /// What the frames were written to.
    pub(super) fn into_inner(self) -> W {
        self.io
    }

    /// Ends our side of the stream.
    pub(super) async fn shutdown(&mut self) {
        // Of a connection that is gone already there is nothing left to end.
        let _ = self.io.shutdown().await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    fn block<F: Future>(f: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(f)
    }

    fn read_all(bytes: &[u8], peer: Peer, max: usize) -> Result<Vec<(Op, Vec<u8>)>, ReadError> {
        block(async {
            let mut reader = Reader::new(bytes, peer, max);
            let mut got = Vec::new();
            while let Some(m) = reader.next().await? {
                got.push((m.op, m.payload.to_vec()));
            }
            Ok(got)
        })
    }

    fn violation(bytes: &[u8], peer: Peer) -> &'static str {
        match read_all(bytes, peer, 100) {
            Err(ReadError::Violation(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    /// RFC 6455 section 5.7.
    #[test]
    fn the_examples_of_the_rfc() {
        let text = vec![(Op::Text, b"Hello".to_vec())];
        let hello = [0x81, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f];
        assert_eq!(read_all(&hello, Peer::Server, 5).unwrap(), text);
        let masked = [
            0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58,
        ];
        assert_eq!(read_all(&masked, Peer::Client, 5).unwrap(), text);
        let fragments = [0x01, 0x03, 0x48, 0x65, 0x6c, 0x80, 0x02, 0x6c, 0x6f];
        assert_eq!(read_all(&fragments, Peer::Server, 5).unwrap(), text);
        let mut writer = Writer::new(Vec::new());
        writer.queue(Op::Text, b"Hello", Some([0x37, 0xfa, 0x21, 0x3d]));
        block(writer.flush()).unwrap();
        assert_eq!(writer.io, masked);
    }

    #[test]
    fn every_length_comes_back() {
        for len in [0, 1, 125, 126, 127, 65_535, 65_536, 200_000] {
            let payload: Vec<u8> = (0..len).map(|i| i as u8).collect();
            for (peer, mask) in [(Peer::Server, None), (Peer::Client, Some([1, 2, 3, 4]))] {
                let mut writer = Writer::new(Vec::new());
                writer.queue(Op::Binary, &payload, mask);
                writer.queue(Op::Ping, b"x", mask);
                block(writer.flush()).unwrap();
                let got = read_all(&writer.io, peer, len).unwrap();
                assert_eq!(
                    got,
                    vec![(Op::Binary, payload.clone()), (Op::Ping, b"x".to_vec())],
                    "{len}"
                );
            }
        }
    }

    #[test]
    fn a_ping_inside_a_fragmented_message_comes_first() {
        let bytes = [
            0x02, 1, b'a', 0x89, 1, b'p', 0x00, 1, b'b', 0x80, 1, b'c', 0x88, 2, 0x03, 0xe8,
        ];
        let got = read_all(&bytes, Peer::Server, 3).unwrap();
        let wanted = vec![
            (Op::Ping, b"p".to_vec()),
            (Op::Binary, b"abc".to_vec()),
            (Op::Close, vec![3, 0xe8]),
        ];
        assert_eq!(got, wanted);
    }

    #[test]
    fn violations_have_their_reason() {
        assert!(violation(&[0x81, 0x01, b'a'], Peer::Client).contains("not masked"));
        assert!(violation(&[0x81, 0x81, 0, 0, 0, 0, b'a'], Peer::Server).contains("is masked"));
        assert!(violation(&[0xc1, 0], Peer::Server).contains("reserved bit"));
        assert!(violation(&[0x83, 0], Peer::Server).contains("opcode"));
        assert!(violation(&[0x80, 0], Peer::Server).contains("without a beginning"));
        assert!(violation(&[0x01, 0, 0x81, 0], Peer::Server).contains("inside a fragmented"));
        assert!(violation(&[0x09, 0], Peer::Server).contains("control frame"));
        assert!(violation(&[0x89, 126, 0, 126], Peer::Server).contains("control frame"));
        assert!(violation(&[0x88, 1, 3], Peer::Server).contains("half a code"));
    }

    #[test]
    fn too_long_is_said_before_it_is_read() {
        // A header that claims 2^63 bytes, and fragments that add up to more than allowed.
        let huge = [0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0];
        assert!(
            matches!(read_all(&huge, Peer::Server, 100), Err(ReadError::TooLarge(n)) if n == 1 << 63)
        );
        let fragments = [0x02, 2, 1, 2, 0x80, 2];
        assert!(matches!(
            read_all(&fragments, Peer::Server, 3),
            Err(ReadError::TooLarge(4))
        ));
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            let mut bytes = Vec::new();
            for _ in 0..(state % 40) {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                bytes.push((state >> 56) as u8);
            }
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            // Half of them with a valid first byte and mask, else few get past the header.
            if state & 2 == 0 && bytes.len() > 1 {
                bytes[0] &= 0x8f;
                bytes[1] |= 0x80;
            }
            let _ = read_all(&bytes, Peer::Client, 64);
        }
    }
}
