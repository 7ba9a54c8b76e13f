//! Ways to store a layer of KV. Only byte planes with zstd are in production; the others are measured beside them.

use cacheclip_chunk::Dtype;
use cacheclip_chunk::container::planes::{join, split};
use serde::Serialize;

/// What a layer is: K, then V, each `[heads, tokens, head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    pub(crate) tokens: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: Dtype,
}

/// What is done to a layer before zstd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Transform {
    /// Nothing.
    None,
    /// Byte planes.
    Planes,
    /// Each element as its bits' difference to the same channel of the token before, then byte planes.
    DeltaPlanes,
    /// Channels of a head one after the other, `[head_dim, tokens]`, then byte planes.
    TransposedPlanes,
    /// The sign moved behind the mantissa, so that the exponent fills the last plane, then byte planes.
    ExponentPlanes,
}

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Way {
    pub(crate) transform: Transform,
    /// zstd's; `None`: stored as it is.
    pub(crate) level: Option<i32>,
}

impl Way {
    /// All that are measured.
    pub(crate) fn all() -> Vec<Self> {
        use Transform::{DeltaPlanes, ExponentPlanes, None as Plain, Planes, TransposedPlanes};
        let raw = Self { transform: Plain, level: None };
        let transforms = [Plain, Planes, DeltaPlanes, TransposedPlanes, ExponentPlanes];
        let levels =
            transforms.into_iter().flat_map(|transform| (1..=3).map(move |level| (transform, level)));
        let compressed = levels.map(|(transform, level)| Self { transform, level: Some(level) });
        std::iter::once(raw).chain(compressed).collect()
    }

    /// For people.
    pub(crate) fn name(self) -> String {
        let transform = match self.transform {
            Transform::None => "",
            Transform::Planes => "planes + ",
            Transform::DeltaPlanes => "delta + planes + ",
            Transform::TransposedPlanes => "transposed + planes + ",
            Transform::ExponentPlanes => "exponent + planes + ",
        };
        self.level.map_or("raw".into(), |level| format!("{transform}zstd {level}"))
    }
}

/// Does and undoes ways, with working memory that is kept.
pub(crate) struct Worker {
    compressors: Vec<(i32, zstd::bulk::Compressor<'static>)>,
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl Worker {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { compressors: Vec::new(), decompressor: zstd::bulk::Decompressor::new()? })
    }

    pub(crate) fn encode(&mut self, way: Way, raw: &[u8], layer: Layer) -> std::io::Result<Vec<u8>> {
        let Some(level) = way.level else { return Ok(raw.to_vec()) };
        let at = match self.compressors.iter().position(|(known, _)| *known == level) {
            Some(at) => at,
            None => {
                self.compressors.push((level, zstd::bulk::Compressor::new(level)?));
                self.compressors.len() - 1
            }
        };
        let zstd = &mut self.compressors[at].1;
        match way.transform {
            Transform::None => zstd.compress(raw),
            transform => zstd.compress(&forward(transform, raw, layer)),
        }
    }

    pub(crate) fn decode(
        &mut self,
        way: Way,
        stored: &[u8],
        raw_len: usize,
        layer: Layer,
    ) -> std::io::Result<Vec<u8>> {
        if way.level.is_none() {
            return Ok(stored.to_vec());
        }
        let packed = self.decompressor.decompress(stored, raw_len)?;
        Ok(match way.transform {
            Transform::None => packed,
            transform => backward(transform, &packed, layer),
        })
    }
}

fn forward(transform: Transform, raw: &[u8], layer: Layer) -> Vec<u8> {
    let size = layer.dtype.size();
    match (transform, size) {
        (Transform::None | Transform::Planes, _) => split(raw, size),
        (transform, 2) => split(&bytes(changed(transform, words::<u16, 2>(raw), layer, false)), size),
        (transform, _) => split(&bytes(changed(transform, words::<u32, 4>(raw), layer, false)), size),
    }
}

fn backward(transform: Transform, planes: &[u8], layer: Layer) -> Vec<u8> {
    let size = layer.dtype.size();
    let raw = join(planes, size);
    match (transform, size) {
        (Transform::None | Transform::Planes, _) => raw,
        (transform, 2) => bytes(changed(transform, words::<u16, 2>(&raw), layer, true)),
        (transform, _) => bytes(changed(transform, words::<u32, 4>(&raw), layer, true)),
    }
}

/// The bits of an element.
trait Bits<const N: usize>: Copy + Default {
    fn from_le(bytes: [u8; N]) -> Self;
    fn to_le(self) -> [u8; N];
    fn minus(self, other: Self) -> Self;
    fn plus(self, other: Self) -> Self;
    fn rotate(self, back: bool) -> Self;
}

macro_rules! bits {
    ($word:ty, $size:literal) => {
        impl Bits<$size> for $word {
            fn from_le(bytes: [u8; $size]) -> Self {
                Self::from_le_bytes(bytes)
            }
            fn to_le(self) -> [u8; $size] {
                self.to_le_bytes()
            }
            fn minus(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            fn rotate(self, back: bool) -> Self {
                if back { self.rotate_right(1) } else { self.rotate_left(1) }
            }
        }
    };
}

bits!(u16, 2);
bits!(u32, 4);

fn words<W: Bits<N>, const N: usize>(raw: &[u8]) -> Vec<W> {
    raw.as_chunks::<N>().0.iter().map(|bytes| W::from_le(*bytes)).collect()
}

fn bytes<W: Bits<N>, const N: usize>(words: Vec<W>) -> Vec<u8> {
    words.into_iter().map(W::to_le).collect::<Vec<[u8; N]>>().into_flattened()
}

/// Applies or, with `back`, undoes a transform.
fn changed<W: Bits<N>, const N: usize>(
    transform: Transform,
    mut words: Vec<W>,
    layer: Layer,
    back: bool,
) -> Vec<W> {
    let (dim, head) = (layer.head_dim, layer.tokens * layer.head_dim);
    match transform {
        Transform::None | Transform::Planes => words,
        Transform::ExponentPlanes => {
            words.iter_mut().for_each(|word| *word = word.rotate(back));
            words
        }
        Transform::DeltaPlanes => {
            for head in words.chunks_exact_mut(head) {
                if back {
                    (dim..head.len()).for_each(|at| head[at] = head[at].plus(head[at - dim]));
                } else {
                    (dim..head.len()).rev().for_each(|at| head[at] = head[at].minus(head[at - dim]));
                }
            }
            words
        }
        Transform::TransposedPlanes => {
            let mut out = vec![W::default(); words.len()];
            for (from, to) in words.chunks_exact(head).zip(out.chunks_exact_mut(head)) {
                transpose(from, to, if back { layer.tokens } else { dim });
            }
            out
        }
    }
}

/// `from` as rows of `width`; `to` as its columns. In squares, so that neither runs through the cache.
fn transpose<W: Copy>(from: &[W], to: &mut [W], width: usize) {
    const SIDE: usize = 32;
    let height = from.len() / width;
    for top in (0..height).step_by(SIDE) {
        for left in (0..width).step_by(SIDE) {
            for row in top..height.min(top + SIDE) {
                for column in left..width.min(left + SIDE) {
                    to[column * height + row] = from[row * width + column];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_gives_back_what_it_was_given() {
        let mut worker = Worker::new().expect("working memory");
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            let layer = Layer { tokens: 37, head_dim: 8, dtype };
            let elements = 2 * 3 * layer.tokens * layer.head_dim;
            let raw: Vec<u8> =
                (0..elements * dtype.size()).map(|at| (at.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
            for way in Way::all() {
                let stored = worker.encode(way, &raw, layer).expect("a codec");
                let back = worker.decode(way, &stored, raw.len(), layer).expect("what was stored");
                assert!(back == raw, "{} of {dtype}", way.name());
            }
        }
    }

    #[test]
    fn a_transform_does_what_its_name_says() {
        // One head of two tokens with two channels.
        let layer = Layer { tokens: 2, head_dim: 2, dtype: Dtype::Bf16 };
        let words = vec![1u16, 2, 5, 0x8007];
        let of = |transform| changed(transform, words.clone(), layer, false);
        assert_eq!(of(Transform::DeltaPlanes), [1, 2, 4, 0x8005]);
        assert_eq!(of(Transform::TransposedPlanes), [1, 5, 2, 0x8007]);
        assert_eq!(of(Transform::ExponentPlanes), [2, 4, 10, 0x000f]);
    }
}
