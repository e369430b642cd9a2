//! Types of what makes and unmakes quantized values.

use crate::dtype::DType;
use crate::fp8::{RecipeKind, ScaleFormat};

use super::super::{Quant, ScaleName, Type, show_shape};
use super::{TypeError, bad, cast, checked, float_only, hinted};

pub(super) fn quantize(
    t: &Type,
    kind: RecipeKind,
    block: u64,
    scales: ScaleFormat,
    scale_name: ScaleName,
) -> Result<Type, TypeError> {
    if let Some(q) = t.quant {
        let hint = "re-quantizing is written .dequantize(f32).quantize(..)";
        if q.block != block {
            return hinted(
                "E0207",
                format!("already quantized with blocks of {}, not {block}", q.block),
                hint,
            );
        }
        let bytes = ScaleFormat::E8m0;
        if kind == RecipeKind::Ue8m0 && !(q.scales == bytes && scales == bytes) {
            return hinted(
                "E0207",
                "already quantized; its scales need not be powers of two",
                hint,
            );
        }
        // A power of two is a number: bytes widen to the f32 scales that the recipe writes.
        return Ok(Type { quant: Some(Quant { scale_name, scales, ..q }), ..t.clone() });
    }
    float_only(t, "quantize")?;
    if t.shape.len() < 2 {
        return hinted(
            "E0206",
            format!("quantize needs a matrix, this is {}", show_shape(&t.shape)),
            "vectors stay in their own type",
        );
    }
    let quant = Some(Quant { block, scales, scale_name });
    Ok(Type { shape: t.shape.clone(), dtype: DType::E4m3, quant })
}

pub(super) fn refine(t: &Type, block: u64) -> Result<Type, TypeError> {
    let Some(q) = t.quant else {
        return hinted(
            "E0208",
            "refine of a value that is not quantized",
            "write .quantize(recipe.block(..)) for a grid of its own",
        );
    };
    if block == 0 || !q.block.is_multiple_of(block) {
        return hinted(
            "E0210",
            format!("a block of {} is not made of blocks of {block}", q.block),
            "a grid becomes finer only, by a size that divides its own",
        );
    }
    Ok(Type { quant: Some(Quant { block, ..q }), ..t.clone() })
}

pub(super) fn dequantize(t: &Type, dtype: DType) -> Result<Type, TypeError> {
    if !dtype.is_float() {
        return bad("E0205", format!("dequantize gives f32, bf16 or f16, not {dtype}"));
    }
    if t.quant.is_none() {
        return cast(t, dtype);
    }
    checked(Type::plain(t.shape.clone(), dtype))
}

pub(super) fn codes(t: &Type) -> Result<Type, TypeError> {
    match t.quant {
        Some(_) => Ok(Type::plain(t.shape.clone(), t.dtype)),
        None => not_quantized("codes"),
    }
}

pub(super) fn scales(t: &Type) -> Result<Type, TypeError> {
    match (t.scale_shape(), t.scale_dtype()) {
        (Some(shape), Some(dtype)) => Ok(Type::plain(shape, dtype)),
        _ => not_quantized("scales"),
    }
}

fn not_quantized(op: &str) -> Result<Type, TypeError> {
    hinted(
        "E0208",
        format!("{op} of a value that is not quantized"),
        "write .quantize(..) first",
    )
}
