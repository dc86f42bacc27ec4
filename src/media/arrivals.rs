//! Connections that have not yet shown whom they are for: a bounded number, shared fairly between the addresses that they come
//! from.
//!
//! An honest client shows it within a round trip, a silent one never does. So where there is no room, the one that has been
//! silent longest goes, of the address that holds the most: who would keep others out has to be faster than they are, from
//! many addresses.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

/// Connections that wait, of all addresses.
pub(super) const MOST: usize = 256;

/// Of one address: an office behind one that joins at once, each connection for a round trip.
pub(super) const MOST_OF_ONE: usize = 32;

/// Whom an address is taken to be: an IPv4 address, or the /64 that one subscriber of an IPv6 network has (RFC 6177).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Origin(u64);

impl Origin {
    pub(super) fn of(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            // ::/32, which no subscriber has.
            IpAddr::V4(ip) => Self(u64::from(u32::from(ip))),
            IpAddr::V6(ip) => Self((u128::from(ip) >> 64) as u64),
        }
    }
}

/// What waits; dropping a `T` ends its connection.
#[derive(Debug)]
pub(super) struct Arrivals<T> {
    /// In the order in which they came.
    waiting: BTreeMap<u64, (Origin, T)>,
    next: u64,
}

impl<T> Default for Arrivals<T> {
    fn default() -> Self {
        Self {
            waiting: BTreeMap::new(),
            next: 0,
        }
    }
}

impl<T> Arrivals<T> {
    /// Takes a connection in; what has to go for it comes back.
    pub(super) fn enter(&mut self, origin: Origin, what: T) -> (u64, Option<T>) {
        let of_its_own = self.waiting.values().filter(|(of, _)| *of == origin);
        let goes = if of_its_own.count() >= MOST_OF_ONE {
            self.oldest_of(origin)
        } else if self.waiting.len() >= MOST {
            self.greediest().and_then(|origin| self.oldest_of(origin))
        } else {
            None
        };
        let gone = goes.and_then(|id| self.waiting.remove(&id));
        let id = self.next;
        self.next += 1;
        self.waiting.insert(id, (origin, what));
        (id, gone.map(|(_, what)| what))
    }

    /// It waits no longer.
    pub(super) fn leave(&mut self, id: u64) {
        self.waiting.remove(&id);
    }

    fn oldest_of(&self, origin: Origin) -> Option<u64> {
        let mut of_it = self.waiting.iter().filter(|(_, (of, _))| *of == origin);
        of_it.next().map(|(id, _)| *id)
    }

    /// The address with the most connections; of several, the one whose oldest has waited longest.
    fn greediest(&self) -> Option<Origin> {
        let mut counts: HashMap<Origin, (usize, u64)> = HashMap::new();
        for (id, (origin, _)) in &self.waiting {
            counts.entry(*origin).or_insert((0, *id)).0 += 1;
        }
        let most = counts
            .into_iter()
            .max_by_key(|(_, (count, oldest))| (*count, std::cmp::Reverse(*oldest)));
        most.map(|(origin, _)| origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(n: u32) -> Origin {
        Origin::of(IpAddr::from(n.to_be_bytes()))
    }

    #[test]
    fn a_subscriber_is_one_origin() {
        let of = |ip: &str| Origin::of(ip.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:0:0:2"));
        assert_ne!(of("2001:db8:0:1::1"), of("2001:db8:0:2::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    /// 10,000 silent connections of one address leave the others theirs.
    #[test]
    fn an_address_that_floods_costs_only_itself() {
        let mut arrivals = Arrivals::default();
        let (honest, gone) = arrivals.enter(origin(1), "honest");
        assert!(gone.is_none());
        for _ in 0..10_000 {
            let (_, gone) = arrivals.enter(origin(2), "silent");
            assert_ne!(gone, Some("honest"));
            assert!(arrivals.waiting.len() <= MOST_OF_ONE + 1);
        }
        assert!(arrivals.waiting.contains_key(&honest));
        arrivals.leave(honest);
        assert_eq!(arrivals.waiting.len(), MOST_OF_ONE);
    }

    /// Many addresses fill the room: whoever comes then gets in, and the greediest lose their oldest.
    #[test]
    fn a_full_room_sheds_the_longest_silent_of_who_holds_the_most() {
        let mut arrivals = Arrivals::default();
        for n in 0..MOST as u32 {
            assert!(arrivals.enter(origin(n % 16), n).1.is_none());
        }
        let (honest, gone) = arrivals.enter(origin(99), 1000);
        assert_eq!(gone, Some(0), "the very first of sixteen equally greedy");
        for n in 0..200 {
            assert_ne!(arrivals.enter(origin(n % 16), 2000 + n).1, Some(1000));
        }
        assert!(arrivals.waiting.contains_key(&honest));
        assert_eq!(arrivals.waiting.len(), MOST);
    }
}
