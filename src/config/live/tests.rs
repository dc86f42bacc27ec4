#![allow(clippy::unwrap_used)]

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
        Live::new(super::super::load(&self.path()).unwrap(), self.path())
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
fn limits_and_graces_need_no_restart() {
    let file = File::new("");
    let live = file.live();
    file.write("limits: {sessions: 5, idle_timeout: 60s}\nsession: {drain_grace: 1s}");
    let changed = Reloaded::Changed {
        parts: vec!["limits", "session"],
        generation: 2,
    };
    assert_eq!(live.reload(), Ok(changed));
    let now = live.load();
    assert_eq!(
        (now.limits.sessions, now.session.drain_grace),
        (5, Duration::from_secs(1))
    );
}

/// A certificate and its key; it ends in so many days, or with none has ended.
fn certify(dir: &Path, name: &str, days: u32) {
    let mut params = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
    let day = Duration::from_secs(86_400);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = rcgen::date_time_ymd(1970, 1, 1) + now.unwrap();
    params.not_before = now - day * 90;
    params.not_after = now + day * days - day;
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = params.self_signed(&key).unwrap();
    fs::write(dir.join(format!("{name}.crt")), cert.pem()).unwrap();
    fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
}

#[test]
fn a_renewed_certificate_is_taken_and_a_broken_one_is_not() {
    let file = File::new("");
    let dir = file.0.path();
    let tls = |name: &str| {
        let at = |kind: &str| dir.join(format!("{name}.{kind}")).display().to_string();
        format!("tls: {{cert: {}, key: {}}}\n", at("crt"), at("key"))
    };
    let put = |from: &str, to: &str| fs::copy(dir.join(from), dir.join(to)).unwrap();
    for (name, days) in [("a", 60), ("b", 90), ("old", 0)] {
        certify(dir, name, days);
    }
    file.write(&tls("a"));
    let live = file.live();
    let told = live.subscribe();
    let now = || live.material().certificate.clone().unwrap();
    let failed = || live.state().files_failed.map(|(_, p)| p.to_string());
    let look = |times: usize| {
        let mut look = live.poll(None);
        for _ in 1..times {
            look = live.poll(Some(&look));
        }
    };
    look(3);
    let first = now();
    assert_eq!(
        (told.has_changed().unwrap(), failed()),
        (false, None),
        "nothing new"
    );

    // The certificate comes before its key: for a moment they don't fit.
    put("b.crt", "a.crt");
    look(2);
    assert!(failed().unwrap().contains("does not fit"), "{:?}", failed());
    assert!(Arc::ptr_eq(&first, &now()) && !told.has_changed().unwrap());
    put("b.key", "a.key");
    look(2);
    assert!(!now().is(&first) && told.has_changed().unwrap());
    assert_eq!((failed(), live.state().generation), (None, 1));
    let second = now();

    // Garbage, one that has expired, none.
    fs::write(dir.join("a.crt"), "garbage").unwrap();
    look(2);
    assert!(failed().unwrap().contains("holds no certificate"));
    put("old.crt", "a.crt");
    put("old.key", "a.key");
    look(2);
    assert!(failed().unwrap().contains("expired"));
    fs::remove_file(dir.join("a.key")).unwrap();
    look(2);
    assert!(failed().unwrap().contains("cannot be read"));
    // Rules don't wait for it, and it doesn't wait for them.
    file.write(&format!("{}defaults: {{mode: lean}}", tls("a")));
    assert!(matches!(live.reload(), Ok(Reloaded::Changed { .. })));
    file.write("nonsense: 1");
    assert!(live.reload().is_err());
    assert!(Arc::ptr_eq(&second, &now()));
    certify(dir, "a", 30);
    look(2);
    assert!(failed().is_none() && !now().is(&second));

    // Other files: what they hold belongs to the change.
    let third = now();
    file.write(&tls("old"));
    let refused = live.reload().unwrap_err().to_string();
    assert!(
        refused.starts_with("1:13: tls.cert: the certificate expired"),
        "{refused}"
    );
    file.write(&tls("absent"));
    assert!(
        live.reload()
            .unwrap_err()
            .to_string()
            .contains("cannot be read")
    );
    assert!(Arc::ptr_eq(&third, &now()));
    file.write(&tls("b"));
    assert!(matches!(live.reload(), Ok(Reloaded::Changed { .. })));
    assert!(now().is(&second));
    file.write("");
    let refused = live.reload().unwrap_err().to_string();
    assert!(refused.contains("tls: only a restart"), "{refused}");
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
    let loaded = super::super::load(&file.path()).unwrap();
    file.write("defaults: {mode: lean}");
    let live = Live::new(loaded, file.path());
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
    let live = Live::new(Settings::parse("").unwrap(), at("auralink.yaml"));
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
