//! What fuzz targets see of the private parts.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, ReadBuf};

use super::frame::{Op, Peer, ReadError, Reader, Writer};

/// Bytes that come in pieces.
struct Pieces(VecDeque<Vec<u8>>);

impl AsyncRead for Pieces {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let pieces = &mut self.0;
        while pieces.front().is_some_and(Vec::is_empty) {
            pieces.pop_front();
        }
        if let Some(piece) = pieces.front_mut() {
            let n = piece.len().min(buf.remaining());
            buf.put_slice(&piece[..n]);
            piece.drain(..n);
        }
        Poll::Ready(Ok(()))
    }
}

/// Runs what never waits.
fn now<F: Future>(f: F) -> Option<F::Output> {
    match std::pin::pin!(f).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// Opcode and payload of every message.
pub type Messages = Vec<(u8, Vec<u8>)>;

/// The messages in `bytes`, which come in `pieces`' lengths (what is left in one), and why reading ended: "" at the end of
/// stream. `memory` is the most bytes that the reader had in memory at a time.
pub fn frames(bytes: &[u8], pieces: &[usize], from_client: bool, most: usize) -> Read {
    frames_of(bytes, pieces, from_client, most, false)
}

/// The same where permessage-deflate was agreed on.
pub fn deflated_frames(bytes: &[u8], pieces: &[usize], from_client: bool, most: usize) -> Read {
    frames_of(bytes, pieces, from_client, most, true)
}

fn frames_of(
    bytes: &[u8],
    pieces: &[usize],
    from_client: bool,
    most: usize,
    deflates: bool,
) -> Read {
    let peer = if from_client {
        Peer::Client
    } else {
        Peer::Server
    };
    let mut rest = bytes;
    let mut cut: VecDeque<Vec<u8>> = VecDeque::new();
    for n in pieces {
        let (piece, after) = rest.split_at((*n).min(rest.len()));
        cut.push_back(piece.to_vec());
        rest = after;
    }
    cut.push_back(rest.to_vec());
    let mut reader = Reader::new(Pieces(cut), peer, most);
    reader.deflating(deflates);
    let mut read = Read {
        messages: Vec::new(),
        end: String::new(),
        memory: 0,
    };
    loop {
        let next = now(reader.next());
        read.memory = read.memory.max(reader.memory());
        match next {
            Some(Ok(Some(message))) => {
                read.messages
                    .push((message.op as u8, message.payload.to_vec()));
            }
            Some(Ok(None)) => return read,
            Some(Err(ReadError::Violation(why))) => {
                why.clone_into(&mut read.end);
                return read;
            }
            Some(Err(ReadError::TooLarge(_))) => {
                "too large".clone_into(&mut read.end);
                return read;
            }
            Some(Err(ReadError::Io)) | None => {
                "broken".clone_into(&mut read.end);
                return read;
            }
        }
    }
}

/// What came out of [`frames`].
#[derive(Debug, PartialEq, Eq)]
pub struct Read {
    /// Every message, in order.
    pub messages: Messages,
    /// Why it ended; "" at the end of stream.
    pub end: String,
    /// Most bytes of buffers at a time.
    pub memory: usize,
}

/// Frames of these messages, masked where `mask` is given; what no frame can hold is left out.
pub fn written(messages: &Messages, mask: Option<[u8; 4]>) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new());
    for (op, payload) in messages {
        let op = match op {
            1 => Op::Text,
            2 => Op::Binary,
            8 => Op::Close,
            9 => Op::Ping,
            _ => Op::Pong,
        };
        writer.queue(op, payload, mask);
    }
    let _ = now(writer.flush());
    writer.into_inner()
}
