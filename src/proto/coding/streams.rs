//! The streams of one direction: their places, their seats at the engine, when they are due, and what has to be
//! remembered of those that ended.

use super::stream::Stream;
use crate::past::Floor;
use foldhash::HashMap;
use rustc_hash::FxHashMap;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// A stream that has been silent for so long may give its place to another ...
const IDLE: Duration = Duration::from_secs(60);
/// ... one that no rule is for any more, after so long ...
const UNRULED: Duration = Duration::from_secs(5);
/// ... and where no place is free it is looked for one so often.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Who has asked the engine for nothing for so long may lose its seat to who speaks.
const SILENT: Duration = Duration::from_secs(5);

/// SSRCs that are remembered for each place. What ended and has been coded is remembered as long as the leg's keys live, in 8
/// bytes: its numbers must not go on with other payloads. A direction that has had so many codes no new ones.
const KNOWN: usize = 64;

/// Bits of a track's number that count streams ([`crate::relay`]).
const NUMBERS: u16 = 1 << 15;

/// What is known of an SSRC.
#[derive(Debug)]
pub(super) enum Known {
    Stream(u16),
    /// It gave up its place.
    Gone {
        floor: Floor,
        /// Framed: its numbers were the hop's.
        packed: bool,
    },
}

/// Whether a stream may have the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// It had a seat.
    Had,
    /// It has one now, perhaps another's.
    Given { instead_of: Option<u16> },
    /// All seats are taken.
    Full,
}

#[derive(Debug)]
pub(super) struct Streams {
    most: usize,
    by_number: FxHashMap<u16, Box<Stream>>,
    /// Seeded, because participants choose their SSRCs, and could choose such as collide.
    by_ssrc: HashMap<u32, Known>,
    next_number: u16,
    /// When each is due, or sooner: one entry a stream at most.
    dues: BTreeSet<(Instant, u16)>,
    seats: usize,
    seated: usize,
    /// No seat becomes free before.
    seats_full_until: Option<Instant>,
    places_full_until: Option<Instant>,
    /// Streams that were looked at.
    #[cfg(test)]
    pub(super) looks: std::cell::Cell<u64>,
}

impl Streams {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            by_number: FxHashMap::default(),
            by_ssrc: HashMap::default(),
            next_number: 0,
            dues: BTreeSet::new(),
            seats: 0,
            seated: 0,
            seats_full_until: None,
            places_full_until: None,
            #[cfg(test)]
            looks: std::cell::Cell::new(0),
        }
    }

    /// Nothing is known.
    pub(super) fn is_empty(&self) -> bool {
        self.by_ssrc.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.by_number.len()
    }

    pub(super) fn known(&mut self, ssrc: u32) -> Option<&mut Known> {
        self.by_ssrc.get_mut(&ssrc)
    }

    /// The stream of an SSRC.
    pub(super) fn of(&mut self, ssrc: u32) -> Option<u16> {
        match self.by_ssrc.get(&ssrc)? {
            Known::Stream(number) => Some(*number),
            Known::Gone { .. } => None,
        }
    }

    pub(super) fn get_mut(&mut self, number: u16) -> Option<&mut Stream> {
        #[cfg(test)]
        self.looks.set(self.looks.get() + 1);
        self.by_number.get_mut(&number).map(AsMut::as_mut)
    }

    pub(super) fn numbers(&self) -> Vec<u16> {
        #[cfg(test)]
        self.looks.set(self.looks.get() + self.len() as u64);
        self.by_number.keys().copied().collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Stream> {
        #[cfg(test)]
        self.looks.set(self.looks.get() + self.len() as u64);
        self.by_number.values().map(AsRef::as_ref)
    }

    /// No place is free.
    pub(super) fn is_full(&self) -> bool {
        self.len() >= self.most
    }

    /// There is room to remember what becomes of an SSRC.
    pub(super) fn may_know(&self, ssrc: u32) -> bool {
        self.by_ssrc.len() < self.most.saturating_mul(KNOWN) || self.by_ssrc.contains_key(&ssrc)
    }

    /// The stream that is to give up its place. Where there is none, it is not looked for one again for a while.
    pub(super) fn idle(&mut self, now: Instant) -> Option<u16> {
        if self.places_full_until.is_some_and(|until| now < until) {
            return None;
        }
        #[cfg(test)]
        self.looks.set(self.looks.get() + self.len() as u64);
        let may_go = |stream: &Stream| {
            let silent = now.saturating_duration_since(stream.last);
            stream.ended || silent > IDLE || stream.rule.is_none() && silent > UNRULED
        };
        let ended = self.by_number.iter().filter(|(_, stream)| may_go(stream));
        let first = ended.min_by_key(|(_, stream)| stream.last);
        let number = first.map(|(number, _)| *number);
        self.places_full_until = number.is_none().then(|| now + LOOK_AGAIN);
        number
    }

    /// Makes a stream.
    pub(super) fn insert(&mut self, now: Instant, ssrc: u32, mid: String) -> u16 {
        let gone = match self.by_ssrc.get(&ssrc) {
            Some(Known::Gone { floor, packed }) => Some((*floor, *packed)),
            Some(Known::Stream(number)) => return *number,
            None => None,
        };
        // There are more numbers than places. One comes again when the engine has long forgotten the stream that had it.
        let mut number = self.next_number;
        while self.by_number.contains_key(&number) {
            number = (number + 1) % NUMBERS;
        }
        self.next_number = (number + 1) % NUMBERS;
        let mut stream = Stream::new(now, ssrc, mid);
        if let Some((floor, packed)) = gone {
            stream.floor = Some(floor);
            stream.was_packed = packed;
        }
        self.by_ssrc.insert(ssrc, Known::Stream(number));
        self.by_number.insert(number, Box::new(stream));
        number
    }

    /// Forgets a stream but for what its SSRC may be used for.
    pub(super) fn remove(&mut self, number: u16) -> Option<Box<Stream>> {
        self.unseat(number);
        let stream = self.by_number.remove(&number)?;
        if let Some(at) = stream.wake {
            self.dues.remove(&(at, number));
        }
        match stream.leaves() {
            Some((floor, packed)) => {
                let gone = Known::Gone { floor, packed };
                self.by_ssrc.insert(stream.ssrc, gone);
            }
            None => {
                self.by_ssrc.remove(&stream.ssrc);
            }
        }
        Some(stream)
    }

    /// Everything is over.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.most);
    }

    /// So many tracks are announced: each may have a seat, and one more where a track changes its SSRC, up to a quarter
    /// of the places: more than speak at a time.
    pub(super) fn set_tracks(&mut self, tracks: usize) {
        self.seats = tracks.min(self.most / 4) + 1;
        self.seats_full_until = None;
        self.places_full_until = None;
    }

    /// Gives a stream a seat where there is one.
    pub(super) fn admit(&mut self, now: Instant, number: u16) -> Admission {
        match self.by_number.get(&number) {
            Some(stream) if stream.seated => return Admission::Had,
            Some(_) => {}
            None => return Admission::Full,
        }
        let mut instead_of = None;
        if self.seated >= self.seats {
            if self.seats_full_until.is_some_and(|until| now < until) {
                return Admission::Full;
            }
            #[cfg(test)]
            self.looks.set(self.looks.get() + self.len() as u64);
            let seated = self.by_number.iter().filter(|(_, stream)| stream.seated);
            let quietest = seated
                .min_by_key(|(_, stream)| stream.worked)
                .map(|(number, stream)| (*number, stream.worked + SILENT));
            match quietest {
                Some((other, free)) if free <= now => {
                    self.unseat(other);
                    instead_of = Some(other);
                }
                Some((_, free)) => {
                    self.seats_full_until = Some(free);
                    return Admission::Full;
                }
                None => return Admission::Full,
            }
        }
        if let Some(stream) = self.by_number.get_mut(&number) {
            (stream.seated, stream.worked) = (true, now);
            self.seated += 1;
        }
        Admission::Given { instead_of }
    }

    pub(super) fn unseat(&mut self, number: u16) {
        if let Some(stream) = self.by_number.get_mut(&number)
            && std::mem::take(&mut stream.seated)
        {
            self.seated -= 1;
            self.seats_full_until = None;
        }
    }

    /// A stream may be due sooner than it was.
    pub(super) fn retime(&mut self, number: u16) {
        #[cfg(test)]
        self.looks.set(self.looks.get() + 1);
        let Some(stream) = self.by_number.get_mut(&number) else {
            return;
        };
        let Some(due) = stream.due() else { return };
        // Later is found out when it is woken in vain.
        if stream.wake.is_none_or(|wake| due < wake) {
            if let Some(wake) = stream.wake.replace(due) {
                self.dues.remove(&(wake, number));
            }
            self.dues.insert((due, number));
        }
    }

    /// When the first is due, or sooner.
    pub(super) fn first_due(&self) -> Option<Instant> {
        self.dues.first().map(|(due, _)| *due)
    }

    /// Moves what is due by now into `due`.
    pub(super) fn take_due(&mut self, now: Instant, due: &mut Vec<u16>) {
        while self.first_due().is_some_and(|due| due <= now)
            && let Some((_, number)) = self.dues.pop_first()
        {
            if let Some(stream) = self.by_number.get_mut(&number) {
                stream.wake = None;
                due.push(number);
            }
        }
    }
}
