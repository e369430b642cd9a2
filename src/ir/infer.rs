//! THE function that says what an operation's result looks like. Knows mesh sizes only as numbers.

mod cuts;
mod grid;
mod quantized;

use crate::diag::{Diagnostic, Span};
use crate::dtype::DType;

use super::op::reshape_dims;
use super::{Dims, Op, Place, Plan, Quant, ScaleName, Source, SourceFormat, Type, show_shape};

use cuts::{divide, experts, head_rows};
use grid::Cut;
use quantized::{codes, dequantize, quantize, refine, scales};

/// Said where a size surprises.
const LOCAL: &str = "sizes are those of one rank, after every cut so far";

/// Why an operation is refused; the caller adds the place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeError {
    pub code: &'static str,
    pub message: String,
    /// Text under the caret.
    pub label: Option<String>,
    pub hint: Option<String>,
}

impl TypeError {
    /// The error at its place in the plan.
    pub fn at(self, span: Span) -> Diagnostic {
        let mut d = Diagnostic::error(self.code, self.message).at(span);
        d.label = self.label;
        d.hint = self.hint;
        d
    }
}

fn bad<T>(code: &'static str, message: impl Into<String>) -> Result<T, TypeError> {
    Err(TypeError { code, message: message.into(), label: None, hint: None })
}

fn hinted<T>(
    code: &'static str,
    message: impl Into<String>,
    hint: impl Into<String>,
) -> Result<T, TypeError> {
    Err(TypeError { code, message: message.into(), label: None, hint: Some(hint.into()) })
}

/// The type of every node of a plan at one place; an error poisons what depends on it (`None`)
/// and is reported once, with the node's index.
pub fn infer_all(plan: &Plan, place: &Place) -> (Vec<Option<Type>>, Vec<(usize, TypeError)>) {
    let mut types: Vec<Option<Type>> = Vec::with_capacity(plan.nodes.len());
    let mut errors = Vec::new();
    for (index, node) in plan.nodes.iter().enumerate() {
        let inputs: Option<Vec<&Type>> =
            node.inputs.iter().map(|i| types[i.0 as usize].as_ref()).collect();
        let found =
            inputs.and_then(|inputs| match infer(&node.op, &inputs, place, &plan.sources) {
                Ok(t) => Some(t),
                Err(e) => {
                    errors.push((index, e));
                    None
                }
            });
        types.push(found);
    }
    (types, errors)
}

/// The result of `op` on inputs of the given types at one place.
///
/// # Errors
/// E02xx for shapes and types that do not fit, E03xx for cuts that the mesh does not allow.
pub fn infer(
    op: &Op,
    inputs: &[&Type],
    place: &Place,
    sources: &[Source],
) -> Result<Type, TypeError> {
    let first = || -> Result<&Type, TypeError> {
        match inputs.first() {
            Some(t) => Ok(*t),
            None => bad("E0201", format!("`{}` of nothing", op.name())),
        }
    };
    match op {
        Op::Source(id) => source_type(&sources[id.0 as usize]),
        Op::Cat { dim } => cat(inputs, *dim),
        Op::Stack => stack(inputs),
        Op::Slice { dim, start, end } => slice(first()?, *dim, *start, *end),
        Op::Reshape { shape } => reshape(first()?, shape),
        Op::Permute { dims } => permute(first()?, dims),
        Op::Pad { dim, multiple, .. } => pad(first()?, *dim, *multiple),
        Op::Cast { dtype } => cast(first()?, *dtype),
        Op::Shard { dim, axis } => {
            let t = first()?;
            let parts = place.size(*axis);
            let size = dim_of(t, *dim)?;
            let what = format!("{axis} = {parts}");
            let local = divide(size, parts, &what, *dim)?;
            Cut { what: &what, dim: *dim, local, parts, by_rank: true }.check(t)?;
            Ok(resized(t, *dim, local))
        }
        Op::Heads { axis, heads } => {
            let t = first()?;
            let ranks = place.size(*axis);
            let (rows, _) = head_rows(t, *heads, ranks, axis.name())?;
            let what = format!("{axis} = {ranks} over {heads} heads");
            // Fewer heads than ranks make fewer cuts: one head, repeated, makes none.
            let parts = ranks.min(*heads);
            let by_rank = ranks <= *heads;
            Cut { what: &what, dim: 0, local: rows, parts, by_rank }.check(t)?;
            Ok(resized(t, 0, rows))
        }
        Op::Experts { axis } => experts(first()?, place, *axis),
        Op::Quantize { recipe, scale_name } => {
            quantize(first()?, recipe.kind, u64::from(recipe.block), recipe.scales, *scale_name)
        }
        Op::Refine { block } => refine(first()?, *block),
        Op::Dequantize { dtype } => dequantize(first()?, *dtype),
        Op::Codes => codes(first()?),
        Op::Scales => scales(first()?),
        Op::Add => add(inputs),
        Op::Scale { .. } => {
            float_only(first()?, "*")?;
            Ok(first()?.clone())
        }
    }
}

fn source_type(source: &Source) -> Result<Type, TypeError> {
    let (dtype, quant) = match &source.format {
        SourceFormat::Plain(dtype) => (*dtype, None),
        SourceFormat::Quantized { block, scale } => (
            DType::E4m3,
            Some(Quant {
                block: *block,
                scales: scale.target,
                scale_name: ScaleName::ScaleInv,
            }),
        ),
    };
    if quant.is_some() && source.shape.len() < 2 {
        return hinted(
            "E0206",
            format!(
                "block scales need a matrix, {} is {}",
                source.name,
                show_shape(&source.shape)
            ),
            "name the stored type to read the codes alone: src(.., .., e4m3)",
        );
    }
    checked(Type { shape: source.shape.clone(), dtype, quant })
}

/// Refuses a type whose bytes do not fit 63 bits.
fn checked(t: Type) -> Result<Type, TypeError> {
    let bytes = t.shape.iter().try_fold(t.dtype.size(), |a, n| a.checked_mul(*n));
    match bytes.filter(|b| *b <= i64::MAX as u64) {
        Some(_) => Ok(t),
        None => {
            bad("E0209", format!("{} has more bytes than fit 63 bits", show_shape(&t.shape)))
        }
    }
}

fn dim_of(t: &Type, dim: usize) -> Result<u64, TypeError> {
    match t.shape.get(dim) {
        Some(size) => Ok(*size),
        None => {
            let shape = show_shape(&t.shape);
            hinted(
                "E0202",
                format!("there is no dimension {dim} in {shape}"),
                "dimensions count from 0",
            )
        }
    }
}

fn resized(t: &Type, dim: usize, size: u64) -> Type {
    let mut t = t.clone();
    t.shape[dim] = size;
    t
}

fn in_matrix(t: &Type, dim: usize) -> bool {
    dim + 2 >= t.shape.len()
}

fn cat(inputs: &[&Type], dim: usize) -> Result<Type, TypeError> {
    let Some((last, front)) = inputs.split_last() else {
        return bad("E0201", "cat of an empty list");
    };
    dim_of(last, dim)?;
    let mut total = 0u64;
    for (index, t) in inputs.iter().enumerate() {
        let same_dims = t.shape.len() == last.shape.len()
            && (0..t.shape.len()).all(|d| d == dim || t.shape[d] == last.shape[d]);
        if !same_dims {
            return bad(
                "E0201",
                format!(
                    "cat along {dim}: part {index} is {}, the last part is {}",
                    show_shape(&t.shape),
                    show_shape(&last.shape)
                ),
            );
        }
        same_kind("cat", t, last)?;
        total = match total.checked_add(t.shape[dim]) {
            Some(sum) => sum,
            None => return bad("E0209", "the joined size does not fit 64 bits"),
        };
    }
    for (index, t) in front.iter().enumerate() {
        if let Some(q) = t.quant
            && in_matrix(t, dim)
            && !t.shape[dim].is_multiple_of(q.block)
        {
            return hinted(
                "E0306",
                format!(
                    "part {index} has {} along {dim}, which ends inside a quantization block \
                     of {}: {} mod {} = {}",
                    t.shape[dim],
                    q.block,
                    t.shape[dim],
                    q.block,
                    t.shape[dim] % q.block
                ),
                "join first and quantize then; a receiver with a grid a part takes .codes() and \
                 .scales() of the parts, joined on their own",
            );
        }
    }
    checked(resized(last, dim, total))
}

fn same_kind(op: &str, a: &Type, b: &Type) -> Result<(), TypeError> {
    if a.dtype != b.dtype {
        return hinted(
            "E0205",
            format!("{op} of {} and {}", a.dtype, b.dtype),
            "a plan joins equal types: cast one part with .to(..), or .quantize/.dequantize it",
        );
    }
    if a.quant.map(|q| (q.block, q.scales)) != b.quant.map(|q| (q.block, q.scales)) {
        let show = |t: &Type| t.quant.map_or("none".to_owned(), |q| q.block.to_string());
        return bad("E0207", format!("{op} of values with blocks {} and {}", show(a), show(b)));
    }
    Ok(())
}

fn stack(inputs: &[&Type]) -> Result<Type, TypeError> {
    let Some(first) = inputs.first() else { return bad("E0201", "stack of an empty list") };
    for (index, t) in inputs.iter().enumerate() {
        if t.shape != first.shape {
            return bad(
                "E0201",
                format!(
                    "stack: part {index} is {}, part 0 is {}",
                    show_shape(&t.shape),
                    show_shape(&first.shape)
                ),
            );
        }
        same_kind("stack", t, first)?;
    }
    let mut t = (*first).clone();
    t.shape.insert(0, inputs.len() as u64);
    checked(t)
}

fn slice(t: &Type, dim: usize, start: u64, end: u64) -> Result<Type, TypeError> {
    let size = dim_of(t, dim)?;
    if start >= end || end > size {
        return hinted(
            "E0203",
            format!("the slice {start}..{end} is not within dimension {dim} of size {size}"),
            LOCAL,
        );
    }
    if let Some(q) = t.quant
        && in_matrix(t, dim)
    {
        for cut in [start, end] {
            if cut != size && !cut.is_multiple_of(q.block) {
                return hinted(
                    "E0304",
                    format!("a cut at {cut} crosses a quantization block of {}", q.block),
                    format!("cut at a multiple of {}, or before .quantize", q.block),
                );
            }
        }
    }
    Ok(resized(t, dim, end - start))
}

fn reshape(t: &Type, shape: &[i64]) -> Result<Type, TypeError> {
    let Some(dims) = reshape_dims(shape, t.elements()) else {
        let message = format!("{} does not reshape to {shape:?}", show_shape(&t.shape));
        let given = shape.iter().filter(|s| **s >= 0).try_fold(1i64, |a, s| a.checked_mul(*s));
        let counts = given.map(|n| match shape.contains(&-1) {
            true => format!("{} elements are no multiple of {n}", t.elements()),
            false => format!("{} elements are not {n}", t.elements()),
        });
        let hint = Some(format!("{LOCAL}; one size may be -1"));
        return Err(TypeError { code: "E0204", message, label: counts, hint });
    };
    if let Some(q) = t.quant {
        let row = |s: &[u64]| (s.len() >= 2).then(|| (s[s.len() - 2], s[s.len() - 1]));
        let fits = match (row(&t.shape), row(&dims)) {
            (Some((r0, c0)), Some((r1, c1))) if c0 == c1 => {
                let (low, high) = (r0.min(r1), r0.max(r1));
                r0 == r1 || (low > 0 && high.is_multiple_of(low) && low.is_multiple_of(q.block))
            }
            _ => false,
        };
        if !fits {
            return hinted(
                "E0304",
                format!(
                    "reshape of a quantized value {} to {} breaks its tiles of {}",
                    show_shape(&t.shape),
                    show_shape(&dims),
                    q.block
                ),
                "only rows may be split or joined, at multiples of the block; .dequantize first \
                 where the values are needed",
            );
        }
    }
    Ok(Type { shape: dims, ..t.clone() })
}

fn permute(t: &Type, dims: &[usize]) -> Result<Type, TypeError> {
    let rank = t.shape.len();
    let mut seen = vec![false; rank];
    for d in dims {
        match seen.get_mut(*d) {
            Some(s) if !*s => *s = true,
            _ => return bad("E0202", format!("{dims:?} is not an order of {rank} dimensions")),
        }
    }
    if dims.len() != rank {
        return bad("E0202", format!("{dims:?} names {} of {rank} dimensions", dims.len()));
    }
    if t.quant.is_some() && !dims[rank.saturating_sub(2)..].iter().all(|d| in_matrix(t, *d)) {
        return bad(
            "E0208",
            "a permute may not move a quantized value's last two dimensions away",
        );
    }
    let shape: Dims = dims.iter().map(|d| t.shape[*d]).collect();
    Ok(Type { shape, ..t.clone() })
}

fn pad(t: &Type, dim: usize, multiple: u64) -> Result<Type, TypeError> {
    let size = dim_of(t, dim)?;
    if t.quant.is_some() {
        return hinted("E0208", "pad_to of a quantized value", "pad before .quantize");
    }
    if multiple == 0 {
        return bad("E0209", "pad_to a multiple of 0");
    }
    match size.checked_next_multiple_of(multiple) {
        Some(padded) => checked(resized(t, dim, padded)),
        None => bad("E0209", "the padded size does not fit 64 bits"),
    }
}

fn cast(t: &Type, dtype: DType) -> Result<Type, TypeError> {
    if t.quant.is_some() {
        return hinted(
            "E0208",
            "a quantized value has no cast",
            format!("write .dequantize({dtype})"),
        );
    }
    if t.dtype != dtype && !(t.dtype.is_float() && dtype.is_float()) {
        let hint = match dtype {
            DType::E4m3 => "write .quantize(fp8::vllm) for codes with block scales",
            _ => "casts go between f32, bf16 and f16",
        };
        return hinted("E0205", format!("there is no cast from {} to {dtype}", t.dtype), hint);
    }
    checked(Type { dtype, ..t.clone() })
}

fn float_only(t: &Type, op: &str) -> Result<(), TypeError> {
    if t.quant.is_some() {
        return hinted(
            "E0208",
            format!("`{op}` of a quantized value"),
            "write .dequantize(..) first, and .quantize(..) after",
        );
    }
    if !t.dtype.is_float() {
        return bad("E0205", format!("`{op}` needs f32, bf16 or f16, this is {}", t.dtype));
    }
    Ok(())
}

fn add(inputs: &[&Type]) -> Result<Type, TypeError> {
    let [a, b] = inputs else { return bad("E0201", "a sum has two sides") };
    float_only(a, "+")?;
    float_only(b, "+")?;
    same_kind("sum", a, b)?;
    if a.shape != b.shape {
        return bad(
            "E0201",
            format!("sum of {} and {}", show_shape(&a.shape), show_shape(&b.shape)),
        );
    }
    Ok((*a).clone())
}
