"""A stand-in for torch: tensors without numbers, modules, meshes; only what scripts/ asks of them."""

import itertools

addresses = itertools.count(4096, 4096)


class Storage:
    def __init__(self):
        self.address = next(addresses)

    def data_ptr(self):
        return self.address


class Tensor:
    device = "cuda:0"

    def __init__(self, shape, dtype="bfloat16", stride=None, of=None, offset=0):
        self.shape, self.dtype = tuple(shape), f"torch.{dtype}"
        self.steps, self.offset = stride, offset
        self.storage = of.storage if of else Storage()

    def numel(self):
        count = 1
        for size in self.shape:
            count *= size
        return count

    def stride(self):
        steps, step = [], 1
        for size in reversed(self.shape):
            steps.insert(0, step)
            step *= size
        return tuple(self.steps or steps)

    def storage_offset(self):
        return self.offset

    def untyped_storage(self):
        return self.storage


class Module:
    """Parameters, buffers and modules by name, as keywords."""

    def __init__(self, params=(), buffers=(), transient=(), **modules):
        self._parameters, self._modules = dict(params), modules
        self._buffers = {**dict(buffers), **dict(transient)}
        self._non_persistent_buffers_set = set(dict(transient))

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        yield prefix, self
        for name, module in self._modules.items():
            inner = f"{prefix}.{name}" if prefix else name
            yield from module.named_modules(memo, inner, remove_duplicate)

    def _named(self, kind, prefix, recurse, remove_duplicate):
        seen = set()
        for path, module in self.named_modules() if recurse else [("", self)]:
            for name, tensor in getattr(module, kind).items():
                if remove_duplicate and id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                yield f"{path}.{name}" if path else name, tensor

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        return self._named("_parameters", prefix, recurse, remove_duplicate)

    def named_buffers(self, prefix="", recurse=True, remove_duplicate=True):
        return self._named("_buffers", prefix, recurse, remove_duplicate)
