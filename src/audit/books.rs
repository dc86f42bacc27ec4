//! What begins and ends, from looks at what lives and notes of what has ended.

use crate::media::{HopSnapshot, SessionId};
use auralink_proto::description::Target;
use auralink_proto::ladder::Rung;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Bundles by name, with the SHA-256 of their manifests; LACE with the libopus that holds it.
pub(super) type Models = BTreeMap<String, String>;

/// A peer connection.
type Pc = (SessionId, Target);

/// Looks after its end for which a peer connection may still be in a worker's snapshot, and for which a session is remembered.
const STALE: u8 = 3;

/// Whose a session is.
#[derive(Debug, Clone)]
pub(super) struct Person {
    pub(super) room: String,
    pub(super) participant: String,
    /// Whose speech is coded on its way to the participant.
    pub(super) hears: BTreeSet<String>,
}

impl Person {
    fn whose(&self, session: SessionId, direction: &'static str) -> Whose {
        Whose {
            session,
            room: self.room.clone(),
            participant: self.participant.clone(),
            direction,
            speakers: match direction {
                "from" => BTreeSet::from([self.participant.clone()]),
                _ => self.hears.clone(),
            },
        }
    }
}

/// Whose speech.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(Default))]
pub(super) struct Whose {
    session: SessionId,
    room: String,
    /// The participant in whose session it happens: the speaker (`from`), or who listens to others (`to`).
    participant: String,
    direction: &'static str,
    /// Whose speech it is.
    speakers: BTreeSet<String>,
}

#[cfg(test)]
impl Whose {
    pub(super) fn named(room: &str, participant: &str) -> Self {
        Self {
            room: room.to_owned(),
            participant: participant.to_owned(),
            ..Self::default()
        }
    }
}

/// Something for the log: an end where there are packets.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Event {
    pub(super) whose: Whose,
    pub(super) rung: Option<Rung>,
    pub(super) models: Models,
    pub(super) packets: Option<u64>,
}

#[derive(Debug)]
struct Running {
    whose: Whose,
    models: Models,
    /// Packets of peer connections that have ended, and of those that live, by target.
    ended: u64,
    live: HashMap<Target, u64>,
    /// Those of them that earlier lines told of.
    told: u64,
}

impl Running {
    fn packets(&self) -> u64 {
        (self.ended + self.live.values().sum::<u64>()).saturating_sub(self.told)
    }
}

/// The books.
#[derive(Debug, Default)]
pub(super) struct Books {
    /// Sessions, and the looks since they ended: their peer connections end right after them.
    people: HashMap<SessionId, (Person, Option<u8>)>,
    running: HashMap<(SessionId, &'static str), Running>,
    /// Peer connections that have ended, and the looks since.
    ended: HashMap<Pc, u8>,
    /// What has happened; to be drained.
    pub(super) events: Vec<Event>,
}

/// What was processed in one direction.
struct Processed {
    direction: &'static str,
    packets: u64,
    rung: Option<Rung>,
    /// By LACE, without a hop.
    enhanced: bool,
}

impl Processed {
    fn of(hop: &[HopSnapshot; 2]) -> impl Iterator<Item = Self> {
        let [up, down] = *hop;
        [("from", up), ("to", down)]
            .into_iter()
            .map(|(direction, hop)| Self {
                direction,
                packets: hop.stats.coded + hop.stats.restored + hop.stats.recode.recoded,
                rung: hop.rung,
                enhanced: direction == "from" && hop.stats.recode.recoded > 0,
            })
            .filter(|processed| processed.packets > 0)
    }
}

/// The models that processed it, where these are loaded.
fn used(enhanced: bool, loaded: &Models) -> Models {
    let mut models = loaded.clone();
    if enhanced {
        models.insert("lace".to_owned(), auralink_engine::libopus().to_owned());
    }
    models
}

impl Books {
    /// A session has begun.
    pub(super) fn began(&mut self, session: SessionId, person: Person) {
        self.people.insert(session, (person, None));
    }

    /// Whose speech is coded on its way to the participant from now on. Where there is none any more, what runs is still that of before.
    pub(super) fn speakers(&mut self, session: SessionId, speakers: BTreeSet<String>) {
        if let Some((person, _)) = self.people.get_mut(&session)
            && !speakers.is_empty()
        {
            person.hears = speakers;
        }
    }

    /// It has ended.
    pub(super) fn gone(&mut self, session: SessionId) {
        if let Some((_, gone)) = self.people.get_mut(&session) {
            *gone = Some(0);
        }
    }

    /// A peer connection has ended.
    pub(super) fn ended(&mut self, pc: Pc, hop: &[HopSnapshot; 2], models: &Models) {
        self.ended.insert(pc, 0);
        for processed in Processed::of(hop) {
            if let Some(running) = self.runs(pc.0, &processed, models) {
                running.live.remove(&pc.1);
                running.ended += processed.packets;
            }
        }
    }

    /// What lives now.
    pub(super) fn look(
        &mut self,
        live: impl Iterator<Item = (Pc, [HopSnapshot; 2])>,
        models: &Models,
    ) {
        let mut seen: HashMap<_, bool> = HashMap::new();
        for (pc, hop) in live
            .filter(|(pc, _)| !self.ended.contains_key(pc))
            .collect::<Vec<_>>()
        {
            for processed in Processed::of(&hop) {
                if let Some(running) = self.runs(pc.0, &processed, models) {
                    running.live.insert(pc.1, processed.packets);
                    *seen.entry((pc.0, processed.direction)).or_default() |= processed.enhanced;
                }
            }
        }
        let keys: Vec<_> = self.running.keys().copied().collect();
        for key in keys {
            let Some(enhanced) = seen.get(&key) else {
                self.end(key);
                continue;
            };
            let models = used(*enhanced, models);
            let Some(running) = self.running.get_mut(&key) else {
                continue;
            };
            let whose = match self.people.get(&key.0) {
                Some((person, _)) => person.whose(key.0, key.1),
                None => running.whose.clone(),
            };
            if running.models != models || running.whose != whose {
                self.events.push(Event {
                    packets: Some(running.packets()),
                    whose: std::mem::replace(&mut running.whose, whose),
                    rung: None,
                    models: std::mem::replace(&mut running.models, models.clone()),
                });
                running.told += running.packets();
                self.events.push(Event {
                    whose: running.whose.clone(),
                    rung: None,
                    models,
                    packets: None,
                });
            }
        }
        let counts = |looks: &mut u8| {
            *looks += 1;
            *looks <= STALE
        };
        self.ended.retain(|_, looks| counts(looks));
        self.people
            .retain(|_, (_, gone)| gone.as_mut().is_none_or(counts));
    }

    /// The entry of what is being processed, begun where it wasn't.
    fn runs(
        &mut self,
        session: SessionId,
        processed: &Processed,
        loaded: &Models,
    ) -> Option<&mut Running> {
        let (person, _) = self.people.get(&session)?;
        let direction = processed.direction;
        let events = &mut self.events;
        Some(self.running.entry((session, direction)).or_insert_with(|| {
            let whose = person.whose(session, direction);
            let models = used(processed.enhanced, loaded);
            events.push(Event {
                whose: whose.clone(),
                rung: processed.rung,
                models: models.clone(),
                packets: None,
            });
            Running {
                whose,
                models,
                ended: 0,
                live: HashMap::new(),
                told: 0,
            }
        }))
    }

    /// Everything ends.
    pub(super) fn stop(&mut self) {
        let keys: Vec<_> = self.running.keys().copied().collect();
        keys.into_iter().for_each(|key| self.end(key));
    }

    fn end(&mut self, key: (SessionId, &'static str)) {
        if let Some(running) = self.running.remove(&key) {
            self.events.push(Event {
                packets: Some(running.packets()),
                whose: running.whose,
                rung: None,
                models: running.models,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLISHER: Pc = (7, Target::Publisher);
    const SUBSCRIBER: Pc = (7, Target::Subscriber);

    fn models(sha256: &str) -> Models {
        [("lyra2".to_owned(), sha256.to_owned())].into()
    }

    fn hop(up: u64, down: u64) -> [HopSnapshot; 2] {
        let mut hop = [HopSnapshot::default(); 2];
        hop[0].stats.coded = up;
        hop[0].rung = Some(Rung::L2);
        hop[1].stats.restored = down;
        hop
    }

    fn books() -> Books {
        let mut books = Books::default();
        let person = Person {
            room: "support".to_owned(),
            participant: "anna".to_owned(),
            hears: BTreeSet::new(),
        };
        books.began(7, person);
        books
    }

    /// Direction and packets of what has happened since.
    fn events(books: &mut Books) -> Vec<(&'static str, Option<u64>)> {
        let mut events: Vec<_> = books
            .events
            .drain(..)
            .map(|event| (event.whose.direction, event.packets))
            .collect();
        events.sort_unstable();
        events
    }

    #[test]
    fn a_session_that_ends_between_two_looks_is_in_the_log() {
        let mut books = books();
        books.gone(7);
        books.ended(PUBLISHER, &hop(12, 30), &models("a"));
        // The worker's snapshot may not know yet.
        for _ in 0..2 {
            books.look([(PUBLISHER, hop(9, 20))].into_iter(), &models("a"));
        }
        assert_eq!(
            events(&mut books),
            [
                ("from", None),
                ("from", Some(12)),
                ("to", None),
                ("to", Some(30))
            ]
        );
        for _ in 0..STALE {
            books.look([].into_iter(), &models("a"));
        }
        assert!(books.people.is_empty() && books.ended.is_empty() && books.running.is_empty());
    }

    #[test]
    fn an_end_tells_all_that_was_processed() {
        let mut books = books();
        let live = [(PUBLISHER, hop(10, 0)), (SUBSCRIBER, hop(0, 5))];
        books.look(live.into_iter(), &models("a"));
        assert_eq!(events(&mut books), [("from", None), ("to", None)]);
        // One peer connection ends and another takes its place; the session goes on.
        books.ended(PUBLISHER, &hop(17, 0), &models("a"));
        books.look([(SUBSCRIBER, hop(3, 9))].into_iter(), &models("a"));
        assert_eq!(events(&mut books), [], "both directions still run");
        books.ended(SUBSCRIBER, &hop(4, 11), &models("a"));
        books.look([].into_iter(), &models("a"));
        assert_eq!(events(&mut books), [("from", Some(21)), ("to", Some(11))]);
    }

    #[test]
    fn other_models_are_another_processing() {
        let mut books = books();
        books.look([(PUBLISHER, hop(10, 0))].into_iter(), &models("a"));
        books.look([(PUBLISHER, hop(25, 0))].into_iter(), &models("b"));
        let [first, end, begin] = &books.events[..] else {
            panic!("{:?}", books.events);
        };
        assert_eq!((&first.models, first.rung), (&models("a"), Some(Rung::L2)));
        assert_eq!((&end.models, end.packets), (&models("a"), Some(25)));
        assert_eq!((&begin.models, begin.packets), (&models("b"), None));
        books.events.clear();
        books.ended(PUBLISHER, &hop(31, 0), &models("b"));
        books.look([].into_iter(), &models("b"));
        assert_eq!(events(&mut books), [("from", Some(6))]);
    }

    #[test]
    fn whose_speech_it_was_is_told() {
        let hears = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let mut books = books();
        books.speakers(7, hears(&["ben"]));
        let live = |down| [(PUBLISHER, hop(10, 0)), (SUBSCRIBER, hop(0, down))].into_iter();
        books.look(live(5), &models("a"));
        // Carl comes, Ben goes, then Carl does: nobody's speech is coded after that.
        books.speakers(7, hears(&["ben", "carl"]));
        books.look(live(9), &models("a"));
        books.speakers(7, hears(&["carl"]));
        books.look(live(11), &models("a"));
        books.speakers(7, hears(&[]));
        books.look(live(11), &models("a"));
        books.stop();
        let told: Vec<_> = books
            .events
            .iter()
            .filter(|event| event.whose.direction == "to")
            .map(|event| {
                let speakers: Vec<_> = event.whose.speakers.iter().map(String::as_str).collect();
                (speakers.join(" "), event.packets)
            })
            .collect();
        let line = |speakers: &str, packets| (speakers.to_owned(), packets);
        assert_eq!(
            told,
            [
                line("ben", None),
                line("ben", Some(9)),
                line("ben carl", None),
                line("ben carl", Some(2)),
                line("carl", None),
                line("carl", Some(0)),
            ]
        );
        let own = |event: &&Event| event.whose.direction == "from";
        for event in books.events.iter().filter(own) {
            assert_eq!(event.whose.speakers, hears(&["anna"]));
        }
    }

    #[test]
    fn enhancement_is_told_of() {
        let mut books = books();
        let mut hop = hop(0, 0);
        hop[0].stats.recode.recoded = 40;
        books.ended(PUBLISHER, &hop, &models("a"));
        books.look([].into_iter(), &models("a"));
        let [begin, end] = &books.events[..] else {
            panic!("{:?}", books.events);
        };
        assert_eq!(begin.models, end.models);
        assert!(begin.models.contains_key("lace"), "{begin:?}");
        assert_eq!(end.packets, Some(40));
    }

    #[test]
    fn who_codes_nothing_is_not_in_it_and_who_runs_at_the_stop_ends() {
        let mut books = books();
        for _ in 0..2 * STALE {
            books.look([(PUBLISHER, hop(0, 0))].into_iter(), &models("a"));
        }
        assert_eq!(events(&mut books), []);
        books.look([(PUBLISHER, hop(2, 0))].into_iter(), &models("a"));
        books.stop();
        assert_eq!(events(&mut books), [("from", None), ("from", Some(2))]);
    }
}
