//! The cases of the Autobahn test suite (sections 1 to 7 and 10) that concern a proxy, as raw bytes through the pump to an echo
//! server of tungstenite's. Its section 9 is about speed; of 12 and 13, compression, see `deflate`.

use super::*;
use crate::signal::fuzz::Messages;

const KEY: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// A client's frame with this first byte.
pub(super) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    match payload.len() {
        n @ 0..=125 => out.push(0x80 | n as u8),
        n @ 126..=0xffff => {
            out.push(0x80 | 126);
            out.extend_from_slice(&(n as u16).to_be_bytes());
        }
        n => {
            out.push(0x80 | 127);
            out.extend_from_slice(&(n as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(&KEY);
    out.extend(payload.iter().zip(KEY.iter().cycle()).map(|(b, k)| b ^ k));
    out
}

/// What the server side says up to the end of the connection: opcode with FIN, payload.
async fn answers(sidecar: &Sidecar, frames: &[Vec<u8>], piece: usize) -> Messages {
    let mut tcp = sidecar.tcp().await;
    tcp.write_all(
        b"GET /rtc HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
          Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )
    .await
    .unwrap();
    assert!(head(&mut tcp).await.starts_with("HTTP/1.1 101"));
    let (mut read, mut write) = tcp.into_split();
    let bytes = frames.concat();
    let writing = async {
        for piece in bytes.chunks(piece) {
            if write.write_all(piece).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    let mut got = Vec::new();
    let reading = async { soon("the end", read.read_to_end(&mut got)).await };
    let (_, ended) = tokio::join!(writing, reading);
    let _ = ended;
    split(&got)
}

/// The frames of a server: first byte, payload.
pub(super) fn split(got: &[u8]) -> Messages {
    let mut at = got;
    let mut out = Vec::new();
    while let [first, second, rest @ ..] = at {
        let (n, rest) = match second {
            126 => (
                usize::from(u16::from_be_bytes([rest[0], rest[1]])),
                &rest[2..],
            ),
            127 => (
                u64::from_be_bytes(rest[..8].try_into().unwrap()) as usize,
                &rest[8..],
            ),
            n => (usize::from(*n), rest),
        };
        out.push((*first, rest[..n].to_vec()));
        at = &rest[n..];
    }
    out
}

fn close() -> Vec<u8> {
    frame(0x88, &1000_u16.to_be_bytes())
}

/// Echoes, then the close that the client asked for.
fn echoed(messages: &[(u8, &[u8])]) -> Messages {
    let mut all: Vec<_> = messages.iter().map(|(op, m)| (*op, m.to_vec())).collect();
    all.push((0x88, 1000_u16.to_be_bytes().to_vec()));
    all
}

#[tokio::test]
async fn what_is_lawful_comes_back() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut cases: Vec<(String, Vec<Vec<u8>>, Messages)> = Vec::new();
    // 1.1, 1.2: texts and binaries of the lengths at which the header changes.
    for len in [0, 125, 126, 127, 128, 65_535, 65_536] {
        for op in [0x81, 0x82] {
            let payload = vec![b'*'; len];
            cases.push((
                format!("1: {len}"),
                vec![frame(op, &payload), close()],
                echoed(&[(op, &payload)]),
            ));
        }
    }
    // 2: pings, unasked pongs.
    let ping = vec![0xfe; 125];
    cases.push((
        "2.4".into(),
        vec![frame(0x89, &ping), close()],
        echoed(&[(0x8a, &ping)]),
    ));
    cases.push((
        "2.7".into(),
        vec![frame(0x8a, b"unasked"), close()],
        echoed(&[]),
    ));
    let many: Vec<_> = (0..10)
        .map(|n| frame(0x89, &[n]))
        .chain([close()])
        .collect();
    let pongs: Vec<_> = (0..10_u8).map(|n| [n]).collect();
    let pongs: Vec<_> = pongs.iter().map(|n| (0x8a, &n[..])).collect();
    cases.push(("2.10".into(), many, echoed(&pongs)));
    // 5: fragments, with pings in between, of every size.
    let text = "Hello-µ@ßöäüàá-UTF-8!!".as_bytes();
    for size in 1..=text.len() {
        let mut frames: Vec<Vec<u8>> = text.chunks(size).map(|part| frame(0x00, part)).collect();
        frames[0][0] |= 0x01;
        frames.push(frame(0x80, b""));
        frames.push(close());
        cases.push((
            format!("5, 6.2: by {size}"),
            frames,
            echoed(&[(0x81, text)]),
        ));
    }
    let interleaved = vec![
        frame(0x01, b"one"),
        frame(0x89, b"p"),
        frame(0x00, b""),
        frame(0x89, b"q"),
        frame(0x80, b"two"),
        close(),
    ];
    cases.push((
        "5.19".into(),
        interleaved,
        echoed(&[(0x8a, b"p"), (0x8a, b"q"), (0x81, b"onetwo")]),
    ));
    for (name, frames, wanted) in &cases {
        for piece in [1, 3, 7, 1 << 20] {
            // Single bytes of what is long take their time and show nothing more.
            if piece < 7 && frames.concat().len() > 1000 {
                continue;
            }
            let mut got = answers(&sidecar, frames, piece).await;
            // tungstenite answers one ping of several in a row where it was slow (RFC 6455 section 5.5.3).
            if name == "2.10" {
                got.retain(|(op, n)| *op != 0x8a || n == &[9]);
                assert_eq!(got, echoed(&[(0x8a, &[9])]), "{name} by {piece}");
                continue;
            }
            assert_eq!(&got, wanted, "{name} by {piece}");
        }
    }
}

#[tokio::test]
async fn what_is_unlawful_ends_the_session_with_its_code() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let mut cases: Vec<(&str, Vec<Vec<u8>>, u16)> = vec![
        ("2.5: a long ping", vec![frame(0x89, &[0; 126])], 1002),
        ("3.1: RSV 1", vec![frame(0x81 | 0x10, b"x")], 1002),
        ("3.2: RSV 2", vec![frame(0x81 | 0x20, b"x")], 1002),
        ("3.4: RSV 4", vec![frame(0x81 | 0x40, b"x")], 1002),
        (
            "3.5: RSV of a control frame",
            vec![frame(0x89 | 0x50, b"x")],
            1002,
        ),
        (
            "5.1: a ping in fragments",
            vec![frame(0x09, b"a"), frame(0x80, b"b")],
            1002,
        ),
        ("5.9: nothing to continue", vec![frame(0x80, b"x")], 1002),
        ("5.10", vec![frame(0x00, b"x"), frame(0x81, b"y")], 1002),
        (
            "5.18: a text in a text",
            vec![frame(0x01, b"x"), frame(0x81, b"y")],
            1002,
        ),
        ("7.3.2: half a code", vec![frame(0x88, b"x")], 1002),
        ("a close in fragments", vec![frame(0x08, b"")], 1002),
        (
            "a long form of a short control frame",
            vec![vec![0x89, 0xfe, 0, 1, 0, 0, 0, 0, b'x']],
            1002,
        ),
    ];
    for op in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
        cases.push(("4: an unknown opcode", vec![frame(0x80 | op, b"")], 1002));
    }
    for bad in [
        &b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited"[..],
        b"\xf4\x90\x80\x80",
        b"\xf8\x88\x80\x80\x80",
        b"\xfe\xff",
        b"\xc0\xaf",
        b"\xce",
        b"\x80",
    ] {
        cases.push(("6: not UTF-8", vec![frame(0x81, bad)], 1007));
        let halves = bad.split_at(bad.len() / 2);
        cases.push((
            "6: not UTF-8, in fragments",
            vec![frame(0x01, halves.0), frame(0x80, halves.1)],
            1007,
        ));
    }
    for (name, frames, code) in &cases {
        for piece in [1, 1 << 20] {
            let got = answers(&sidecar, frames, piece).await;
            let (op, payload) = got.last().unwrap_or_else(|| panic!("{name}: nothing came"));
            assert_eq!(
                (*op, &payload[..2]),
                (0x88, &code.to_be_bytes()[..]),
                "{name}: {got:?}"
            );
            assert_eq!(got.len(), 1, "{name}: {got:?}");
        }
    }
    // 7.7, 7.9: every close code goes to the server, which judges it; a client that sends it sees the server's answer.
    for (code, answer) in [
        (1000_u16, 1000_u16),
        (1011, 1011),
        (3000, 3000),
        (4999, 4999),
        (1005, 1002),
        (999, 1002),
    ] {
        let got = answers(&sidecar, &[frame(0x88, &code.to_be_bytes())], 1 << 20).await;
        let said = got
            .last()
            .map(|(_, payload)| u16::from_be_bytes([payload[0], payload[1]]));
        assert!(
            said == Some(answer) || said == Some(code) || said.is_none(),
            "{code}: {said:?}"
        );
    }
}

/// The result depends on the bytes and not on where they were cut, and memory on what came and not on what a header claims.
#[test]
fn cuts_change_nothing_and_claims_take_nothing() {
    use crate::signal::fuzz::frames;
    let text = [
        frame(0x01, "öäü".as_bytes()),
        frame(0x89, b"p"),
        frame(0x80, &[b'x'; 300]),
        close(),
    ]
    .concat();
    let whole = frames(&text, &[], true, 1000);
    assert_eq!((whole.messages.len(), whole.end.as_str()), (3, ""));
    for size in 1..text.len() {
        let pieces = vec![size; text.len() / size];
        let cut = frames(&text, &pieces, true, 1000);
        assert_eq!(
            (&cut.messages, &cut.end),
            (&whole.messages, &whole.end),
            "by {size}"
        );
    }
    // A megabyte is announced and ten bytes come.
    let mut claim = vec![0x82, 0xff, 0, 0, 0, 0, 0, 0x10, 0, 0];
    claim.extend_from_slice(&KEY);
    claim.extend_from_slice(&[0; 10]);
    let read = frames(&claim, &[2, 8, 4], true, 1 << 20);
    assert!(read.memory < 8 << 10, "{} bytes", read.memory);
    // Empty fragments without end, and one message in single bytes.
    let mut tiny = frame(0x01, b"");
    tiny.extend(frame(0x00, b"").repeat(20_000));
    let read = frames(&tiny, &vec![100; 1300], true, 1000);
    assert!(read.memory < 16 << 10, "{} bytes", read.memory);
    let mut single = frame(0x01, b"");
    single.extend(frame(0x00, b"x").repeat(50_000));
    single.extend(frame(0x80, b"!"));
    let read = frames(&single, &vec![1000; 400], true, 1 << 20);
    assert_eq!(read.messages[0].1.len(), 50_001);
    assert!(read.memory < 4 * 50_001, "{} bytes", read.memory);
}
