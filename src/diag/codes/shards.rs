//! Codes of the shard stage: what each rank holds, on a given topology.

use super::Code;

pub(super) const CODES: &[Code] = &[
    Code {
        code: "E0301",
        title: "a size does not divide over the axis",
        text: "\
`.shard(dim, axis)` gives every rank an equal, contiguous part, so the size must be a
multiple of the axis. Receivers do not round either. Choose an axis size that divides,
or, where the receiver pads (vocabulary tables, for one), pad in the plan first:
    table.shard(0, tp)                      // 151937 rows over 8 ranks
    table.pad_to(0, 64).shard(0, tp)",
    },
    Code {
        code: "E0302",
        title: "the heads do not divide over the axis",
        text: "\
`.heads(axis, n)` cuts dimension 0 at whole heads. With at least as many heads as ranks,
n must be a multiple of the axis; with fewer, the axis must be a multiple of n and each
head is repeated. 32 heads fit on 8 ranks and 4 heads on 16, but neither fits on 3. The
rows must also be n heads of equal size: check that n is the number of query heads for
q, and the number of key-value heads for k and v.",
    },
    Code {
        code: "E0303",
        title: "the experts do not spread evenly",
        text: "\
With redundant experts or EPLB every rank holds the same number of physical experts, so
experts + redundant_experts must be a multiple of ep; redundant experts need an expert
map or the initial one, and no logical expert may be left without a slot. Change
redundant_experts in --infer: 256 experts over ep = 24 need 8 of them (264 / 24 = 11).
Without EPLB an uneven count is allowed: the first ranks hold one expert more.",
    },
    Code {
        code: "E0304",
        title: "a cut crosses a quantization block",
        text: "\
The value is quantized and a cut falls inside a block, so two ranks would need parts of
one block under one scale; no receiver can hold that. If each rank quantizes its own
part in the receiver, cut first:
    w.quantize(fp8::vllm).shard(0, tp)      // 10944 / 8 = 10 blocks and 88 rows
    w.shard(0, tp).quantize(fp8::vllm)
A source that is FP8 already has its grid: use an axis size whose parts end on the grid,
or a finer grid with `.refine(b)` where the receiver takes one.",
    },
    Code {
        code: "E0305",
        title: "the expert map is not valid",
        text: "\
An expert map lists, for every MoE layer, the logical expert in each physical slot. The
list must have experts + redundant_experts entries, each below the number of experts,
and every logical expert must appear. The layer must exist in the model and have
experts. Fetch the map anew from the server if it was rebalanced, and check that --infer
has the server's ep and redundant_experts.",
    },
    Code {
        code: "E0306",
        title: "a joined quantized part ends inside a block",
        text: "\
Quantized parts keep their own grids when they are joined, so every part but the last
must end on a block. Two halves of 10944 rows have 86 + 86 rows of scales, while the
joined 21888 rows have 171: no scale fits the block at the seam. From float values, join
first:
    cat([gate.quantize(q), up.quantize(q)])
    cat([gate, up]).quantize(q)
From an FP8 source it cannot be done exactly: dequantize and quantize again, in the
plan.",
    },
    Code {
        code: "E0307",
        title: "the topology is not valid",
        text: "\
--infer or --train names an axis that does not exist, gives a size that is not possible,
or --rank asks for a rank beyond the last. Inference axes: tp, dp, ep, pp,
redundant_experts, eplb, replicas; ep is 1 or dp * tp. Training axes: dp_replicate,
fsdp, tp, ep, pp, and the switch expert_fsdp_dim (0 or 1); ep divides fsdp. An axis left
out is 1, a count left out is 0.
    --infer tp=8,dp=2,ep=8
    --infer tp=8,dp=2,ep=16
As a warning: pp is above 1, but the plan asks neither stage(i) nor first_stage or
last_stage, so every stage would hold the whole model.",
    },
    Code {
        code: "E0308",
        title: "what must be worked on together lies on several trainer ranks",
        text: "\
Trainer ranks never exchange rows, only the maxima of tiles. So the operands of a sum,
and FP8 codes with their block scales, must have one placement; and a tile whose rows
lie on several ranks may be quantized once, or twice on one grid, as in
    x.quantize(fp8::vllm).dequantize(f32).quantize(fp8::ue8m0)
Place the operands alike on the trainer, or so that whole tiles lie on a rank. For FP8
sources: rows per rank must be a multiple of the block.",
    },
];
