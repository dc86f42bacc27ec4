//! The query of a request as Go's `net/url.ParseQuery` reads it, which is what LiveKit uses, and stricter in one thing: what
//! another reader could read otherwise is refused. So the token that LiveKit checks is the one that was read here.
//!
//! Go leaves out pairs with a semicolon (it was a separator once) or a broken escape, and takes the first of several values.
//! Real clients write none of these.

use std::borrow::Cow;

/// Most pairs of a query. LiveKit's clients send some 25; Go gives up at 10,000.
pub const MAX_PAIRS: usize = 256;

/// Why a request is not taken: it could be read in two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unclear {
    /// A semicolon separates for some, and for others belongs to a value.
    #[error("the query has a semicolon: write it as %3B")]
    Semicolon,
    /// A `%` that two hexadecimal digits don't follow.
    #[error("the query has a % that two hexadecimal digits don't follow: write it as %25")]
    Escape,
    /// Over [`MAX_PAIRS`].
    #[error("the query has more than {MAX_PAIRS} parameters")]
    Pairs,
    /// A parameter that says who asks for what is there more than once.
    #[error("the query has {0} more than once")]
    Repeated(&'static str),
    /// Such a parameter is no UTF-8.
    #[error("{0} in the query is not UTF-8")]
    NotUtf8(&'static str),
    /// More than one Authorization header field.
    #[error("the request has more than one Authorization header field")]
    Authorization,
    /// A form in the body may hold parameters too, and LiveKit reads them.
    #[error("the request has a form for a body: parameters are taken from the query only")]
    Form,
    /// A claim that is there twice, or not spelt as LiveKit spells it.
    #[error("the token has the claim {0} twice or in another spelling")]
    Claim(&'static str),
}

/// A query, taken apart.
#[derive(Debug, Clone)]
pub struct Query<'a> {
    raw: &'a str,
    pairs: Vec<Pair<'a>>,
}

#[derive(Debug, Clone)]
struct Pair<'a> {
    name: Cow<'a, [u8]>,
    value: Cow<'a, [u8]>,
    /// Where the value stands in the query.
    at: std::ops::Range<usize>,
}

impl<'a> Query<'a> {
    /// Reads what stands after `?`.
    ///
    /// # Errors
    /// When another reader could find other parameters in it.
    pub fn parse(raw: &'a str) -> Result<Self, Unclear> {
        if raw.contains(';') {
            return Err(Unclear::Semicolon);
        }
        let mut pairs = Vec::new();
        let mut start = 0;
        for text in raw.split('&') {
            let end = start + text.len();
            if !text.is_empty() {
                if pairs.len() >= MAX_PAIRS {
                    return Err(Unclear::Pairs);
                }
                let (name, value) = text.split_once('=').unwrap_or((text, ""));
                pairs.push(Pair {
                    name: unescape(name)?,
                    value: unescape(value)?,
                    at: end - value.len()..end,
                });
            }
            start = end + 1;
        }
        Ok(Self { raw, pairs })
    }

    /// The value of a parameter; empty is as good as absent, as it is to LiveKit.
    ///
    /// # Errors
    /// When there are several, or it is not UTF-8.
    pub fn get(&self, name: &'static str) -> Result<Option<&str>, Unclear> {
        let Some(pair) = self.find(name)? else {
            return Ok(None);
        };
        let value = std::str::from_utf8(&pair.value).map_err(|_| Unclear::NotUtf8(name))?;
        Ok(Some(value).filter(|value| !value.is_empty()))
    }

    /// The query with another value for a parameter that it has; `value` is escaped already.
    ///
    /// # Errors
    /// As [`Query::get`].
    pub fn with(&self, name: &'static str, value: &str) -> Result<String, Unclear> {
        let Some(at) = self.find(name)?.map(|pair| pair.at.clone()) else {
            return Ok(self.raw.to_owned());
        };
        // A name alone has an empty value, as Go reads it.
        let alone = !self.raw[..at.start].ends_with('=');
        let mut new = self.raw.to_owned();
        new.replace_range(at, &format!("{}{value}", if alone { "=" } else { "" }));
        Ok(new)
    }

    fn find(&self, name: &'static str) -> Result<Option<&Pair<'a>>, Unclear> {
        let mut found = self
            .pairs
            .iter()
            .filter(|pair| *pair.name == *name.as_bytes());
        match (found.next(), found.next()) {
            (_, Some(_)) => Err(Unclear::Repeated(name)),
            (first, None) => Ok(first),
        }
    }
}

/// `QueryUnescape`: `+` is a space, `%xx` a byte.
fn unescape(text: &str) -> Result<Cow<'_, [u8]>, Unclear> {
    if !text.contains(['%', '+']) {
        return Ok(Cow::Borrowed(text.as_bytes()));
    }
    let digit = |byte: Option<u8>| {
        byte.and_then(|byte| char::from(byte).to_digit(16))
            .and_then(|digit| u8::try_from(digit).ok())
            .ok_or(Unclear::Escape)
    };
    let mut plain = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'%' => digit(bytes.next())? << 4 | digit(bytes.next())?,
            b'+' => b' ',
            byte => byte,
        });
    }
    Ok(Cow::Owned(plain))
}

#[cfg(test)]
#[path = "query/tests.rs"]
mod tests;
