//! Which mode and limits a participant gets: the `defaults:` and `rooms:` part of the
//! configuration, resolved once for each session. Pure data and matching: reading the file is the
//! root package's work.

use crate::ladder::Rung;
use std::fmt;
use std::str::FromStr;

/// Longest glob accepted, in bytes. LiveKit caps room names and identities at 256 by default.
pub const MAX_GLOB: usize = 256;

/// What a room's media goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mode {
    /// Pure relay: as if the sidecar were not there.
    #[default]
    Off,
    /// Stock clients on both sides, steered through SDP, redundancy shed where nothing is lost.
    Lean,
    /// Speech is coded between two AuraLinks; towards anyone else it is relayed, but for what `recode` and `video` say.
    Neural,
}

impl Mode {
    /// As configuration, metrics and `/status.json` spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Lean => "lean",
            Self::Neural => "neural",
        }
    }

    /// The rung that speech takes between two AuraLinks where policy names none.
    #[must_use]
    pub const fn rung(self) -> Rung {
        match self {
            Self::Off => Rung::NATIVE,
            Self::Lean => Rung::L4,
            Self::Neural => Rung::L2,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What happens to redundant audio (RED, RFC 2198).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RedPolicy {
    /// Not asked of the publisher; shed towards a subscriber while it reports under 2 % loss and
    /// given back when it reports more.
    #[default]
    Auto,
    /// Left as client and server negotiate it.
    Keep,
    /// Never sent, however much is lost.
    Off,
}

impl RedPolicy {
    /// As configuration spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Keep => "keep",
            Self::Off => "off",
        }
    }
}

/// Which subscribers get speech coded anew at a lower rate ([`AudioPolicy::recode`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RecodeFor {
    /// Every one that the rule is for.
    All,
    /// Those whose own receiver reports tell of 2 % loss or more, until 30 s have gone by without.
    #[default]
    Lossy,
}

impl RecodeFor {
    /// As configuration spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Lossy => "lossy",
        }
    }
}

/// Limits for speech tracks. Stereo and music tracks are never touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AudioPolicy {
    /// What a publisher's encoder is steered to, in bits a second of Opus payload (6,000 to
    /// 510,000, RFC 6716 section 2.1.1).
    pub max_bitrate: u32,
    /// Speech a packet carries, in milliseconds: 20, 40 or 60.
    pub packet_ms: u16,
    /// What happens to RED.
    pub red: RedPolicy,
    /// Speech that a steered publisher sent at a low rate is enhanced and handed to LiveKit at the
    /// engine's local rate.
    pub enhance: bool,
    /// Speech goes to constrained subscribers on this rung, L3 to L6, as ordinary Opus; native: as LiveKit sends it.
    pub recode: Rung,
    /// Who is constrained.
    pub recode_for: RecodeFor,
}

impl Default for AudioPolicy {
    fn default() -> Self {
        Self {
            max_bitrate: 12_000,
            packet_ms: 40,
            red: RedPolicy::Auto,
            enhance: false,
            recode: Rung::NATIVE,
            recode_for: RecodeFor::Lossy,
        }
    }
}

/// The codec that camera publishers are steered to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum VideoCodec {
    /// The publisher's own choice.
    #[default]
    Keep,
    /// VP9 with spatial layers (SVC).
    Vp9,
    /// AV1 with spatial layers (SVC).
    Av1,
}

impl VideoCodec {
    /// As configuration spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Vp9 => "vp9",
            Self::Av1 => "av1",
        }
    }

    /// The MIME type in LiveKit's `enabled_publish_codecs`; none for [`VideoCodec::Keep`].
    #[must_use]
    pub const fn mime(self) -> Option<&'static str> {
        match self {
            Self::Keep => None,
            Self::Vp9 => Some("video/VP9"),
            Self::Av1 => Some("video/AV1"),
        }
    }
}

/// Limits for video tracks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct VideoPolicy {
    /// What publishers are steered to. LiveKit takes one list of codecs for a participant, so that it
    /// is for screen share as well.
    pub codec: VideoCodec,
    /// Bits a second over all layers of a track; none: not limited.
    pub max_bitrate: Option<u32>,
    /// `max_bitrate` is for screen share as well; otherwise its bitrate is left alone.
    pub screen_share: bool,
}

/// Everything that policy says about one participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Policy {
    /// What its media goes through. With [`Mode::Off`] the rest has no effect.
    pub mode: Mode,
    /// Speech.
    pub audio: AudioPolicy,
    /// Where it isn't the mode's own ([`Mode::rung`]): the rung of speech between two AuraLinks.
    pub rung: Option<Rung>,
    /// The room is told, by a participant attribute, whose speech is coded.
    pub disclose: bool,
    /// Video; none: left alone.
    pub video: Option<VideoPolicy>,
    /// Of the configuration it came from: 1 for the one the process started with, one more for
    /// each reload that changed something. A session keeps the one it began with.
    pub generation: u64,
}

impl Policy {
    /// The rung that speech takes between two AuraLinks.
    #[must_use]
    pub fn rung(&self) -> Rung {
        match self.mode {
            Mode::Off => Rung::NATIVE,
            mode => self.rung.unwrap_or(mode.rung()),
        }
    }

    /// Whether it wants what only models can do: a neural rung, or the voice detector, without which nothing is coded below L4.
    #[must_use]
    pub fn wants_models(&self) -> bool {
        let wants = |rung: Rung| rung != Rung::NATIVE && rung < Rung::L4;
        self.mode != Mode::Off && (wants(self.rung()) || wants(self.audio.recode))
    }
}

/// Why a glob is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GlobError {
    /// An empty pattern would match nothing that LiveKit accepts.
    #[error("an empty pattern matches nothing (write \"*\" for everything)")]
    Empty,
    /// Over [`MAX_GLOB`].
    #[error("the pattern is {0} bytes long (at most {MAX_GLOB} are allowed)")]
    TooLong(usize),
    /// Characters that mean something in other glob dialects, or nothing a name can hold.
    #[error(
        "{0:?} is not allowed in a pattern (`*` matches any run of characters and `?` any one; there are no classes, alternatives or escapes)"
    )]
    Character(char),
}

/// A pattern over whole names: `*` is any run of characters, also none, `?` exactly one character;
/// all else is itself, case and all. There is no escape: `?` matches a literal `*` too.
///
/// Matching takes at most pattern × name steps, both bounded, whatever the pattern: no backtracking
/// into an earlier `*`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Glob(Box<str>);

impl Glob {
    /// The pattern that matches every name.
    #[must_use]
    pub fn any() -> Self {
        Self("*".into())
    }

    /// The pattern as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// It matches every name.
    #[must_use]
    pub fn is_any(&self) -> bool {
        self.0.bytes().all(|b| b == b'*')
    }

    /// The whole of `name` is what the pattern describes.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let mut pattern = self.0.chars();
        let mut rest = name.chars();
        // Where to go on when what followed the last `*` did not fit: the pattern after that `*`,
        // and the name with one more character given to it.
        let mut retry: Option<(std::str::Chars<'_>, std::str::Chars<'_>)> = None;
        loop {
            let mut ahead = pattern.clone();
            let mut name_ahead = rest.clone();
            match (ahead.next(), name_ahead.next()) {
                (Some('*'), _) => {
                    pattern = ahead;
                    retry = Some((pattern.clone(), rest.clone()));
                }
                (Some(p), Some(n)) if p == '?' || p == n => {
                    pattern = ahead;
                    rest = name_ahead;
                }
                (None, None) => return true,
                _ => {
                    // The shortest run for the last `*` was wrong: one character more. An earlier
                    // `*` need not be tried again: it already took the least it could.
                    let Some((after, from)) = &mut retry else {
                        return false;
                    };
                    if from.next().is_none() {
                        return false;
                    }
                    pattern = after.clone();
                    rest = from.clone();
                }
            }
        }
    }
}

impl FromStr for Glob {
    type Err = GlobError;

    fn from_str(text: &str) -> Result<Self, GlobError> {
        if text.is_empty() {
            return Err(GlobError::Empty);
        }
        if text.len() > MAX_GLOB {
            return Err(GlobError::TooLong(text.len()));
        }
        // A class or an alternative taken literally would match nothing, and say nothing.
        let odd = |c: &char| matches!(c, '[' | ']' | '{' | '}' | '\\') || c.is_control();
        if let Some(c) = text.chars().find(odd) {
            return Err(GlobError::Character(c));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One entry of `rooms:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Room names, any of them.
    pub rooms: Vec<Glob>,
    /// Participant identities, any of them; empty: every participant.
    pub identities: Vec<Glob>,
    /// API keys that signed the token (its `iss`), any of them; empty: every key.
    pub api_keys: Vec<Glob>,
    /// What it gives, already laid over the defaults.
    pub policy: Policy,
}

impl Rule {
    /// It is for this room, perhaps not for everyone in it.
    #[must_use]
    pub fn covers_room(&self, room: &str) -> bool {
        self.rooms.iter().any(|g| g.matches(room))
    }

    /// It is for everyone in the rooms it covers.
    #[must_use]
    pub fn is_for_everyone(&self) -> bool {
        let any = |globs: &[Glob]| globs.is_empty() || globs.iter().any(Glob::is_any);
        any(&self.identities) && any(&self.api_keys)
    }

    /// No later rule can be reached.
    #[must_use]
    pub fn takes_everything(&self) -> bool {
        self.is_for_everyone() && self.rooms.iter().any(Glob::is_any)
    }

    fn matches(&self, room: &str, identity: &str, api_key: &str) -> bool {
        let any =
            |globs: &[Glob], name: &str| globs.is_empty() || globs.iter().any(|g| g.matches(name));
        self.covers_room(room) && any(&self.identities, identity) && any(&self.api_keys, api_key)
    }
}

/// All rules of one configuration, in the file's order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    defaults: Policy,
    rules: Vec<Rule>,
}

impl Rules {
    /// `defaults` is what a participant gets that no rule is for.
    #[must_use]
    pub fn new(defaults: Policy, rules: Vec<Rule>, generation: u64) -> Self {
        Self { defaults, rules }.with_generation(generation)
    }

    /// The same rules under another generation.
    #[must_use]
    pub fn with_generation(mut self, generation: u64) -> Self {
        self.defaults.generation = generation;
        for rule in &mut self.rules {
            rule.policy.generation = generation;
        }
        self
    }

    /// Of the configuration these came from.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.defaults.generation
    }

    /// What a participant gets that no rule is for.
    #[must_use]
    pub const fn defaults(&self) -> &Policy {
        &self.defaults
    }

    /// In the file's order.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Whether anybody may get what wants models ([`Policy::wants_models`]).
    #[must_use]
    pub fn want_models(&self) -> bool {
        // A rule that stands behind one for everyone is reported when the file is read.
        let rules = self.rules.iter().map(|rule| &rule.policy);
        rules
            .chain([&self.defaults])
            .any(|policy| policy.wants_models())
    }

    /// What the participant gets: the first rule that is for it, or the defaults.
    #[must_use]
    pub fn resolve(&self, room: &str, identity: &str, api_key: &str) -> Policy {
        self.find(room, identity, api_key)
            .map_or(self.defaults, |(_, rule)| rule.policy)
    }

    /// The first rule that is for the participant, with its place in the file's list from 0.
    #[must_use]
    pub fn find(&self, room: &str, identity: &str, api_key: &str) -> Option<(usize, &Rule)> {
        self.rules
            .iter()
            .enumerate()
            .find(|(_, r)| r.matches(room, identity, api_key))
    }
}

#[cfg(test)]
mod tests {
    // How long a hostile pattern takes is measured by the real clock.
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]
    use super::*;
    use proptest::prelude::*;

    fn glob(text: &str) -> Glob {
        text.parse().unwrap()
    }

    #[test]
    fn globs_match_whole_names() {
        for (pattern, yes, no) in [
            (
                "support-*",
                &["support-", "support-1", "support-a-b"][..],
                &["support", "xsupport-1", "Support-1"][..],
            ),
            ("*", &["", "a", "ü"], &[]),
            ("**", &["", "abc"], &[]),
            ("?", &["a", "ü", "*"], &["", "ab"]),
            ("a?c", &["abc", "aüc"], &["ac", "abbc"]),
            (
                "*-east",
                &["r-east", "-east", "a-east-east"],
                &["east", "r-east-"],
            ),
            (
                "a*b*c",
                &["abc", "aXbYc", "abbbc", "abcbc"],
                &["acb", "ab", "abcd"],
            ),
            ("*a?", &["aa", "xaab", "aab"], &["a", "ba"]),
            ("exact", &["exact"], &["exactly", "exac", ""]),
        ] {
            for name in yes {
                assert!(
                    glob(pattern).matches(name),
                    "{pattern} should match {name:?}"
                );
            }
            for name in no {
                assert!(
                    !glob(pattern).matches(name),
                    "{pattern} should not match {name:?}"
                );
            }
        }
    }

    #[test]
    fn bad_globs_say_why() {
        assert_eq!("".parse::<Glob>(), Err(GlobError::Empty));
        assert_eq!(
            "a".repeat(257).parse::<Glob>(),
            Err(GlobError::TooLong(257))
        );
        for c in ['[', ']', '{', '}', '\\', '\n', '\0'] {
            assert_eq!(
                format!("a{c}").parse::<Glob>(),
                Err(GlobError::Character(c))
            );
        }
        assert!("a".repeat(256).parse::<Glob>().is_ok());
    }

    #[test]
    fn a_hostile_glob_stays_cheap() {
        // Exponential for a matcher that backtracks into every `*`.
        let pattern = glob(&("*a".repeat(127) + "b"));
        let name = "a".repeat(4096);
        assert!(!pattern.matches(&name), "and this returns at all");
    }

    fn rule(rooms: &str, identities: &[&str], api_keys: &[&str], max_bitrate: u32) -> Rule {
        let audio = AudioPolicy {
            max_bitrate,
            ..AudioPolicy::default()
        };
        Rule {
            rooms: vec![glob(rooms)],
            identities: identities.iter().map(|g| glob(g)).collect(),
            api_keys: api_keys.iter().map(|g| glob(g)).collect(),
            policy: Policy {
                mode: Mode::Lean,
                audio,
                ..Policy::default()
            },
        }
    }

    #[test]
    fn the_first_rule_that_is_for_the_participant_wins() {
        let rules = Rules::new(
            Policy::default(),
            vec![
                rule("support-*", &["agent-*"], &[], 1),
                rule("support-*", &[], &["APIx"], 2),
                rule("support-*", &[], &[], 3),
                rule("support-vip", &[], &[], 4),
            ],
            7,
        );
        let rate = |room, identity, key| rules.resolve(room, identity, key).audio.max_bitrate;
        assert_eq!(rate("support-1", "agent-9", "APIx"), 1);
        assert_eq!(rate("support-1", "ann", "APIx"), 2);
        assert_eq!(rate("support-1", "ann", "APIy"), 3);
        assert_eq!(
            rate("support-vip", "ann", "APIy"),
            3,
            "a later, closer rule does not win"
        );
        let other = rules.resolve("lobby", "agent-9", "APIx");
        assert_eq!((other.mode, other.generation), (Mode::Off, 7));
        assert_eq!(rules.resolve("support-1", "a", "b").generation, 7);
        assert_eq!(
            rules.find("support-1", "ann", "APIy").map(|(n, _)| n),
            Some(2)
        );
        assert_eq!(
            rules
                .clone()
                .with_generation(8)
                .resolve("support-1", "a", "b")
                .generation,
            8
        );
    }

    #[test]
    fn a_rule_knows_what_it_covers() {
        assert!(rule("*", &[], &[], 1).takes_everything());
        assert!(rule("*", &["*"], &["**"], 1).takes_everything());
        assert!(!rule("*", &["a"], &[], 1).takes_everything());
        assert!(!rule("a*", &[], &[], 1).takes_everything());
        assert!(rule("a*", &[], &[], 1).is_for_everyone());
    }

    /// The definition, without a thought for speed.
    fn naive(pattern: &[char], name: &[char]) -> bool {
        match (pattern.first(), name.first()) {
            (None, None) => true,
            (Some('*'), _) => {
                naive(&pattern[1..], name) || (!name.is_empty() && naive(pattern, &name[1..]))
            }
            (Some(p), Some(n)) => (*p == '?' || p == n) && naive(&pattern[1..], &name[1..]),
            _ => false,
        }
    }

    #[test]
    fn only_neural_rungs_and_l3_want_models() {
        let policy = |mode, rung, recode| Policy {
            mode,
            rung,
            audio: AudioPolicy {
                recode,
                ..AudioPolicy::default()
            },
            ..Policy::default()
        };
        for (wants, policy) in [
            (false, policy(Mode::Off, Some(Rung::L2), Rung::L3)),
            (false, policy(Mode::Lean, None, Rung::NATIVE)),
            (false, policy(Mode::Lean, None, Rung::L4)),
            (true, policy(Mode::Lean, None, Rung::L3)),
            (true, policy(Mode::Lean, Some(Rung::L1), Rung::NATIVE)),
            (true, policy(Mode::Neural, None, Rung::NATIVE)),
            (false, policy(Mode::Neural, Some(Rung::L4), Rung::NATIVE)),
        ] {
            assert_eq!(policy.wants_models(), wants, "{policy:?}");
            assert_eq!(Rules::new(policy, Vec::new(), 1).want_models(), wants);
            let rule = Rule {
                rooms: vec![Glob::any()],
                identities: Vec::new(),
                api_keys: Vec::new(),
                policy,
            };
            let rules = Rules::new(Policy::default(), vec![rule], 1);
            assert_eq!(rules.want_models(), wants);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn the_matcher_agrees_with_the_naive_one(pattern in "[ab*?ü]{1,8}", name in "[abü*]{0,10}") {
            let p: Vec<char> = pattern.chars().collect();
            let n: Vec<char> = name.chars().collect();
            prop_assert_eq!(glob(&pattern).matches(&name), naive(&p, &n));
        }

        #[test]
        fn no_text_panics(pattern in any::<String>(), name in any::<String>()) {
            if let Ok(glob) = pattern.parse::<Glob>() {
                let _ = glob.matches(&name);
                prop_assert_eq!(glob.to_string(), pattern);
            }
        }
    }
}
