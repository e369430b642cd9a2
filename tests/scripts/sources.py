"""A trainer's module over 2 x 4 ranks and a stage, dumped to the path of the first argument."""

import sys

import dump_sources
from torch import Module, Tensor
from torch.distributed.tensor import DTensor, Mesh, Replicate, Shard, _StridedShard

dense = Mesh(fsdp=8)
experts = Mesh(fsdp_mod_ep=4, ep=2)


def module(rows):
    return Module(
        {
            "w": DTensor([rows, 4], dense, [Shard(0)], "float32"),
            "experts": DTensor([2, 8, 4], experts, [_StridedShard(1, split_factor=1), Shard(0)]),
            "whole": DTensor([4], experts, [Replicate(), Replicate()]),
        },
        buffers={"bias": Tensor([3]), "count": Tensor([1], "int64")},
        transient={"cache": Tensor([9])},
    )


dump_sources.dump(Module(_orig_mod=module(16)), sys.argv[1])
try:
    dump_sources.manifest(module(17))
except ValueError as why:
    print(why)
stages = [
    dump_sources.manifest(Module({name: Tensor([4])}), Mesh(pp=2), on={"pp": at})
    for at, name in enumerate(["a", "b"])
]
print([(t["name"], t["on"]["pp"]) for t in dump_sources.merge(stages)["tensors"]])
