//! The settings in force, and their replacement while calls go on.
//!
//! A reload is all or nothing: the new file is parsed whole; if it is wrong, or changes what only a
//! restart can change, nothing happens but a log line, a metric and a warning on `/readyz`.
//!
//! The files that it names are looked at with it, and for themselves: a renewed certificate is taken
//! though the configuration may be broken, and the other way round. What can't be used leaves what is
//! in force.
//!
//! The file is polled, not watched with inotify: a Kubernetes ConfigMap is a symlink into a directory
//! that is replaced, an editor renames a new file over the old one, and a network file system reports
//! nothing at all; inotify follows none of these without watching every directory on the way. A
//! configuration is a few kB: reading it once a second costs microseconds, and what is compared is
//! the content, so that neither clocks nor inodes matter.

use super::files::Files;
use super::{Loaded, Material, Problem, Problems, Settings, load_bytes, read_file, with_files};
use arc_swap::ArcSwap;
use auralink_proto::policy::Policy;
use metrics::{counter, gauge};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// How often the file is read. A change is taken when two readings in a row agree, so that a file
/// that is just being written is not taken by half.
pub(super) const POLL: Duration = Duration::from_millis(500);

/// What a reload did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reloaded {
    /// The file says what is in force already.
    Unchanged,
    /// These parts are new, under this generation.
    Changed {
        /// `defaults`, `rooms`, `log.level`, `metrics.rooms`, `tls`, `limits`, `session`.
        parts: Vec<&'static str>,
        /// One more than before.
        generation: u64,
    },
}

/// How the file and what is in force stand to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReloadState {
    /// Of the settings in force, from 1.
    pub generation: u64,
    /// Why the file as it is now was refused, and since when; none: it is in force.
    pub failed: Option<(SystemTime, Problems)>,
    /// Why the files that it names (certificate, key, trusted roots) can't be used as they are now; none: they are.
    pub files_failed: Option<(SystemTime, Problems)>,
}

/// The settings in force.
pub struct Live {
    path: PathBuf,
    settings: ArcSwap<Settings>,
    material: ArcSwap<Material>,
    failed: ArcSwap<Option<(SystemTime, Problems)>>,
    files_failed: ArcSwap<Option<(SystemTime, Problems)>>,
    generation: watch::Sender<u64>,
    /// What was last looked at, good or bad; none before the first look. Its lock makes reloads one at
    /// a time.
    handled: Mutex<Handled>,
}

type Content = Result<Vec<u8>, Problem>;

#[derive(Default)]
struct Handled {
    config: Option<Content>,
    files: Option<Files>,
}

/// What one look found.
struct Look {
    config: Content,
    files: Files,
}

impl Live {
    /// What was loaded is in force; `path` is the file that it came from and that is read again.
    #[must_use]
    pub fn new(loaded: Loaded, path: impl Into<PathBuf>) -> Arc<Self> {
        let path = path.into();
        let (settings, material) = (loaded.settings, loaded.material);
        let (generation, _) = watch::channel(settings.rules.generation());
        #[expect(clippy::cast_precision_loss, reason = "a small counter")]
        gauge!("auralink_config_generation").set(settings.rules.generation() as f64);
        gauge!("auralink_config_last_reload_failed").set(0.0);
        if settings.tls.is_some() || settings.upstream.https {
            gauge!("auralink_tls_last_reload_failed").set(0.0);
        }
        show_end(&material);
        Arc::new(Self {
            path,
            settings: ArcSwap::from_pointee(settings),
            material: ArcSwap::from_pointee(material),
            failed: ArcSwap::from_pointee(None),
            files_failed: ArcSwap::from_pointee(None),
            generation,
            handled: Mutex::default(),
        })
    }

    /// What the files hold that the settings in force name, as far as it could be used.
    #[must_use]
    pub fn material(&self) -> Arc<Material> {
        self.material.load_full()
    }

    /// What is in force now. Cheap: no lock.
    #[must_use]
    pub fn load(&self) -> Arc<Settings> {
        self.settings.load_full()
    }

    /// What a new participant gets.
    #[must_use]
    pub fn policy(&self, room: &str, identity: &str, api_key: &str) -> Policy {
        self.settings.load().rules.resolve(room, identity, api_key)
    }

    /// Is told the generation whenever something in force has changed; renewed files leave it as it is.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// For `/readyz` and `/status.json`.
    #[must_use]
    pub fn state(&self) -> ReloadState {
        ReloadState {
            generation: self.settings.load().rules.generation(),
            failed: Option::clone(&self.failed.load()),
            files_failed: Option::clone(&self.files_failed.load()),
        }
    }

    /// The file that is read again.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file again, and those that it names, and puts in force what can be.
    ///
    /// # Errors
    /// Why the file cannot be; the settings in force stay as they are. What is wrong with those that it
    /// names, is in [`Live::state`].
    pub fn reload(&self) -> Result<Reloaded, Problems> {
        let content = read_file(&self.path);
        let mut handled = self.lock();
        let result = self.take(&content, false);
        handled.config = Some(content);
        let files = Files::read(&self.load());
        self.renew(&files, false);
        handled.files = Some(files);
        result
    }

    /// Reloads on SIGHUP and when the file's content changes; never returns.
    pub async fn watch(self: Arc<Self>) {
        use tokio::signal::unix::{SignalKind, signal};
        let mut hangup = signal(SignalKind::hangup())
            .inspect_err(
                |error| tracing::warn!(%error, "SIGHUP will not reload; a changed file will"),
            )
            .ok();
        let mut tick = tokio::time::interval(POLL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut seen: Option<Look> = None;
        loop {
            let asked = async {
                if let Some(signal) = &mut hangup
                    && signal.recv().await.is_some()
                {
                    return;
                }
                std::future::pending().await
            };
            let by_signal = tokio::select! {
                () = asked => true,
                _ = tick.tick() => false,
            };
            // A file system may hang; the runtime's own threads must not.
            let live = Arc::clone(&self);
            let before = seen.take();
            let work = tokio::task::spawn_blocking(move || {
                if by_signal {
                    let _ = live.reload();
                    return None;
                }
                Some(live.poll(before.as_ref()))
            });
            seen = work.await.ok().flatten();
        }
    }

    /// One look at the files; `before` is what the last look found.
    fn poll(&self, before: Option<&Look>) -> Look {
        let look = Look {
            config: read_file(&self.path),
            files: Files::read(&self.load()),
        };
        let Some(before) = before else {
            return look;
        };
        let mut handled = self.lock();
        // The first look finds what the process was started with, or what was written since.
        if before.config == look.config && handled.config.as_ref() != Some(&look.config) {
            let _ = self.take(&look.config, handled.config.is_none());
            handled.config = Some(look.config.clone());
        }
        if before.files == look.files && handled.files.as_ref() != Some(&look.files) {
            self.renew(&look.files, true);
            handled.files = Some(look.files.clone());
        }
        look
    }

    fn lock(&self) -> MutexGuard<'_, Handled> {
        // What it guards is replaced as a whole: a panic elsewhere leaves nothing half done.
        self.handled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts what these files hold in force, or says why not; everybody is told, unless it is `quiet` and there is nothing new.
    fn renew(&self, files: &Files, quiet: bool) {
        let settings = self.load();
        if settings.tls.is_none() && !settings.upstream.https {
            return;
        }
        let old = self.material.load_full();
        let new = files.material(settings.upstream.https);
        let new = new.and_then(|new| {
            let news = new.news(&old).map_err(|wrong| vec![wrong])?;
            Ok((new, news))
        });
        let failed = self.files_failed.load().is_some();
        let label = match &new {
            Ok((_, news)) if !news.is_empty() => "ok",
            // What was broken is again what is in force.
            Ok(_) if failed => "ok",
            Ok(_) if quiet => return,
            Ok(_) => "unchanged",
            Err(_) => "failed",
        };
        counter!("auralink_tls_reloads_total", "result" => label).increment(1);
        gauge!("auralink_tls_last_reload_failed").set(if new.is_err() { 1.0 } else { 0.0 });
        let problems = match new {
            Ok((new, news)) => {
                if !news.is_empty() || failed {
                    let ends = new.certificate.as_ref().map(|c| c.ends_shown().to_owned());
                    tracing::info!(news = news.join(", "), ends, "certificates read again");
                }
                // The same ones stay: with them TLS sessions that can be resumed.
                if !news.is_empty() {
                    show_end(&new);
                    self.material.store(Arc::new(new));
                    // After the material, so that whoever is told finds it.
                    self.generation.send_modify(|_| {});
                }
                None
            }
            Err(wrong) => {
                let problem = |(key, message): (&str, String)| {
                    tracing::error!(
                        key,
                        error = message,
                        "what is new can't be used; the old stays in force"
                    );
                    Problem {
                        place: None,
                        key: key.to_owned(),
                        message,
                    }
                };
                let problems = Problems(wrong.into_iter().map(problem).collect());
                Some((SystemTime::now(), problems))
            }
        };
        self.files_failed.store(Arc::new(problems));
    }

    /// Puts `content` in force, or says why not; everybody is told, unless it is `quiet` and there is
    /// nothing new.
    fn take(&self, content: &Content, quiet: bool) -> Result<Reloaded, Problems> {
        let result = match content {
            Ok(bytes) => load_bytes(bytes).and_then(|new| self.replace(new)),
            Err(problem) => Err(Problems(vec![problem.clone()])),
        };
        if quiet && result == Ok(Reloaded::Unchanged) {
            return result;
        }
        let file = self.path.display().to_string();
        let label = match &result {
            Ok(Reloaded::Unchanged) => "unchanged",
            Ok(Reloaded::Changed { .. }) => "ok",
            Err(_) => "failed",
        };
        counter!("auralink_config_reloads_total", "result" => label).increment(1);
        gauge!("auralink_config_last_reload_failed").set(if result.is_err() { 1.0 } else { 0.0 });
        match &result {
            Ok(Reloaded::Unchanged) => {
                tracing::info!(file, "configuration read again: nothing new")
            }
            Ok(Reloaded::Changed { parts, generation }) => {
                #[expect(clippy::cast_precision_loss, reason = "a small counter")]
                gauge!("auralink_config_generation").set(*generation as f64);
                tracing::info!(
                    file,
                    generation,
                    parts = parts.join(", "),
                    "configuration reloaded"
                );
            }
            Err(problems) => {
                for problem in &problems.0 {
                    let error = problem.line(&file, "error");
                    tracing::error!(error, "configuration not reloaded; the old settings stay");
                }
            }
        }
        self.failed.store(Arc::new(
            result
                .as_ref()
                .err()
                .map(|p| (SystemTime::now(), p.clone())),
        ));
        if let Ok(Reloaded::Changed { generation, .. }) = &result {
            self.generation.send_replace(*generation);
        }
        result
    }

    fn replace(&self, new: Loaded) -> Result<Reloaded, Problems> {
        let old = self.settings.load_full();
        let fixed = old.restart_only(&new.settings);
        if !fixed.is_empty() {
            let problem = |key: &&'static str| Problem {
                place: new.place(key),
                key: (*key).to_owned(),
                message: "only a restart can change it; nothing of this file was taken".into(),
            };
            return Err(Problems(fixed.iter().map(problem).collect()));
        }
        let parts = old.reloadable(&new.settings);
        if parts.is_empty() {
            return Ok(Reloaded::Unchanged);
        }
        let new = if parts.contains(&"tls") {
            // Other files: they are as much a part of the change as their names.
            let place = new.place("tls.cert");
            let new = with_files(new)?;
            new.material
                .news(&self.material.load())
                .map_err(|(key, message)| {
                    let key = key.to_owned();
                    Problems(vec![Problem {
                        place,
                        key,
                        message,
                    }])
                })?;
            show_end(&new.material);
            self.material.store(Arc::new(new.material.clone()));
            new
        } else {
            new
        };
        let generation = old.rules.generation().saturating_add(1);
        let mut settings = new.settings;
        settings.rules = settings.rules.with_generation(generation);
        for warning in &new.warnings {
            tracing::warn!(
                "{}",
                warning.line(&self.path.display().to_string(), "warning")
            );
        }
        self.settings.store(Arc::new(settings));
        Ok(Reloaded::Changed { parts, generation })
    }
}

/// When the certificate in force ends, for alerts.
fn show_end(material: &Material) {
    if let Some(certificate) = &material.certificate {
        let ends = certificate.ends().duration_since(SystemTime::UNIX_EPOCH);
        gauge!("auralink_tls_certificate_not_after_timestamp_seconds")
            .set(ends.unwrap_or_default().as_secs_f64());
    }
}

#[cfg(test)]
mod tests;
