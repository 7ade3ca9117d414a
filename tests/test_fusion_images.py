"""Networks of images run fused: what is folded, that it computes the same, and what makes it give way."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

import nybble
from nybble.fusion.block import fused_at, unfuse
from nybble.fusion.image_graph import graph_of, is_of_images
from nybble.fusion.watch import watch


class Block(nn.Module):
    def __init__(self, channels, inside, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inside, 1, bias=False), nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, 1, groups=inside)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3, self.bn3 = nn.Conv2d(inside, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.down = nn.Sequential(nn.Conv2d(channels, channels, 1, stride), nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = functional.relu6(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.down(x)
        return self.relu(y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 5, 2, 2), nn.BatchNorm2d(24), nn.SiLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(Block(24, 40), Block(24, 32, 2), nn.Dropout(0.1))
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(functional.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1))


def net(scheme="w8a8", dtype=torch.float32):
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(-1.5, 1.5)
            module.bias.data.normal_()
    model = model.eval().to(dtype)
    nybble.quantize(model, scheme, goal="memory", fuse=False)
    return model


def images(batch=2, size=33, seed=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_whole_network_is_one_program(scheme, dtype):
    model, x = net(scheme, dtype), images().to(dtype)
    plain = copy.deepcopy(model)
    report = nybble.fuse(model, [x], goal="always")
    assert [chain.name for chain in report.chains] == [""]
    assert "9 convolutions" in report.chains[0].steps
    # Batch norms are folded into scales of 8 bits; without, what comes after them is torch's.
    assert report.chains[0].compiled >= (9 + 9 + 2 + 4 if scheme != "w4a8" else 9)
    for one in (x, images(seed=2).to(dtype), x.contiguous(memory_format=torch.channels_last)):
        assert distance(model(one), plain(one)) <= (0.1 if "a8" in scheme else 0.05)
    first = model(x)
    kept = first.clone()
    model(images(seed=3).to(dtype))
    assert torch.equal(first, kept)  # results are no memory of the program
    report.undo()
    assert torch.equal(model(x), plain(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, 2, 1)
        self.wide, self.same = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.narrow = nn.Conv2d(32, 16, 1)
        self.last = nn.Conv2d(16, 8, 3, 2, 1)

    def forward(self, x):
        x = self.first(x).relu()
        y = self.same(self.wide(x).relu()).relu()
        y = (self.narrow(y) + x).relu()
        return self.last(y)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_codes_between_static_convolutions(batch):
    torch.manual_seed(0)
    model, x = Residual().eval(), images(batch, 40)
    nybble.quantize(
        model, "w8a8static", goal="memory", fuse=False, calibration=[(images(4, 40, seed),) for seed in (5, 6)]
    )
    assert all(str(module.scheme) == "w8a8static" for module in model.children())
    plain = copy.deepcopy(model)
    nybble.fuse(model, [x], goal="always")
    program = fused_at(model).first
    able = all(program.bound[part].writes_codes for part in program.folds)
    assert len(program.codes) == (4 if able else 0)
    for seed in (1, 2):
        one = images(batch, 40, seed)
        assert distance(model(one), plain(one)) <= 0.03
    one[0, 0, 0, 0] = float("inf")
    assert model(one)[0].isnan().all()  # as the modules themselves
    assert torch.equal(model(one).isnan(), plain(one).isnan())


@torch.no_grad()
def test_other_sizes_are_learned_and_gradients_run_unfused():
    model, x = net(), images()
    plain = copy.deepcopy(model)
    nybble.fuse(model, [x], goal="always")
    for other in (images(1), images(3, 40)):
        assert torch.equal(model(other), plain(other))  # watched
        assert distance(model(other), plain(other)) <= 0.1
    with torch.enable_grad():
        assert torch.equal(model(x), plain(x))


@torch.no_grad()
def test_changed_statistics_are_seen():
    model, x = net(), images()
    nybble.fuse(model, [x], goal="always")
    before = model(x)
    model.blocks[0].bn3.running_mean.add_(3.0)
    plain = copy.deepcopy(model)
    nybble.fusion.block.unfuse(plain)
    for _ in range(2):
        assert distance(model(x), plain(x)) <= 0.1
    assert distance(model(x), before) > 0.1


@torch.no_grad()
def test_threads_have_their_own_memory():
    model = net()
    nybble.fuse(model, [images()], goal="always")
    inputs = [images(seed=seed) for seed in range(4)]
    wanted, found = [model(x) for x in inputs], {}

    def work(i):
        with torch.no_grad():
            found[i] = [model(inputs[i]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, wanted[i]) for i, several in found.items() for one in several)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        y = self.conv(x)
        y = y * torch.sigmoid(y.mean([2, 3], keepdim=True))
        return self.other(y).flatten(2), y


@torch.no_grad()
def test_torch_functions_between_and_several_results():
    torch.manual_seed(0)
    model = Gated().eval()
    nybble.quantize(model, "w8a8", goal="memory", fuse=False)
    plain, x = copy.deepcopy(model), images(2, 9)
    report = nybble.fuse(model, [x], goal="always")
    assert report.chains
    for found, wanted in zip(model(x), plain(x), strict=True):
        assert found.shape == wanted.shape
        assert distance(found, wanted) <= 0.02


class Looks(Gated):
    def forward(self, x):
        return super().forward(x if x.max() > 0 else -x)


class Changes(Gated):
    def forward(self, x):
        x.mul_(2)
        return super().forward(x)


@pytest.mark.parametrize(("cls", "reason"), [(Looks, "depends on values"), (Changes, "in place")])
@torch.no_grad()
def test_what_is_not_understood_stays(cls, reason):
    model = cls().eval()
    nybble.quantize(model, "w8a8", goal="memory", fuse=False)
    report = nybble.fuse(model, [images(1, 9)], goal="always")
    assert not report.chains
    assert reason in report.left[0].reason


@torch.no_grad()
def test_a_graph_follows_changes_in_place():
    model = net()
    assert is_of_images(watch(model, (images(),), {}, model.forward))
    model = model.stem
    call = watch(model, (images(),), {}, model.forward)
    assert not is_of_images(call)  # it has one convolution
    assert [step.kind for step in graph_of(call).steps] == ["input", "conv", "norm", "act", "pool"]
    assert fused_at(model) is None


def test_a_model_made_in_inference_mode_and_loaded(tmp_path):
    # Its tensors have no counter of writes, though is_inference() says no.
    model = net()
    nybble.save(model, tmp_path)
    with torch.inference_mode():
        again = nybble.load(Net().eval(), tmp_path)
    x = torch.randn(2, 3, 40, 40)
    nybble.fuse(again, [x], goal="always")
    assert fused_at(again) is not None
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.share_memory(),
        lambda m: m.bfloat16().float(),
        lambda m: [setattr(one, "data", one.data.clone()) for one in (*m.parameters(), *m.buffers())],
    ],
    ids=["share_memory", "dtypes", "data"],
)
@torch.no_grad()
def test_tensors_that_moved_are_read_where_they_are(move):
    model = net()
    nybble.fuse(model, [images()], goal="always")
    model(images())
    move(model)
    plain = copy.deepcopy(model)
    unfuse(plain)
    for _ in range(2):
        assert distance(model(images()), plain(images())) < 0.02


@torch.no_grad()
def test_programs_of_old_statistics_are_dropped():
    model = net()
    nybble.fuse(model, [images()], goal="always")
    for i in range(12):
        model.stem[1].running_mean.add_(0.01)
        model(images())
        model(images())  # runs fused: the next change is the first in succession again
        assert sum(map(len, fused_at(model).kinds.values())) == 1, i
    assert fused_at(model).undone is None
