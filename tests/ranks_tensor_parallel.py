"""Checks of tensor parallelism, one process for each rank; tests/test_parallel.py runs them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import nybble
from nybble.weights.weight_type import weight_types

sys.path.insert(0, str(Path(__file__).parent))
import ranks

N, K = 96, 1024
SPARSE = ("sp50w8a8", "sp24w8a8", "sp24w4a16g32", "sp32of128w8a8", "bs32x32w8a8")


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def dense_schemes() -> list[str]:
    """Every type of weight, with each kind of activation that it has, in its smallest groups and whole rows."""
    found = []
    for name, kind in weight_types().items():
        if kind.bits == 16:
            continue
        for bits in kind.act_bits:
            sizes = [f"g{kind.group_sizes[min(1, len(kind.group_sizes) - 1)]}"] if kind.group_sizes else []
            groups = [*sizes, ""] if kind.whole_rows else sizes
            for group in groups:
                found.append(f"{name}a{bits}{group}")
                if kind.zero_point is not None:
                    found.append(f"{name}a{bits}{group}asym")
                if bits != 16:
                    found.append(f"{name}a{bits}{group}static")
    return found


def layer(scheme: str, n: int = N, k: int = K, bias: bool = True, seed: int = 0) -> nybble.nn.Linear:
    """The same layer on every rank. A sparse one has zeros that every pattern has."""
    random = torch.Generator().manual_seed(seed)
    dense = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        for one in dense.parameters():
            one.copy_(torch.randn(one.shape, generator=random) / 16)
        if scheme in SPARSE:
            dense.weight.view(n, -1, 128)[..., 32:] = 0
            dense.weight.view(n, -1, 4)[..., 2:] = 0
    cls = nybble.nn.SparseLinear if scheme in SPARSE else nybble.nn.Linear
    return cls.from_dense(dense, scheme, act_range=(-4.0, 4.0) if "static" in scheme else None)


def rows(k: int = K, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def share(whole: Tensor, dim: int) -> Tensor:
    return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def close(found: Tensor, wanted: Tensor, limit: float) -> None:
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error <= limit, f"relative error {error:.3g}, at most {limit:.3g}"


def refused(error: type[Exception], call: Callable[[], object], *parts: str) -> None:
    """The call raises, and says all these."""
    with pytest.raises(error) as told:
        call()
    missing = [part for part in parts if part not in str(told.value)]
    assert not missing, f"{missing} not in {told.value}"


# --- one layer


@torch.no_grad()
def columns_are_bit_for_bit(folder: Path) -> None:
    """Every scheme, and outputs that do not divide evenly."""
    world = mesh()
    for i, scheme in enumerate((*dense_schemes(), "w4a16g32order", *SPARSE)):
        one, x = layer(scheme, N - 3), rows(dtype=torch.float32 if i % 4 < 2 else torch.bfloat16)
        wanted = one(x)
        parallelize_module(one, world, ColwiseParallel(output_layouts=Replicate() if i % 2 else Shard(-1)))
        assert one.out_features < N - 3, scheme
        assert torch.equal(one(x), wanted if i % 2 else share(wanted, -1)), scheme


def simulated(scheme: str, x: Tensor) -> Tensor:
    """What row-wise ranks compute, on one: the sum of layers with a share of the inputs each."""
    dense = layer(scheme).dequantize()
    parts = []
    for weight, part in zip(
        dense.weight.chunk(dist.get_world_size(), 1), x.chunk(dist.get_world_size(), -1), strict=True
    ):
        # A weight that the codes hold exactly is rounded to the same codes: activations alone differ.
        act = part
        if "a16" not in scheme and "static" not in scheme:
            identity = nybble.nn.Linear.from_dense(_identity(part.shape[-1]), f"w8{scheme[scheme.index('a') :][:2]}")
            act = identity(part)
        parts.append(act @ weight.T)
    return torch.stack(parts).sum(0) + dense.bias


def _identity(size: int) -> nn.Linear:
    one = nn.Linear(size, size, bias=False)
    one.weight = nn.Parameter(torch.eye(size))
    return one


@torch.no_grad()
def rows_are_summed(folder: Path) -> None:
    """Float and static activations: within float summation. Dynamic ones: as on ranks simulated in float."""
    world = mesh()
    for scheme in dense_schemes():
        whole, x = layer(scheme), rows()
        wanted = whole(x)
        parallelize_module(whole, world, RowwiseParallel())
        found = whole(share(x, -1))
        if "a16" in scheme or "static" in scheme:
            close(found, wanted, 2e-6)
        else:
            close(found, simulated(scheme, x), 2e-6)
            close(found, wanted, 0.03)
    for scheme in SPARSE:
        whole, x = layer(scheme), rows()
        wanted = whole(x)
        parallelize_module(whole, world, RowwiseParallel(input_layouts=Replicate()))
        close(whole(x), wanted, 2e-6 if "a16" in scheme else 0.03)


def no_group_is_cut(folder: Path) -> None:
    world, size = mesh(), dist.get_world_size()
    style = RowwiseParallel()
    for scheme, k, unit in (
        ("w4a16g128", 128 * size - 32, "128"),
        ("w8a8g64", 96 * size, "64"),
        ("w4ka16g32", 128 * size, "256"),
        ("sp32of128w8a8", 192 * size, "128"),
    ):
        one = nybble.nn.SparseLinear(k, N, scheme=scheme) if scheme in SPARSE else layer(scheme, N, k)
        refused(
            ValueError, lambda one=one: parallelize_module(one, world, style), f"in_features={k}", unit, f"ranks={size}"
        )
        assert (one.in_features, one.sharding) == (k, None)
    refused(ValueError, lambda: parallelize_module(layer("w4a16g32order"), world, style), "w4a16g32order", "order")
    few = layer("w8a8", size - 1)
    refused(
        ValueError, lambda: parallelize_module(few, world, ColwiseParallel()), f"out_features={size - 1}", "too few"
    )
    cut = parallelize_module(layer("w8a8"), world, ColwiseParallel())
    refused(ValueError, lambda: parallelize_module(cut, world, ColwiseParallel()), "cut already")
    table = nybble.nn.Embedding.from_dense(nn.Embedding(64, 64), "w8a16")
    refused(NotImplementedError, lambda: parallelize_module(table, world, style), "RowwiseParallel", "Embedding")


def gradients_are_those_of_one_rank(folder: Path) -> None:
    """Of inputs and of a trained bias; the inner width is cut, as in an MLP."""
    world = mesh()
    for scheme in ("w8a16", "w4a8g32static"):
        model = nn.Sequential(layer(scheme, K, 64), nn.SiLU(), layer(scheme, N, K, seed=3))
        x, one = rows(64).requires_grad_(), copy.deepcopy(model)
        one(x).square().sum().backward()
        wanted = [x.grad, one[0].bias.grad, one[2].bias.grad]
        x.grad = None
        parallelize_module(model, world, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        model(x).square().sum().backward()
        found = [x.grad, model[0].bias.grad, model[2].bias.grad]
        for a, b in zip(found, (wanted[0], share(wanted[1], 0), wanted[2]), strict=True):
            close(a, b, 1e-5)


def state_is_that_of_the_whole(folder: Path) -> None:
    """state_dict has DTensors of the whole layer, and takes them or whole tensors."""
    world = mesh()
    for scheme in ("w4a16g32asym", "w8a8static", "w4nfa16g32", "w4a16g32order"):
        styles = [ColwiseParallel()] if "order" in scheme else [ColwiseParallel(), RowwiseParallel()]
        for style in styles:
            one = layer(scheme)
            wanted = {key: value.clone() for key, value in one.state_dict().items()}
            parallelize_module(one, world, style)
            state = one.state_dict()
            assert state.keys() == wanted.keys()
            for key, value in state.items():
                assert isinstance(value, DTensor), key
                assert torch.equal(value.full_tensor(), wanted[key]), key
            other = layer(scheme, seed=7)
            if "static" in scheme:
                other.load_state_dict({**other.state_dict(), "act_scale": torch.tensor([0.5])})
            parallelize_module(other, world, style)
            x = rows() if isinstance(style, ColwiseParallel) else share(rows(), -1)
            before = other(x)
            for given in (state, wanted):
                other.load_state_dict(given)
                assert torch.equal(other(x), one(x)), scheme
                assert not torch.equal(before, one(x))
    sparse = parallelize_module(layer("sp50w8a8"), world, ColwiseParallel())
    refused(NotImplementedError, sparse.state_dict, "SparseLinear")
    model = nn.Sequential(parallelize_module(layer("w8a8"), world, ColwiseParallel()))
    refused(ValueError, lambda: nybble.save(model, folder / "x"), "0: is cut", "before it is parallelized")


def the_first_rank_counts(folder: Path) -> None:
    """As torch's styles: rank 0's weight is scattered, unless src_data_rank is None."""
    world, x = mesh(), rows()
    mine, first = layer("w8a8", seed=dist.get_rank()), layer("w8a8", seed=0)
    apart = layer("w8a8", seed=dist.get_rank())
    wanted = share(first(x), -1)
    parallelize_module(mine, world, ColwiseParallel())
    parallelize_module(apart, world, ColwiseParallel(), src_data_rank=None)
    assert torch.equal(mine(x), wanted)
    assert torch.equal(apart(x), share(layer("w8a8", seed=dist.get_rank())(x), -1))


def rows_of_dtensors(folder: Path) -> None:
    """A whole layer in a world of DTensors: the rule of the op."""
    world, x = mesh(), rows(seed=2).repeat(2, 2, 1)[:, :8]
    one = layer("w4a8g32")
    wanted = one(x)
    distribute_module(one, world)
    for place in (Shard(0), Shard(1), Replicate()):
        found = one(distribute_tensor(x, world, [place]))
        assert found.placements == (place,)
        assert torch.equal(found.full_tensor(), wanted)


# --- a model


class Attention(nn.Module):
    """Heads of 32 over as many as the projections give."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (-1, 32)).transpose(1, 2) for one in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """As those of Llama, without rotary places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.norms = Attention(width), nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.gate, self.up, self.down = nn.Linear(width, 512), nn.Linear(width, 512), nn.Linear(512, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        hidden = self.norms[1](x)
        return x + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


class Model(nn.Module):
    """Tokens to logits, by two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 128), nn.Linear(128, 64)
        self.blocks = nn.ModuleList(Block(128) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


COLUMNS = dict.fromkeys(("attention.q", "attention.k", "attention.v", "gate", "up"), ColwiseParallel)
PLAN = {
    f"blocks.*.{name}": cls
    for name, cls in {**COLUMNS, "attention.o": RowwiseParallel, "down": RowwiseParallel}.items()
}


@torch.no_grad()
def a_model_gives_the_logits_of_one_rank(folder: Path) -> None:
    """Quantized, and quantized and fused; a fused chain gives way to layers that are cut."""
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    for scheme, limit in (("w8a16", 3e-6), ("w4a16g32", 3e-6), ("w8a8", 0.05)):
        for fuse in (False, True):
            torch.manual_seed(0)
            model = Model().eval()
            nybble.quantize(model, scheme, goal="memory", fuse=False)
            wanted = model(tokens)
            if fuse:
                nybble.fuse(model, [tokens], goal="always")
                close(model(tokens), wanted, 0.05)
            size = sum(one.nbytes for one in model.modules() if isinstance(one, nybble.nn.Linear))
            plan = {key: cls() for key, cls in PLAN.items()}
            parallelize_module(model, mesh(), {**plan, "head": ColwiseParallel(output_layouts=Replicate())})
            close(model(tokens), wanted, limit)
            now = sum(one.nbytes for one in model.modules() if isinstance(one, nybble.nn.Linear))
            assert now < 1.2 * size / dist.get_world_size()


CHECKS = {
    one.__name__: one
    for one in (
        columns_are_bit_for_bit,
        rows_are_summed,
        no_group_is_cut,
        gradients_are_those_of_one_rank,
        state_is_that_of_the_whole,
        the_first_rank_counts,
        rows_of_dtensors,
        a_model_gives_the_logits_of_one_rank,
    )
}

if __name__ == "__main__":
    ranks.main(CHECKS)
