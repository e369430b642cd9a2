"""A worker of a tied Llama at tp rank 1 of 2, dumped to the folder of the first argument."""

import sys
from types import SimpleNamespace as Facts

import dump_receiver
from torch import Module, Tensor

folder, strided = sys.argv[1], "strided" in sys.argv[2:]


class Kernel:
    pass


embed = Tensor([64, 256])
o = Tensor([256, 128], stride=[1, 256] if strided else None)
layer = Module(
    input_layernorm=Module({"weight": Tensor([256])}),
    post_attention_layernorm=Module({"weight": Tensor([256])}),
    self_attn=Module(
        qkv_proj=Module({"weight": Tensor([384, 256])}),
        o_proj=Module({"weight": o}),
        rotary_emb=Module(transient={"cos_sin_cache": Tensor([64, 128])}),
        attn=Module(buffers={"_k_scale": Tensor([], "float32")}),
    ),
    mlp=Module(
        gate_up_proj=Module({"weight": Tensor([512, 256])}),
        down_proj=Module({"weight": Tensor([256, 256])}),
    ),
)
# A second name of a buffer, through a view of the same memory.
scale = layer._modules["self_attn"]._modules["attn"]._buffers["_k_scale"]
layer._modules["mlp"]._buffers["_k_scale"] = Tensor([], "float32", of=scale)
quant = Kernel()
quant.fp8_backend = Facts(name="TRITON")
layer._modules["mlp"].quant_method = quant
model = Module(
    model=Module(
        embed_tokens=Module({"weight": embed}),
        layers=Module(**{"0": layer}),
        norm=Module({"weight": Tensor([256])}),
    ),
    lm_head=Module({"weight": embed}),
)
# A tensor that some versions keep as an attribute: a view of half of o_proj.
model.W_UV = Tensor([128, 128], stride=[128, 1], of=o, offset=128 * 128)
parallel = Facts(
    tensor_parallel_size=2,
    data_parallel_size=1,
    pipeline_parallel_size=1,
    data_parallel_rank=0,
    enable_expert_parallel=False,
)
config = Facts(model="a/llama", quantization=None, hf_config=Facts(to_dict=lambda: {"a": object}))
worker = Facts(
    rank=1,
    model_runner=Facts(model=model),
    vllm_config=Facts(parallel_config=parallel, model_config=config),
)
print(dump_receiver.dump(worker, folder))
