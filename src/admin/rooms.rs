//! Traffic and savings by room, with a bounded number of labels.
//!
//! Room names are chosen by strangers, and Prometheus keeps every label that it ever saw. So at most
//! `metrics.rooms` rooms have a label of their own at a time; a room that comes when all are taken
//! is counted under `other` for as long as its sessions last. A label is free again some time after
//! its room's last session ended, when every scraper has seen the last value. The `metrics` crate
//! cannot let go of a label, which is why these few series are kept and written here.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The label of all rooms that have none of their own.
pub const OTHER: &str = "other";

/// How long a room's series outlive its last session: several scrapes.
const LINGER: Duration = Duration::from_secs(300);

/// Counters by room.
pub struct Rooms {
    limit: AtomicUsize,
    named: Mutex<HashMap<Arc<str>, Slot>>,
    other: Arc<Counters>,
}

struct Slot {
    counters: Arc<Counters>,
    /// When its last session ended; none while it has any.
    idle_since: Option<Instant>,
}

#[derive(Default)]
struct Counters {
    sessions: AtomicU64,
    /// Up, down.
    wire: [AtomicU64; 2],
    native: [AtomicU64; 2],
}

/// Bytes of one direction of a session's live peer connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RoomBytes {
    /// On the participant's wire.
    pub wire: u64,
    /// As they would have been without the sidecar.
    pub native: u64,
}

/// One session's entry; leaves the room when it is dropped.
pub struct RoomMeter {
    rooms: Arc<Rooms>,
    counters: Arc<Counters>,
    room: Option<Arc<str>>,
    seen: [RoomBytes; 2],
}

impl Rooms {
    /// At most `limit` rooms have a label at a time.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicUsize::new(limit),
            named: Mutex::default(),
            other: Arc::default(),
        })
    }

    /// Takes a reloaded limit. Labels above a lower one end with their rooms.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// A session of this room begins.
    #[must_use]
    pub fn enter(self: &Arc<Self>, room: &str) -> RoomMeter {
        self.enter_at(room, Instant::now())
    }

    fn enter_at(self: &Arc<Self>, room: &str, now: Instant) -> RoomMeter {
        let mut named = self.lock();
        forget_idle(&mut named, now);
        let free = named.len() < self.limit.load(Ordering::Relaxed) && room != OTHER;
        if free && !named.contains_key(room) {
            named.insert(
                room.into(),
                Slot {
                    counters: Arc::default(),
                    idle_since: None,
                },
            );
        }
        let slot = named
            .get_key_value(room)
            .map(|(name, slot)| (name.clone(), slot.counters.clone()));
        if let Some(slot) = named.get_mut(room) {
            slot.idle_since = None;
        }
        let (room, counters) = match slot {
            Some((name, counters)) => (Some(name), counters),
            None => (None, Arc::clone(&self.other)),
        };
        // Under the lock: a room must not be forgotten between being found and being counted.
        counters.sessions.fetch_add(1, Ordering::Relaxed);
        drop(named);
        RoomMeter {
            rooms: Arc::clone(self),
            counters,
            room,
            seen: [RoomBytes::default(); 2],
        }
    }

    /// Appends the series in Prometheus' text format.
    pub fn render(&self, out: &mut String) {
        self.render_at(out, Instant::now());
    }

    fn render_at(&self, out: &mut String, now: Instant) {
        let mut named = self.lock();
        forget_idle(&mut named, now);
        let mut all: Vec<(String, Arc<Counters>)> = named
            .iter()
            .map(|(name, slot)| (escape(name), slot.counters.clone()))
            .collect();
        drop(named);
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all.push((OTHER.to_owned(), Arc::clone(&self.other)));
        type Pick = fn(&Counters) -> &[AtomicU64; 2];
        super::metrics::ROOM_SESSIONS.head(out);
        for (room, counters) in &all {
            let n = counters.sessions.load(Ordering::Relaxed);
            let _ = writeln!(
                out,
                "{}{{room=\"{room}\"}} {n}",
                super::metrics::ROOM_SESSIONS.name
            );
        }
        let bytes: [(_, Pick); 2] = [
            (&super::metrics::ROOM_WIRE_BYTES, |c| &c.wire),
            (&super::metrics::ROOM_NATIVE_BYTES, |c| &c.native),
        ];
        for (metric, pick) in bytes {
            metric.head(out);
            for (room, counters) in &all {
                for (direction, n) in ["up", "down"].iter().zip(pick(counters)) {
                    let n = n.load(Ordering::Relaxed);
                    let labels = format!("room=\"{room}\",direction=\"{direction}\"");
                    let _ = writeln!(out, "{}{{{labels}}} {n}", metric.name);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Slot>> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn forget_idle(named: &mut HashMap<Arc<str>, Slot>, now: Instant) {
    named.retain(|_, slot| {
        slot.idle_since
            .is_none_or(|since| now.saturating_duration_since(since) < LINGER)
    });
}

/// As label values want it.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

impl RoomMeter {
    /// What the session's live peer connections have carried. A lower sum than before (one of them
    /// has ended) adds nothing: it only is what the next one is compared with.
    pub fn observe(&mut self, up: RoomBytes, down: RoomBytes) {
        for (i, new) in [up, down].into_iter().enumerate() {
            let old = std::mem::replace(&mut self.seen[i], new);
            let add = |to: &AtomicU64, new: u64, old: u64| {
                to.fetch_add(new.saturating_sub(old), Ordering::Relaxed)
            };
            add(&self.counters.wire[i], new.wire, old.wire);
            add(&self.counters.native[i], new.native, old.native);
        }
    }
}

impl Drop for RoomMeter {
    fn drop(&mut self) {
        let mut named = self.rooms.lock();
        let before = self.counters.sessions.fetch_sub(1, Ordering::Relaxed);
        if let Some(slot) = self.room.as_ref().and_then(|room| named.get_mut(room))
            && before == 1
        {
            slot.idle_since = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(wire: u64, native: u64) -> RoomBytes {
        RoomBytes { wire, native }
    }

    fn rendered(rooms: &Rooms, now: Instant) -> String {
        let mut out = String::new();
        rooms.render_at(&mut out, now);
        out
    }

    #[test]
    fn labels_are_bounded_and_come_free() {
        let rooms = Rooms::new(2);
        let now = Instant::now();
        let mut a = rooms.enter_at("a", now);
        let _b = rooms.enter_at("b\"\\\n", now);
        let mut late = rooms.enter_at("c", now);
        let _own = rooms.enter_at(OTHER, now);
        a.observe(bytes(10, 100), bytes(1, 2));
        a.observe(bytes(15, 120), bytes(1, 2));
        a.observe(bytes(5, 5), bytes(1, 2));
        late.observe(bytes(7, 7), bytes(0, 0));
        let out = rendered(&rooms, now);
        for line in [
            "auralink_room_sessions{room=\"a\"} 1",
            "auralink_room_sessions{room=\"b\\\"\\\\\\n\"} 1",
            "auralink_room_sessions{room=\"other\"} 2",
            "auralink_room_wire_bytes_total{room=\"a\",direction=\"up\"} 15",
            "auralink_room_native_bytes_total{room=\"a\",direction=\"up\"} 120",
            "auralink_room_wire_bytes_total{room=\"a\",direction=\"down\"} 1",
            "auralink_room_wire_bytes_total{room=\"other\",direction=\"up\"} 7",
        ] {
            assert!(out.lines().any(|l| l == line), "{line} is not in\n{out}");
        }
        assert!(!out.contains("room=\"c\""));

        drop(a);
        let soon = Instant::now() + LINGER / 2;
        assert!(
            rendered(&rooms, soon).contains("room=\"a\""),
            "its last values are still to be seen"
        );
        let _again = rooms.enter_at("a", soon);
        drop(rooms.enter_at("a", soon));
        assert!(
            rendered(&rooms, soon + LINGER * 2).contains("room=\"a\""),
            "one session is left"
        );
        drop(_again);
        let later = Instant::now() + LINGER * 2;
        assert!(!rendered(&rooms, later).contains("room=\"a\""));
        drop(late);
        let _c = rooms.enter_at("c", later);
        assert!(rendered(&rooms, later).contains("auralink_room_sessions{room=\"c\"} 1"));
    }

    #[test]
    fn a_hundred_thousand_rooms_leave_no_trace() {
        let rooms = Rooms::new(50);
        let now = Instant::now();
        for n in 0..100_000 {
            drop(rooms.enter_at(&format!("room-{n}"), now));
        }
        assert_eq!(rooms.lock().len(), 50);
        let lines = rendered(&rooms, now).lines().count();
        assert_eq!(
            lines,
            51 * 5 + 6,
            "five series a room, and three heads of two lines"
        );
        assert_eq!(
            rendered(&rooms, Instant::now() + LINGER * 2)
                .lines()
                .count(),
            5 + 6
        );
        assert_eq!(rooms.lock().len(), 0);
    }

    #[test]
    fn without_labels_all_is_other() {
        let rooms = Rooms::new(0);
        let _a = rooms.enter("a");
        assert!(
            rendered(&rooms, Instant::now()).contains("auralink_room_sessions{room=\"other\"} 1")
        );
    }
}
