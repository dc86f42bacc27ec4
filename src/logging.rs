//! Structured logs on standard error, through `tracing`.

use crate::config::{Log, LogFormat};
use std::sync::OnceLock;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// Changes the level of the subscriber that [`init`] installed.
static LEVEL: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Installs the process's subscriber; a second call changes nothing. `RUST_LOG` goes before
/// `log.level`.
pub fn init(log: &Log) {
    let from_env = EnvFilter::try_from_default_env().ok();
    let fixed = from_env.is_some();
    let filter = from_env.unwrap_or_else(|| EnvFilter::new(quiet(&log.level)));
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    let installed = match log.format {
        LogFormat::Text => {
            let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
            registry
                .with(fmt::layer().with_writer(std::io::stderr).with_ansi(ansi))
                .try_init()
        }
        LogFormat::Json => registry
            .with(fmt::layer().json().with_writer(std::io::stderr))
            .try_init(),
    };
    if installed.is_ok() && !fixed {
        let _ = LEVEL.set(handle);
    }
}

/// `rtc-dtls` warns of each extension of a ClientHello that it doesn't know, and strangers write those.
fn quiet(level: &str) -> String {
    format!("rtc_dtls=error,{level}")
}

/// Takes a reloaded `log.level`; where `RUST_LOG` is set, it stays.
pub fn set_level(level: &str) {
    if let (Some(handle), Ok(filter)) = (LEVEL.get(), EnvFilter::try_new(quiet(level))) {
        let _ = handle.reload(filter);
    }
}
