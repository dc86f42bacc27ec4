//! The protobuf wire format (protobuf.dev/programming-guides/encoding), read without a schema and
//! patched in place: what is not meant to change is copied, tags and unknown fields included.

use super::SignalError;

/// A field's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// Wire type 0.
    Varint(u64),
    /// Wire type 1.
    Fixed64(u64),
    /// Wire type 2: string, bytes, message, packed numbers or map entry.
    Bytes(&'a [u8]),
    /// Wire type 5.
    Fixed32(u32),
}

/// One field of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field<'a> {
    /// 1 to 2²⁹ − 1.
    pub number: u32,
    /// What it holds.
    pub value: Value<'a>,
    /// All of its bytes: tag, length, value.
    pub raw: &'a [u8],
    /// The bytes of the tag, which need not be the shortest encoding.
    pub tag: &'a [u8],
}

impl<'a> Field<'a> {
    /// The value of a length-delimited field.
    pub fn bytes(&self) -> Option<&'a [u8]> {
        match self.value {
            Value::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }
}

/// Iterates over the fields of a message. After an error there is nothing more.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Starts at the first field.
    pub fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, SignalError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        match read_field(self.rest) {
            Ok((field, rest)) => {
                self.rest = rest;
                Some(Ok(field))
            }
            Err(error) => {
                self.rest = &[];
                Some(Err(error))
            }
        }
    }
}

fn read_field(input: &[u8]) -> Result<(Field<'_>, &[u8]), SignalError> {
    let (key, rest) = read_varint(input)?;
    let number = u32::try_from(key >> 3)
        .ok()
        .filter(|number| (1..1 << 29).contains(number))
        .ok_or(SignalError::Wire("field number out of range"))?;
    let tag = up_to(input, rest);
    let (value, rest) = match key & 7 {
        0 => {
            let (value, rest) = read_varint(rest)?;
            (Value::Varint(value), rest)
        }
        1 => {
            let (bytes, rest) = rest.split_first_chunk().ok_or(SignalError::Truncated)?;
            (Value::Fixed64(u64::from_le_bytes(*bytes)), rest)
        }
        2 => {
            let (length, rest) = read_varint(rest)?;
            let length = usize::try_from(length).map_err(|_| SignalError::Truncated)?;
            let (bytes, rest) = rest
                .split_at_checked(length)
                .ok_or(SignalError::Truncated)?;
            (Value::Bytes(bytes), rest)
        }
        5 => {
            let (bytes, rest) = rest.split_first_chunk().ok_or(SignalError::Truncated)?;
            (Value::Fixed32(u32::from_le_bytes(*bytes)), rest)
        }
        3 | 4 => return Err(SignalError::Wire("groups are not supported")),
        _ => return Err(SignalError::Wire("unknown wire type")),
    };
    let field = Field {
        number,
        value,
        raw: up_to(input, rest),
        tag,
    };
    Ok((field, rest))
}

/// The part of `whole` before its tail `rest`.
fn up_to<'a>(whole: &'a [u8], rest: &[u8]) -> &'a [u8] {
    whole
        .get(..whole.len().saturating_sub(rest.len()))
        .unwrap_or(&[])
}

fn read_varint(input: &[u8]) -> Result<(u64, &[u8]), SignalError> {
    let mut value = 0_u64;
    for (index, byte) in input.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        if index == 9 && bits > 1 {
            return Err(SignalError::Wire("varint overflows 64 bits"));
        }
        value |= bits << (7 * index);
        if byte & 0x80 == 0 {
            return Ok((value, input.get(index + 1..).unwrap_or(&[])));
        }
    }
    if input.len() >= 10 {
        Err(SignalError::Wire("varint longer than 10 bytes"))
    } else {
        Err(SignalError::Truncated)
    }
}

/// The numbers of a packed repeated field, up to the first that is not well-formed.
pub fn packed_varints(mut packed: &[u8]) -> Vec<u64> {
    let mut out = Vec::new();
    while let Ok((value, rest)) = read_varint(packed) {
        out.push(value);
        packed = rest;
    }
    out
}

/// Appends a varint.
pub fn write_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes().first().copied().unwrap_or(0) | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes().first().copied().unwrap_or(0));
}

/// Appends a varint field unless it is 0, which proto3 leaves out.
pub fn write_uint(out: &mut Vec<u8>, number: u32, value: u64) {
    if value != 0 {
        write_varint(out, u64::from(number) << 3);
        write_varint(out, value);
    }
}

/// Appends a length-delimited field.
pub fn write_bytes(out: &mut Vec<u8>, number: u32, value: &[u8]) {
    write_varint(out, u64::from(number) << 3 | 2);
    write_varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

/// What becomes of a length-delimited field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Stays as it is.
    Keep,
    /// Goes.
    Drop,
    /// Its value is replaced; the length is encoded anew, the tag stays.
    Replace(Vec<u8>),
}

/// Asks `decide` about every length-delimited field numbered `number` of a message and returns the
/// new message, or `None` when nothing changed.
///
/// # Errors
/// When the message is not well-formed, or what `decide` returns.
pub fn patch(
    message: &[u8],
    number: u32,
    mut decide: impl FnMut(&[u8]) -> Result<Change, SignalError>,
) -> Result<Option<Vec<u8>>, SignalError> {
    let mut out: Option<Vec<u8>> = None;
    let mut done = 0;
    for field in Fields::new(message) {
        let field = field?;
        let change = match field.bytes() {
            Some(bytes) if field.number == number => decide(bytes)?,
            _ => Change::Keep,
        };
        if change != Change::Keep && out.is_none() {
            let mut copy = Vec::with_capacity(message.len() + 512);
            copy.extend_from_slice(message.get(..done).unwrap_or(&[]));
            out = Some(copy);
        }
        if let Some(out) = &mut out {
            match change {
                Change::Keep => out.extend_from_slice(field.raw),
                Change::Drop => {}
                Change::Replace(new) => {
                    out.extend_from_slice(field.tag);
                    write_varint(out, new.len() as u64);
                    out.extend_from_slice(&new);
                }
            }
        }
        done += field.raw.len();
    }
    Ok(out)
}

/// Checks that a message is well-formed and has each of these fields at most once. One that is there more often is the last one
/// to some decoders, and all of them merged, if it is a message, to others; no encoder writes it.
///
/// # Errors
/// Where that isn't so.
pub fn once(message: &[u8], numbers: &[u32]) -> Result<(), SignalError> {
    let mut seen = 0_u32;
    for field in Fields::new(message) {
        let number = field?.number;
        if let Some(place) = numbers.iter().position(|known| *known == number) {
            let bit = 1 << place;
            if seen & bit != 0 {
                return Err(SignalError::Repeated(number));
            }
            seen |= bit;
        }
    }
    Ok(())
}

/// Replaces the string at the end of a path of field numbers.
///
/// # Errors
/// When a message on the path is not well-formed or has the field more than once, or the string is not UTF-8, or what `replace`
/// returns.
pub fn patch_string(
    message: &[u8],
    path: &[u32],
    replace: &mut dyn FnMut(&str) -> Result<Option<String>, SignalError>,
) -> Result<Option<Vec<u8>>, SignalError> {
    let Some((number, rest)) = path.split_first() else {
        return Ok(None);
    };
    once(message, &[*number])?;
    patch(message, *number, |bytes| {
        let new = if rest.is_empty() {
            let text = std::str::from_utf8(bytes).map_err(|_| SignalError::Utf8)?;
            replace(text)?.map(String::into_bytes)
        } else {
            patch_string(bytes, rest, replace)?
        };
        Ok(new.map_or(Change::Keep, Change::Replace))
    })
}
