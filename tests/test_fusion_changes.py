"""What fused modules must not miss: changes after fusing, side effects, and calls that differ from the example."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nybble
from nybble.fusion import fuse
from nybble.fusion.block import fused_modules

WIDTH = 64


class Block(nn.Module):
    """A residual block with attributes that its forward reads."""

    def __init__(self):
        super().__init__()
        self.norm, self.act, self.drop = nn.LayerNorm(WIDTH), nn.GELU(), nn.Dropout(0.5)
        self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)
        self.plain = False

    def inner(self, x):
        return self.drop(self.down(self.act(self.up(self.norm(x)))))

    def forward(self, x):
        return self.inner(x) if self.plain else x + self.inner(x)


class OnLength(Block):
    def forward(self, x):
        return x + self.inner(x) * (2 if x.shape[1] > 16 else 1)


class OnValues(Block):
    def forward(self, x):
        return x + self.inner(x) if x.abs().max() < 50 else x


class InPlace(Block):
    def forward(self, x):
        return x.add_(self.inner(x))


class Number(Block):
    def forward(self, x):
        return x + self.inner(x), x.shape[1]


def pair(kind=Block, count=2, **options):
    """A fused model and an unfused copy."""
    torch.manual_seed(0)
    model = nn.Sequential(*(kind() for _ in range(count))).eval() if count > 1 else kind().eval()
    nybble.quantize(model, "w8a16", goal="memory")
    plain = copy.deepcopy(model)
    examples = None if options.get("later") else [(torch.randn(2, 7, WIDTH),)]
    return model, plain, fuse(model, examples, goal="always")


def agree(model, plain, x):
    with torch.no_grad():
        assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def _replace(model):
    model[0].norm.weight = nn.Parameter(torch.full((WIDTH,), 3.0))
    model[0].down.bias = nn.Parameter(torch.full((WIDTH,), 3.0))


def _assign(model):
    state = {name: 2 * one if ".norm." in name else one for name, one in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


class _Fourfold(nn.Module):
    def forward(self, weight):
        return 4 * weight


CHANGES = {
    "a parameter is replaced": _replace,
    "a state is assigned": _assign,
    "a flag": lambda model: setattr(model[0], "plain", True),
    "an eps": lambda model: setattr(model[0].norm, "eps", 1.0),
    "an inner forward": lambda model: setattr(model[0].act, "forward", lambda x: 0 * x),
    "a parametrization": lambda model: nn.utils.parametrize.register_parametrization(
        model[0].norm, "weight", _Fourfold()
    ),
    "a module more": lambda model: model.append(nn.ReLU()),
    "a module less": lambda model: model.pop(1),
    "a weight in place": lambda model: model[0].norm.weight.data.mul_(3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_count(change):
    model, plain, report = pair()
    assert report.chains
    for one in (model, plain):
        CHANGES[change](one)
    for length in (5, 20):
        agree(model, plain, torch.randn(2, length, WIDTH))


def test_dropout_switched_on_inside():
    model, _, _ = pair()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    x = torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))


def test_functional_call():
    model, plain, _ = pair()
    new, x = {"0.norm.weight": torch.full((WIDTH,), 4.0)}, torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        expected = torch.func.functional_call(plain, new, (x,))
        assert_close(torch.func.functional_call(model, new, (x,)), expected, rtol=1e-4, atol=1e-5)
    agree(model, plain, x)


@pytest.mark.parametrize(("kind", "factor"), [(OnLength, 1), (OnValues, 100), (Number, 1)])
def test_what_the_example_does_not_show(kind, factor):
    model, plain, report = pair(kind, count=1)
    assert not report.chains
    x = factor * torch.randn(2, 20, WIDTH)
    with torch.no_grad():
        assert str(model(x)) == str(plain(x))


def test_in_place_runs_as_before():
    model, plain, _ = pair(InPlace, later=True)
    for _ in range(3):
        a, b = (torch.ones(2, 20, WIDTH) for _ in range(2))
        with torch.no_grad():
            assert torch.equal(model(a), plain(b))
        assert torch.equal(a, b)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x, y):
        return self.norm(self.one(x) + self.other(y))


def test_an_example_with_one_tensor_twice():
    model = Two().eval()
    nybble.quantize(model, "w8a16", goal="memory")
    plain, x, y = copy.deepcopy(model), *torch.randn(2, 2, 7, WIDTH)
    fuse(model, [(x, x)], goal="always")
    with torch.no_grad():
        assert_close(model(x, y), plain(x, y), rtol=1e-4, atol=1e-5)
        assert_close(model(y, y), plain(y, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("later", [False, True])
def test_many_threads(later):
    model, plain, _ = pair(later=later)
    x, wrong = torch.randn(2, 20, WIDTH), []
    with torch.no_grad():
        expected = plain(x)

    def calls():
        with torch.no_grad():
            for _ in range(6):
                wrong.append(float((model(x) - expected).norm() / expected.norm()))

    threads = [threading.Thread(target=calls) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 36
    assert max(wrong) < 1e-4


def test_strides_and_widths():
    model, plain, _ = pair()
    agree(model, plain, torch.randn(1, 1, WIDTH).expand(3, 5, WIDTH))
    agree(model, plain, torch.randn(2, WIDTH, 7).transpose(1, 2))
    with pytest.raises(RuntimeError, match="normalized_shape"), torch.no_grad():
        model(torch.randn(2, 7, WIDTH + 1))


def test_reports_of_other_searches():
    model, _, first = pair()
    first.undo()
    assert not first.chains
    pending = fuse(model, goal="always")
    second = fuse(model, goal="always")
    assert not pending.pending
    assert second.pending
    torch.save(model, io.BytesIO())


def test_what_changes_at_each_call_is_left_in_the_end():
    model, plain, _ = pair()
    for step in range(8):
        for one in (model, plain):
            one[0].norm.eps = 1e-5 * (step + 1)
        agree(model, plain, torch.randn(2, 7, WIDTH))
    assert any("from call to call" in (fused.undone or "") for fused in fused_modules(model).values())


def test_rare_changes_never_end_the_fusion():
    model, plain, _ = pair()
    for step in range(8):
        for one in (model, plain):
            one[0].norm.eps = 1e-5 * (step + 1)
        for _ in range(2):
            agree(model, plain, torch.randn(2, 7, WIDTH))
    assert not any(fused.undone for fused in fused_modules(model).values())


class Mlp(nn.Module):
    """Without biases and norms; a function and tensors are attributes."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 128, bias=False), nn.Linear(128, WIDTH, bias=False)
        self.act, self.pair, self.none = nn.functional.gelu, (torch.ones(3), 1), None

    def forward(self, x):
        return self.down(self.act(self.up(x))) if self.none is None else x


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.share_memory(),
        lambda m: setattr(m, "act", nn.functional.relu),
        lambda m: setattr(m, "pair", (torch.zeros(3), 1)),
        lambda m: setattr(m, "none", 1),
    ],
    ids=["share_memory", "function", "tensors", "none"],
)
@torch.no_grad()
def test_other_attributes_and_memory_are_seen(change):
    model, plain, _ = pair(Mlp, 1)
    x = torch.randn(2, 9, WIDTH)
    model(x)
    change(model)
    change(plain)
    for _ in range(2):
        assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
