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

use crate::admin::{Admin, Rooms};
use crate::app::{App, Door};
use crate::audit::Audit;
use crate::config::{Live, Scheduling, Settings};
use crate::fault::{Fault, What};
use crate::media::{Media, MediaConfig};
use crate::overview::Overview;
use crate::signal::Drain;
use auralink_engine::{Engine, EngineConfig};
use auralink_proto::dtls::Identity;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// How often the folders of models are looked at.
const MODELS_EVERY: std::time::Duration = std::time::Duration::from_secs(2);

/// Runs the sidecar until SIGTERM or SIGINT, then drains it.
///
/// # Errors
/// What kept it from starting: a port in use, a certificate that cannot be read.
pub async fn run(settings: Settings, path: &Path) -> Result<(), Fault> {
    let cannot = |error: std::io::Error| Fault::internal(What::Config, error.to_string());
    let recorder = admin::metrics::install()
        .map_err(|error| Fault::internal(What::Defect, "no metrics").because(error))?;
    let live = Live::new(settings, path);
    let settings = live.load();
    let identity = Identity::generate()
        .map_err(|error| Fault::internal(What::Config, "no DTLS certificate").because(error))?;
    let bound = signal::bind(signal_config(&settings)?).await?;
    let admin_bound = admin::bind(settings.admin.listen).await.map_err(cannot)?;
    let engine = Engine::start(engine_config(&settings))
        .map(Arc::new)
        .map_err(|error| Fault::internal(What::Config, error.to_string()))?;
    let (events, events_from_media) = tokio::sync::mpsc::unbounded_channel();
    let media = Media::start(
        MediaConfig {
            ips: settings.media.ips.clone(),
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
    tokio::spawn(app.clone().follow(events_from_media));
    tokio::spawn(media.clone().accept_tcp());
    tokio::spawn(live.clone().watch());
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
        auditing = Some(tokio::spawn(follow));
    }
    tokio::spawn(watch_models(engine.clone()));
    let mut generations = live.subscribe();
    let reloaded = app.clone();
    let reloaded_live = live.clone();
    tokio::spawn(async move {
        while generations.changed().await.is_ok() {
            logging::set_level(&reloaded_live.load().log.level);
            reloaded.policy_changed();
        }
    });
    let overview = Arc::new(Overview {
        app: app.clone(),
        media: media.clone(),
        live: live.clone(),
        engine: engine.clone(),
        started: Instant::now(),
        draining: AtomicBool::new(false),
        upstream_answers: AtomicBool::new(false),
    });
    let rooms = Rooms::new(settings.metrics.rooms);
    tokio::spawn(overview.clone().meter(rooms.clone()));
    tokio::spawn(overview.clone().probe());
    let admin = Admin {
        source: overview.clone(),
        metrics: recorder,
        rooms,
    };
    tokio::spawn(admin::serve(admin_bound, Arc::new(admin)));
    let (drain, draining) = tokio::sync::watch::channel(Drain::Running);
    tracing::info!(
        listen = %bound.local_addr(),
        upstream = %settings.upstream,
        workers = settings.media.workers,
        "serving"
    );
    let serving = tokio::spawn(signal::serve(bound, Arc::new(Door(app.clone())), draining));
    shutdown_signal().await?;
    let grace = live.load().session.drain_grace;
    tracing::info!(?grace, "draining: no new sessions");
    overview.draining.store(true, Ordering::Relaxed);
    drain.send_replace(Drain::Draining);
    let until = tokio::time::Instant::now() + grace;
    while !app.cells().is_empty() && tokio::time::Instant::now() < until {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    drain.send_replace(Drain::Leaving);
    // Returns when every connection has been closed.
    let _ = serving.await;
    drop(audit_ends);
    if let Some(auditing) = auditing {
        // It has only its last lines to write.
        let _ = auditing.await;
    }
    tracing::info!("stopped");
    Ok(())
}

async fn shutdown_signal() -> Result<(), Fault> {
    use tokio::signal::unix::{SignalKind, signal};
    let cannot = |error| Fault::internal(What::Config, "cannot listen for signals").because(error);
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Models that come, go or change are noticed while calls run.
async fn watch_models(engine: Arc<Engine>) {
    let mut every = tokio::time::interval(MODELS_EVERY);
    let mut known: Vec<String> = Vec::new();
    loop {
        every.tick().await;
        engine.reload();
        let problems = engine.status().problems;
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

fn signal_config(settings: &Settings) -> Result<signal::SignalConfig, Fault> {
    let upstream = settings
        .upstream
        .to_string()
        .parse()
        .map_err(|error: String| Fault::internal(What::Config, error))?;
    let limits = &settings.limits;
    Ok(signal::SignalConfig {
        listen: settings.listen,
        upstream,
        tls: settings.tls.as_ref().map(|tls| signal::TlsFiles {
            cert: tls.cert.clone(),
            key: tls.key.clone(),
        }),
        limits: signal::Limits {
            max_header_bytes: limits.max_header_bytes,
            max_query_bytes: limits.max_query_bytes,
            max_frame_bytes: limits.max_frame_bytes,
            header_timeout: limits.header_timeout,
            dial_timeout: limits.dial_timeout,
            idle_timeout: limits.idle_timeout,
            handshakes: limits.handshakes,
            sessions: limits.sessions,
            ..signal::Limits::default()
        },
    })
}
