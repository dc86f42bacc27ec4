//! The settings in force, and their replacement while calls go on.
//!
//! A reload is all or nothing: the new file is parsed whole; if it is wrong, or changes what only a
//! restart can change, nothing happens but a log line, a metric and a warning on `/readyz`.
//!
//! The file is polled, not watched with inotify: a Kubernetes ConfigMap is a symlink into a directory
//! that is replaced, an editor renames a new file over the old one, and a network file system reports
//! nothing at all; inotify follows none of these without watching every directory on the way. A
//! configuration is a few kB: reading it once a second costs microseconds, and what is compared is
//! the content, so that neither clocks nor inodes matter.

use super::{Loaded, Problem, Problems, Settings, load_bytes, read_file};
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
        /// `defaults`, `rooms`, `log.level`, `metrics.rooms`.
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
}

/// The settings in force.
pub struct Live {
    path: PathBuf,
    settings: ArcSwap<Settings>,
    failed: ArcSwap<Option<(SystemTime, Problems)>>,
    generation: watch::Sender<u64>,
    /// The content that was last looked at, good or bad; none before the first look. Its lock makes
    /// reloads one at a time.
    handled: Mutex<Option<Content>>,
}

type Content = Result<Vec<u8>, Problem>;

impl Live {
    /// `settings` are in force; `path` is the file that they came from and that is read again.
    #[must_use]
    pub fn new(settings: Settings, path: impl Into<PathBuf>) -> Arc<Self> {
        let path = path.into();
        let (generation, _) = watch::channel(settings.rules.generation());
        #[expect(clippy::cast_precision_loss, reason = "a small counter")]
        gauge!("auralink_config_generation").set(settings.rules.generation() as f64);
        gauge!("auralink_config_last_reload_failed").set(0.0);
        Arc::new(Self {
            path,
            settings: ArcSwap::from_pointee(settings),
            failed: ArcSwap::from_pointee(None),
            generation,
            handled: Mutex::new(None),
        })
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

    /// Is told the generation whenever it changes.
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
        }
    }

    /// The file that is read again.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file again and puts it in force if it can be.
    ///
    /// # Errors
    /// Why it cannot be; the settings in force stay as they are.
    pub fn reload(&self) -> Result<Reloaded, Problems> {
        let content = read_file(&self.path);
        let mut handled = self.lock();
        let result = self.take(&content, false);
        *handled = Some(content);
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
        let mut seen: Option<Content> = None;
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

    /// One look at the file; `before` is what the last look found.
    fn poll(&self, before: Option<&Content>) -> Content {
        let content = read_file(&self.path);
        if before == Some(&content) {
            let mut handled = self.lock();
            if handled.as_ref() != Some(&content) {
                // The first look finds what the process was started with, or what was written since.
                let _ = self.take(&content, handled.is_none());
                *handled = Some(content.clone());
            }
        }
        content
    }

    fn lock(&self) -> MutexGuard<'_, Option<Content>> {
        // What it guards is replaced as a whole: a panic elsewhere leaves nothing half done.
        self.handled.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use auralink_proto::policy::Mode;
    use std::fs;

    struct File(tempfile::TempDir);

    impl File {
        fn new(text: &str) -> Self {
            let file = Self(tempfile::tempdir().unwrap());
            file.write(text);
            file
        }

        fn path(&self) -> PathBuf {
            self.0.path().join("auralink.yaml")
        }

        fn write(&self, text: &str) {
            fs::write(self.path(), text).unwrap();
        }

        fn live(&self) -> Arc<Live> {
            Live::new(
                super::super::load(&self.path()).unwrap().settings,
                self.path(),
            )
        }
    }

    #[test]
    fn a_reload_is_all_or_nothing() {
        let file = File::new("rooms: [{match: a}]");
        let live = file.live();
        let generations = live.subscribe();
        let policy = || live.policy("a", "", "");
        assert_eq!((policy().mode, policy().generation), (Mode::Off, 1));
        assert_eq!(live.reload(), Ok(Reloaded::Unchanged));

        file.write("rooms: [{match: a, mode: lean}]\nlog: {level: warn}");
        let changed = Reloaded::Changed {
            parts: vec!["rooms", "log.level"],
            generation: 2,
        };
        assert_eq!(live.reload(), Ok(changed));
        assert_eq!((policy().mode, policy().generation), (Mode::Lean, 2));
        assert_eq!(*generations.borrow(), 2);
        let old = live.load();

        // A good rule beside what only a restart changes: neither is taken.
        file.write("rooms: []\nmedia: {udp_port: 1}\nlisten: 127.0.0.1:1");
        let refused = live.reload().unwrap_err();
        assert_eq!(
            refused.to_string(),
            "3:9: listen: only a restart can change it; nothing of this file was taken; \
             2:19: media.udp_port: only a restart can change it; nothing of this file was taken"
        );
        // What the file no longer says falls back to a default that is not in force.
        file.write("rooms: [{match: a, mode: auto}]");
        assert!(live.reload().is_err());
        fs::remove_file(file.path()).unwrap();
        assert!(
            live.reload()
                .unwrap_err()
                .to_string()
                .starts_with("cannot be read")
        );
        assert!(Arc::ptr_eq(&old, &live.load()), "nothing was replaced");
        let state = live.state();
        assert_eq!(state.generation, 2);
        assert!(
            state
                .failed
                .unwrap()
                .1
                .to_string()
                .starts_with("cannot be read")
        );
        assert_eq!(*generations.borrow(), 2);

        file.write("rooms: [{match: a, mode: lean}]\nlog: {level: warn}");
        assert_eq!(live.reload(), Ok(Reloaded::Unchanged));
        assert_eq!(
            live.state().failed,
            None,
            "the file is what is in force again"
        );
    }

    #[test]
    fn results_are_counted() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            let file = File::new("");
            let live = file.live();
            let _ = live.reload();
            file.write("x: 1");
            let _ = live.reload();
            assert!(
                recorder
                    .handle()
                    .render()
                    .contains("auralink_config_last_reload_failed 1")
            );
            file.write("defaults: {mode: lean}");
            let _ = live.reload();
        });
        let text = recorder.handle().render();
        for line in [
            "auralink_config_reloads_total{result=\"unchanged\"} 1",
            "auralink_config_reloads_total{result=\"failed\"} 1",
            "auralink_config_reloads_total{result=\"ok\"} 1",
            "auralink_config_generation 2",
            "auralink_config_last_reload_failed 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_file_is_taken_once_two_looks_agree() {
        let file = File::new("");
        let live = file.live();
        let mode = || live.policy("a", "", "").mode;
        let first = live.poll(None);
        let same = live.poll(Some(&first));
        file.write("defaults: {mode: lean}");
        let half = live.poll(Some(&same));
        assert_eq!(mode(), Mode::Off, "it may still be being written");
        file.write("defaults: {mode: lean}\n# and the rest");
        let whole = live.poll(Some(&half));
        assert_eq!(mode(), Mode::Off);
        let whole = live.poll(Some(&whole));
        assert_eq!((mode(), live.state().generation), (Mode::Lean, 2));
        let _ = live.poll(Some(&whole));
        assert_eq!(live.state().generation, 2);
    }

    #[test]
    fn what_changed_while_the_process_started_is_not_missed() {
        let file = File::new("");
        let settings = super::super::load(&file.path()).unwrap().settings;
        file.write("defaults: {mode: lean}");
        let live = Live::new(settings, file.path());
        let look = live.poll(None);
        let _ = live.poll(Some(&look));
        assert_eq!(live.policy("a", "", "").mode, Mode::Lean);
    }

    /// As the kubelet does it: `auralink.yaml → ..data/auralink.yaml`, `..data → ..1`, and a rename
    /// of a new `..data` over the old one.
    #[tokio::test]
    async fn a_config_map_is_followed() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (version, text) in [("..1", ""), ("..2", "defaults: {mode: lean}")] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("auralink.yaml"), text).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/auralink.yaml", at("auralink.yaml")).unwrap();
        let live = Live::new(Settings::default(), at("auralink.yaml"));
        let watching = tokio::spawn(Arc::clone(&live).watch());
        let mut generations = live.subscribe();
        tokio::time::sleep(POLL * 3).await;
        assert_eq!(*generations.borrow(), 1);
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        tokio::time::timeout(Duration::from_secs(20), generations.changed())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(live.policy("a", "", "").mode, Mode::Lean);
        watching.abort();
    }
}
