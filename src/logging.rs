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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::fault::{Fault, What};
    use crate::shown::Shown;
    use crate::shown::tests::{EVIL, is_evil};
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// In both formats a line is a line, whatever strangers call their rooms.
    #[test]
    fn nobody_writes_a_line_of_her_own() {
        for json in [false, true] {
            let kept = Kept::default();
            let writer = kept.clone();
            let layer = fmt::layer().with_ansi(false);
            let write = || {
                for evil in EVIL {
                    tracing::info!(room = %Shown(evil), "session");
                    Fault::upstream(What::Undecodable, evil.to_owned())
                        .because(evil)
                        .report(evil, "7");
                }
            };
            if json {
                let layer = layer.json().with_writer(move || writer.clone());
                tracing::subscriber::with_default(Registry::default().with(layer), write);
            } else {
                let layer = layer.with_writer(move || writer.clone());
                tracing::subscriber::with_default(Registry::default().with(layer), write);
            }
            let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
            assert_eq!(text.lines().count(), 2 * EVIL.len(), "{text}");
            for line in text.lines() {
                assert!(!is_evil(line), "{line}");
            }
        }
    }
}
