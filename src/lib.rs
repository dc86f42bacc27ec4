//! AuraLink: a transparent media proxy in front of an unmodified LiveKit server.
//!
//! [`run`] wires the parts together and takes them down again; docs/ARCHITECTURE.md is the map.

pub mod admin;
mod app;
mod audit;
pub mod config;
pub mod fault;
pub mod logging;
pub mod media;
mod overview;
mod shown;
pub mod signal;
pub mod surroundings;
mod tasks;
pub mod tls;

use crate::admin::hop::EngineStatus;
use crate::admin::{Admin, Rooms};
use crate::app::{App, Door};
use crate::audit::Audit;
use crate::config::{Live, Loaded, Scheduling, Settings};
use crate::fault::{Fault, What};
use crate::media::external::{self, Proof};
use crate::media::{Media, MediaConfig};
use crate::overview::{Overview, Probed};
use crate::signal::Drain;
use crate::tasks::Tasks;
use auralink_engine::{Engine, EngineConfig};
use auralink_proto::dtls::Identity;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// The revision of the source that this is built from: a commit; `debug` in a debug build; `unknown`.
pub const REVISION: &str = env!("AURALINK_REVISION");

/// Version and revision, as `auralink --version` says them.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (",
    env!("AURALINK_REVISION"),
    ")"
);

/// How often it is looked whether the engine's watcher runs.
const WATCHER_EVERY: std::time::Duration = std::time::Duration::from_secs(1);

/// Where the process cannot go on, clients have so long to hear it: a second for a leave and its close, and a slow network.
const LEAVING: std::time::Duration = std::time::Duration::from_secs(5);

/// How often the folders of models are looked at.
const MODELS_EVERY: std::time::Duration = std::time::Duration::from_secs(2);

/// Runs the sidecar until SIGTERM or SIGINT, then drains it.
///
/// # Errors
/// What kept it from starting: a port in use, a certificate that cannot be read; or a thread or task that has ended without which
/// it cannot go on.
pub async fn run(loaded: Loaded, path: &Path) -> Result<(), Fault> {
    let cannot = |error: std::io::Error| Fault::internal(What::Config, error.to_string());
    let recorder = admin::metrics::install()
        .map_err(|error| Fault::internal(What::Defect, "no metrics").because(error))?;
    tasks::see_panics();
    let tasks = Tasks::new();
    let live = Live::new(loaded, path);
    let settings = live.load();
    let identity = Identity::generate()
        .map_err(|error| Fault::internal(What::Config, "no DTLS certificate").because(error))?;
    let bound = signal::bind(signal_config(&settings, &live)?).await?;
    let control = bound.control();
    let admin_bound = admin::bind(settings.admin.listen).map_err(cannot)?;
    let engine = Engine::start(engine_config(&settings))
        .map(Arc::new)
        .map_err(|error| Fault::internal(What::Config, error.to_string()))?;
    let (events, events_from_media) = tokio::sync::mpsc::unbounded_channel();
    let (ips, external) = addresses(&settings).await?;
    let media = Media::start(
        MediaConfig {
            ips,
            external,
            udp_port: settings.media.udp_port,
            tcp_port: settings.media.tcp_port,
            workers: settings.media.workers,
            realtime: settings.media.scheduling == Scheduling::Realtime,
            consent_timeout: settings.session.consent_timeout,
        },
        &identity,
        engine.clone(),
        events,
    )
    .map(Arc::new)
    .map_err(cannot)?;
    let runtime = tokio::runtime::Handle::current();
    let app = App::new(
        media.clone(),
        live.clone(),
        identity.fingerprint().to_owned(),
        runtime,
    )?;
    tasks.need("media events", app.clone().follow(events_from_media));
    let accepting = media.clone();
    tasks.keep("ice-tcp", move || {
        let accepting = accepting.clone().accept_tcp();
        async move {
            if let Err(error) = accepting.await {
                tracing::error!(%error, "ICE-TCP connections cannot be accepted");
            }
        }
    });
    let watching = live.clone();
    tasks.keep("reload", move || watching.clone().watch());
    let (worker, told) = (media.clone(), tasks.clone());
    tasks.need("workers' watch", async move {
        told.fail(&worker.ended().await);
    });
    let watched = engine.clone();
    tasks.need("codec-watch", async move {
        while watched.is_watched() {
            tokio::time::sleep(WATCHER_EVERY).await;
        }
    });
    let (audit_ends, audit_end) = tokio::sync::watch::channel(());
    let mut auditing = None;
    if let Some(path) = &settings.audit {
        let audit = Audit::open(path).map_err(|error| {
            let what = format!("audit.log: cannot open {}: {error}", path.display());
            Fault::internal(What::Config, what)
        })?;
        let (notes, noted) = tokio::sync::mpsc::unbounded_channel();
        app.audited_by(notes);
        let follow = audit.follow(media.clone(), engine.clone(), noted, audit_end);
        auditing = Some(tasks.need("audit", follow));
    }
    let models = engine.clone();
    let wanting = live.clone();
    tasks.keep("models", move || {
        watch_models(models.clone(), wanting.clone())
    });
    let follower = Follower {
        app: app.clone(),
        live: live.clone(),
        media: media.clone(),
        control,
    };
    tasks.keep("policy", move || follower.clone().follow());
    let overview = Arc::new(Overview {
        app: app.clone(),
        media: media.clone(),
        live: live.clone(),
        engine: engine.clone(),
        started: Instant::now(),
        draining: AtomicBool::new(false),
        probed: Probed::new(),
        tasks: tasks.clone(),
    });
    let rooms = Rooms::new(settings.metrics.rooms);
    let (meter, metered) = (overview.clone(), rooms.clone());
    tasks.keep("room meter", move || meter.clone().meter(metered.clone()));
    let probe = overview.clone();
    tasks.keep("upstream probe", move || probe.clone().probe());
    let admin = Admin {
        source: overview.clone(),
        metrics: recorder,
        rooms,
    };
    let admin = admin::start(admin_bound, Arc::new(admin)).map_err(cannot)?;
    tasks.need("admin", admin);
    let (drain, draining) = tokio::sync::watch::channel(Drain::Running);
    tracing::info!(
        listen = %bound.local_addr(),
        upstream = %settings.upstream,
        version = VERSION,
        workers = settings.media.workers,
        "serving"
    );
    let serving = signal::serve(bound, Arc::new(Door(app.clone())), draining);
    let serving = tasks.need("signalling", serving);
    let drained = async {
        let mut signals = Signals::listen()?;
        signals.next().await;
        let grace = live.load().session.drain_grace;
        tracing::info!(?grace, "draining: no new sessions");
        overview.draining.store(true, Ordering::Relaxed);
        drain.send_replace(Drain::Draining);
        let until = tokio::time::Instant::now() + grace;
        let gone = async {
            while !app.cells().is_empty() && tokio::time::Instant::now() < until {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        };
        tokio::select! {
            () = gone => {}
            () = signals.next() => tracing::info!("told again: clients are told to leave now"),
        }
        Ok(())
    };
    let over = tokio::select! {
        drained = drained => drained,
        why = tasks.ended() => {
            // Whose media is gone should join anew at once, and not here: so nobody waits for the others.
            tracing::error!(why, "cannot go on: all clients are told to reconnect, and the process ends");
            overview.draining.store(true, Ordering::Relaxed);
            Err(Fault::internal(What::Defect, why))
        }
    };
    tasks.stop();
    drain.send_replace(Drain::Leaving);
    // Returns when every connection has been closed; where something is broken, that is not to be relied on.
    if over.is_ok() {
        let _ = serving.await;
    } else {
        let _ = tokio::time::timeout(LEAVING, serving).await;
    }
    drop(audit_ends);
    if let Some(auditing) = auditing {
        // It has only its last lines to write; a disk that hangs must not keep the process.
        let _ = tokio::time::timeout(LEAVING, auditing).await;
    }
    tracing::info!("stopped");
    over
}

/// Addresses that media is bound to, and how clients are told of those that a NAT maps.
async fn addresses(settings: &Settings) -> Result<(Vec<IpAddr>, Vec<(IpAddr, IpAddr)>), Fault> {
    let media = settings.media.clone();
    if !media.use_external_ip {
        return Ok((media.ips, Vec::new()));
    }
    let asking = tokio::task::spawn_blocking(move || {
        external::discover(&media.ips, media.udp_port, &media.stun_servers)
    });
    let found = match asking.await {
        Ok(found) => found.map_err(|error| Fault::internal(What::Config, error.to_string()))?,
        Err(error) => return Err(Fault::internal(What::Defect, error.to_string())),
    };
    for external::Mapping {
        local,
        external,
        proof,
    } in &found
    {
        tracing::info!(%local, %external, "the external address that clients are told");
        match proof {
            Proof::Same | Proof::Arrived => {}
            Proof::Untold => tracing::warn!(
                %external,
                "what is sent to the external address from here does not come back: if clients can't connect, see that UDP from \
                 media.udp_port on (and media.tcp_port) is forwarded to this host"
            ),
            Proof::OtherPort(port) => tracing::warn!(
                %external,
                port,
                ours = settings.media.udp_port,
                "the NAT maps our port to another: clients can connect only if UDP from media.udp_port on (and media.tcp_port) is \
                 forwarded to this host by the same numbers"
            ),
        }
    }
    let mapped = found.iter().map(|found| (found.local, found.external));
    Ok((
        found.iter().map(|found| found.local).collect(),
        mapped.collect(),
    ))
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> Result<Self, Fault> {
        use tokio::signal::unix::{SignalKind, signal};
        let cannot =
            |error| Fault::internal(What::Config, "cannot listen for signals").because(error);
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(cannot)?,
            interrupt: signal(SignalKind::interrupt()).map_err(cannot)?,
        })
    }

    /// Returns when one of them comes.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What a reload changes while calls run.
#[derive(Clone)]
struct Follower {
    app: Arc<App>,
    live: Arc<Live>,
    media: Arc<Media>,
    control: signal::Control,
}

impl Follower {
    async fn follow(self) {
        let mut generations = self.live.subscribe();
        loop {
            // First what may have changed since the start, or while this was being restarted.
            self.apply();
            if generations.changed().await.is_err() {
                return;
            }
        }
    }

    fn apply(&self) {
        let (settings, material) = (self.live.load(), self.live.material());
        logging::set_level(&settings.log.level);
        self.control.set_limits(&limits(&settings));
        if let Some(certificate) = &material.certificate {
            self.control.set_certificate(certificate);
        }
        if let Some(roots) = &material.roots
            && let Err(error) = self.control.trust(roots)
        {
            tracing::error!(%error, "trusted roots");
        }
        self.media
            .set_consent_timeout(settings.session.consent_timeout);
        self.app.policy_changed();
    }
}

/// Models that come, go or change are noticed while calls run.
async fn watch_models(engine: Arc<Engine>, live: Arc<Live>) {
    let mut every = tokio::time::interval(MODELS_EVERY);
    let mut known: Vec<String> = Vec::new();
    loop {
        every.tick().await;
        engine.reload();
        let problems = EngineStatus::of(&engine, live.load().rules.want_models()).problems;
        if problems != known {
            for problem in problems.iter().filter(|problem| !known.contains(problem)) {
                tracing::warn!(problem, "engine");
            }
            if problems.is_empty() {
                tracing::info!("engine: everything works");
            }
            known = problems;
        }
    }
}

fn engine_config(settings: &Settings) -> EngineConfig {
    let engine = &settings.engine;
    let bundle = |name: &str| engine.models.as_ref().map(|folder| folder.join(name));
    EngineConfig {
        threads: engine.threads,
        runtime: engine.runtime.clone(),
        lyra: bundle(&engine.codec),
        vad: bundle("silero-vad"),
        local_bitrate: engine.local_bitrate,
        ..EngineConfig::default()
    }
}

fn signal_config(settings: &Settings, live: &Live) -> Result<signal::SignalConfig, Fault> {
    let upstream = settings
        .upstream
        .to_string()
        .parse()
        .map_err(|error: String| Fault::internal(What::Config, error))?;
    // To LiveKit on the same host a byte costs less than to compress it, here and there.
    let host = settings.upstream.host.as_str();
    let beside = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    Ok(signal::SignalConfig {
        listen: settings.listen,
        upstream,
        compress: !beside,
        tls: live.material().certificate.clone(),
        limits: limits(settings),
    })
}

fn limits(settings: &Settings) -> signal::Limits {
    let limits = &settings.limits;
    signal::Limits {
        max_header_bytes: limits.max_header_bytes,
        max_query_bytes: limits.max_query_bytes,
        max_frame_bytes: limits.max_frame_bytes,
        max_upstream_frame_bytes: limits.max_upstream_frame_bytes,
        header_timeout: limits.header_timeout,
        dial_timeout: limits.dial_timeout,
        idle_timeout: limits.idle_timeout,
        handshakes: limits.handshakes,
        sessions: limits.sessions,
        keep_alive_timeout: limits.keep_alive_timeout,
        connections: limits.connections,
        connections_per_address: limits.connections_per_address,
        ..signal::Limits::default()
    }
}
