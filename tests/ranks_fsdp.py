"""Checks of FSDP2 on quantized models, one process for each rank; tests/test_parallel.py runs them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import nybble
from nybble.parallel import calibrate_alone, keep_portable

sys.path.insert(0, str(Path(__file__).parent))
import ranks

SCHEMES = ("w8a8", "w4a16g32asym", "w4a8g32static", "w4nfa16g32", "sp50w8a8")


class Block(nn.Module):
    """An MLP with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 130), nn.Linear(130, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def made(scheme: str) -> nn.Module:
    """The same model on every rank: tokens to logits, all layers quantized, embeddings too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 64), Block(), Block(), nn.Linear(64, 32)).eval()
    batches = [torch.arange(16).view(2, 8)]
    if scheme.startswith("sp"):
        nybble.sparsify(model, "50%", method="magnitude", goal="memory")
    else:
        with calibrate_alone():
            nybble.quantize(model, scheme, calibration=batches if "static" in scheme else None, goal="memory")
    return model


def shard(model: nn.Module) -> nn.Module:
    for i in (1, 2):
        fully_shard(model[i])
    return fully_shard(model)


def held(model: nn.Module) -> int:
    """Bytes of this rank's parameters and packed weights."""
    parts = [one.to_local() if isinstance(one, DTensor) else one for one in (*model.parameters(), *model.buffers())]
    return sum(part.nbytes for part in parts)


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


@torch.no_grad()
def packed_weights_stay_whole(folder: Path) -> None:
    for scheme in SCHEMES:
        model = made(scheme)
        wanted = model(TOKENS)
        shard(model)
        for _ in range(2):
            assert torch.equal(model(TOKENS), wanted), scheme


@torch.no_grad()
def portable_weights_are_sharded(folder: Path) -> None:
    """Bit for bit, call after call, and the state is that of the whole model."""
    for scheme in SCHEMES:
        model = made(scheme)
        wanted, state = model(TOKENS), {key: one.clone() for key, one in model.state_dict().items()}
        size = held(model)
        assert keep_portable(model) == (5 if scheme.startswith("sp") else 6)
        shard(model)
        share = held(model)
        for _ in range(2):
            assert torch.equal(model(TOKENS), wanted), scheme
            model.reshard()
            assert held(model) == share < 0.6 * size + 512, scheme
        found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            assert found.keys() == state.keys()
        assert all(torch.equal(one, state[key]) for key, one in found.items())
        model.reshard()
        model[3].scale.to_local().mul_(2)
        assert not torch.equal(model(TOKENS), wanted)
        model.reshard()
        whole = {key: one.clone() for key, one in state.items()}
        set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
        assert torch.equal(model(TOKENS), wanted), scheme


def converted_scales_are_refused(folder: Path) -> None:
    model = nn.Sequential(made("w8a8")[3])
    keep_portable(model)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bfloat16, was torch"):
        model(torch.ones(2, 64))


class Adapted(nn.Module):
    """LoRA by hand: a frozen layer and two trained ones beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapters_train(folder: Path) -> None:
    """The gradients of adapters are those of one process, and so is the model after a step."""
    for portable in (False, True):
        model = made("w4a16g32")
        model.requires_grad_(requires_grad=False)
        torch.manual_seed(1)
        for block in model[1:3]:
            block.up, block.down = Adapted(block.up), Adapted(block.down)
        one = copy.deepcopy(model)
        if portable:
            keep_portable(model)
        shard(model)
        losses = []
        for each in (one, model):
            trained = [parameter for parameter in each.parameters() if parameter.requires_grad]
            step = torch.optim.SGD(trained, lr=0.5)
            each(TOKENS).square().sum().backward()
            step.step()
            losses.append(each(TOKENS).detach())
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(grads) == 8
        for name, grad in grads.items():
            wanted = one.get_parameter(name).grad
            torch.testing.assert_close(grad.full_tensor(), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def peft_adapters_train(folder: Path) -> None:
    """As above, by PEFT."""
    nybble.patch_peft()
    grads = []
    for parallel in (False, True):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
        model = peft.get_peft_model(made("w8a8"), config).base_model.model
        if parallel:
            keep_portable(model)
            shard(model)
        model(TOKENS).square().sum().backward()
        named = [(name, one.grad) for name, one in model.named_parameters() if one.requires_grad]
        grads.append({name: one.full_tensor() if parallel else one for name, one in named})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 8
    for name, wanted in grads[0].items():
        torch.testing.assert_close(grads[1][name], wanted, rtol=1e-6, atol=1e-6)


def adapters_on_cut_layers_are_refused(folder: Path) -> None:
    nybble.patch_peft()
    model = made("w8a8")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"1.up": ColwiseParallel(), "1.down": RowwiseParallel()})
    with pytest.raises(ValueError, match="layer: is cut"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up"]))


CHECKS = {
    one.__name__: one
    for one in (
        packed_weights_stay_whole,
        portable_weights_are_sharded,
        adapters_train,
        peft_adapters_train,
        converted_scales_are_refused,
        adapters_on_cut_layers_are_refused,
    )
}

if __name__ == "__main__":
    ranks.main(CHECKS)
