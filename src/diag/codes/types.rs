//! Codes of the type stage: shapes, dtypes and block grids of expressions.

use super::Code;

pub(super) const CODES: &[Code] = &[
    Code {
        code: "E0201",
        title: "shapes do not fit together",
        text: "\
The inputs of one operation must agree: `cat` needs the same size in every dimension but
the joined one, `stack` and `+` need equal shapes, and all parts need the same dtype.
The shapes in the message are those of one rank, after every `.shard` so far. Often one
part was cut and the other was not:
    cat([gate.shard(0, tp), up], 1)
    cat([gate.shard(0, tp), up.shard(0, tp)], 1)",
    },
    Code {
        code: "E0202",
        title: "there is no such dimension",
        text: "\
Dimensions count from 0, so a matrix has 0 (rows, the output side) and 1 (columns, the
input side). The expression has fewer dimensions than the call asks for. `stack` adds a
dimension in front: after it, what was 0 is 1.
    stack(0..E, |e| ...).shard(0, etp)      // cuts the experts
    stack(0..E, |e| ...).shard(1, etp)      // cuts each expert's rows",
    },
    Code {
        code: "E0203",
        title: "a slice reaches beyond the tensor",
        text: "\
`.slice(dim, a..b)` takes elements a up to, but not including, b. Here b is larger than
the size of that dimension, or a is larger than b. The size in the message is the local
one: after `.shard` or `.heads` a rank has only its part.
    kv_b.slice(0, 0..N * P)                 // N counts the heads of the whole model
    kv_b.reshape([-1, P + V, L]).slice(1, 0..P)",
    },
    Code {
        code: "E0204",
        title: "a reshape does not keep the number of elements",
        text: "\
`.reshape` gives the same elements, in the same order, another shape; the products of
the sizes must be equal. One size may be -1 and is then computed, if the others divide
the number of elements. After a cut, write -1 for the dimension that the cut made
smaller:
    q.heads(tp, N).reshape([N, D, H])
    q.heads(tp, N).reshape([-1, D, H])",
    },
    Code {
        code: "E0205",
        title: "this operation is not defined for this dtype",
        text: "\
Arithmetic and rounding are defined for float values only, and casts only where each
value has one meaning: the codes of an FP8 tensor mean nothing without their scales,
packed integers are not numbers. Convert first, so that the plan says where it rounds.
    a.to(f32) * 0.5
    q8.dequantize(bf16) * 0.5",
    },
    Code {
        code: "E0206",
        title: "quantize needs a float matrix",
        text: "\
Block quantization works on tiles of rows and columns: the value must have two
dimensions, or three, where the first counts experts, and be bf16, f16 or f32. Vectors
such as norms and biases are not quantized by any receiver; write them as they are. An
integer or an already packed value must be turned into floats first.
    norm.src(\"weight\", [H]).quantize(q)
    norm.src(\"weight\", [H])",
    },
    Code {
        code: "E0207",
        title: "the value is already quantized with another block",
        text: "\
`.quantize` on a value that is quantized with the same block passes its codes through
untouched. With another block it would have to round a second time, which loses
precision, so it must be written down:
    w.quantize(q.block(64))
    w.dequantize(f32).quantize(q.block(64))
If only the grid of the scales must be finer, `.refine(64)` repeats them and rounds
nothing.",
    },
    Code {
        code: "E0208",
        title: "this operation is not defined on a quantized value",
        text: "\
A quantized value is two tensors, codes and scales. Moves that respect the block grid
(cuts, slices, cat, stack) apply to both; arithmetic, casts and moves that tear blocks
apart have no meaning. Do them before `.quantize`, or on the result of `.dequantize`.
    (w.quantize(q)) * k
    (w * k).quantize(q)",
    },
    Code {
        code: "E0209",
        title: "a size is zero, negative or too large",
        text: "\
Every size must be at least 1 where the operation needs elements, and the number of
bytes must fit in 64 bits. Sizes come from the config, so the likely cause is a key that
means something else in this model, or a subtraction that went below zero:
    src(\"weight\", [model.num_hidden_layers - model.first_k_dense_replace, H])
Read the size from the key that has it, or guard the case with `if`.",
    },
    Code {
        code: "E0210",
        title: "refine: the finer block does not divide the present one",
        text: "\
`.refine(b)` repeats each scale over a finer grid, which is exact only when the present
block is a multiple of b: 128 can become 64 or 32, but not 96. Choose b as the greatest
common divisor of 128 and the sizes that are cut, at least 32, as the receiver does. For
any other block the weights must be rounded again: `.dequantize(f32).quantize(...)`.",
    },
];
