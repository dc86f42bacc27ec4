//! Which rules nobody gets to: those of which earlier ones take all.
//!
//! A pattern covers another one where every name that the other matches is matched by it. That is looked for by matching it against the
//! other's text, in which `?` is some one character and `*` some run of them. So what is found is true; a few odd pairs (`*?` and `*a`)
//! are not found.

use super::yaml::Section;
use auralink_proto::policy::{Glob, Rule};

/// Steps of comparing that one file may take: a thousand rules with patterns of ten characters.
const STEPS: usize = 100_000_000;

/// A character of a pattern.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sign {
    Is(char),
    Any,
    Run,
}

/// A pattern whose runs of wildcards are in one order: each `?` before the `*`, and that once.
struct Pattern(Vec<Sign>);

impl Pattern {
    fn of(glob: &Glob) -> Self {
        let mut signs = Vec::new();
        let mut run = false;
        for c in glob.as_str().chars() {
            match c {
                '*' => run = true,
                '?' => signs.push(Sign::Any),
                c => {
                    if std::mem::take(&mut run) {
                        signs.push(Sign::Run);
                    }
                    signs.push(Sign::Is(c));
                }
            }
        }
        if run {
            signs.push(Sign::Run);
        }
        Self(signs)
    }

    fn any() -> Self {
        Self(vec![Sign::Run])
    }

    /// Every name that `other` matches is matched by this one. As `Glob::matches`: the shortest run first, no way back behind it.
    fn covers(&self, other: &Self) -> bool {
        let (pattern, text) = (&self.0, &other.0);
        let (mut p, mut t) = (0, 0);
        let mut retry: Option<(usize, usize)> = None;
        loop {
            match (pattern.get(p), text.get(t)) {
                (Some(Sign::Run), _) => {
                    p += 1;
                    retry = Some((p, t));
                }
                (Some(Sign::Any), Some(Sign::Is(_) | Sign::Any)) => (p, t) = (p + 1, t + 1),
                (Some(Sign::Is(a)), Some(Sign::Is(b))) if a == b => (p, t) = (p + 1, t + 1),
                (None, None) => return true,
                _ => {
                    let Some((after, from)) = &mut retry else {
                        return false;
                    };
                    if *from >= text.len() {
                        return false;
                    }
                    *from += 1;
                    (p, t) = (*after, *from);
                }
            }
        }
    }
}

/// One rule's patterns.
struct Patterns {
    rooms: Vec<Pattern>,
    identities: Vec<Pattern>,
    api_keys: Vec<Pattern>,
}

impl Patterns {
    fn of(rule: &Rule) -> Self {
        let all = |globs: &[Glob]| globs.iter().map(Pattern::of).collect::<Vec<_>>();
        let or_any = |globs: &[Glob]| match all(globs) {
            none if none.is_empty() => vec![Pattern::any()],
            some => some,
        };
        Self {
            rooms: all(&rule.rooms),
            identities: or_any(&rule.identities),
            api_keys: or_any(&rule.api_keys),
        }
    }
}

/// The rules so far.
pub(super) struct Reach {
    earlier: Vec<Patterns>,
    steps: usize,
}

impl Reach {
    pub(super) fn new() -> Self {
        Self {
            earlier: Vec::new(),
            steps: STEPS,
        }
    }

    /// Says so where nobody gets to the next rule, or not by one of its patterns.
    pub(super) fn next(&mut self, rule: &Rule, section: &Section<'_>, everything: Option<&str>) {
        let patterns = Patterns::of(rule);
        let key = section.path("match");
        let here = key.trim_end_matches(".match");
        let taken: Vec<Option<Vec<usize>>> = patterns
            .rooms
            .iter()
            .map(|room| self.taken(room, &patterns))
            .collect();
        let names = |mut rules: Vec<usize>| {
            rules.sort_unstable();
            rules.dedup();
            let names: Vec<String> = rules.iter().map(|n| format!("rooms[{n}]")).collect();
            names.join(" and ")
        };
        if let Some(everything) = everything {
            let message = format!("is never reached: {everything} is for everyone in every room");
            section.found.warning(section.id, here, message);
        } else if !taken.is_empty() && taken.iter().all(Option::is_some) {
            let by = names(taken.into_iter().flatten().flatten().collect());
            let message = format!(
                "is never reached: {by} before it takes all that it is for; the first rule that fits wins, so put the narrower one first"
            );
            section.found.warning(section.id, here, message);
        } else {
            for (glob, by) in rule.rooms.iter().zip(taken) {
                if let Some(by) = by {
                    let by = names(by);
                    let message = format!("\"{glob}\" is never reached: {by} before it takes it");
                    section
                        .found
                        .warning(section.found.id(&key), &*key, message);
                }
            }
        }
        self.earlier.push(patterns);
    }

    /// The earlier rules that together take all who come by this room's pattern; none: something is left, or it can't be told.
    fn taken(&mut self, room: &Pattern, of: &Patterns) -> Option<Vec<usize>> {
        let mut by = Vec::new();
        for identity in &of.identities {
            for api_key in &of.api_keys {
                by.push(self.takes(room, identity, api_key)?);
            }
        }
        Some(by)
    }

    fn takes(&mut self, room: &Pattern, identity: &Pattern, api_key: &Pattern) -> Option<usize> {
        if self.steps == 0 {
            return None;
        }
        let (earlier, steps) = (&self.earlier, &mut self.steps);
        let mut any = |patterns: &[Pattern], of: &Pattern| {
            patterns.iter().any(|pattern| {
                *steps = steps.saturating_sub(pattern.0.len() * of.0.len() + 1);
                *steps > 0 && pattern.covers(of)
            })
        };
        earlier.iter().position(|rule| {
            any(&rule.rooms, room)
                && any(&rule.identities, identity)
                && any(&rule.api_keys, api_key)
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Settings;
    use proptest::prelude::*;

    fn covers(a: &str, b: &str) -> bool {
        Pattern::of(&a.parse().unwrap()).covers(&Pattern::of(&b.parse().unwrap()))
    }

    #[test]
    fn what_a_pattern_covers() {
        for (a, b) in [
            ("*", "a"),
            ("*", "*"),
            ("**", "*?"),
            ("a*", "a"),
            ("a*", "ab*c?"),
            ("?*", "*?"),
            ("??", "?a"),
            ("*b*", "abc*"),
            ("*-*", "support-?"),
            ("a*c", "abbc*c"),
        ] {
            assert!(covers(a, b), "{a} covers {b}");
        }
        for (a, b) in [
            ("a", "*"),
            ("a", "?"),
            ("?", "*"),
            ("?", "??"),
            ("a*", "*a"),
            ("a?", "a*"),
            ("A*", "a"),
            ("*b", "ab*"),
            ("a*c", "ac?"),
        ] {
            assert!(!covers(a, b), "{a} does not cover {b}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn what_is_said_to_be_covered_is(
            a in "[ab?*]{1,6}", b in "[ab?*]{1,6}", name in "[ab]{0,7}"
        ) {
            let [wide, narrow]: [Glob; 2] = [a.parse().unwrap(), b.parse().unwrap()];
            prop_assert!(!covers(&a, &b) || !narrow.matches(&name) || wide.matches(&name));
        }
    }

    fn warnings(text: &str) -> Vec<String> {
        let loaded = Settings::parse(text).unwrap();
        loaded
            .warnings
            .iter()
            .map(|w| w.line("f", "warning"))
            .collect()
    }

    #[test]
    fn rules_that_nobody_gets_to_are_named() {
        let text = "rooms:
  - { match: 'support-*', mode: lean }
  - { match: 'support-1', mode: lean }
  - { match: [support-vip, lobby], mode: lean }
  - { match: lobby, identities: 'agent-*', mode: lean }
  - { match: x, identities: a, mode: lean }
  - { match: x, identities: [b, 'c*'], mode: lean }
  - { match: x, identities: [a, b, cd], mode: lean }
  - { match: x, identities: [a, d], mode: lean }
  - { match: y, api_keys: 'API*', mode: lean }
  - { match: y, api_keys: 'API1', identities: z, mode: lean }
  - { match: y, mode: lean }
";
        let all = warnings(text);
        let expected = [
            "f:3:5: warning: rooms[1]: is never reached: rooms[0] before it takes all that it is for",
            "f:4:14: warning: rooms[2].match: \"support-vip\" is never reached: rooms[0] before it takes it",
            "f:5:5: warning: rooms[3]: is never reached: rooms[2] before it takes all that it is for",
            "f:8:5: warning: rooms[6]: is never reached: rooms[4] and rooms[5] before it takes all that it is for",
            "f:11:5: warning: rooms[9]: is never reached: rooms[8] before it takes all that it is for",
        ];
        assert_eq!(all.len(), expected.len(), "{all:#?}");
        for (said, expected) in all.iter().zip(expected) {
            assert!(said.starts_with(expected), "{said}");
        }
    }

    #[test]
    fn a_file_full_of_rules_is_read_all_the_same() {
        let rules: String = (0..8000)
            .map(|n| format!("- {{match: '*a{n}*', mode: lean}}\n"))
            .collect();
        assert!(Settings::parse(&format!("rooms:\n{rules}")).is_ok());
    }
}
