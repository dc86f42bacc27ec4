//! Strangers' text where people read it: names of rooms and participants, paths, details of errors.

use std::fmt::{self, Write};

/// As long as LiveKit's default limit for the name of a room (`limit.max_room_name_length`, 256) and no longer.
const MAX_CHARS: usize = 256;

/// Displays a text in one line of bounded length, whatever is in it: control characters, line separators, bidirectional overrides and all else that
/// does not show as itself are escaped as in a Rust literal, and so is the backslash, so that no text looks like the escape of
/// another. What goes into a log, or into an error that may be logged, goes through this.
#[derive(Clone, Copy)]
pub(crate) struct Shown<'a>(pub(crate) &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut chars = self.0.chars();
        for c in chars.by_ref().take(MAX_CHARS) {
            match c {
                '\'' | '"' => f.write_char(c)?,
                // Printable ones stay; category Cc, Cf, Zl, Zp and the like don't.
                c => write!(f, "{}", c.escape_debug())?,
            }
        }
        if chars.next().is_some() {
            f.write_char('…')?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Names that would do harm if they were displayed as they are.
    pub(crate) const EVIL: [&str; 7] = [
        "a\nERROR forged=1",
        "a\r\n\tb",
        "\u{1b}[2J\u{1b}[31mred",
        "\u{9b}31m",
        "\u{202e}txt.exe\u{2066}\u{2069}\u{200f}",
        "a\u{2028}b\u{2029}c\u{85}d",
        "zero\u{200b}width\u{feff}\u{0}\u{7f}",
    ];

    /// Whether a line could be taken for something else.
    pub(crate) fn is_evil(line: &str) -> bool {
        line.chars().any(|c| {
            c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
        })
    }

    #[test]
    fn nothing_shows_as_what_it_is_not() {
        for evil in EVIL {
            assert!(is_evil(evil));
            let shown = Shown(evil).to_string();
            assert!(!is_evil(&shown), "{shown}");
        }
        assert_eq!(
            Shown("a\n\\n").to_string(),
            "a\\n\\\\n",
            "no two look alike"
        );
        for plain in ["support-1", "Büro \"Süd\"", "会議室", "🎉 it's"] {
            assert_eq!(Shown(plain).to_string(), plain);
        }
        assert_eq!(
            Shown(&"x".repeat(300)).to_string().chars().count(),
            MAX_CHARS + 1
        );
        assert!(Shown(&"\u{202e}".repeat(1 << 20)).to_string().len() < 3 * 1024);
    }
}
