//! TLS towards clients and towards the upstream.

use super::*;
use crate::signal::upstream::Dialer;
use crate::tls::{Certificate, provider};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};

/// A certificate and its key, PEM, and who trusts it.
fn certificate() -> (String, String, RootCertStore) {
    let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(own.cert.der().clone()).unwrap();
    (own.cert.pem(), own.signing_key.serialize_pem(), roots)
}

fn served() -> (Arc<Certificate>, RootCertStore) {
    let (cert, key, roots) = certificate();
    let certificate = Certificate::read(cert.as_bytes(), key.as_bytes()).unwrap();
    (Arc::new(certificate), roots)
}

type Secured = tokio_rustls::client::TlsStream<TcpStream>;

/// A connection over TLS by somebody who trusts these.
async fn dial(sidecar: &Sidecar, roots: &RootCertStore) -> std::io::Result<Secured> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("localhost").unwrap();
    soon("a handshake", connector.connect(name, sidecar.tcp().await)).await
}

#[tokio::test]
async fn a_renewed_certificate_is_for_the_next_connection() {
    let origin = Origin::start().await;
    let ((old, old_roots), (new, new_roots)) = (served(), served());
    let sidecar = Sidecar::start(&origin.url(), |c| c.tls = Some(old)).await;
    let stream = dial(&sidecar, &old_roots).await.unwrap();
    let (mut ws, _) = tokio_tungstenite::client_async("wss://localhost/rtc", stream)
        .await
        .unwrap();
    assert!(dial(&sidecar, &new_roots).await.is_err());
    sidecar.control.set_certificate(&new);
    assert!(dial(&sidecar, &new_roots).await.is_ok());
    assert!(dial(&sidecar, &old_roots).await.is_err());
    ws.send(Message::text("still here")).await.unwrap();
    assert_eq!(
        soon("the echo", ws.next()).await.unwrap().unwrap(),
        Message::text("still here")
    );
}

#[tokio::test]
async fn clients_come_over_tls() {
    let (certificate, roots) = served();
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |c| c.tls = Some(certificate)).await;
    let stream = dial(&sidecar, &roots).await.unwrap();
    let (mut ws, _) = tokio_tungstenite::client_async("wss://localhost/rtc", stream)
        .await
        .unwrap();
    ws.send(Message::text("hello")).await.unwrap();
    assert_eq!(
        soon("the echo", ws.next()).await.unwrap().unwrap(),
        Message::text("hello")
    );
    assert_eq!(origin.told.count("x-forwarded-proto: https"), 1);

    // Plain HTTP to a TLS port is one client's mistake and nobody else's.
    assert!(!sidecar.get("/x").await.starts_with("HTTP/1.1 2"));
    ws.send(Message::text("still")).await.unwrap();
    assert_eq!(
        soon("the echo", ws.next()).await.unwrap().unwrap(),
        Message::text("still")
    );
}

#[tokio::test]
async fn the_upstream_is_reached_over_tls_and_its_certificate_is_checked() {
    let (cert, key, roots) = certificate();
    let chain: Vec<_> = CertificateDer::pem_slice_iter(cert.as_bytes())
        .map(Result::unwrap)
        .collect();
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            chain,
            PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let told = Told::default();
    let seen = told.clone();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (acceptor, told) = (acceptor.clone(), seen.clone());
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(tcp).await {
                    origin::serve(stream, (told, Arc::default())).await;
                }
            });
        }
    });
    let start = async |upstream: Upstream, dialer: Option<Dialer>| {
        let mut bound = bind(SignalConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            upstream: "http://127.0.0.1:1".parse().unwrap(),
            tls: None,
            compress: false,
            limits: Limits::default(),
        })
        .await
        .unwrap();
        bound.dialer = Arc::new(match dialer {
            Some(dialer) => dialer,
            None => Dialer::trusting(upstream, RootCertStore::empty()).unwrap(),
        });
        Sidecar::run(bound)
    };
    let upstream: Upstream = format!("https://localhost:{port}").parse().unwrap();
    let trusted = start(
        upstream.clone(),
        Some(Dialer::trusting(upstream.clone(), roots.clone()).unwrap()),
    )
    .await;
    assert!(trusted.get("/teapot").await.starts_with("HTTP/1.1 418"));
    let mut ws = trusted.websocket("/rtc").await;
    say(&mut ws, "hello").await;
    assert_eq!(next(&mut ws).await, Some(Message::text("hello")));

    let asked = told.count("GET");
    let untrusted = start(upstream, None).await;
    let answer = untrusted.get("/teapot").await;
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    assert_eq!(
        told.count("GET"),
        asked,
        "no request, and so no token, went to a server that is not known"
    );

    // Roots that come later are for the next connection.
    untrusted.control.trust(&roots).unwrap();
    let answer = untrusted.get("/teapot").await;
    assert!(answer.starts_with("HTTP/1.1 418"), "{answer}");
    untrusted.control.trust(&RootCertStore::empty()).unwrap();
    assert!(untrusted.get("/teapot").await.starts_with("HTTP/1.1 502"));
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let config = |listen| SignalConfig {
        listen,
        upstream: "http://127.0.0.1:1".parse().unwrap(),
        tls: None,
        compress: false,
        limits: Limits::default(),
    };
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let taken = bind(config(any)).await.unwrap();
    let fault = bind(config(taken.local_addr())).await.err().unwrap();
    assert!(
        fault.to_string().contains(&taken.local_addr().to_string()),
        "{fault}"
    );
}
