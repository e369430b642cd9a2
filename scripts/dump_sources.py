"""How a trainer's mesh cuts its tensors, as a source manifest for `engine --source-manifest`.

On any rank of the trainer (with pipeline stages: on one of each, then `merge`):

    dump_sources.dump(model, "sources.json")

Parameters and persistent buffers that are DTensors have their placements, others are whole on
every rank. `mesh` is the trainer's device mesh with all its axes; left out, it is the one with
the most axes that a tensor has.
"""

import json
import sys

from torch.distributed.tensor import DTensor

TYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e8m0fnu", "int32", "uint8")
# What wrappers put into names.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def axes_of(mesh):
    names = mesh.mesh_dim_names or tuple(f"axis{i}" for i in range(len(mesh.shape)))
    return list(zip(names, mesh.shape))


def placed(placement):
    if placement.is_replicate():
        return "R"
    split = getattr(placement, "split_factor", None)
    if split is not None:
        return f"SS({placement.dim},{split})"
    if hasattr(placement, "dim"):
        return f"S({placement.dim})"
    raise ValueError(f"{placement} is no placement of weights")


def positions(axis, size, axes):
    """Which of the mesh's axes one axis is: that of its name, or the run that it flattens."""
    if (axis, size) in axes:
        return [axes.index((axis, size))]
    runs = []
    for first in range(len(axes)):
        product = 1
        for last in range(first, len(axes)):
            product *= axes[last][1]
            if last > first and product == size and axes[first][1] > 1 < axes[last][1]:
                runs.append(list(range(first, last + 1)))
    if len(runs) == 1:
        return runs[0]
    raise ValueError(f"axis {axis} of size {size} is not one of the mesh {axes}: give mesh=")


def placements(name, tensor, axes):
    out = ["R"] * len(axes)
    if not isinstance(tensor, DTensor):
        return out
    for (axis, size), placement in zip(axes_of(tensor.device_mesh), tensor.placements):
        word = placed(placement)
        run = positions(axis, size, axes)
        # Cut once by all, and cut by one after the other, differ where a part is smaller.
        if len(run) > 1 and word != "R" and (word[1] == "S" or tensor.shape[placement.dim] % size):
            raise ValueError(f"{name} is cut unevenly by {axis}, which the mesh has in parts")
        for at in run:
            out[at] = word
    return out


def named_tensors(model):
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, tensor in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), tensor


def manifest(model, mesh=None, on=None):
    """The manifest; `on` says which stage this rank is of, such as {"pp": 1}."""
    tensors = list(named_tensors(model))
    meshes = [t.device_mesh for _, t in tensors if isinstance(t, DTensor)]
    mesh = mesh or max(meshes, key=lambda m: len(m.shape), default=None)
    axes = axes_of(mesh) if mesh is not None else []
    out = {"schema": 1, "mesh": [list(axis) for axis in axes], "tensors": []}
    for name, tensor in tensors:
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in TYPES:
            print(f"{name} is left out: {dtype} is not a type of weights", file=sys.stderr)
            continue
        entry = {"name": name, "dtype": dtype, "shape": list(tensor.shape)}
        entry["placements"] = placements(name, tensor, axes)
        if on:
            entry["on"] = dict(on)
        out["tensors"].append(entry)
    return out


def merge(manifests):
    """One manifest of those of all pipeline stages."""
    first, *others = manifests
    if any(other["mesh"] != first["mesh"] for other in others):
        raise ValueError("the manifests are of different meshes")
    return {**first, "tensors": [t for m in manifests for t in m["tensors"]]}


def dump(model, path, mesh=None, on=None):
    with open(path, "w") as file:
        json.dump(manifest(model, mesh, on), file, indent=1)
