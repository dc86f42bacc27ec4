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
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};

/// How often is looked: as often as workers publish.
const EVERY: Duration = Duration::from_secs(1);

/// Where the log goes.
#[derive(Debug)]
pub(crate) struct Audit {
    path: PathBuf,
    file: File,
    failed: bool,
}

/// What the registry tells of.
pub(crate) enum Note {
    /// LiveKit has accepted a session.
    Began(Arc<Cell>),
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
    /// As the system says.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            failed: false,
        })
    }

    fn write(&mut self, entry: &Entry<'_>) {
        let written = serde_json::to_vec(entry)
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                // One write a line: lines of several processes don't mix (O_APPEND).
                self.file.write_all(&line)
            });
        match written {
            Ok(()) => self.failed = false,
            Err(error) => {
                counter!(AUDIT_FAILED.name).increment(1);
                if !self.failed {
                    tracing::error!(path = %self.path.display(), %error, "the audit log cannot be written");
                }
                self.failed = true;
            }
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
            let models = engine.status().bundles.into_iter().collect();
            while let Ok(note) = notes.try_recv() {
                match note {
                    Note::Began(cell) => books.began(
                        cell.id,
                        Person {
                            room: cell.room().to_owned(),
                            participant: cell.identity().to_owned(),
                        },
                    ),
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
            for event in books.events.drain(..) {
                self.write(&Entry {
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

fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
