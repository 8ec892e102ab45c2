"""python -m tests.routing.sharded FOLDER CLASS...: FSDP2 over two gloo processes against one process."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmd_dar.routing import attach, detach
from dmd_dar.routing.examples import example_inputs
from tests.routing.tiny_models import distance, gradients, shaken, tiny_model


def sharded(model: nn.Module, mesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for path in model.dar.plan.blocks:
        # diffusers' DiT uses an embedder of its first block once more at its end
        fully_shard(model.get_submodule(path), mesh=mesh, reshard_after_forward=path != "transformer_blocks.0")
    return fully_shard(model, mesh=mesh)


def own_gradients(model: nn.Module, inputs: dict, rank: int) -> dict[str, Tensor]:
    """The gradients of the whole batch of two, from a process that sees its own sample."""
    shared = ("img_ids", "txt_ids")
    own = {k: v[rank : rank + 1] if isinstance(v, Tensor) and k not in shared else v for k, v in inputs.items()}
    return {name: 2 * value.full_tensor() for name, value in gradients(model, own).items()}  # FSDP takes the mean


def trains_as_one(name: str, rank: int, mesh) -> None:
    def routed() -> nn.Module:
        return shaken(attach(tiny_model(name, torch.float64), query="timestep", chunk_size=2))

    alone = routed()
    inputs = example_inputs(alone)
    expected = gradients(alone, inputs)
    for checkpointing in (False, True):
        model = sharded(routed(), mesh)
        if checkpointing:
            model.enable_gradient_checkpointing()
        assert distance(own_gradients(model, inputs, rank), expected) < 1e-12


def first_forward_proves(name: str, rank: int, mesh) -> None:
    """A model attached on the meta device, sharded, then filled: the check runs in its first forward."""
    plain = tiny_model(name, torch.float64)
    with torch.device("meta"):
        model = type(plain).from_config(plain.config).double().eval()
    model = sharded(attach(model, query="static", chunk_size=2), mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith("dar."):
                parameter.copy_(dist.tensor.distribute_tensor(plain.get_parameter(key).data, mesh))
    model.dar.reset()
    assert model.dar.proof is not None
    inputs = example_inputs(plain)
    found, expected = own_gradients(model, inputs, rank), gradients(plain, inputs)
    assert model.dar.proof is None
    assert distance({key: found[key] for key in expected}, expected) < 1e-12
    with pytest.raises(ValueError, match="attach before fully_shard"):
        attach(detach(model), query="static", chunk_size=2)


def work(rank: int, folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    done = []
    for name in names:
        trains_as_one(name, rank, mesh)
        done.append(name)
    first_forward_proves(names[-1], rank, mesh)
    if rank == 0:
        print(*done, names[-1], "from", "meta")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, tuple(sys.argv[1:]), nprocs=2, start_method="fork")
