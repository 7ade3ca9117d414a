"""Networks of images in the shapes of ResNet-50 and MobileNetV2, as plain torch modules with random weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

SIDE = 224
# Width, blocks and stride of the stages of ResNet-50; expansion, width, blocks and stride of those of MobileNetV2.
_RESNET = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_MOBILENET = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs, relu = 4 * width, partial(nn.ReLU, inplace=True)
        first, second = _conv(inputs, width, 1), _conv(width, width, 3, stride)
        self.path = nn.Sequential(*first, relu(), *second, relu(), *_conv(width, outputs, 1))
        fits = stride == 1 and inputs == outputs
        self.short = nn.Identity() if fits else nn.Sequential(*_conv(inputs, outputs, 1, stride))
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.path(x)
        y += self.short(x)
        out: Tensor = self.relu(y)
        return out


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width, relu = inputs * expansion, partial(nn.ReLU6, inplace=True)
        wide = [] if expansion == 1 else [*_conv(inputs, width, 1), relu()]
        each = [*_conv(width, width, 3, stride, groups=width), relu()]
        self.path = nn.Sequential(*wide, *each, *_conv(width, outputs, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.path(x)
        return x + y if self.adds else y


class _Net(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def resnet() -> nn.Module:
    """25.6 M weights, 4.1 G multiply-adds for an image."""
    parts = [*_conv(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks, stride in _RESNET:
        for i in range(blocks):
            parts.append(_Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    return _trained(_Net(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)))


def mobilenet() -> nn.Module:
    """3.5 M weights, 0.3 G multiply-adds for an image; a third of its convolutions are depthwise."""
    parts = [*_conv(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    inputs = 32
    for expansion, outputs, blocks, stride in _MOBILENET:
        for i in range(blocks):
            parts.append(_Inverted(inputs, outputs, stride if i == 0 else 1, expansion))
            inputs = outputs
    parts += [*_conv(inputs, 1280, 1), nn.ReLU6(inplace=True)]
    return _trained(_Net(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)))


def image(batch: int, seed: int) -> dict[str, Tensor]:
    """Random images."""
    return {"x": torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))}


def _trained(net: nn.Module) -> nn.Module:
    """With batch norms whose statistics are those of random images, as training leaves them; always the same."""
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out" if module.groups == 1 else "fan_in")
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
        net.train()(image(16, 1)["x"])
    return net.eval()
