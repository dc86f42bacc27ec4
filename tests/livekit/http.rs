//! HTTP as bytes on a socket, so that what two servers answer can be compared; tokens; a WebSocket that shows its frames.

use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Key and secret of livekit/livekit.yaml.
pub(crate) const KEY: &str = "devkey";
pub(crate) const SECRET: &str = "secret-of-at-least-32-chars-for-auralink-tests";

/// `ip:port`, IPv6 in brackets.
pub(crate) fn join(ip: &str, port: u16) -> String {
    if ip.contains(':') {
        format!("[{ip}]:{port}")
    } else {
        format!("{ip}:{port}")
    }
}

/// What a server said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Names in lower case, as they came.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(own, _)| own == name)
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// What has to be the same with and without the sidecar: all but what names the connection or the moment.
    pub(crate) fn essence(&self) -> (u16, Vec<(String, String)>, Vec<u8>) {
        let mut headers = self.headers.clone();
        headers.retain(|(name, _)| {
            !matches!(
                name.as_str(),
                "date" | "connection" | "keep-alive" | "transfer-encoding" | "content-length"
            )
        });
        headers.sort();
        (self.status, headers, self.body.clone())
    }
}

/// One request on a connection of its own.
pub(crate) fn request(
    port: u16,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(15)))?;
    let mut head = format!("{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("connection"))
    {
        head.push_str("Connection: close\r\n");
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    read_answer(&mut stream)
}

pub(crate) fn get(port: u16, target: &str) -> io::Result<Answer> {
    request(port, "GET", target, &[], b"")
}

fn read_head(stream: &mut TcpStream) -> io::Result<(u16, Vec<(String, String)>)> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte)? == 0 {
            return Err(io::Error::other(
                "closed before the answer's headers were complete",
            ));
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut lines = head.lines();
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .and_then(|status| status.parse().ok())
        .ok_or_else(|| io::Error::other(format!("no status line in {head:?}")))?;
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Ok((status, headers))
}

fn read_answer(stream: &mut TcpStream) -> io::Result<Answer> {
    let (status, headers) = read_head(stream)?;
    let mut answer = Answer {
        status,
        headers,
        body: Vec::new(),
    };
    let length = answer
        .header("content-length")
        .and_then(|n| n.parse::<usize>().ok());
    match length {
        Some(length) => {
            answer.body.resize(length, 0);
            stream.read_exact(&mut answer.body)?;
        }
        None => {
            let mut raw = Vec::new();
            stream.read_to_end(&mut raw)?;
            let chunked = answer.header("transfer-encoding") == Some("chunked");
            answer.body = if chunked { dechunk(&raw)? } else { raw };
        }
    }
    Ok(answer)
}

fn dechunk(mut raw: &[u8]) -> io::Result<Vec<u8>> {
    let bad = || io::Error::other("malformed chunked body");
    let mut body = Vec::new();
    loop {
        let end = raw
            .windows(2)
            .position(|two| two == b"\r\n")
            .ok_or_else(bad)?;
        let size = std::str::from_utf8(&raw[..end]).map_err(|_| bad())?;
        let size = usize::from_str_radix(size, 16).map_err(|_| bad())?;
        raw = &raw[end + 2..];
        if size == 0 {
            return Ok(body);
        }
        body.extend_from_slice(raw.get(..size).ok_or_else(bad)?);
        raw = raw.get(size + 2..).ok_or_else(bad)?;
    }
}

/// A participant's token.
pub(crate) fn token(room: &str, identity: &str) -> String {
    grant(json!({"room": room, "roomJoin": true}), identity, SECRET)
}

/// A token with this video grant, signed with this secret.
pub(crate) fn grant(video: Value, identity: &str, secret: &str) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let claims = json!({
        "iss": KEY, "sub": identity, "nbf": now - 10, "exp": now + 3600, "video": video,
    });
    jsonwebtoken::encode(
        &jsonwebtoken::Header::default(),
        &claims,
        &jsonwebtoken::EncodingKey::from_secret(secret.as_bytes()),
    )
    .unwrap()
}

/// The headers of a WebSocket's opening handshake (RFC 6455); the key is its example.
pub(crate) const UPGRADE: [(&str, &str); 4] = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// A WebSocket client that shows frames as they come.
pub(crate) struct WebSocket {
    stream: TcpStream,
}

/// Opcode and payload.
pub(crate) type WsFrame = (u8, Vec<u8>);

impl WebSocket {
    /// Opens it; the answer where the server refuses.
    pub(crate) fn open(port: u16, target: &str) -> Result<Self, Answer> {
        Self::open_with(port, target, &[])
    }

    /// The same with header fields.
    pub(crate) fn open_with(
        port: u16,
        target: &str,
        headers: &[(&str, &str)],
    ) -> Result<Self, Answer> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the port listens");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut head = format!("GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n");
        for (name, value) in UPGRADE.iter().chain(headers) {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let mut peeked = stream.try_clone().unwrap();
        let (status, headers) = read_head(&mut peeked).expect("an answer to the upgrade");
        if status != 101 {
            return Err(Answer {
                status,
                headers,
                body: Vec::new(),
            });
        }
        assert_eq!(
            headers
                .iter()
                .find(|(name, _)| name == "sec-websocket-accept")
                .map(|(_, v)| v.as_str()),
            Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
            "the accept value that belongs to the key (RFC 6455 §1.3)"
        );
        Ok(Self { stream })
    }

    /// The next frame; `None` when the connection has ended.
    pub(crate) fn next(&mut self) -> Option<WsFrame> {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head).ok()?;
        assert_eq!(head[1] & 0x80, 0, "a server does not mask (RFC 6455 §5.1)");
        let length = match head[1] {
            126 => {
                let mut bytes = [0; 2];
                self.stream.read_exact(&mut bytes).ok()?;
                usize::from(u16::from_be_bytes(bytes))
            }
            127 => {
                let mut bytes = [0; 8];
                self.stream.read_exact(&mut bytes).ok()?;
                usize::try_from(u64::from_be_bytes(bytes)).ok()?
            }
            short => usize::from(short),
        };
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).ok()?;
        Some((head[0] & 0x0F, payload))
    }
}
