//! The audit log: one JSON object a line for each time that AIC codecs begin and end to process
//! somebody's speech. docs/privacy.md says what it is for and what is in it.
//!
//! It is made from the once-a-second snapshots of the media workers, so begin and end are exact to a
//! second, and media knows nothing of it.

use crate::admin::metrics::AUDIT_FAILED;
use crate::app::{App, Cell};
use crate::media::{Media, SessionId};
use auralink_engine::Engine;
use metrics::counter;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// How often is looked: as often as workers publish.
const EVERY: Duration = Duration::from_secs(1);

/// Where the log goes.
#[derive(Debug)]
pub(crate) struct Audit {
    path: PathBuf,
    file: File,
    failed: bool,
}

/// Whose speech.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Whose {
    session: SessionId,
    room: String,
    /// The participant in whose session it happens: the speaker (`from`), or who listens to others (`to`).
    participant: String,
    direction: &'static str,
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

struct Running {
    whose: Whose,
    models: BTreeMap<String, String>,
    packets: u64,
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
        app: Arc<App>,
        media: Arc<Media>,
        engine: Arc<Engine>,
        mut stop: watch::Receiver<()>,
    ) {
        let mut running: HashMap<(SessionId, &'static str), Running> = HashMap::new();
        let mut every = tokio::time::interval(EVERY);
        let mut stopping = false;
        while !stopping {
            tokio::select! {
                _ = every.tick() => {}
                _ = stop.changed() => stopping = true,
            }
            let cells: HashMap<SessionId, Arc<Cell>> = app
                .cells()
                .into_iter()
                .map(|cell| (cell.id, cell))
                .collect();
            let mut now = HashMap::new();
            let snapshots = if stopping {
                Vec::new()
            } else {
                media.snapshots()
            };
            for pc in snapshots.iter().flat_map(|s| s.pcs.clone()) {
                for (direction, hop) in ["from", "to"].into_iter().zip(pc.hop) {
                    let recoded = hop.stats.recode.recoded;
                    let packets = hop.stats.coded + hop.stats.restored + recoded;
                    if packets > 0 {
                        let entry = now.entry((pc.session, direction));
                        let (sum, rung, enhanced) = entry.or_insert((0, None, false));
                        *sum += packets;
                        *enhanced |= direction == "from" && recoded > 0;
                        *rung = hop.rung.or(*rung);
                    }
                }
            }
            let ended: Vec<_> = running
                .keys()
                .filter(|key| !now.contains_key(*key))
                .copied()
                .collect();
            for Running {
                whose,
                models,
                packets,
            } in ended.iter().filter_map(|key| running.remove(key))
            {
                self.write(&Entry {
                    time: unix_time(),
                    event: "end",
                    whose: &whose,
                    rung: None,
                    models: &models,
                    packets: Some(packets),
                    media_stored: false,
                });
            }
            for ((session, direction), (packets, rung, enhanced)) in now {
                if let Some(known) = running.get_mut(&(session, direction)) {
                    known.packets = packets;
                    continue;
                }
                // The session may have ended since the snapshot.
                let Some(cell) = cells.get(&session) else {
                    continue;
                };
                let whose = Whose {
                    session,
                    room: cell.room().to_owned(),
                    participant: cell.identity().to_owned(),
                    direction,
                };
                let mut models: BTreeMap<_, _> = engine.status().bundles.into_iter().collect();
                if enhanced {
                    models.insert("lace".to_owned(), auralink_engine::libopus().to_owned());
                }
                self.write(&Entry {
                    time: unix_time(),
                    event: "begin",
                    whose: &whose,
                    rung: rung.map(|rung| rung.to_string()),
                    models: &models,
                    packets: None,
                    media_stored: false,
                });
                let begun = Running {
                    whose,
                    models,
                    packets,
                };
                running.insert((session, direction), begun);
            }
        }
    }
}

fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
