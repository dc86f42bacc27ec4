//! Dialling LiveKit or the origin.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::Uri;
use hyper::header::HeaderValue;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::ServerName;

use super::Limits;
use crate::fault::{Fault, What};
use crate::tls::{provider, roots};

/// Address of the upstream: `http` or `https` (`ws` and `wss` mean the same), host, port, base path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    tls: bool,
    /// Without brackets.
    host: String,
    port: u16,
    /// "" or "/something", no slash at the end.
    base: String,
    /// What the Host header says.
    authority: HeaderValue,
}

impl Upstream {
    /// Whether the connection is TLS.
    pub fn tls(&self) -> bool {
        self.tls
    }

    /// Name or address, an IPv6 address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Path before every request's own: "" or "/something".
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Host header: the authority, without the scheme's own port.
    pub fn authority(&self) -> &HeaderValue {
        &self.authority
    }
}

impl FromStr for Upstream {
    type Err = String;

    /// # Errors
    /// A sentence that says what is wrong and what is allowed. The URL is not repeated in it where it may hold a password.
    fn from_str(text: &str) -> Result<Upstream, String> {
        const WANTED: &str =
            "wanted is http://HOST[:PORT][/BASE] or https://… (ws and wss mean the same)";
        let uri: Uri = text
            .parse()
            .map_err(|e| format!("not a URL ({e}): {WANTED}"))?;
        let tls = match uri.scheme_str() {
            Some("http" | "ws") => false,
            Some("https" | "wss") => true,
            Some(other) => return Err(format!("scheme {other:?} is not served: {WANTED}")),
            None => return Err(format!("no scheme: {WANTED}")),
        };
        let Some(authority) = uri.authority() else {
            return Err(format!("no host: {WANTED}"));
        };
        if authority.as_str().contains('@') {
            return Err(format!("user and password do not belong here: {WANTED}"));
        }
        if uri.query().is_some() || text.contains('#') {
            return Err(format!(
                "a query or a fragment does not belong here: {WANTED}"
            ));
        }
        let default = if tls { 443 } else { 80 };
        // Read here: `Authority::port` takes a number over 65535 for no port at all.
        let written = authority
            .as_str()
            .get(authority.host().len()..)
            .unwrap_or("");
        let port = match written.strip_prefix(':') {
            None => default,
            Some(digits) => digits
                .parse::<u16>()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| format!("{digits:?} is not a port from 1 to 65535: {WANTED}"))?,
        };
        let host = authority.host();
        if host.is_empty() {
            return Err(format!("no host: {WANTED}"));
        }
        let shown = if port == default {
            host.to_owned()
        } else {
            format!("{host}:{port}")
        };
        Ok(Upstream {
            tls,
            host: host
                .trim_start_matches('[')
                .trim_end_matches(']')
                .to_owned(),
            port,
            base: uri.path().trim_end_matches('/').to_owned(),
            authority: HeaderValue::from_str(&shown)
                .map_err(|_| format!("not a host: {WANTED}"))?,
        })
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        let authority = self.authority.to_str().unwrap_or(&self.host);
        write!(f, "{scheme}://{authority}{}", self.base)
    }
}

/// Makes connections to one upstream.
pub(super) struct Dialer {
    pub(super) upstream: Upstream,
    tls: Option<(ArcSwap<rustls::ClientConfig>, ServerName<'static>)>,
}

impl Dialer {
    /// Reads the system's trusted roots if the upstream is https (SSL_CERT_FILE and SSL_CERT_DIR name others).
    pub(super) fn new(upstream: Upstream) -> Result<Dialer, Fault> {
        if upstream.tls {
            let roots = roots().map_err(|why| {
                Fault::internal(
                    What::Config,
                    format!("upstream {upstream} is https, but {why}"),
                )
            })?;
            Dialer::trusting(upstream, roots)
        } else {
            Ok(Dialer {
                upstream,
                tls: None,
            })
        }
    }

    /// For an https upstream whose certificate one of `roots` has signed.
    pub(super) fn trusting(
        upstream: Upstream,
        roots: rustls::RootCertStore,
    ) -> Result<Dialer, Fault> {
        let name = ServerName::try_from(upstream.host.clone()).map_err(|_| {
            Fault::internal(
                What::Config,
                format!("upstream {upstream}: the host can't be checked against a certificate"),
            )
        })?;
        let config = ArcSwap::from(client(roots)?);
        let tls = Some((config, name));
        Ok(Dialer { upstream, tls })
    }

    /// From the next connection on these are trusted; those that are there go on.
    pub(super) fn trust(&self, roots: rustls::RootCertStore) -> Result<(), Fault> {
        if let Some((config, _)) = &self.tls {
            config.store(client(roots)?);
        }
        Ok(())
    }

    /// A new connection, ready for HTTP/1.1.
    pub(super) async fn dial(&self, limits: &Limits) -> Result<Conn, Fault> {
        match timeout(limits.dial_timeout, self.connect()).await {
            Ok(Ok(conn)) => Ok(conn),
            Ok(Err(e)) => Err(match out_of_descriptors(&e) {
                Some(fault) => fault.because(e),
                None => Fault::upstream(
                    What::Unreachable,
                    "the media server can't be reached; if this lasts, its operator has to look",
                )
                .because(format!(
                    "connecting to {}: {e}; is LiveKit running, and is `upstream` right?",
                    self.upstream
                )),
            }),
            Err(_) => Err(Fault::upstream(
                What::Timeout,
                "the media server did not take the connection in time",
            )
            .because(format!(
                "connecting to {} took over {:?} (limits.dial_timeout)",
                self.upstream, limits.dial_timeout
            ))),
        }
    }

    async fn connect(&self) -> io::Result<Conn> {
        let host = (self.upstream.host.as_str(), self.upstream.port);
        let tcp = first_to_answer(lookup_host(host).await?.collect()).await?;
        tune(&tcp);
        Ok(match &self.tls {
            None => Conn::Plain(tcp),
            Some((config, name)) => {
                let connector = TlsConnector::from(config.load_full());
                Conn::Tls(Box::new(connector.connect(name.clone(), tcp).await?))
            }
        })
    }
}

/// Asks an upstream how it is, over a connection of its own each time, as a client would make one.
pub struct Prober {
    dialer: Dialer,
    limits: Limits,
}

impl Prober {
    /// # Errors
    /// As [`bind`](super::bind) has them: no trusted roots for an https upstream.
    pub fn new(upstream: Upstream) -> Result<Prober, Fault> {
        Ok(Prober {
            dialer: Dialer::new(upstream)?,
            limits: Limits::default(),
        })
    }

    /// Whom its next connections trust, where the upstream is https.
    ///
    /// # Errors
    /// As [`Control::trust`](super::Control::trust).
    pub fn trust(&self, roots: &rustls::RootCertStore) -> Result<(), Fault> {
        self.dialer.trust(roots.clone())
    }

    /// Whom it asks.
    #[must_use]
    pub fn upstream(&self) -> &Upstream {
        &self.dialer.upstream
    }

    /// The status of the answer to `GET` of its root.
    ///
    /// # Errors
    /// It can't be reached, is not who it should be (TLS), or its answer is not HTTP/1.
    pub async fn status(&self) -> Result<u16, Fault> {
        let upstream = self.upstream();
        let mut stream = self.dialer.dial(&self.limits).await?;
        let lost = |e: io::Error| {
            let detail = "the media server closed the connection without an answer";
            Fault::upstream(What::Lost, detail).because(e)
        };
        let mut request = format!("GET {}/ HTTP/1.1\r\nHost: ", upstream.base).into_bytes();
        request.extend_from_slice(upstream.authority.as_bytes());
        request.extend_from_slice(b"\r\nConnection: close\r\n\r\n");
        stream.write_all(&request).await.map_err(lost)?;
        stream.flush().await.map_err(lost)?;
        // `HTTP/1.1 200`: RFC 9112 section 4.
        let mut line = [0; 12];
        stream.read_exact(&mut line).await.map_err(lost)?;
        let status = line.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..));
        let status = status.and_then(|status| std::str::from_utf8(status).ok()?.parse().ok());
        status.filter(|status| *status >= 100).ok_or_else(|| {
            let detail = "the media server's answer is not HTTP";
            Fault::upstream(What::BadAnswer, detail).because(detail)
        })
    }
}

/// Between the beginnings of two attempts: "Connection Attempt Delay" of RFC 8305 section 5.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// The first connection that comes about to one of a host's addresses (RFC 8305): they are tried in turn, IPv6 and IPv4
/// alternating, each a moment after the one before it or as soon as that has failed.
async fn first_to_answer(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut waiting = alternating(addresses).into_iter();
    let mut attempts = JoinSet::new();
    let mut failed = None;
    loop {
        if let Some(address) = waiting.next() {
            attempts.spawn(TcpStream::connect(address));
        } else if attempts.is_empty() {
            let none = || io::Error::new(io::ErrorKind::NotFound, "the host has no address");
            return Err(failed.unwrap_or_else(none));
        }
        let ended = async {
            if waiting.len() == 0 {
                return attempts.join_next().await;
            }
            timeout(ATTEMPT_DELAY, attempts.join_next())
                .await
                .unwrap_or(None)
        };
        match ended.await {
            // The others end with the set.
            Some(Ok(Ok(tcp))) => return Ok(tcp),
            Some(Ok(Err(e))) => {
                // Of several reasons the first is that of the address that the system prefers, but ours go before all.
                if failed.is_none() || out_of_descriptors(&e).is_some() {
                    failed = Some(e);
                }
            }
            Some(Err(_)) | None => {}
        }
    }
}

/// The families in turn, the first one's first; in each the system's order stays (RFC 6724).
fn alternating(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (a, b): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|at| at.is_ipv6() == first);
    let (mut a, mut b) = (a.into_iter(), b.into_iter());
    let mut all = Vec::new();
    loop {
        let before = all.len();
        all.extend(a.next());
        all.extend(b.next());
        if all.len() == before {
            return all;
        }
    }
}

/// The fault where an error says that this process or this system has nothing left to make a connection of.
pub(super) fn out_of_descriptors(error: &io::Error) -> Option<Fault> {
    use nix::errno::Errno;
    let detail = match Errno::from_raw(error.raw_os_error()?) {
        Errno::EMFILE | Errno::ENFILE => {
            "the sidecar has no file descriptors left; try again, its operator has to raise the limit (LimitNOFILE=, ulimit -n)"
        }
        Errno::ENOBUFS | Errno::ENOMEM => "the sidecar's system has no memory left for connections",
        // All local ports towards the upstream are in use.
        Errno::EADDRNOTAVAIL => {
            "the sidecar's system has no local ports left towards the media server"
        }
        _ => return None,
    };
    Some(Fault::internal(What::Descriptors, detail))
}

/// Signal messages are small and wait for nobody (no Nagle); a peer whose host vanished is noticed (keepalive).
pub(super) fn tune(tcp: &TcpStream) {
    const QUIET: Duration = Duration::from_secs(30);
    // Neither is worth ending a connection for.
    let _ = tcp.set_nodelay(true);
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(QUIET)
        .with_interval(QUIET / 3);
    let _ = socket2::SockRef::from(tcp).set_tcp_keepalive(&keepalive);
}

fn client(roots: rustls::RootCertStore) -> Result<Arc<rustls::ClientConfig>, Fault> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| Fault::internal(What::Config, e.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(tls))
}

/// A byte stream, plain or TLS; the TLS state is boxed, it takes over a kilobyte.
pub(super) enum Conn {
    /// http
    Plain(TcpStream),
    /// https
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Conn {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Conn::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Conn::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Conn::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Conn::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Conn::Plain(s) => Pin::new(s).poll_flush(cx),
            Conn::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Conn::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Conn::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Conn::Plain(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Conn::Tls(s) => Pin::new(s).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Conn::Plain(s) => s.is_write_vectored(),
            Conn::Tls(s) => s.is_write_vectored(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let u: Upstream = "http://127.0.0.1:7880".parse().unwrap();
        assert_eq!(
            (u.tls(), u.host(), u.port(), u.base()),
            (false, "127.0.0.1", 7880, "")
        );
        assert_eq!(u.authority(), "127.0.0.1:7880");
        let u: Upstream = "wss://livekit.example/lk/".parse().unwrap();
        assert_eq!(
            (u.tls(), u.host(), u.port(), u.base()),
            (true, "livekit.example", 443, "/lk")
        );
        assert_eq!(u.to_string(), "https://livekit.example/lk");
        let u: Upstream = "http://[::1]:80/".parse().unwrap();
        assert_eq!(
            (u.host(), u.port(), u.to_string().as_str()),
            ("::1", 80, "http://[::1]")
        );
    }

    #[test]
    fn families_take_turns() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let [a, b, c, d] = [
            at("[2001:db8::1]:1"),
            at("[2001:db8::2]:1"),
            at("192.0.2.1:1"),
            at("[2001:db8::3]:1"),
        ];
        assert_eq!(alternating(vec![a, b, c, d]), [a, c, b, d]);
        assert_eq!(alternating(vec![c, a]), [c, a]);
        assert!(alternating(vec![]).is_empty());
    }

    /// Nothing comes back from TEST-NET-1 (RFC 5737): the listener whose queue is full stands for it, as it is on this host.
    #[tokio::test]
    async fn an_address_that_does_not_answer_holds_up_no_other() {
        let silent =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        silent
            .bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into())
            .unwrap();
        silent.listen(0).unwrap();
        let silent_at = silent.local_addr().unwrap().as_socket().unwrap();
        let _full: Vec<_> = (0..3)
            .map(|_| std::net::TcpStream::connect_timeout(&silent_at, Duration::from_millis(100)))
            .collect();
        let good = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good_at = good.local_addr().unwrap();
        let closed: SocketAddr = "127.0.0.1:9".parse().unwrap();
        let found = timeout(
            Duration::from_secs(20),
            first_to_answer(vec![silent_at, closed, good_at]),
        );
        assert_eq!(found.await.unwrap().unwrap().peer_addr().unwrap(), good_at);
        let refused = first_to_answer(vec![closed]).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(first_to_answer(vec![]).await.is_err());
    }

    #[test]
    fn running_out_is_our_own_fault() {
        for errno in [24, 23, 105, 12, 99] {
            let fault = out_of_descriptors(&io::Error::from_raw_os_error(errno)).unwrap();
            assert_eq!(
                (fault.side.as_str(), fault.status().as_u16()),
                ("internal", 503)
            );
        }
        assert!(out_of_descriptors(&io::Error::from_raw_os_error(111)).is_none());
        assert!(out_of_descriptors(&io::ErrorKind::NotFound.into()).is_none());
    }

    #[test]
    fn bad_addresses_are_refused_with_the_reason() {
        for (text, why) in [
            ("127.0.0.1:7880", "no scheme"),
            ("ftp://x", "scheme"),
            ("/rtc", "no scheme"),
            ("http://user:secret@x", "user and password"),
            ("http://x?a=b", "query"),
            ("http://x/#a", "fragment"),
            ("http://x:0", "port"),
            ("http://x:99999", "port"),
            ("http://x:", "port"),
            ("http://[::1]:0", "port"),
            ("", "URL"),
        ] {
            let e = text.parse::<Upstream>().unwrap_err();
            assert!(e.contains(why), "{text}: {e}");
            assert!(!e.contains("secret"), "{e}");
        }
    }
}
