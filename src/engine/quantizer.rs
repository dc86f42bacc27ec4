//! Residual vector quantization: each stage codes what the stages before left over.

use crate::bits::{self, Writer};
use crate::codec::CodecError;

/// The codebooks of a residual quantizer, and how its indices are packed ([`crate::bits`]). The code of few stages is a prefix of
/// the code of many.
#[derive(Debug, Clone)]
pub struct Quantizer {
    /// `[stages][entries][dimension]`.
    books: Vec<f32>,
    /// The same for the search, `[stages][entries / LANES][dimension][LANES]`: the distances of so many entries are summed side by side,
    /// each in the order of its dimensions. Entries that aren't there are infinitely far.
    lanes: Vec<[f32; LANES]>,
    stages: usize,
    entries: usize,
    dimension: usize,
    bits: u32,
}

/// Entries that are compared at once: four registers of SSE, one of AVX-512.
const LANES: usize = 16;

impl Quantizer {
    /// From little-endian `f32` in the order `[stages][entries][dimension]`, with 2 to 65,536 entries.
    ///
    /// # Errors
    /// The length isn't that of the shape, or there are numbers that are none.
    pub fn new(
        bytes: &[u8],
        stages: usize,
        entries: usize,
        dimension: usize,
    ) -> Result<Self, String> {
        let wanted = [stages, entries, dimension]
            .into_iter()
            .try_fold(size_of::<f32>(), usize::checked_mul)
            .unwrap_or(0);
        if wanted == 0 || bytes.len() != wanted || !(2..=65_536).contains(&entries) {
            return Err(format!(
                "the codebooks have {} bytes, {stages} × {entries} × {dimension} f32 are {wanted}",
                bytes.len()
            ));
        }
        let books: Vec<f32> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        if books.iter().any(|x| !x.is_finite()) {
            return Err("the codebooks hold numbers that are none".to_owned());
        }
        let blocks = entries.div_ceil(LANES);
        let mut lanes = vec![[f32::INFINITY; LANES]; stages * blocks * dimension];
        for (stage, book) in books.chunks_exact(entries * dimension).enumerate() {
            for (entry, numbers) in book.chunks_exact(dimension).enumerate() {
                let first = (stage * blocks + entry / LANES) * dimension;
                for (number, lane) in numbers.iter().zip(lanes.iter_mut().skip(first)) {
                    lane[entry % LANES] = *number;
                }
            }
        }
        Ok(Self {
            books,
            lanes,
            stages,
            entries,
            dimension,
            bits: crate::bundle::bits(entries),
        })
    }

    /// How many numbers it codes at a time.
    #[must_use]
    pub const fn dimension(&self) -> usize {
        self.dimension
    }

    fn stage_books(&self) -> impl Iterator<Item = &[f32]> {
        self.books.chunks_exact(self.entries * self.dimension)
    }

    /// Codes `features` with the first `stages` stages and appends the bytes that they fill to `out`.
    pub fn encode(&self, features: &[f32], stages: usize, out: &mut Vec<u8>) {
        let mut rest = features.to_vec();
        let mut writer = Writer::new(out, self.bits);
        let blocks = self.entries.div_ceil(LANES) * self.dimension;
        for (book, lanes) in self
            .stage_books()
            .zip(self.lanes.chunks_exact(blocks))
            .take(stages)
        {
            let index = nearest(&rest, lanes, self.dimension);
            if let Some(entry) = book.chunks_exact(self.dimension).nth(index) {
                for (r, c) in rest.iter_mut().zip(entry) {
                    *r -= c;
                }
            }
            writer.put(index as u16);
        }
        writer.end();
    }

    /// The features that the first `stages` indices of `code` stand for, into `features`.
    ///
    /// # Errors
    /// `code` hasn't the bytes that they fill, the quantizer hasn't that many stages, or an index is none of its entries.
    pub fn decode(
        &self,
        code: &[u8],
        stages: usize,
        features: &mut [f32],
    ) -> Result<(), CodecError> {
        if code.len() != bits::bytes(stages, self.bits) || stages > self.stages {
            return Err(CodecError::Input("another length than its codec's"));
        }
        features.fill(0.0);
        for (book, index) in self
            .stage_books()
            .zip(bits::read(code, self.bits).take(stages))
        {
            let entry = book
                .chunks_exact(self.dimension)
                .nth(usize::from(index))
                .ok_or(CodecError::Input("a code beyond the codebook"))?;
            for (f, c) in features.iter_mut().zip(entry) {
                *f += c;
            }
        }
        Ok(())
    }
}

/// The first of the entries that are nearest to `rest`. `lanes`: a stage's.
fn nearest(rest: &[f32], lanes: &[[f32; LANES]], dimension: usize) -> usize {
    let mut best = (f32::INFINITY, 0);
    for (block, entries) in lanes.chunks_exact(dimension).enumerate() {
        let mut distances = [0.0f32; LANES];
        for (r, entry) in rest.iter().zip(entries) {
            for (distance, c) in distances.iter_mut().zip(entry) {
                *distance += (r - c) * (r - c);
            }
        }
        for (lane, distance) in distances.into_iter().enumerate() {
            if distance < best.0 {
                best = (distance, block * LANES + lane);
            }
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::lyra_bundle;

    /// Features of real speech and what Lyra's own quantizer made of them.
    const FEATURES: &[u8] = include_bytes!("testdata/test_feat.bin");
    const INDICES: &[u8] = include_bytes!("testdata/test_idx.bin");

    fn quantizer() -> Quantizer {
        let bundle = std::fs::read(lyra_bundle().join("codebooks.f32")).unwrap();
        Quantizer::new(&bundle, 46, 16, 64).unwrap()
    }

    #[test]
    fn golden_vectors() {
        let quantizer = quantizer();
        let frames = FEATURES.chunks_exact(64 * 4).zip(INDICES.chunks_exact(46));
        assert_eq!(frames.len(), 387);
        for (frame, (features, indices)) in frames.enumerate() {
            let features: Vec<f32> = features
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect();
            let mut code = Vec::new();
            quantizer.encode(&features, 46, &mut code);
            let wanted: Vec<u8> = indices
                .chunks_exact(2)
                .map(|pair| pair[0] << 4 | pair[1])
                .collect();
            assert_eq!(code, wanted, "frame {frame}");
        }
    }

    #[test]
    fn few_stages_are_a_prefix_of_many_and_coarser() {
        let quantizer = quantizer();
        let mut errors = [0.0f64; 3];
        for features in FEATURES.chunks_exact(64 * 4) {
            let features: Vec<f32> = features
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect();
            let mut codes = [Vec::new(), Vec::new(), Vec::new()];
            for ((code, stages), error) in codes.iter_mut().zip([16, 30, 46]).zip(&mut errors) {
                quantizer.encode(&features, stages, code);
                let mut back = [0.0; 64];
                quantizer.decode(code, stages, &mut back).unwrap();
                *error += features
                    .iter()
                    .zip(back)
                    .map(|(a, b)| f64::from((a - b).powi(2)))
                    .sum::<f64>();
            }
            assert_eq!(codes.each_ref().map(Vec::len), [8, 15, 23]);
            assert!(codes[1].starts_with(&codes[0]) && codes[2].starts_with(&codes[1]));
        }
        assert!(
            errors[0] > 1.5 * errors[1] && errors[1] > 1.2 * errors[2],
            "{errors:?}"
        );
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let quantizer = quantizer();
        let mut features = [0.0; 64];
        for (length, stages) in [(7, 16), (9, 16), (0, 16), (24, 48)] {
            assert!(
                quantizer
                    .decode(&vec![0; length], stages, &mut features)
                    .is_err()
            );
        }
        assert!(Quantizer::new(&[0; 100], 46, 16, 64).is_err());
        assert!(Quantizer::new(&[0xff; 46 * 16 * 64 * 4], 46, 16, 64).is_err());
    }

    #[test]
    fn a_codebook_may_be_of_any_size() {
        // 5 entries of one number: 3 bits, of which 5, 6 and 7 are none.
        let book: Vec<u8> = [-2.0f32, -1.0, 0.0, 1.0, 2.0, -0.2, -0.1, 0.0, 0.1, 0.2]
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect();
        let quantizer = Quantizer::new(&book, 2, 5, 1).unwrap();
        let mut code = Vec::new();
        quantizer.encode(&[0.9], 2, &mut code);
        assert_eq!(
            code,
            [0b0110_0100],
            "1.0, then −0.1, and two bits of nothing"
        );
        let mut back = [0.0];
        quantizer.decode(&code, 2, &mut back).unwrap();
        assert!((back[0] - 0.9).abs() < 1e-6);
        // What fills the last byte is nobody's.
        quantizer.decode(&[code[0] | 3], 2, &mut back).unwrap();
        assert!((back[0] - 0.9).abs() < 1e-6);
        assert!(quantizer.decode(&[0b1010_0000], 2, &mut back).is_err());
        assert!(Quantizer::new(&[0; 16], usize::MAX, 2, 2).is_err());
    }
}
