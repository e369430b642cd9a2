"""DTensors and their placements."""

from .. import Tensor


class Mesh:
    def __init__(self, **axes):
        self.mesh_dim_names, self.shape = tuple(axes), tuple(axes.values())


class Replicate:
    def is_replicate(self):
        return True


class Shard:
    def __init__(self, dim):
        self.dim = dim

    def is_replicate(self):
        return False


class _StridedShard(Shard):
    def __init__(self, dim, *, split_factor):
        super().__init__(dim)
        self.split_factor = split_factor


class DTensor(Tensor):
    def __init__(self, shape, mesh, placements, dtype="bfloat16"):
        super().__init__(shape, dtype)
        self.device_mesh, self.placements = mesh, tuple(placements)
