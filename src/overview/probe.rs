//! Knocks at LiveKit's door, so that readiness knows of its end before a client does.

use super::Overview;
use crate::fault::{Fault, What};
use crate::signal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// How often LiveKit is knocked at, and how long it has to answer.
const EVERY: Duration = Duration::from_secs(2);

/// What LiveKit's health check at `/` says when its node's statistics are older than 4 s (`LivekitServer.healthCheck`).
const UNHEALTHY: u16 = 406;

/// What came of the last knock.
pub(crate) struct Probed {
    /// Why LiveKit is not up, in words; none: it is.
    down: Mutex<Option<String>>,
}

impl Probed {
    /// Nobody has knocked yet.
    pub(crate) fn new() -> Self {
        Self {
            down: Mutex::new(Some("LiveKit has not been asked yet".to_owned())),
        }
    }

    /// Why no session should be sent here; none: LiveKit is up.
    pub(crate) fn down(&self) -> Option<String> {
        let down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        down.clone()
    }

    /// Notes how it is, with a line in the log where that is new.
    fn note(&self, upstream: &signal::Upstream, down: Option<String>) {
        let mut known = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*known, &down) {
            (Some(_), None) => tracing::info!(%upstream, "LiveKit is up"),
            (None, Some(why)) => tracing::warn!(why, "LiveKit is not up: new sessions would fail"),
            _ => {}
        }
        *known = down;
    }
}

impl Overview {
    /// Asks LiveKit how it is until the process ends.
    pub(crate) async fn probe(self: Arc<Self>) {
        let settings = self.live.load();
        let upstream = settings.upstream.to_string().parse::<signal::Upstream>();
        let prober = upstream
            .map_err(|error| Fault::internal(What::Config, error))
            .and_then(signal::Prober::new);
        let prober = match prober {
            Ok(prober) => prober,
            Err(fault) => {
                // Signalling has been started with the same, so that only what was there then can be gone: roots of trust.
                let why = format!("{}: {fault}", settings.upstream);
                *self
                    .probed
                    .down
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(why);
                return;
            }
        };
        let mut every = tokio::time::interval(EVERY);
        let mut trusted = None;
        loop {
            every.tick().await;
            // Roots that were renewed, as signalling takes them.
            let roots = self.live.material().roots.clone();
            if let Some(new) =
                roots.filter(|new| !trusted.as_ref().is_some_and(|old| Arc::ptr_eq(old, new)))
            {
                if let Err(error) = prober.trust(&new) {
                    tracing::error!(%error, "trusted roots");
                }
                trusted = Some(new);
            }
            let (result, down) = knock(&prober, EVERY).await;
            metrics::counter!("auralink_upstream_probes_total", "result" => result).increment(1);
            metrics::gauge!("auralink_upstream_up").set(f64::from(u8::from(down.is_none())));
            if down.is_none() {
                let now = SystemTime::now().duration_since(UNIX_EPOCH);
                metrics::gauge!("auralink_upstream_last_success_timestamp_seconds")
                    .set(now.unwrap_or_default().as_secs_f64());
            }
            self.probed.note(prober.upstream(), down);
        }
    }
}

/// One knock: what it counts as, and why LiveKit is not up. `GET` of its root has to bring a status below 500, as LiveKit gives it
/// without a token, and not the one by which it says itself that it is not well.
async fn knock(prober: &signal::Prober, patience: Duration) -> (&'static str, Option<String>) {
    let upstream = prober.upstream();
    let began = Instant::now();
    let answered = tokio::time::timeout(patience, prober.status()).await;
    if let Ok(Ok(_)) = answered {
        let took = began.elapsed().as_secs_f64();
        metrics::histogram!("auralink_upstream_probe_seconds").record(took);
    }
    match answered {
        Ok(Ok(UNHEALTHY)) => {
            let why = format!(
                "{upstream} says {UNHEALTHY}: LiveKit itself is not healthy, its node's statistics are older than 4 s"
            );
            ("unhealthy", Some(why))
        }
        Ok(Ok(status @ 500..)) => ("error", Some(format!("{upstream} says {status}"))),
        Ok(Ok(_)) => ("up", None),
        Ok(Err(fault)) => {
            let why = fault.cause.as_deref().unwrap_or(&fault.detail);
            (
                "unreachable",
                Some(format!("{upstream} does not answer: {why}")),
            )
        }
        Err(_) => {
            let why = format!("{upstream} does not answer within {patience:?}");
            ("timeout", Some(why))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// What a server that says `reply` counts as; none: it accepts and hangs.
    async fn probed(reply: Option<&'static str>) -> (&'static str, String) {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = server.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (mut stream, _) = server.accept().await.unwrap();
            let Some(reply) = reply else {
                return std::future::pending().await;
            };
            let mut request = [0; 1024];
            let len = stream.read(&mut request).await.unwrap();
            let wanted = format!("GET /base/ HTTP/1.1\r\nHost: {at}\r\n");
            assert!(request[..len].starts_with(wanted.as_bytes()));
            stream.write_all(reply.as_bytes()).await.unwrap();
        });
        let upstream = format!("http://{at}/base").parse().unwrap();
        let prober = signal::Prober::new(upstream).unwrap();
        let (result, down) = knock(&prober, Duration::from_millis(300)).await;
        serving.abort();
        let why = down.unwrap_or_default();
        assert!(
            why.is_empty() || why.starts_with(&format!("http://{at}/base ")),
            "{why}"
        );
        (result, why)
    }

    #[tokio::test]
    async fn a_server_is_up_that_says_so() {
        assert_eq!(probed(Some("HTTP/1.1 200 OK\r\n\r\nOK")).await.0, "up");
        assert_eq!(probed(Some("HTTP/1.1 404 Not Found\r\n\r\n")).await.0, "up");
        let (result, why) = probed(Some("HTTP/1.1 406 Not Acceptable\r\n\r\nNot Ready")).await;
        assert_eq!(result, "unhealthy");
        assert!(why.contains("406"), "{why}");
        let (result, why) = probed(Some("HTTP/1.1 502 Bad Gateway\r\n\r\n")).await;
        assert_eq!(
            (result, why.ends_with("says 502")),
            ("error", true),
            "{why}"
        );
        for reply in ["SSH-2.0-OpenSSH_9.6\r\n", "HTTP/1.1 2", ""] {
            assert_eq!(probed(Some(reply)).await.0, "unreachable", "{reply}");
        }
        let (result, why) = probed(None).await;
        assert_eq!(result, "timeout");
        assert!(why.contains("does not answer"), "{why}");
    }

    #[tokio::test]
    async fn who_is_not_there_is_named() {
        let at = {
            let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            server.local_addr().unwrap()
        };
        let prober = signal::Prober::new(format!("http://{at}").parse().unwrap()).unwrap();
        let (result, why) = knock(&prober, Duration::from_secs(5)).await;
        assert_eq!(result, "unreachable");
        assert!(why.unwrap().contains("refused"));
    }
}
