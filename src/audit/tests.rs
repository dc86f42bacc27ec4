#![allow(clippy::unwrap_used)]
use super::*;
use crate::shown::tests::{EVIL, is_evil};
use std::fs;
use std::os::unix::fs::symlink;

fn entry<'a>(whose: &'a Whose, models: &'a BTreeMap<String, String>, run: &'a str) -> Entry<'a> {
    Entry {
        time: 1,
        event: "begin",
        run,
        whose,
        rung: None,
        models,
        packets: None,
        media_stored: false,
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn nobody_else_reads_it_and_no_link_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    Audit::open(&at("new")).unwrap();
    assert_eq!(mode(&at("new")), 0o600);
    // One that somebody made readable is tightened; what is in it stays.
    fs::write(at("open"), "old\n").unwrap();
    fs::set_permissions(at("open"), Permissions::from_mode(0o666)).unwrap();
    Audit::open(&at("open")).unwrap();
    assert_eq!(mode(&at("open")), 0o600);
    assert_eq!(fs::read_to_string(at("open")).unwrap(), "old\n");
    symlink(at("open"), at("link")).unwrap();
    symlink(at("nothing"), at("dangling")).unwrap();
    for link in ["link", "dangling"] {
        assert!(Audit::open(&at(link)).is_err(), "{link}");
    }
    assert!(!at("nothing").exists(), "nothing was made behind it");
    assert!(Audit::open(dir.path()).is_err());
    assert!(
        Audit::open(Path::new("/dev/null")).is_err(),
        "no ordinary file"
    );
}

#[test]
fn it_goes_on_in_a_new_file_when_it_was_rotated() {
    let dir = tempfile::tempdir().unwrap();
    let (path, old) = (dir.path().join("log"), dir.path().join("log.1"));
    let mut audit = Audit::open(&path).unwrap();
    let (person, models) = (Whose::default(), BTreeMap::new());
    let lines = |path: &Path| fs::read_to_string(path).unwrap().lines().count();
    audit.write(&entry(&person, &models, "r"));
    audit.follow_rotation();
    audit.write(&entry(&person, &models, "r"));
    fs::rename(&path, &old).unwrap();
    // logrotate's `create` may make one that others can read.
    fs::write(&path, "").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    audit.follow_rotation();
    audit.write(&entry(&person, &models, "r"));
    assert_eq!((lines(&old), lines(&path), mode(&path)), (2, 1, 0o600));
    // Its successor is a trap: it goes on in the file that it has.
    fs::rename(&path, &old).unwrap();
    symlink(dir.path().join("elsewhere"), &path).unwrap();
    audit.follow_rotation();
    audit.write(&entry(&person, &models, "r"));
    assert_eq!(lines(&old), 2);
    assert!(!dir.path().join("elsewhere").exists());
    fs::remove_file(&path).unwrap();
    audit.follow_rotation();
    audit.write(&entry(&person, &models, "r"));
    assert_eq!((lines(&old), lines(&path)), (2, 1));
}

#[test]
fn a_line_shows_as_what_it_is_and_says_what_was_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut audit = Audit::open(&path).unwrap();
    let models = BTreeMap::new();
    for evil in EVIL {
        let whose = Whose::named(evil, evil);
        audit.write(&entry(&whose, &models, "r"));
    }
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), EVIL.len());
    for (line, evil) in text.lines().zip(EVIL) {
        assert!(!is_evil(line), "{line}");
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(
            (&line["room"], &line["participant"]),
            (&evil.into(), &evil.into())
        );
    }
}

#[test]
fn a_session_of_another_process_is_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let (first, second) = (Audit::open(&path).unwrap(), Audit::open(&path).unwrap());
    assert_ne!(first.run, second.run);
}
