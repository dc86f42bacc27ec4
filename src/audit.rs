//! The audit log: one JSON object a line for each time that AIC codecs begin and end to process
//! somebody's speech. docs/privacy.md says what it is for and what is in it.
//!
//! It is made from the once-a-second snapshots of the media workers, and from what each peer connection
//! had done when it ended: so begin and end are exact to a second, and no session is too short for it.

mod books;

use crate::admin::metrics::AUDIT_FAILED;
use crate::app::Cell;
use crate::media::{HopSnapshot, Media, SessionId};
use auralink_engine::Engine;
use auralink_proto::description::Target;
use books::{Books, Person, Whose};
use metrics::counter;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};

/// How often is looked: as often as workers publish.
const EVERY: Duration = Duration::from_secs(1);

/// Who may read and write it: its owner.
const MODE: u32 = 0o600;

/// Where the log goes.
#[derive(Debug)]
pub(crate) struct Audit {
    path: PathBuf,
    file: File,
    /// Tells this process from those before and after it, whose sessions have the same numbers.
    run: String,
    failed: bool,
}

/// What the registry tells of.
pub(crate) enum Note {
    /// LiveKit has accepted a session.
    Began(Arc<Cell>),
    /// Whose speech is coded from now on, on its way to the participant.
    Speakers(SessionId, BTreeSet<String>),
    /// It has ended.
    Gone(SessionId),
    /// A peer connection has ended, and this its hop has done: client to server, server to client.
    Ended(SessionId, Target, Box<[HopSnapshot; 2]>),
}

/// One line.
#[derive(Debug, Serialize)]
struct Entry<'a> {
    /// Seconds since the Unix epoch.
    time: u64,
    /// `begin` or `end`.
    event: &'static str,
    /// The process; with `session` unique.
    run: &'a str,
    #[serde(flatten)]
    whose: &'a Whose,
    /// The cheapest rung in use at the beginning.
    #[serde(skip_serializing_if = "Option::is_none")]
    rung: Option<String>,
    /// Bundles by name, with the SHA-256 of their manifests; LACE with the libopus that holds it.
    models: &'a BTreeMap<String, String>,
    /// With `end`: audio packets that were coded and restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    packets: Option<u64>,
    /// Never: there is no code that writes media anywhere.
    media_stored: bool,
}

impl Audit {
    /// Opens the log to append to it, readable by its owner alone.
    ///
    /// # Errors
    /// As the system says; also where it is a symbolic link or no file, or belongs to somebody else.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut run = [0; 8];
        getrandom::fill(&mut run).map_err(io::Error::other)?;
        Ok(Self {
            path: path.to_owned(),
            file: open(path)?,
            run: run.iter().map(|byte| format!("{byte:02x}")).collect(),
            failed: false,
        })
    }

    /// Goes on in a new file where the old one was moved away or deleted, as logrotate does. Where that fails, nothing is lost: it goes on in the old one.
    fn follow_rotation(&mut self) {
        let there = std::fs::symlink_metadata(&self.path).ok();
        let same = self.file.metadata().is_ok_and(|own| {
            let own = (own.dev(), own.ino());
            there.is_some_and(|there| (there.dev(), there.ino()) == own)
        });
        if same {
            return;
        }
        match open(&self.path) {
            Ok(file) => self.file = file,
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &io::Error) {
        counter!(AUDIT_FAILED.name).increment(1);
        if !self.failed {
            tracing::error!(path = %self.path.display(), %error, "the audit log cannot be written");
        }
        self.failed = true;
    }

    fn write(&mut self, entry: &Entry<'_>) {
        let written = serde_json::to_string(entry)
            .map_err(io::Error::from)
            .and_then(|line| {
                // One write a line: lines of several processes don't mix (O_APPEND).
                self.file.write_all((plain(&line) + "\n").as_bytes())
            });
        match written {
            Ok(()) => self.failed = false,
            Err(error) => self.fail(&error),
        }
    }

    /// Writes the log until `stop` changes; then everything that runs ends.
    pub(crate) async fn follow(
        mut self,
        media: Arc<Media>,
        engine: Arc<Engine>,
        mut notes: mpsc::UnboundedReceiver<Note>,
        mut stop: watch::Receiver<()>,
    ) {
        let mut books = Books::default();
        let mut every = tokio::time::interval(EVERY);
        let mut stopping = false;
        while !stopping {
            tokio::select! {
                _ = every.tick() => {}
                _ = stop.changed() => stopping = true,
            }
            self.follow_rotation();
            let models = engine.status().bundles.into_iter().collect();
            while let Ok(note) = notes.try_recv() {
                match note {
                    Note::Began(cell) => books.began(
                        cell.id,
                        Person {
                            room: cell.room().to_owned(),
                            participant: cell.identity().to_owned(),
                            hears: BTreeSet::new(),
                        },
                    ),
                    Note::Speakers(session, speakers) => books.speakers(session, speakers),
                    Note::Gone(session) => books.gone(session),
                    Note::Ended(session, target, hop) => {
                        books.ended((session, target), &hop, &models)
                    }
                }
            }
            let snapshots = media.snapshots();
            let live = snapshots
                .iter()
                .flat_map(|snapshot| &snapshot.pcs)
                .map(|pc| ((pc.session, pc.target), pc.hop));
            books.look(live, &models);
            if stopping {
                books.stop();
            }
            let run = self.run.clone();
            for event in books.events.drain(..) {
                self.write(&Entry {
                    run: &run,
                    time: unix_time(),
                    event: if event.packets.is_some() {
                        "end"
                    } else {
                        "begin"
                    },
                    whose: &event.whose,
                    rung: event.rung.map(|rung| rung.to_string()),
                    models: &event.models,
                    packets: event.packets,
                    media_stored: false,
                });
            }
        }
    }
}

/// Opens or makes a file that nobody else can have made, can read or can point elsewhere: what is in it names people.
fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(MODE)
        // A pipe without a reader would keep us waiting; it is refused below.
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
        .open(path)?;
    let is = file.metadata()?;
    if !is.is_file() {
        return Err(io::Error::other("it is no ordinary file"));
    }
    // Its own entry there belongs to whoever the process acts as.
    if is.uid() != std::fs::metadata("/proc/self")?.uid() {
        return Err(io::Error::other("it belongs to somebody else"));
    }
    if is.mode() & 0o777 != MODE {
        file.set_permissions(Permissions::from_mode(MODE))?;
        tracing::warn!(path = %path.display(), "others could read or write the audit log; its mode is 0600 now");
    }
    Ok(file)
}

/// JSON in which what doesn't show as itself is escaped, which says the same: a terminal can't be made to show a line as another one.
fn plain(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii_graphic() || c == ' ' || c.is_alphanumeric() {
            out.push(c);
        } else {
            // All of them are in strings: what JSON itself is made of is printable.
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
#[path = "audit/tests.rs"]
mod tests;
