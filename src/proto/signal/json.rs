//! protojson text (protobuf.dev/programming-guides/json), patched by splicing: only the value that
//! changes is written anew, so numbers, spacing and unknown members stay as they were.

use std::ops::Range;

use super::SignalError;

/// A member name of a message in both of the spellings that protojson accepts.
pub(super) fn same_name(key: &str, camel: &str) -> bool {
    key == camel || key == snake(camel)
}

/// `syncState` → `sync_state`.
pub(super) fn snake(camel: &str) -> String {
    let mut out = String::with_capacity(camel.len() + 4);
    for c in camel.chars() {
        if c.is_ascii_uppercase() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

/// Replaces the strings at the end of a path of member names, wherever it occurs. `text` must be
/// valid JSON.
///
/// # Errors
/// When a member on the path is repeated or not of the type it has to be, or what `replace` returns.
pub(super) fn patch_string(
    text: &str,
    path: &[&str],
    replace: &mut dyn FnMut(&str) -> Result<Option<String>, SignalError>,
) -> Result<Option<String>, SignalError> {
    let Some(span) = find(text, path)? else {
        return Ok(None);
    };
    let raw = text.get(span.clone()).unwrap_or("");
    if raw == "null" {
        return Ok(None);
    }
    let old: String = serde_json::from_str(raw).map_err(|e| SignalError::Json(e.to_string()))?;
    let Some(new) = replace(&old)? else {
        return Ok(None);
    };
    let new = serde_json::to_string(&new).map_err(|e| SignalError::Json(e.to_string()))?;
    Ok(Some(splice(text, span, &new)))
}

/// Keeps only those elements of the array at the end of a path for which `keep` holds; it is given
/// the element's text. `None` when all stay or there is no such array.
///
/// # Errors
/// As [`patch_string`].
pub(super) fn filter_array(
    text: &str,
    path: &[&str],
    keep: &mut dyn FnMut(&str) -> bool,
) -> Result<Option<String>, SignalError> {
    let Some(span) = find(text, path)? else {
        return Ok(None);
    };
    let mut cursor = Cursor::new(text, span.start);
    if cursor.peek() != Some(b'[') {
        return Ok(None);
    }
    let elements = cursor.elements()?;
    let kept: Vec<&str> = elements
        .iter()
        .filter_map(|element| text.get(element.clone()))
        .filter(|element| keep(element))
        .collect();
    if kept.len() == elements.len() {
        return Ok(None);
    }
    let new = format!("[{}]", kept.join(","));
    Ok(Some(splice(text, span, &new)))
}

fn splice(text: &str, span: Range<usize>, new: &str) -> String {
    let before = text.get(..span.start).unwrap_or("");
    let after = text.get(span.end..).unwrap_or("");
    [before, new, after].concat()
}

/// Where the value at the end of the path stands.
fn find(text: &str, path: &[&str]) -> Result<Option<Range<usize>>, SignalError> {
    let mut span = 0..text.len();
    for name in path {
        let mut cursor = Cursor::new(text, span.start);
        if cursor.peek() != Some(b'{') {
            return Ok(None);
        }
        let mut found = None;
        for (key, value) in cursor.members()? {
            if same_name(&key, name) && found.replace(value).is_some() {
                return Err(SignalError::Json(format!("member {name} is repeated")));
            }
        }
        match found {
            Some(value) => span = value,
            None => return Ok(None),
        }
    }
    Ok(Some(span))
}

/// Walks over JSON text that a parser has accepted; it only has to find where values end.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn new(text: &'a str, at: usize) -> Self {
        Self { text, at }
    }

    /// The next byte that is not white space, which stays unread.
    fn peek(&mut self) -> Option<u8> {
        let rest = self.text.as_bytes().get(self.at..)?;
        let skip = rest.iter().position(|b| !b.is_ascii_whitespace())?;
        self.at += skip;
        rest.get(skip).copied()
    }

    fn expect(&mut self, wanted: u8) -> Result<(), SignalError> {
        if self.peek() == Some(wanted) {
            self.at += 1;
            return Ok(());
        }
        Err(SignalError::Json(format!(
            "expected {} at byte {}",
            char::from(wanted),
            self.at
        )))
    }

    /// After a value: true where another one follows, false at the closing bracket.
    fn more(&mut self, close: u8) -> Result<bool, SignalError> {
        if self.peek() == Some(b',') {
            self.at += 1;
            return Ok(true);
        }
        self.expect(close)?;
        Ok(false)
    }

    fn members(&mut self) -> Result<Vec<(String, Range<usize>)>, SignalError> {
        self.expect(b'{')?;
        let mut members = Vec::new();
        if self.peek() == Some(b'}') {
            return Ok(members);
        }
        loop {
            let key = self.value()?;
            let key = self.text.get(key).unwrap_or("");
            let key = serde_json::from_str(key).map_err(|e| SignalError::Json(e.to_string()))?;
            self.expect(b':')?;
            let value = self.value()?;
            members.push((key, value));
            if !self.more(b'}')? {
                return Ok(members);
            }
        }
    }

    fn elements(&mut self) -> Result<Vec<Range<usize>>, SignalError> {
        self.expect(b'[')?;
        let mut elements = Vec::new();
        if self.peek() == Some(b']') {
            return Ok(elements);
        }
        loop {
            elements.push(self.value()?);
            if !self.more(b']')? {
                return Ok(elements);
            }
        }
    }

    /// Reads over one value and returns where it stands.
    fn value(&mut self) -> Result<Range<usize>, SignalError> {
        let end = || SignalError::Json("ends within a value".to_owned());
        let first = self.peek().ok_or_else(end)?;
        let start = self.at;
        let bytes = self.text.as_bytes();
        let mut depth = 0_usize;
        let mut in_string = false;
        let scalar = !matches!(first, b'"' | b'{' | b'[');
        loop {
            let Some(&byte) = bytes.get(self.at) else {
                // Only a number at top level ends with the text.
                return if scalar {
                    Ok(start..self.at)
                } else {
                    Err(end())
                };
            };
            if in_string {
                match byte {
                    b'\\' => self.at += 1,
                    b'"' => in_string = false,
                    _ => {}
                }
            } else {
                match byte {
                    b'"' => in_string = true,
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' if scalar => return Ok(start..self.at),
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    b',' if scalar => return Ok(start..self.at),
                    byte if scalar && byte.is_ascii_whitespace() => return Ok(start..self.at),
                    _ => {}
                }
            }
            self.at += 1;
            if depth == 0 && !in_string && !scalar {
                return Ok(start..self.at);
            }
        }
    }
}
