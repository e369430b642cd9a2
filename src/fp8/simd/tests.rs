//! Every vector path against the scalar definition, bit for bit.

use proptest::prelude::*;

use super::super::codec::bf16_to_f32;
use super::super::recipe::Step;
use super::super::tile::{Next, Tile, amax_f32_scalar, amax_u16_scalar, encode_scalar};
use super::{Source, amax_f32, amax_u16, encode, levels};

fn row<T>(values: &[T]) -> Tile<'_, T> {
    Tile { values, stride: values.len(), rows: 1, cols: values.len() }
}

/// Compares all levels on a tile of either type; codes outside the tile must stay untouched.
fn check(step: Step, source: Source<'_>) {
    let (rows, cols) = match source {
        Source::Bf16(tile) => (tile.rows, tile.cols),
        Source::F32(tile) => (tile.rows, tile.cols),
    };
    let out_stride = cols + 3;
    let mut expected = vec![0xaa; rows * out_stride];
    match source {
        Source::Bf16(tile) => {
            encode_scalar(step, tile, bf16_to_f32, &mut expected, out_stride);
        }
        Source::F32(tile) => encode_scalar(step, tile, |x| x, &mut expected, out_stride),
    }
    for level in levels() {
        let mut codes = vec![0xaa; rows * out_stride];
        encode(level, step, source, Next::NONE, &mut codes, out_stride);
        let differs = codes.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{level:?}, {step:?}");
        match source {
            Source::Bf16(tile) => assert_eq!(amax_u16(level, tile), amax_u16_scalar(tile)),
            Source::F32(tile) => assert_eq!(amax_f32(level, tile), amax_f32_scalar(tile)),
        }
    }
}

fn both(by: f32) -> [Step; 2] {
    [Step::Multiply(by), Step::Divide(by)]
}

#[test]
fn every_bf16_at_many_scales() {
    // In pieces, so that those beyond 464 do not send all to the scalar definition.
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let scales = [1.0, 1.3, 0.75, 3.0e-5, 2.2e-7, 4.48e6, 1e-36, 7.6e35, 1e-45];
    for by in scales.into_iter().chain([0.0, -1.5, f32::INFINITY, f32::NAN]) {
        for step in both(by) {
            for piece in all.chunks(67) {
                check(step, Source::Bf16(row(piece)));
            }
        }
    }
}

#[test]
fn every_step_of_f32_around_every_code() {
    let mut numbers = Vec::new();
    for code in 0..0x7f_u8 {
        let x = super::super::codec::e4m3_decode(code);
        let next = super::super::codec::e4m3_decode(code + 1);
        let middle = if next.is_nan() { 464.0 } else { (x + next) / 2.0 };
        for x in [x, middle] {
            numbers.extend([x.next_down(), x, x.next_up(), -x.next_down(), -x, -x.next_up()]);
        }
    }
    for by in [1.0, 0.5, 0.999_999_94, 1.000_000_1] {
        for step in both(by) {
            for piece in numbers.chunks(33) {
                check(step, Source::F32(row(piece)));
            }
        }
    }
}

#[test]
fn an_empty_tile_has_maximum_zero() {
    for level in levels() {
        assert_eq!(amax_u16(level, row(&[])), 0);
        assert_eq!(amax_f32(level, row(&[])), 0);
    }
}

/// f32 bits: any, or of magnitudes from 2^-15 to 512, where codes vary.
fn f32_bits() -> impl Strategy<Value = u32> {
    let near = (any::<bool>(), 0x3800_0000u32..0x4400_0000);
    prop_oneof![
        1 => any::<u32>(),
        40 => near.prop_map(|(negative, bits)| u32::from(negative) << 31 | bits),
    ]
}

proptest! {
    #[test]
    fn any_tile_is_encoded_as_defined(
        by in prop_oneof![any::<f32>(), 0.2f32..1.2],
        (rows, cols, slack) in (1usize..5, 1usize..140, 0usize..5),
        bits in prop::collection::vec(f32_bits(), 5 * 145),
    ) {
        let stride = cols + slack;
        let wide: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
        let narrow: Vec<u16> = bits.iter().map(|&b| (b >> 16) as u16).collect();
        for step in both(by) {
            check(step, Source::F32(Tile { values: &wide, stride, rows, cols }));
            check(step, Source::Bf16(Tile { values: &narrow, stride, rows, cols }));
        }
    }
}
