"""What a live vLLM worker holds, as a receiver manifest for `engine check --manifest`.

In the process that owns the LLM, with this folder on PYTHONPATH and
VLLM_ALLOW_INSECURE_SERIALIZATION=1:

    llm.collective_rpc(dump_receiver.dump, args=("manifests",))

writes manifests/rank-N.json, one a worker. `manifest(model)` alone takes any torch module.
"""

import json
import os

import torch

# Tensors that some versions keep as plain attributes of a module.
ATTRIBUTES = ("W_UV", "W_UK_T", "W_UK_T_dcp_qrep", "hc_attn_fn_broadcast")


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def row_major(shape):
    stride, step = [], 1
    for size in reversed(shape):
        stride.insert(0, step)
        step *= max(size, 1)
    return stride


def memory(tensor):
    """Equal for two names of one tensor: the same elements of the same storage."""
    address = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    if address == 0:  # nothing is allocated: only the object itself tells
        return id(tensor)
    place = (str(tensor.device), address, tensor.storage_offset(), tensor.dtype)
    return place + (tuple(tensor.shape), tuple(tensor.stride()))


def named_tensors(model):
    """(kind, name, tensor, persistent) of all that a model holds, under all of its names."""
    for name, tensor in model.named_parameters(remove_duplicate=False):
        yield "parameters", name, tensor, None
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(recurse=False))
        for name in ATTRIBUTES:
            tensor = vars(module).get(name)
            if isinstance(tensor, torch.Tensor) and name not in own:
                yield "parameters", f"{prefix}.{name}".lstrip("."), tensor, None
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in module.named_buffers(recurse=False):
            kept = name not in module._non_persistent_buffers_set
            yield "buffers", f"{prefix}.{name}".lstrip("."), tensor, kept


def manifest(module, /, **facts):
    """The manifest of one rank; `facts` are further keys, such as topology."""
    out = {**facts, "parameters": [], "buffers": [], "aliases": []}
    first = {}
    for kind, name, tensor, persistent in named_tensors(module):
        of = first.setdefault(memory(tensor), name)
        if of != name:
            out["aliases"].append({"name": name, "of": of})
            continue
        shape, stride = list(tensor.shape), list(tensor.stride())
        entry = {"name": name, "dtype": dtype_name(tensor), "shape": shape}
        if stride != row_major(shape) and tensor.numel() > 1:
            entry["stride"] = stride
        if persistent is not None:
            entry["persistent"] = persistent
        out[kind].append(entry)
    return out


def topology(worker):
    """Where a worker stands, in the engine's numbering of ranks."""
    config = worker.vllm_config.parallel_config
    tp, pp, dp = (
        getattr(config, f"{axis}_parallel_size", 1) for axis in ("tensor", "pipeline", "data")
    )
    dp_rank = getattr(config, "data_parallel_rank", 0)
    pp_rank, tp_rank = divmod(worker.rank % (tp * pp), tp)
    spread = bool(getattr(config, "enable_expert_parallel", False))
    balanced = bool(getattr(config, "enable_eplb", False))
    redundant = getattr(getattr(config, "eplb_config", None), "num_redundant_experts", 0)
    return {
        "tp": tp,
        "dp": dp,
        "ep": tp * dp if spread else 1,
        "pp": pp,
        "enable_expert_parallel": spread,
        "redundant_experts": redundant if balanced else 0,
        "global_rank": (dp_rank * pp + pp_rank) * tp + tp_rank,
        "tp_rank": tp_rank,
        "dp_rank": dp_rank,
        "ep_rank": dp_rank * tp + tp_rank if spread else 0,
        "pp_rank": pp_rank,
    }


def kernels(model):
    """The kernel classes that the model's layers chose, with one layer of each."""
    found = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        kinds = [type(method).__name__]
        for key, value in sorted(vars(method).items()):
            if "backend" in key or "kernel" in key or "linear" in key:
                kinds.append(f"{key}={getattr(value, 'name', type(value).__name__)}")
        found.setdefault(" ".join(kinds), name)
    return found


def dump(worker, folder="."):
    """Writes rank-N.json of a vLLM worker and gives its path."""
    model, config = worker.model_runner.model, worker.vllm_config.model_config
    where = topology(worker)
    out = manifest(
        model,
        model=str(config.model),
        hf_config=config.hf_config.to_dict(),
        topology=where,
        quant=str(config.quantization),
        state="after process_weights_after_loading",
        vllm_info={"model_class": type(model).__name__, "kernels": kernels(model)},
    )
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"rank-{where['global_rank']}.json")
    with open(path, "w") as file:
        json.dump(out, file, indent=1, default=str)
    return path
