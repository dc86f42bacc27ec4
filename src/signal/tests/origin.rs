//! The upstream of the tests: what it does is written in the path, what it was asked is kept.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message, Role};

use super::Told;

type Body = BoxBody<Bytes, hyper::Error>;

/// An upstream on a port of its own.
pub(super) struct Origin {
    pub(super) at: SocketAddr,
    /// "METHOD target" and "field: value" of every request, and what its WebSockets received.
    pub(super) told: Told,
    /// Bytes of `/endless` that were taken.
    pub(super) taken: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Origin {
    pub(super) async fn start() -> Origin {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let told = Told::default();
        let taken = Arc::new(AtomicUsize::new(0));
        let state = (told.clone(), taken.clone());
        let task = tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(tcp, state.clone()));
            }
        });
        Origin {
            at,
            told,
            taken,
            task,
        }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.at)
    }
}

pub(super) async fn serve<S>(stream: S, (told, taken): (Told, Arc<AtomicUsize>))
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    told.add("connection");
    let service = hyper::service::service_fn(move |request| {
        let (told, taken) = (told.clone(), taken.clone());
        async move { Ok::<_, Infallible>(answer(request, told, taken).await) }
    });
    let _ = hyper::server::conn::http1::Builder::new()
        .preserve_header_case(true)
        .max_buf_size(1 << 20)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
}

fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into())
        .map_err(|never| match never {})
        .boxed()
}

async fn answer(
    mut request: Request<Incoming>,
    told: Told,
    taken: Arc<AtomicUsize>,
) -> Response<Body> {
    told.add(format!("{} {}", request.method(), request.uri()));
    for (name, value) in request.headers() {
        told.add(format!(
            "{name}: {}",
            String::from_utf8_lossy(value.as_bytes())
        ));
    }
    let query = request.uri().query().unwrap_or("").to_owned();
    match request.uri().path() {
        "/echo" => Response::new(request.into_body().boxed()),
        "/teapot" => {
            let mut r = Response::new(full("short and stout"));
            *r.status_mut() = StatusCode::IM_A_TEAPOT;
            let h = r.headers_mut();
            h.append("set-cookie", HeaderValue::from_static("a=1"));
            h.append("set-cookie", HeaderValue::from_static("b=2"));
            h.append("keep-alive", HeaderValue::from_static("timeout=5"));
            r
        }
        "/endless" => {
            let stream = futures_util::stream::repeat_with(move || {
                taken.fetch_add(16 << 10, Ordering::Relaxed);
                Ok::<_, hyper::Error>(Frame::data(Bytes::from_static(&[b'x'; 16 << 10])))
            });
            Response::new(BodyExt::boxed(StreamBody::new(stream)))
        }
        "/whip/v1" if query.contains("bad") => {
            let mut r = Response::new(full("invalid token\n"));
            *r.status_mut() = StatusCode::UNAUTHORIZED;
            r
        }
        path if path.starts_with("/whip/v1") && request.method() != "GET" => {
            let created = request.method() == "POST";
            let body = request.into_body().collect().await.unwrap().to_bytes();
            told.add(format!("sdp {}", String::from_utf8_lossy(&body)));
            let mut r = Response::new(full(if created { "answer" } else { "" }));
            *r.status_mut() = if created {
                StatusCode::CREATED
            } else {
                StatusCode::NO_CONTENT
            };
            if created {
                let h = r.headers_mut();
                h.insert(header::LOCATION, HeaderValue::from_static("/whip/v1/PA_1"));
                h.insert(header::ETAG, HeaderValue::from_static("abcd"));
            }
            r
        }
        "/never" => std::future::pending().await,
        "/rtc" | "/rtc/v1" | "/agent" if !request.headers().contains_key("sec-websocket-key") => {
            let mut r = Response::new(full("not a websocket"));
            *r.status_mut() = StatusCode::BAD_REQUEST;
            r
        }
        "/rtc" if query.contains("bad") => {
            let mut r = Response::new(full("invalid token\n"));
            *r.status_mut() = StatusCode::UNAUTHORIZED;
            r.headers_mut().insert(
                header::ACCESS_CONTROL_ALLOW_ORIGIN,
                HeaderValue::from_static("*"),
            );
            r
        }
        "/rtc" if query.contains("never") => std::future::pending().await,
        "/rtc" | "/rtc/v1" => {
            let upgrade = hyper::upgrade::on(&mut request);
            let told = told.clone();
            let extensions = query.contains("compress");
            tokio::spawn(async move {
                let io = TokioIo::new(upgrade.await.unwrap());
                websocket(
                    WebSocketStream::from_raw_socket(io, Role::Server, None).await,
                    &query,
                    told,
                )
                .await;
            });
            switch(&request, extensions)
        }
        "/agent" => {
            // No WebSocket at all once it is upgraded: bytes back in capital letters.
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgrade.await.unwrap());
                let mut buf = [0; 1024];
                while let Ok(n @ 1..) = io.read(&mut buf).await {
                    io.write_all(&buf[..n].to_ascii_uppercase()).await.unwrap();
                }
                io.write_all(b"bye").await.unwrap();
                io.shutdown().await.unwrap();
            });
            switch(&request, true)
        }
        _ => {
            let mut r = Response::new(full("404 page not found\n"));
            *r.status_mut() = StatusCode::NOT_FOUND;
            r
        }
    }
}

fn switch(request: &Request<Incoming>, extensions: bool) -> Response<Body> {
    let key = request.headers()["sec-websocket-key"].as_bytes();
    let mut r = Response::new(full(""));
    *r.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let h = r.headers_mut();
    h.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    h.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    h.insert(
        "sec-websocket-accept",
        derive_accept_key(key).parse().unwrap(),
    );
    h.insert("x-from", HeaderValue::from_static("origin"));
    if extensions {
        h.insert(
            "sec-websocket-extensions",
            HeaderValue::from_static("permessage-deflate"),
        );
    }
    r
}

/// A server that does what it is told in text: `close CODE REASON`, `big BYTES`, `vanish`, `say TEXT`; all else it echoes.
async fn websocket<S>(mut ws: WebSocketStream<S>, query: &str, told: Told)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if query.contains("flood") {
        // As fast as it is taken, in messages of 64 KiB.
        for n in 0.. {
            told.add(format!("flood {n}"));
            if ws.send(Message::binary(vec![7; 64 << 10])).await.is_err() {
                return;
            }
        }
    }
    while let Some(message) = ws.next().await {
        let Ok(message) = message else {
            told.add("websocket broke");
            return;
        };
        match message {
            Message::Text(text) => {
                told.add(format!("text {text}"));
                let (verb, rest) = text.split_once(' ').unwrap_or((&text, ""));
                match verb {
                    "close" => {
                        let (code, reason) = rest.split_once(' ').unwrap();
                        let code = CloseCode::from(code.parse::<u16>().unwrap());
                        let reason = reason.to_owned().into();
                        let _ = ws.close(Some(CloseFrame { code, reason })).await;
                    }
                    "big" => ws
                        .send(Message::binary(vec![0; rest.parse().unwrap()]))
                        .await
                        .unwrap(),
                    "ping" => ws
                        .send(Message::Ping(rest.to_owned().into()))
                        .await
                        .unwrap(),
                    "vanish" => return,
                    "say" => ws.send(Message::text(rest)).await.unwrap(),
                    _ => {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                        let _ = ws.send(Message::Text(text)).await;
                    }
                }
            }
            Message::Binary(bytes) => {
                told.add(format!("binary {}", bytes.len()));
                let _ = ws.send(Message::Binary(bytes)).await;
            }
            Message::Ping(bytes) => told.add(format!("ping {}", String::from_utf8_lossy(&bytes))),
            Message::Pong(bytes) => told.add(format!("pong {}", String::from_utf8_lossy(&bytes))),
            Message::Close(frame) => {
                told.add(frame.map_or("close none".to_owned(), |f| {
                    format!("close {} {}", u16::from(f.code), f.reason)
                }));
            }
            Message::Frame(_) => unreachable!("tungstenite never reads one"),
        }
    }
    told.add("websocket ended");
}
