"""`nybble.fuse` around mixtures of experts: they run by their own forward between compiled steps."""

import pytest
import torch
from torch import nn

import nybble
from nybble.fusion.block import fused_modules
from nybble.fusion.fuse import fuse
from nybble.fusion.nodes import Inside
from nybble.nn.composite import CompositeModule

from .fusion_zoo import MAKERS, ids, make, run

pytest.importorskip("transformers")
NAME = "qwen3 moe"
EXAMPLE = {"input_ids": ids(2, 8)}


def quantized(dtype=torch.float32):
    model = make(NAME, dtype)
    nybble.quantize(model, "w8a8", goal="memory")
    return model


def inside(model):
    """The modules that run by their own forward, of each fused module."""
    return {
        name: [node.module for node in fused.first.program.explanation.nodes if isinstance(node, Inside)]
        for name, fused in fused_modules(model).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_run_by_their_own_forward(dtype):
    model = quantized(dtype)
    calls = []
    fuse(model, MAKERS[NAME][1], goal="always")
    assert inside(model) == {f"model.layers.{i}": [model.model.layers[i].mlp] for i in range(2)}
    assert all(any(isinstance(one, CompositeModule) for one in layer.mlp.modules()) for layer in model.model.layers)
    experts = model.model.layers[0].mlp
    own = type(experts).forward
    experts.forward = lambda x: calls.append(tuple(x.shape)) or own(experts, x)
    run(model, EXAMPLE)
    assert calls == [(2, 8, 64)]


def test_the_proof_does_not_depend_on_what_the_router_chooses():
    """A last bit of difference may send a token to another expert: only the experts' input and output are proved."""
    model = quantized(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # all experts are equally good
    fuse(model, MAKERS[NAME][1], goal="always")
    assert set(fused_modules(model)) == {"model.layers.0", "model.layers.1"}


def test_a_hook_on_an_expert_is_called():
    model = quantized()
    fuse(model, MAKERS[NAME][1], goal="always")
    before, seen = run(model, EXAMPLE), []
    handle = model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(run(model, EXAMPLE), before, rtol=1e-4, atol=1e-5)
    assert seen == [1]
    handle.remove()


def test_another_weight_of_the_router_counts():
    model = quantized()
    fuse(model, MAKERS[NAME][1], goal="always")
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.neg_()
    fused = run(model, EXAMPLE)
    for module in fused_modules(model).values():
        module.take_away()
    torch.testing.assert_close(fused, run(model, EXAMPLE), rtol=1e-4, atol=1e-5)


class Peeking(nn.Module):
    """Experts that look at values. known: whether what they compute then is in the vocabulary of chains."""

    def __init__(self, mlp, known):
        super().__init__()
        self.mlp, self.known = mlp, known

    def forward(self, x):
        y = self.mlp(x) * (2 if bool(x.sum() > 0) else 3)
        return y if self.known else torch.cumsum(y, 1)


class Layer(nn.Module):
    """A norm, what is given, and a residual."""

    def __init__(self, width, middle):
        super().__init__()
        self.norm, self.middle, self.out = nn.LayerNorm(width), middle, nn.Linear(width, width)

    def forward(self, x):
        return x + self.out(self.middle(self.norm(x)))


def test_experts_may_look_at_values():
    layer = Layer(64, Peeking(quantized().model.layers[0].mlp, known=False)).eval()
    nybble.quantize(layer, "w8a16", include=["out"], goal="memory")
    x = torch.randn(2, 8, 64)
    before = run(layer, (x,)), run(layer, (-x,))
    fuse(layer, [(x,)], goal="always")
    assert inside(layer) == {"": [layer.middle]}
    for example, expected in zip((x, -x), before, strict=True):
        torch.testing.assert_close(run(layer, (example,)), expected, rtol=1e-4, atol=1e-5)


def test_a_look_outside_of_what_runs_by_its_own_forward_counts():
    layer = Layer(64, Peeking(quantized().model.layers[0].mlp, known=True)).eval()
    nybble.quantize(layer, "w8a16", include=["out"], goal="memory")
    report = fuse(layer, [(torch.randn(2, 8, 64),)], goal="always")
    assert not fused_modules(layer)
    assert "depends on values" in str(report)


def test_a_module_with_other_layers_is_not_left_whole():
    """What is inside it might run fused."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = quantized().model.layers[0].mlp
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return torch.cumsum(self.linear(self.mlp(x)), 1)

    layer = Layer(64, Odd()).eval()
    nybble.quantize(layer, "w8a16", include=["out", "middle.linear"], goal="memory")
    report = fuse(layer, [(torch.randn(2, 8, 64),)], goal="always")
    assert not any(inside(layer).values())
    assert "cumsum" in str(report)
