//! Codes of inputs and live tables: checkpoints, manifests, and what the receiver holds.

use super::Code;

pub(super) const CODES: &[Code] = &[
    Code {
        code: "E0401",
        title: "a source tensor was not found",
        text: "\
The plan reads a tensor that the checkpoint or the trainer does not have. Missing
weights are never filled with zeros. The message shows the nearest name that exists.
Names differ between layouts of one family: fused or split experts, a `model.` in front
or not. Choose the layout with --set source=..., or check that --model names the right
folder.",
    },
    Code {
        code: "E0402",
        title: "a source tensor has another shape than the plan says",
        text: "\
`block.src(name, shape)` states the shape of the whole tensor, computed from the config.
The file or the trainer holds another one. Either the config is not of these weights, or
the plan is wrong for this model: transposed, a head count for the wrong heads, a bias
or a padding that it does not know. The message shows both shapes. A tensor is never
cropped or padded to fit.",
    },
    Code {
        code: "E0403",
        title: "a source tensor has another dtype than the plan takes",
        text: "\
A value that becomes narrower loses bits, so the plan must say where. Widening is free
of loss and needs no word; f32 to bf16, or bf16 to f16, does.
    ix[\"k_norm.weight\"] = ix.src(\"k_norm.weight\", [D]);      // narrows f32 to bf16
    ix[\"k_norm.weight\"] = ix.src(\"k_norm.weight\", [D]).to(bf16);
An FP8 source for a bf16 target is written `.dequantize(bf16)`.",
    },
    Code {
        code: "E0404",
        title: "a source tensor is neither used nor dropped",
        text: "\
Every tensor of the source must go somewhere. One that no parameter reads is a sign that
the plan forgot it, and the receiver would serve old weights. If it really has no place
in the receiver, say so:
    drop(\"rotary_emb.inv_freq\");
Patterns are dotted path segments: `mlp.gate` does not match `mlp.gate_proj`.",
    },
    Code {
        code: "E0405",
        title: "a keep or drop pattern matches nothing",
        text: "\
A pattern without a match is usually misspelled, and would silently stop protecting what
it names. `drop` is checked against the source's tensors, `keep` against the receiver's.
Patterns are dotted path segments; a dot matches a dot only. If the tensors exist in
some models of the family only, write the pattern as optional:
    drop(\"rotary_emb.inv_freq\", optional);",
    },
    Code {
        code: "E0406",
        title: "a target parameter is written twice",
        text: "\
`block[name] = value` may happen once for each name: with two writers the last would win
by accident. A quantized value also writes its scale, so `w13_weight` and a separate
`w13_weight_scale_inv` collide. The label shows the first writer. Join the values with
`cat` if both are parts of one parameter; otherwise remove one, or check the name in the
loop (a layer or expert number left out gives one name many times).",
    },
    Code {
        code: "E0407",
        title: "a target parameter has no writer",
        text: "\
The receiver holds a parameter or buffer that the plan does not write. After the update
it would still have its old or uninitialized value. Add a rule that writes it; or, if it
is not a weight (a calibration scale, a cache), declare that it stays:
    keep(\"attn._k_scale\");",
    },
    Code {
        code: "E0408",
        title: "the plan writes a name that the receiver does not have",
        text: "\
The receiver's manifest has no parameter of this name. The message shows the nearest
one. Names change between versions of vLLM (from 0.24 on, MoE weights stand under
`experts.routed_experts`), and with the quantization (`weight_scale_inv` or
`weight_scale`). Check that --target and --set quant describe this server. Parameters of
the pipeline stages belong inside `if stage(i) { ... }`.",
    },
    Code {
        code: "E0409",
        title: "shape or stride differs from the receiver's",
        text: "\
The receiver registered this parameter with another local shape, or lies in memory in
another order. The message shows both, with the rank. Nothing is reshaped to fit.
Typical causes: a different tp, ep or dp than the server runs with, a layer that the
server replicates instead of cutting, a backend that swaps, pads or packs the weight
after loading. Set --infer and --target to what the server really uses.",
    },
    Code {
        code: "E0410",
        title: "dtype differs from the receiver's",
        text: "\
The plan makes another dtype than the receiver holds. Nothing is cast silently. If the
receiver keeps the weight in high precision, leave out `.quantize`; if it wants FP8, add
it; for f32 biases and norms add a cast:
    gate[\"e_score_correction_bias\"] = gate.src(\"e_score_correction_bias\", [E]).to(f32);
A whole model that differs usually means another --set quant than the server's.",
    },
    Code {
        code: "E0411",
        title: "two targets share storage",
        text: "\
Two names of the receiver are the same memory, and the plan writes both; the second
write would destroy the first, or repeat it. A tied head is `embed_tokens`; in bf16 W_UV
and W_UK_T are views of kv_b_proj. Write the storage once, under its first name. If the
two names overlap in part only, the receiver's manifest is wrong or the model is not
supported.",
    },
    Code {
        code: "E0412",
        title: "a scale tensor is missing or does not fit its weight",
        text: "\
FP8 codes are meaningless without their scales: one for each block of 128 x 128, the
last blocks of a dimension may be smaller. Beside an e4m3 weight of shape [N, K] there
must be a scale of shape [ceil(N/128), ceil(K/128)], or the block that the config's
`weight_block_size` names, in a float dtype or as e8m0 exponents. Convert the checkpoint
anew: scales cannot be guessed from codes.",
    },
    Code {
        code: "E0413",
        title: "weights are missing",
        text: "\
run and verify read weights, but --model is left out, names a config.json alone, or a
folder without safetensors files. Or `model.safetensors.index.json` names a file that is
not in the folder: a download or a copy was not finished. The message counts the
tensors that are missing with it. Nothing was read; fetch the file and run again. A file
that was renamed must be renamed in the index.",
    },
    Code {
        code: "E0414",
        title: "a file is truncated or its header is not valid",
        text: "\
A safetensors file starts with a header that says where each tensor lies. The header is
not valid JSON, its offsets overlap or leave gaps, or the file is shorter or longer than
the header says; the message gives both sizes. Fetch the file again and compare its
checksum. Missing bytes are never taken as zeros.",
    },
    Code {
        code: "E0415",
        title: "a tensor is in two files, and there is no index",
        text: "\
Without an index nobody can say which copy is meant; the last one read would win by
accident. The message names both files. Remove the file that does not belong to the
checkpoint (often an older save in the same folder), or add an index that names one of
them.",
    },
    Code {
        code: "E0416",
        title: "the index names a tensor that the file does not have",
        text: "\
The index says that a tensor is in a file, but the file's header does not list it: index
and files come from two different saves. Fetch both from one place, or write the index
again from the files.",
    },
    Code {
        code: "E0417",
        title: "config.json is missing or not valid JSON",
        text: "\
Shapes come from the model's config, so nothing can be planned without it. --model takes
the folder that holds config.json, or the file itself. For dry-run and check the
file alone is enough; run and verify need the weights beside it.",
    },
    Code {
        code: "E0418",
        title: "a file holds a dtype that is not supported",
        text: "\
The engine moves bf16, f16, f32, e4m3, e8m0, int32 and uint8. This tensor has another
type, and taking its bytes for something else would give wrong weights. If the tensor is
not part of the model, `drop` it in the plan; otherwise convert the checkpoint.",
    },
    Code {
        code: "E0419",
        title: "an input file is malformed",
        text: "\
A manifest, an expert map or a cluster file is not the JSON that is expected: it does
not parse, has another schema number, a key is missing, or a value has the wrong type or
cannot be. The message names the file and the key. The forms, of --expert-map (the
logical expert in each physical slot), of --source-manifest, of --manifest, and of
--cluster (GB/s of a link each way; a key left out has this value):
    {\"schema\": 1, \"layers\": {\"model.layers.3\": [0, 2, 1, 2]}}
    {\"schema\": 1, \"mesh\": [[\"fsdp\", 2]], \"tensors\": [{\"name\": \"w\",
     \"dtype\": \"bfloat16\", \"shape\": [4, 4], \"placements\": [\"S(0)\"]}]}
    {\"parameters\": [{\"name\": \"w\", \"dtype\": \"bfloat16\", \"shape\": [4, 4],
     \"stride\": [4, 1]}], \"buffers\": [], \"aliases\": [{\"name\": \"v\", \"of\": \"w\"}],
     \"topology\": {\"tp\": 2, \"global_rank\": 1, \"tp_rank\": 1}}
    {\"schema\": 1, \"gpus_per_host\": 8, \"nics_per_host\": 8, \"nvlink_gb_s\": 370.0,
     \"nic_gb_s\": 45.0, \"latency_us\": 20.0}",
    },
    Code {
        code: "E0420",
        title: "a kept name is also written",
        text: "\
`keep(pattern)` promises that the plan leaves these parameters as they are, and yet a
rule writes one of them; so does a pattern that keeps one part of a fused parameter.
Decide: make the pattern narrower, or leave the rule out for this name.
    keep(\"mlp.gate\");            // and elsewhere: mlp[\"gate.weight\"] = ...",
    },
    Code {
        code: "E0421",
        title: "a file or a second copy of a tensor was ignored",
        text: "\
A note, not an error: the folder holds a safetensors file that the index does not name,
or a file holds a tensor that the index places elsewhere. The index decides; nothing is
merged. If the ignored data should have been used, correct the index; if not, removing
it makes the note go away.",
    },
    Code {
        code: "E0422",
        title: "an entry of the ignore list matches nothing",
        text: "\
A warning: the model's quantization config lists modules that stay in high precision,
and one entry matches no module. Many published configs carry such entries and are
right; but a misspelled one means that a module is quantized that should not be. Entries
are dotted path segments (`mlp.gate` is not `mlp.gate_proj`), or regular expressions
after `re:`.",
    },
    Code {
        code: "E0423",
        title: "one block of a fused FP8 weight covers parts of two tensors",
        text: "\
A note of the dry run: values were joined first and quantized then, and a part does not
end on a block, so rows of two tensors share one scale. That is exact for receivers that
quantize the fused weight, and differs from quantizing each part alone. If the receiver
has one grid for each part, give every part its own parameter or pad it to the block:
    cat([gate.pad_to(0, 128), up.pad_to(0, 128)]).quantize(q)",
    },
];
