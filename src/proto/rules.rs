//! Which rule a packet of one direction goes by. However many rules and streams there are, that costs one look
//! into a table.

use crate::description::TrackRule;
use crate::packet::RtpHeader;
use foldhash::HashMap;

/// SSRCs that signalling didn't name and of which is remembered what rule they have, or that they have none.
/// Beyond so many all are looked up anew: a participant makes up as many SSRCs as it likes.
const MAX_MET: usize = 4096;

/// What is known of an SSRC that no rule names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Met {
    /// Its MID said so.
    Rule(usize),
    /// Its MID is none of the rules'.
    Another,
    /// It has said no MID yet; it may with its next packet.
    Nameless,
}

/// The rules of one direction, by SSRC and by MID. Both are what a participant chooses, so the tables are seeded: of such as collide it
/// could otherwise make as many as it likes.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    list: Vec<TrackRule>,
    mid_ext_id: Option<u8>,
    by_ssrc: HashMap<u32, usize>,
    by_mid: HashMap<Vec<u8>, usize>,
    met: HashMap<u32, Met>,
    /// Rules that were looked at, all of them where the list was asked for.
    #[cfg(test)]
    pub(crate) looks: std::cell::Cell<u64>,
}

impl Rules {
    /// Takes new rules; `false`: they are those that were.
    pub(crate) fn set(&mut self, rules: Vec<TrackRule>, mid_ext_id: Option<u8>) -> bool {
        if self.list == rules && self.mid_ext_id == mid_ext_id {
            return false;
        }
        self.by_ssrc.clear();
        self.by_mid.clear();
        self.met.clear();
        for (index, rule) in rules.iter().enumerate() {
            // The first one that names it has it.
            for ssrc in &rule.ssrcs {
                self.by_ssrc.entry(*ssrc).or_insert(index);
            }
            if !rule.mid.is_empty() {
                let mid = rule.mid.as_bytes().to_vec();
                self.by_mid.entry(mid).or_insert(index);
            }
        }
        self.list = rules;
        self.mid_ext_id = mid_ext_id;
        true
    }

    pub(crate) fn list(&self) -> &[TrackRule] {
        #[cfg(test)]
        self.looks.set(self.looks.get() + self.list.len() as u64);
        &self.list
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(crate) fn get(&self, index: usize) -> Option<&TrackRule> {
        #[cfg(test)]
        self.looks.set(self.looks.get() + 1);
        self.list.get(index)
    }

    /// The rule of a packet's stream, by SSRC or MID.
    pub(crate) fn find(&mut self, header: &RtpHeader, packet: &[u8]) -> Option<usize> {
        if let Some(index) = self.by_ssrc.get(&header.ssrc) {
            return Some(*index);
        }
        let id = self.mid_ext_id?;
        let before = self.met.get(&header.ssrc).copied();
        match before {
            Some(Met::Rule(index)) => return Some(index),
            Some(Met::Another) => return None,
            Some(Met::Nameless) | None => {}
        }
        let met = match header.extension(packet, id) {
            Some(mid) => self
                .by_mid
                .get(mid)
                .map_or(Met::Another, |index| Met::Rule(*index)),
            None => Met::Nameless,
        };
        if before != Some(met) {
            if self.met.len() >= MAX_MET {
                self.met.clear();
            }
            self.met.insert(header.ssrc, met);
        }
        match met {
            Met::Rule(index) => Some(index),
            Met::Another | Met::Nameless => None,
        }
    }

    /// The rule of a stream that was found by this MID before.
    pub(crate) fn again(&self, ssrc: u32, mid: &str) -> Option<usize> {
        let by_mid = || {
            let index = *self.by_mid.get(mid.as_bytes())?;
            // Where signalling names SSRCs, the others are none of this rule's.
            let rule = self.list.get(index)?;
            rule.ssrcs.is_empty().then_some(index)
        };
        self.by_ssrc.get(&ssrc).copied().or_else(by_mid)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn packet(ssrc: u32, mid: Option<u8>) -> Vec<u8> {
        let mut packet = vec![0x80, 111, 0, 1, 0, 0, 0, 1];
        packet.extend(ssrc.to_be_bytes());
        if let Some(mid) = mid {
            packet[0] |= 0x10;
            packet.extend([0xbe, 0xde, 0, 1, 0x30, mid, 0, 0]);
        }
        packet.push(0);
        packet
    }

    fn find(rules: &mut Rules, ssrc: u32, mid: Option<u8>) -> Option<usize> {
        let packet = packet(ssrc, mid);
        rules.find(&RtpHeader::parse(&packet).unwrap(), &packet)
    }

    fn rules() -> Rules {
        let mut rules = Rules::default();
        let rule = |mid: &str, ssrcs: &[u32]| TrackRule {
            mid: mid.to_owned(),
            ssrcs: ssrcs.to_vec(),
            ..TrackRule::default()
        };
        assert!(rules.set(vec![rule("0", &[]), rule("1", &[7, 8])], Some(3)));
        rules
    }

    #[test]
    fn a_stream_is_found_by_its_ssrc_or_by_a_mid_that_it_said_once() {
        let mut rules = rules();
        assert_eq!(find(&mut rules, 8, None), Some(1));
        assert_eq!(find(&mut rules, 9, None), None);
        assert_eq!(find(&mut rules, 9, Some(b'0')), Some(0));
        assert_eq!(find(&mut rules, 9, None), Some(0), "it said so before");
        assert_eq!(find(&mut rules, 10, Some(b'5')), None);
        assert_eq!(rules.again(9, "0"), Some(0));
        assert_eq!(rules.again(9, "1"), None, "that one names its SSRCs");
        let list = rules.list().to_vec();
        assert!(!rules.set(list.clone(), Some(3)));
        assert!(rules.set(list, None));
        assert_eq!(find(&mut rules, 9, None), None, "what was learned is void");
    }

    #[test]
    fn made_up_ssrcs_fill_nothing() {
        let mut rules = rules();
        for ssrc in 100..100_000 {
            let mid = [Some(b'0'), Some(b'9'), None][(ssrc % 3) as usize];
            find(&mut rules, ssrc, mid);
            assert!(rules.met.len() <= MAX_MET);
        }
        assert_eq!(find(&mut rules, 8, None), Some(1));
    }
}
