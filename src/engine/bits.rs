//! Codes of a few bits each, one after the other, the first in the most significant bits: so that the code of few stages is the
//! beginning of the code of many.

/// Bytes of `count` codes of `bits` bits; what is left of the last byte has no meaning.
#[must_use]
pub const fn bytes(count: usize, bits: u32) -> usize {
    (count * bits as usize).div_ceil(8)
}

/// Appends codes to bytes. End it with [`Writer::end`].
#[derive(Debug)]
pub struct Writer<'a> {
    out: &'a mut Vec<u8>,
    bits: u32,
    /// Bits that don't fill a byte yet, the newest lowest.
    held: u32,
    count: u32,
}

impl<'a> Writer<'a> {
    /// For codes of `bits` bits, 16 at most.
    pub const fn new(out: &'a mut Vec<u8>, bits: u32) -> Self {
        Self {
            out,
            bits,
            held: 0,
            count: 0,
        }
    }

    /// Appends a code; higher bits than there are to a code are lost.
    pub fn put(&mut self, code: u16) {
        self.held = self.held << self.bits | u32::from(code) & ((1 << self.bits) - 1);
        self.count += self.bits;
        while self.count >= 8 {
            self.count -= 8;
            self.out.push((self.held >> self.count & 0xff) as u8);
        }
    }

    /// Fills the last byte with zeros.
    pub fn end(self) {
        if self.count > 0 {
            self.out.push((self.held << (8 - self.count) & 0xff) as u8);
        }
    }
}

/// The codes of `bits` bits, 16 at most, that `bytes` hold whole.
pub fn read(bytes: &[u8], bits: u32) -> impl Iterator<Item = u16> {
    let (mut held, mut count) = (0u32, 0);
    let mut bytes = bytes.iter();
    std::iter::from_fn(move || {
        while count < bits {
            held = held << 8 | u32::from(*bytes.next()?);
            count += 8;
        }
        count -= bits;
        Some((held >> count & ((1 << bits) - 1)) as u16)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_every_width_come_back() {
        for width in 1..=16 {
            let codes: Vec<u16> = (0..37u32)
                .map(|k| (k * 40_503 % (1 << width)) as u16)
                .collect();
            let mut out = vec![7];
            let mut writer = Writer::new(&mut out, width);
            codes.iter().for_each(|code| writer.put(*code));
            writer.end();
            assert_eq!(out.len() - 1, bytes(37, width));
            let back: Vec<u16> = read(&out[1..], width).take(37).collect();
            assert_eq!(back, codes, "{width} bits");
            // The first ones by themselves are its first bytes but for what fills the last.
            let mut few = Vec::new();
            let mut writer = Writer::new(&mut few, width);
            codes.iter().take(9).for_each(|code| writer.put(*code));
            writer.end();
            let prefix = &out[1..=few.len()];
            assert_eq!(
                read(prefix, width).take(9).collect::<Vec<u16>>(),
                codes[..9]
            );
            if (9 * width).is_multiple_of(8) {
                assert_eq!(few, prefix);
            }
        }
        let mut out = Vec::new();
        let mut writer = Writer::new(&mut out, 10);
        [0x3ff, 0, 0x155]
            .into_iter()
            .for_each(|code| writer.put(code));
        writer.end();
        assert_eq!(out, [0xff, 0xc0, 0x05, 0x54]);
    }
}
