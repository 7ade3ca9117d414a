"""Passes on networks with convolutions: what calibration learns from them, and what is told."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import nybble
from nybble.nn.conv import patch_rows
from nybble.nn.kinds import kind_of

LAYERS = {
    "Conv2d": lambda: nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 2), dilation=(1, 2)),
    "same": lambda: nn.Conv2d(6, 8, 4, padding="same"),
    "reflect": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "Conv1d": lambda: nn.Conv1d(6, 8, 5, 2, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_matrix_are_the_output(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    size = (9,) * (layer.weight.dim() - 2)
    kind = kind_of(layer)
    for x in (torch.randn(2, 6, *size), torch.randn(6, *size)):
        y = layer(x)
        rows = kind.rows(layer, x)
        wanted = (y if y.dim() == x.dim() == layer.weight.dim() else y.unsqueeze(0)).movedim(1, -1).flatten(0, -2)
        assert torch.allclose(rows @ kind.matrix_of(layer).T + layer.bias, wanted, atol=1e-5)
        quantized = kind.module.from_dense(layer, "w8a8")
        assert torch.equal(patch_rows(quantized, x), rows)


def smooth(seed, count=3):
    """Images whose neighbouring pixels are alike, so that patches have structure to learn from."""
    generator = torch.Generator().manual_seed(seed)
    return [functional.avg_pool2d(torch.randn(4, 8, 18, 18, generator=generator), 5, 1, 2) for _ in range(count)]


@pytest.mark.parametrize("method", ["gptq", "awq"])
@torch.no_grad()
def test_calibrated_methods_learn_from_patches(method):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3)).eval()
    plain, learned = copy.deepcopy(dense), copy.deepcopy(dense)
    nybble.quantize(plain, "w4a16g32", goal="memory", fuse=False)
    nybble.quantize(learned, "w4a16g32", calibration=smooth(1), method=method, goal="memory", fuse=False)
    held = smooth(2, 1)[0]
    wanted = dense(held)
    errors = [float((model(held) - wanted).norm()) for model in (plain, learned)]
    assert errors[1] < 0.95 * errors[0] if method == "gptq" else errors[1] < 1.1 * errors[0]


@torch.no_grad()
def test_groups_are_rounded_without_data_and_named():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=4), nn.ConvTranspose1d(4, 4, 2)).eval()
    model = nn.Sequential(*dense[:2])
    report = nybble.quantize(model, "w8a8", calibration=smooth(1), method="gptq", goal="memory", fuse=False)
    assert report.coverage == 100
    assert "4 groups" in str(report)
    assert "groups" not in kind_of(dense[2]).why_no_rows(dense[2])


@torch.no_grad()
def test_a_static_scale_is_calibrated():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    model = copy.deepcopy(dense)
    nybble.quantize(model, "w8a8static", calibration=smooth(1), goal="memory", fuse=False)
    x = smooth(2, 1)[0]
    assert (model(x) - dense(x)).norm() <= 0.05 * dense(x).norm()


@torch.no_grad()
def test_speed_is_measured_on_images():
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, groups=64)).eval()
    report = nybble.quantize(model, "w8a8", m=(64,), fuse=False)
    assert len(report.layers) == 2
    x = torch.randn(1, 32, 8, 8)
    assert model(x).shape == (1, 64, 8, 8)


@torch.no_grad()
def test_layers_of_one_shape_keep_their_own_weights():
    torch.manual_seed(0)
    dense = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)), nn.Conv1d(3, 8, 5)).eval()
    model = copy.deepcopy(dense)
    report = nybble.quantize(model, "w8a8", goal="memory", fuse=False)
    assert report.coverage == 100
    for before, after in zip(dense, model, strict=True):
        assert (after.dequantize().weight - before.weight).norm() <= 0.01 * before.weight.norm()
    tied = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    tied[1].weight = tied[0].weight
    nybble.quantize(tied, "w8a8", goal="memory", fuse=False)
    assert tied[0].weight_id == tied[1].weight_id
