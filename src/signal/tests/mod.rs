//! The listener over real sockets: against an upstream of the tests' own, whose every byte is known, and against LiveKit itself.
//! The WebSocket client is tungstenite, which shares no code with the pump.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod deflate;
mod frames;
mod limits;
mod livekit;
mod oddities;
mod origin;
mod pass;
mod paths;
mod session;
mod strangers;
mod tls;
mod whip;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::Message;

use super::*;
use crate::fault::What;
use origin::Origin;

/// Long enough for an overloaded machine, short enough to be seen as a failure.
const PATIENCE: Duration = Duration::from_secs(20);

/// Fails instead of hanging.
async fn soon<F: Future>(what: &str, f: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, f).await {
        Ok(output) => output,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// What the sessions of a test were told, in order.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    fn add(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    /// Waits until something that starts so was told, and returns it.
    async fn wait(&self, start: &str) -> String {
        let found = async {
            loop {
                if let Some(found) = self.all().into_iter().find(|t| t.starts_with(start)) {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, found)
            .await
            .unwrap_or_else(|_| panic!("{start:?} was never told, only {:?}", self.all()))
    }

    fn count(&self, start: &str) -> usize {
        self.all().iter().filter(|t| t.starts_with(start)).count()
    }
}

fn authorization<'a>(o: &Opening<'a>) -> Option<&'a str> {
    o.headers.get("authorization")?.to_str().ok()
}

/// Sessions whose messages say themselves what is to become of them.
struct Scripted(Told);

impl Sessions for Scripted {
    fn open(&self, o: &Opening<'_>) -> Result<Opened, Fault> {
        self.0.add(format!(
            "open {} {} {:?}",
            o.path,
            o.query,
            authorization(o)
        ));
        if o.query.contains("undecodable") {
            return Err(Fault::client(
                What::Undecodable,
                "join_request can't be read",
            ));
        }
        Ok(Opened {
            session: Box::new(Script(self.0.clone(), None)),
            query: o
                .query
                .contains("rewrite")
                .then(|| o.query.replace("rewrite", "rewritten")),
        })
    }

    fn whip(&self, o: &Opening<'_>, message: WhipMessage<'_>) -> Result<Whip, Fault> {
        self.0
            .add(format!("whip {:?} {message:?}", authorization(o)));
        let body = match message {
            WhipMessage::Offer(text) | WhipMessage::Fragment { text, .. }
                if text.contains("undecodable") =>
            {
                return Err(Fault::client(What::Undecodable, "the SDP can't be read"));
            }
            WhipMessage::Offer(text) => Some(format!("{text} and more")),
            WhipMessage::Fragment { text, .. } => Some(text.replace("theirs", "ours")),
            WhipMessage::Delete { .. } => None,
        };
        Ok(Whip {
            exchange: Box::new(Exchange(self.0.clone())),
            body,
        })
    }
}

struct Exchange(Told);

impl WhipExchange for Exchange {
    fn id(&self) -> &str {
        "w1"
    }
    fn answered(
        self: Box<Self>,
        answer: WhipAnswer<'_>,
        place: Option<Permit>,
    ) -> Result<String, Fault> {
        let has = if place.is_some() { "with" } else { "without" };
        self.0.add(format!(
            "answered {:?} {:?} {has} a place",
            answer.resource, answer.body
        ));
        Ok(answer.body.replace("answer", "rewritten answer"))
    }
}

struct Script(Told, Option<Permit>);

impl Script {
    fn judge(&self, from: &str, frame: Frame<'_>) -> Result<Verdict, Fault> {
        match frame {
            Frame::Text(text) => {
                self.0.add(format!("{from} text {text}"));
                match text.strip_prefix(from).unwrap_or("").trim() {
                    "drop" => Ok(Verdict::Drop),
                    "replace" => Ok(Verdict::Text("replaced".to_owned())),
                    "binary" => Ok(Verdict::Binary(vec![1, 2, 3])),
                    "fault" => Err(Fault::internal(What::Defect, "as the test wishes")),
                    "panic" => panic!("as the test wishes"),
                    _ => Ok(Verdict::Keep),
                }
            }
            Frame::Binary(bytes) => {
                self.0.add(format!("{from} binary {}", bytes.len()));
                Ok(Verdict::Keep)
            }
        }
    }
}

impl SignalSession for Script {
    fn id(&self) -> &str {
        "s1"
    }
    fn accepted(&mut self, place: Option<Permit>) {
        self.0.add("accepted");
        self.1 = place;
    }
    fn refused(&mut self, status: u16) {
        self.0.add(format!("refused {status}"));
    }
    fn client_frame(&mut self, f: Frame<'_>) -> Result<Verdict, Fault> {
        self.judge("client", f)
    }
    fn server_frame(&mut self, f: Frame<'_>) -> Result<Verdict, Fault> {
        self.judge("server", f)
    }
    fn leave_frame(&mut self) -> Option<Verdict> {
        Some(Verdict::Text("leave".to_owned()))
    }
    fn closed(&mut self, how: Closed) {
        self.0.add(format!("closed {:?} {:?}", how.by, how.code));
    }
}

/// A listener that serves until it is dropped.
struct Sidecar {
    at: SocketAddr,
    told: Told,
    drain: watch::Sender<Drain>,
    control: Control,
    serving: JoinHandle<()>,
}

impl Sidecar {
    async fn start(upstream: &str, change: impl FnOnce(&mut SignalConfig)) -> Sidecar {
        let mut config = SignalConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            upstream: upstream.parse().unwrap(),
            tls: None,
            compress: false,
            limits: Limits::default(),
        };
        change(&mut config);
        Sidecar::run(bind(config).await.unwrap())
    }

    fn run(bound: Bound) -> Sidecar {
        let told = Told::default();
        let (drain, watch) = watch::channel(Drain::Running);
        let (at, control) = (bound.local_addr(), bound.control());
        let serving = tokio::spawn(serve(bound, Arc::new(Scripted(told.clone())), watch));
        Sidecar {
            at,
            told,
            drain,
            control,
            serving,
        }
    }

    async fn before(origin: &Origin) -> Sidecar {
        Sidecar::start(&origin.url(), |_| {}).await
    }

    async fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.at).await.unwrap()
    }

    /// A WebSocket through the sidecar; panics if there is none.
    async fn websocket(&self, target: &str) -> WebSocketStream<TcpStream> {
        self.try_websocket(target).await.unwrap()
    }

    async fn try_websocket(
        &self,
        target: &str,
    ) -> Result<WebSocketStream<TcpStream>, tokio_tungstenite::tungstenite::Error> {
        let request = format!("ws://{}{target}", self.at)
            .into_client_request()
            .unwrap();
        let (stream, _) = soon(
            target,
            tokio_tungstenite::client_async(request, self.tcp().await),
        )
        .await?;
        Ok(stream)
    }

    /// One request as raw bytes, the whole answer as text; the request should say `Connection: close`.
    async fn raw(&self, request: &str) -> String {
        let mut tcp = self.tcp().await;
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        soon("an answer", tcp.read_to_end(&mut answer))
            .await
            .unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn get(&self, target: &str) -> String {
        self.raw(&format!(
            "GET {target} HTTP/1.1\r\nHost: sidecar\r\nConnection: close\r\n\r\n"
        ))
        .await
    }
}

/// Reads up to the end of a header section.
async fn head(tcp: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon("a header section", tcp.read_u8()).await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// The next message, or `None` at the end of the stream.
async fn next(ws: &mut WebSocketStream<TcpStream>) -> Option<Message> {
    soon("a message", ws.next()).await.and_then(Result::ok)
}

/// Everything up to the close frame: its code and reason, or `None` if the connection broke off without one.
async fn closing(ws: &mut WebSocketStream<TcpStream>) -> Option<(u16, String)> {
    let mut seen = None;
    while let Some(message) = next(ws).await {
        if let Message::Close(frame) = message {
            seen = Some(frame.map_or((1005, String::new()), |f| {
                (f.code.into(), f.reason.to_string())
            }));
        }
    }
    seen
}

async fn say(ws: &mut WebSocketStream<TcpStream>, text: &str) {
    soon("a message to go", ws.send(Message::text(text)))
        .await
        .unwrap();
}
