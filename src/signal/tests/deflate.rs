//! permessage-deflate (RFC 7692): raw bytes of a client through the pump to an echo server of tungstenite's, which knows nothing of
//! it, and to an upstream that is raw bytes too. Compressed and decompressed by `flate2` here, as the RFC has it and without the pump's code.

use super::frames::{frame, split};
use super::*;
use crate::signal::fuzz::Messages;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use tokio::net::TcpListener;

const TERMS: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

fn packed(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 1000);
    Compress::new(Compression::best(), false)
        .compress_vec(text, &mut out, FlushCompress::Sync)
        .unwrap();
    out.strip_suffix(&[0, 0, 0xff, 0xff]).unwrap().to_vec()
}

fn unpacked(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 << 20);
    let whole = [payload, &[0, 0, 0xff, 0xff]].concat();
    Decompress::new(false)
        .decompress_vec(&whole, &mut out, FlushDecompress::Sync)
        .unwrap();
    out
}

/// Speech-like text: repeats itself, but not too much.
fn text(len: usize) -> Vec<u8> {
    let words = (0..).flat_map(|n: u32| format!("a=candidate:{} {} ", n % 97, n).into_bytes());
    words.take(len).collect()
}

/// A session whose client offers so much; the head of the answer.
async fn opened(sidecar: &Sidecar, offer: &str) -> (TcpStream, String) {
    let mut tcp = sidecar.tcp().await;
    let offer = match offer {
        "" => String::new(),
        offer => format!("Sec-WebSocket-Extensions: {offer}\r\n"),
    };
    let request = format!(
        "GET /rtc HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n{offer}\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    tcp.write_all(request.as_bytes()).await.unwrap();
    let head = head(&mut tcp).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    (tcp, head.to_ascii_lowercase())
}

/// What comes back for these frames, up to the end.
async fn answers(sidecar: &Sidecar, offer: &str, frames: &[Vec<u8>]) -> Messages {
    let (mut tcp, _) = opened(sidecar, offer).await;
    tcp.write_all(&frames.concat()).await.unwrap();
    let mut got = Vec::new();
    let _ = soon("the end", tcp.read_to_end(&mut got)).await;
    split(&got)
}

fn close() -> Vec<u8> {
    frame(0x88, &1000_u16.to_be_bytes())
}

#[tokio::test]
async fn it_is_agreed_on_with_who_offers_it() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    for offer in ["permessage-deflate; client_max_window_bits", TERMS] {
        let (_tcp, head) = opened(&sidecar, offer).await;
        let line = format!("\r\nsec-websocket-extensions: {TERMS}\r\n");
        assert!(head.contains(&line), "{offer}: {head}");
    }
    for offer in ["", "permessage-deflate; server_max_window_bits=9", "x"] {
        let (_tcp, head) = opened(&sidecar, offer).await;
        assert!(
            !head.contains("sec-websocket-extensions"),
            "{offer}: {head}"
        );
    }
    assert_eq!(origin.told.count("sec-websocket-extensions"), 0);
}

#[tokio::test]
async fn compressed_messages_come_through_and_go_back() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let long = text(20_000);
    let whole = packed(&long);
    assert!(whole.len() * 3 < long.len(), "{}", whole.len());
    let (a, b) = whole.split_at(whole.len() / 3);
    for (name, frames) in [
        ("in one", vec![frame(0xc1, &whole)]),
        (
            "in fragments, with a ping between them",
            vec![frame(0x41, a), frame(0x89, b"p"), frame(0x80, b)],
        ),
        ("not compressed", vec![frame(0x81, &long)]),
    ] {
        let frames = [frames, vec![close()]].concat();
        let got = answers(&sidecar, "permessage-deflate", &frames).await;
        let back = got.iter().find(|(op, _)| op & 0x0f == 1).expect(name);
        assert_eq!(back.0, 0xc1, "{name}: compressed");
        assert!(back.1.len() * 3 < long.len(), "{name}: {}", back.1.len());
        assert_eq!(unpacked(&back.1), long, "{name}");
        // Nobody who didn't offer it gets it.
        if name == "not compressed" {
            let got = answers(&sidecar, "", &frames).await;
            assert_eq!(got[0], (0x81, long.clone()));
        }
    }
    // The examples of RFC 7692 section 7.2.3. What is short goes back as it is.
    for payload in [
        &b"\xf2\x48\xcd\xc9\xc9\x07\x00"[..],
        b"\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00",
        b"\xf3\x48\xcd\xc9\xc9\x07\x00",
        b"\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00",
    ] {
        let frames = [frame(0xc1, payload), close()];
        let got = answers(&sidecar, "permessage-deflate", &frames).await;
        assert_eq!(got[0], (0x81, b"Hello".to_vec()), "{payload:x?}");
    }
    // What doesn't get shorter neither.
    let mut noise = vec![0; 5000];
    getrandom::fill(&mut noise).unwrap();
    let frames = [frame(0x82, &noise), close()];
    let got = answers(&sidecar, "permessage-deflate", &frames).await;
    assert_eq!(got[0], (0x82, noise));
}

#[tokio::test]
async fn what_breaks_the_rules_or_is_too_long_ends_the_session() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| c.limits.max_frame_bytes = 100_000).await;
    let offer = "permessage-deflate";
    let good = packed(&text(500));
    for (name, frames, code) in [
        ("no deflate", vec![frame(0xc1, b"\x07nonsense")], 1002),
        (
            "on a continuation",
            vec![frame(0x41, &good), frame(0xc0, b"")],
            1002,
        ),
        ("on a ping", vec![frame(0xc9, b"")], 1002),
        ("another bit", vec![frame(0xa1, &good)], 1002),
        ("no UTF-8", vec![frame(0xc1, &packed(b"\xff\xfe"))], 1007),
        (
            "a bomb",
            vec![frame(0xc2, &packed(&vec![0; 1 << 20]))],
            1009,
        ),
        (
            "just too long",
            vec![frame(0xc2, &packed(&vec![7; 100_001]))],
            1009,
        ),
    ] {
        let got = answers(&sidecar, offer, &frames).await;
        let (op, payload) = got.last().unwrap_or_else(|| panic!("{name}: nothing came"));
        assert_eq!(
            (*op, &payload[..2]),
            (0x88, &u16::to_be_bytes(code)[..]),
            "{name}"
        );
        assert_eq!(got.len(), 1, "{name}: {got:?}");
    }
    let fits = [frame(0xc2, &packed(&vec![7; 100_000])), close()];
    let got = answers(&sidecar, offer, &fits).await;
    assert_eq!(unpacked(&got[0].1), vec![7; 100_000]);
    // Not offered, not taken.
    let got = answers(&sidecar, "", &[frame(0xc1, &good)]).await;
    assert_eq!(got[0].1[..2], 1002_u16.to_be_bytes());
}

/// An upstream that agrees to what it is offered, and says one message; what it was offered, and the first frame that it gets.
async fn upstream(says: Vec<u8>) -> (SocketAddr, JoinHandle<(String, u8, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let asked = head(&mut tcp).await.to_ascii_lowercase();
        let terms = match asked.contains("sec-websocket-extensions") {
            true => format!("Sec-WebSocket-Extensions: {TERMS}\r\n"),
            false => String::new(),
        };
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n{terms}\r\n"
        );
        tcp.write_all(answer.as_bytes()).await.unwrap();
        tcp.write_all(&says).await.unwrap();
        let first = tcp.read_u8().await.unwrap();
        let mut len = usize::from(tcp.read_u8().await.unwrap() & 0x7f);
        if len == 126 {
            len = usize::from(tcp.read_u16().await.unwrap());
        }
        let mut key = [0; 4];
        tcp.read_exact(&mut key).await.unwrap();
        let mut payload = vec![0; len];
        tcp.read_exact(&mut payload).await.unwrap();
        for (n, byte) in payload.iter_mut().enumerate() {
            *byte ^= key[n & 3];
        }
        (asked, first, payload)
    });
    (at, serving)
}

#[tokio::test]
async fn the_upstream_is_offered_what_the_client_offers_where_the_way_is_long() {
    let long = text(3_000);
    let mut says = vec![0xc1, 126];
    says.extend_from_slice(&(packed(&long).len() as u16).to_be_bytes());
    says.extend_from_slice(&packed(&long));
    let (at, serving) = upstream(says).await;
    let sidecar = Sidecar::start(&format!("http://{at}"), |c| c.compress = true).await;
    let (mut tcp, head) = opened(&sidecar, "permessage-deflate; client_max_window_bits").await;
    assert!(
        head.contains(&format!("sec-websocket-extensions: {TERMS}")),
        "{head}"
    );
    tcp.write_all(&frame(0x81, &long)).await.unwrap();
    let (asked, first, payload) = soon("the upstream", serving).await.unwrap();
    assert!(
        asked.contains(&format!("sec-websocket-extensions: {TERMS}\r\n")),
        "{asked}"
    );
    assert_eq!(first, 0xc1, "compressed");
    assert_eq!(unpacked(&payload), long);
    drop(tcp);
    // Who offers nothing has nothing offered; what an upstream compresses all the same is refused.
    let (at, serving) = upstream(vec![0xc1, 0]).await;
    let sidecar = Sidecar::start(&format!("http://{at}"), |c| c.compress = true).await;
    let (mut tcp, head) = opened(&sidecar, "").await;
    assert!(!head.contains("extensions"), "{head}");
    let mut got = Vec::new();
    let _ = soon("the end", tcp.read_to_end(&mut got)).await;
    assert_eq!(split(&got)[0].1[..2], 1011_u16.to_be_bytes());
    let (asked, _, payload) = soon("the upstream", serving).await.unwrap();
    assert!(!asked.contains("extensions"), "{asked}");
    assert_eq!(payload[..2], 1002_u16.to_be_bytes());
}

/// LiveKit's message may be long when it is decompressed, and then there has to be room for it as for any long one.
#[tokio::test]
async fn what_gets_long_when_it_is_decompressed_takes_room() {
    let long = text(3_000);
    let mut says = vec![0xc1, 126];
    says.extend_from_slice(&(packed(&long).len() as u16).to_be_bytes());
    says.extend_from_slice(&packed(&long));
    for (most, fits) in [(3_000, true), (2_999, false)] {
        let (at, _serving) = upstream(says.clone()).await;
        let sidecar = Sidecar::start(&format!("http://{at}"), |c| {
            c.compress = true;
            c.limits.max_frame_bytes = 2_000;
            c.limits.max_upstream_frame_bytes = most;
        })
        .await;
        let (mut tcp, _) = opened(&sidecar, "permessage-deflate").await;
        let mut got = vec![0; 4];
        soon("a message", tcp.read_exact(&mut got)).await.unwrap();
        if fits {
            assert_eq!(got[0], 0xc1);
            let mut payload = vec![0; usize::from(u16::from_be_bytes([got[2], got[3]]))];
            tcp.read_exact(&mut payload).await.unwrap();
            assert_eq!(unpacked(&payload), long);
        } else {
            assert_eq!((got[0], &got[2..]), (0x88, &1011_u16.to_be_bytes()[..]));
        }
    }
}
