//! YAML with places: a tree whose every node can be found again in the text, and a reader over it
//! that collects every mistake instead of stopping at the first.
//!
//! serde_yaml gives a line and a column only to the error it stops at. So the tree numbers its nodes
//! in reading order, and the place of node n is where a second reading stops that is told to fail at
//! n ([`place`]). That costs one more pass for each reported mistake and nothing for a good file.

use super::{Place, Problem};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The number of a node in reading order.
pub(super) type Id = u32;

/// More mistakes than this are not listed.
const MAX_PROBLEMS: usize = 50;

#[derive(Debug)]
pub(super) struct Node {
    id: Id,
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    /// In the file's order; keys may repeat, the reader says so.
    Map(Vec<(Node, Node)>),
}

impl Node {
    /// What stands there, for messages: short, and on one line.
    pub(super) fn shown(&self) -> String {
        match &self.kind {
            Kind::Null => "nothing".into(),
            Kind::Bool(b) => b.to_string(),
            Kind::Int(n) => n.to_string(),
            Kind::Float(n) => n.to_string(),
            Kind::Text(t) if t.chars().count() > 60 => {
                format!("{:?}…", t.chars().take(60).collect::<String>())
            }
            Kind::Text(t) => format!("{t:?}"),
            Kind::List(_) => "a list".into(),
            Kind::Map(_) => "a mapping".into(),
        }
    }
}

struct Reading {
    next: Cell<Id>,
    stop: Option<Id>,
}

impl Reading {
    fn node<E: serde::de::Error>(&self) -> Result<Id, E> {
        let id = self.next.get();
        self.next.set(id.saturating_add(1));
        if self.stop == Some(id) {
            Err(E::custom("here"))
        } else {
            Ok(id)
        }
    }
}

impl<'de> DeserializeSeed<'de> for &Reading {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Node, D::Error> {
        from.deserialize_any(self)
    }
}

/// `visit_*` for what needs no more than a conversion.
macro_rules! scalars {
    ($($visit:ident($from:ty) => $kind:expr;)*) => {$(
        fn $visit<E: serde::de::Error>(self, value: $from) -> Result<Node, E> {
            let convert: fn($from) -> Kind = $kind;
            Ok(Node { id: self.node()?, kind: convert(value) })
        }
    )*};
}

impl<'de> Visitor<'de> for &Reading {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("plain YAML without tags")
    }

    scalars! {
        visit_bool(bool) => Kind::Bool;
        visit_i64(i64) => |n| Kind::Int(n.into());
        visit_u64(u64) => |n| Kind::Int(n.into());
        visit_i128(i128) => Kind::Int;
        visit_u128(u128) => |n| Kind::Int(i128::try_from(n).unwrap_or(i128::MAX));
        visit_f64(f64) => Kind::Float;
        visit_str(&str) => |t| Kind::Text(t.to_owned());
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Node, E> {
        Ok(Node {
            id: self.node()?,
            kind: Kind::Null,
        })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Node, A::Error> {
        let id = self.node()?;
        let mut items = Vec::new();
        while let Some(item) = from.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Node {
            id,
            kind: Kind::List(items),
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Node, A::Error> {
        let id = self.node()?;
        let mut entries = Vec::new();
        while let Some(key) = from.next_key_seed(self)? {
            if matches!(key.kind, Kind::List(_) | Kind::Map(_)) {
                return Err(A::Error::custom("a key must be a word"));
            }
            entries.push((key, from.next_value_seed(self)?));
        }
        Ok(Node {
            id,
            kind: Kind::Map(entries),
        })
    }
}

fn read(text: &str, stop: Option<Id>) -> Result<Node, serde_yaml::Error> {
    let reading = Reading {
        next: Cell::new(0),
        stop,
    };
    (&reading).deserialize(serde_yaml::Deserializer::from_str(text))
}

/// The tree of `text`; an empty text is an empty mapping.
pub(super) fn parse(text: &str) -> Result<Node, Problem> {
    if text
        .lines()
        .all(|l| l.trim_start().starts_with('#') || l.trim().is_empty())
    {
        return Ok(Node {
            id: 0,
            kind: Kind::Null,
        });
    }
    read(text, None).map_err(|error| {
        let place = error.location().map(|l| Place {
            line: l.line(),
            column: l.column(),
        });
        let mut message = error.to_string();
        if let Some(Place { line, column }) = place {
            message = message.replacen(&format!(" at line {line} column {column}"), "", 1);
        }
        Problem {
            place,
            key: String::new(),
            message: format!("not valid YAML: {message}"),
        }
    })
}

/// Where the node stands in the text that it came from.
pub(super) fn place(text: &str, id: Id) -> Option<Place> {
    let location = read(text, Some(id)).err()?.location()?;
    Some(Place {
        line: location.line(),
        column: location.column(),
    })
}

/// What the reading of one file found.
#[derive(Default)]
pub(super) struct Findings {
    problems: RefCell<Vec<(Id, String, String)>>,
    warnings: RefCell<Vec<(Id, String, String)>>,
    /// Every key that may stand in the file, as far as the reader came: `rooms[].audio.packet`.
    known: RefCell<BTreeSet<String>>,
    /// Every key that stands in it, with its value's node.
    given: RefCell<BTreeMap<String, Id>>,
}

impl Findings {
    pub(super) fn problem(&self, id: Id, key: impl Into<String>, message: impl Into<String>) {
        self.problems
            .borrow_mut()
            .push((id, key.into(), message.into()));
    }

    pub(super) fn warning(&self, id: Id, key: impl Into<String>, message: impl Into<String>) {
        self.warnings
            .borrow_mut()
            .push((id, key.into(), message.into()));
    }

    /// The keys that stand in the file, and their nodes.
    pub(super) fn given(&self) -> BTreeMap<String, Id> {
        self.given.borrow().clone()
    }

    /// Every key that a file may hold; see the field.
    #[cfg(test)]
    pub(super) fn known(&self) -> BTreeSet<String> {
        self.known.borrow().clone()
    }

    /// The key's value, if it stands in the file; the file's first node otherwise.
    pub(super) fn id(&self, key: &str) -> Id {
        self.id_of_either(key, key)
    }

    /// Of what two keys do together: the first that stands in the file.
    pub(super) fn id_of_either(&self, key: &str, other: &str) -> Id {
        let given = self.given.borrow();
        given
            .get(key)
            .or_else(|| given.get(other))
            .copied()
            .unwrap_or(0)
    }

    /// Mistakes and warnings, in the text's order.
    pub(super) fn into_problems(self, text: &str) -> (Vec<Problem>, Vec<Problem>) {
        let finish = |mut list: Vec<(Id, String, String)>| {
            list.sort_by_key(|(id, ..)| *id);
            let left_out = list.len().saturating_sub(MAX_PROBLEMS);
            let mut problems: Vec<_> = list
                .into_iter()
                .take(MAX_PROBLEMS)
                .map(|(id, key, message)| Problem {
                    place: place(text, id),
                    key,
                    message,
                })
                .collect();
            if left_out > 0 {
                let message = format!("{left_out} more mistakes are not listed");
                problems.push(Problem {
                    place: None,
                    key: String::new(),
                    message,
                });
            }
            problems
        };
        (
            finish(self.problems.into_inner()),
            finish(self.warnings.into_inner()),
        )
    }
}

/// A mapping being read: each key that may stand in it is asked for once, then [`Section::done`]
/// reports the rest.
pub(super) struct Section<'a> {
    path: String,
    entries: Vec<(&'a str, &'a Node, &'a Node)>,
    asked: RefCell<Vec<&'static str>>,
    pub(super) found: &'a Findings,
    /// Of the mapping itself.
    pub(super) id: Id,
    /// It is one, or nothing stands there; otherwise that has been reported.
    mapping: bool,
}

impl<'a> Section<'a> {
    /// `node` absent or null: nothing stands in it.
    pub(super) fn new(path: String, node: Option<&'a Node>, found: &'a Findings) -> Self {
        let mut entries: Vec<(&'a str, &'a Node, &'a Node)> = Vec::new();
        let id = node.map_or(0, |n| n.id);
        let name = if path.is_empty() { "the file" } else { &path };
        let mut mapping = true;
        match node.map(|n| &n.kind) {
            None | Some(Kind::Null) => {}
            Some(Kind::Map(pairs)) => {
                for (key, value) in pairs {
                    let Kind::Text(word) = &key.kind else {
                        let message = format!("{} is no key: a key is a word", key.shown());
                        found.problem(key.id, name, message);
                        continue;
                    };
                    if entries.iter().any(|(k, ..)| k == word) {
                        let message = "the key stands here for the second time; keep one of them";
                        found.problem(key.id, join(&path, word), message);
                    } else {
                        entries.push((word, key, value));
                    }
                }
            }
            Some(_) => {
                mapping = false;
                let shown = node.map(Node::shown).unwrap_or_default();
                found.problem(
                    id,
                    name,
                    format!("{shown} stands where a mapping (`key: value`) belongs"),
                );
            }
        }
        Self {
            path,
            entries,
            asked: RefCell::default(),
            found,
            id,
            mapping,
        }
    }

    pub(super) fn path(&self, key: &str) -> String {
        join(&self.path, key)
    }

    fn find(&self, key: &'static str) -> Option<&'a Node> {
        self.asked.borrow_mut().push(key);
        let path = self.path(key);
        self.found.known.borrow_mut().insert(general(&path));
        let (_, _, value) = self.entries.iter().find(|(k, ..)| *k == key)?;
        self.found.given.borrow_mut().insert(path, value.id);
        Some(value)
    }

    /// A mapping below this one.
    pub(super) fn section(&self, key: &'static str) -> Section<'a> {
        Section::new(self.path(key), self.find(key), self.found)
    }

    /// A mapping below this one, and whether it stands there at all.
    pub(super) fn optional_section(&self, key: &'static str) -> (bool, Section<'a>) {
        let node = self.find(key);
        (
            node.is_some(),
            Section::new(self.path(key), node, self.found),
        )
    }

    /// The mappings of a list below this one.
    pub(super) fn sections(&self, key: &'static str) -> Vec<Section<'a>> {
        let node = self.find(key);
        match node.map(|n| &n.kind) {
            None | Some(Kind::Null) => Vec::new(),
            Some(Kind::List(items)) => items
                .iter()
                .enumerate()
                .map(|(i, item)| {
                    Section::new(format!("{}[{i}]", self.path(key)), Some(item), self.found)
                })
                .collect(),
            Some(_) => {
                let (id, shown) = node.map(|n| (n.id, n.shown())).unwrap_or_default();
                self.found.problem(
                    id,
                    self.path(key),
                    format!("{shown} stands where a list (`- …`) belongs"),
                );
                Vec::new()
            }
        }
    }

    /// The key's value, or none if it isn't there or is wrong.
    pub(super) fn optional<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&Node) -> Result<T, String>,
    ) -> Option<T> {
        let node = self.find(key)?;
        self.value(key, node, parse)
    }

    fn value<T>(
        &self,
        key: &str,
        node: &Node,
        parse: impl FnOnce(&Node) -> Result<T, String>,
    ) -> Option<T> {
        let parsed = match node.kind {
            Kind::Null => {
                Err("has no value; give it one, or leave the key out for its default".into())
            }
            _ => parse(node),
        };
        parsed
            .map_err(|message| self.found.problem(node.id, self.path(key), message))
            .ok()
    }

    /// The key's value, or `default` if it isn't there or is wrong.
    pub(super) fn or<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&Node) -> Result<T, String>,
        default: T,
    ) -> T {
        self.optional(key, parse).unwrap_or(default)
    }

    /// One value or a list of them; each wrong one is reported by itself.
    pub(super) fn one_or_more<T>(
        &self,
        key: &'static str,
        parse: impl Fn(&Node) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let node = self.find(key)?;
        let Kind::List(items) = &node.kind else {
            return self.value(key, node, parse).map(|one| vec![one]);
        };
        if items.is_empty() {
            self.found.problem(
                node.id,
                self.path(key),
                "the list is empty; leave the key out instead",
            );
        }
        let mut all = Vec::with_capacity(items.len());
        for (i, item) in items.iter().enumerate() {
            match parse(item) {
                Ok(value) => all.push(value),
                Err(m) => self
                    .found
                    .problem(item.id, format!("{}[{i}]", self.path(key)), m),
            }
        }
        (!all.is_empty()).then_some(all)
    }

    /// Reports those of the keys that are missing.
    pub(super) fn require(&self, keys: &[&'static str]) {
        for key in keys {
            if self.mapping && !self.entries.iter().any(|(k, ..)| k == key) {
                let message = "is missing here; it has no default";
                self.found.problem(self.id, self.path(key), message);
            }
        }
    }

    /// Reports every key that was not asked for.
    pub(super) fn done(self) {
        let asked = self.asked.into_inner();
        for (word, key, _) in &self.entries {
            if asked.contains(word) {
                continue;
            }
            let mut message = String::from("unknown key");
            if let Some(near) = asked.iter().find(|a| nearly(a, word)) {
                message.push_str(&format!(" (did you mean `{near}`?)"));
            }
            message.push_str(&format!("; allowed here: {}", asked.join(", ")));
            self.found.problem(key.id, join(&self.path, word), message);
        }
    }
}

fn join(path: &str, key: &str) -> String {
    // A stranger's key may be anything; messages stay on one line and short.
    let key: String = key.chars().filter(|c| !c.is_control()).take(60).collect();
    if path.is_empty() {
        key
    } else {
        format!("{path}.{key}")
    }
}

/// `rooms[3].match` → `rooms[].match`.
fn general(path: &str) -> String {
    let mut inside = false;
    path.chars()
        .filter(|c| {
            inside = (inside || *c == '[') && *c != ']';
            !inside || *c == '['
        })
        .collect()
}

/// At most two letters were mistyped, left out or put in.
fn nearly(a: &str, b: &str) -> bool {
    if b.len() > 60 || a.len() < 3 {
        return false;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = change.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()] <= 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_near_misses() {
        assert_eq!(general("rooms[12].audio.packet"), "rooms[].audio.packet");
        assert!(
            nearly("udp_port", "udp_prot")
                && nearly("listen", "lissten")
                && nearly("match", "mach")
        );
        assert!(!nearly("listen", "admin") && !nearly("ip", "ix"));
    }

    #[test]
    fn every_node_is_found_again() {
        let text = "a: 1\nb:\n  - ü: x\n    d: [1, {e: 2}]\n  - &anchor z\nf: *anchor\n";
        let places: Vec<_> = (0..18)
            .map(|id| place(text, id).map(|p| (p.line, p.column)))
            .collect();
        assert_eq!(places[1], Some((1, 1)), "key a");
        assert_eq!(places[2], Some((1, 4)), "its value");
        assert_eq!(places[3], Some((2, 1)), "key b");
        assert_eq!(places[6], Some((3, 5)), "key ü");
        assert_eq!(
            places[7],
            Some((3, 8)),
            "columns count characters, not bytes"
        );
        assert_eq!(places[12], Some((4, 13)), "key e");
    }
}
