"""Residual networks for small images, with batch normalization: ResNet-18 with a 3×3 stem, and ResNet-32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["pad", "project"]


class ResNet(nn.Module):
    """A 3×3 stem, stages of basic blocks that halve the image and double the channels, mean pooling, a linear head.

    Args:
        blocks: blocks in each stage.
        width: channels of the stem and of the first stage.
        classes: outputs.
        channels: of the images.
        shortcut: how a block whose output has another shape passes its input on: `"pad"` with every second pixel and
            zeros for the new channels (option A), or `"project"` with a 1×1 convolution (option B).
        activation: makes the nonlinearity.

    Example:
        >>> import torch
        >>> ResNet([1, 1], width=4, classes=3)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 3])

    References:
        He et al. 2016, Deep residual learning for image recognition, arXiv 1512.03385, sec. 3.3 and 4.2.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        classes: int = 10,
        channels: int = 3,
        shortcut: Shortcut = "project",
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(len(blocks))]
        self.stem = nn.Sequential(_convolution(channels, width), nn.BatchNorm2d(width), activation())
        stages, before = [], width
        for stage, (count, after) in enumerate(zip(blocks, widths, strict=True)):
            sizes = [(before if i == 0 else after, 2 if i == 0 and stage else 1) for i in range(count)]
            stages.append(nn.Sequential(*(Block(n, after, stride, shortcut, activation) for n, stride in sizes)))
            before = after
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (n, classes), of images (n, channels, height, width)."""
        logits: Tensor = self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))
        return logits


class Block(nn.Module):
    """σ(x' + BN(W₂ σ(BN(W₁ x)))), with x' the input in the output's shape.

    Args:
        before: channels of the input.
        after: channels of the output.
        stride: of the first convolution.
        shortcut: as for the network.
        activation: as for the network.
    """

    def __init__(
        self, before: int, after: int, stride: int, shortcut: Shortcut, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _convolution(before, after, stride),
            nn.BatchNorm2d(after),
            activation(),
            _convolution(after, after),
            nn.BatchNorm2d(after),
        )
        self.activation = activation()
        self.shortcut: nn.Module = nn.Identity()
        if (before, stride) != (after, 1):
            self.shortcut = _Pad(after - before, stride) if shortcut == "pad" else _projection(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, after, height / stride, width / stride) of (n, before, height, width)."""
        y: Tensor = self.activation(self.shortcut(x) + self.residual(x))
        return y


def resnet18(classes: int = 10, width: int = 64, activation: Callable[[], nn.Module] = nn.ReLU) -> ResNet:
    """Return ResNet-18 in its form for small images: 11,173,962 parameters at 10 classes.

    Args:
        classes: outputs.
        width: channels of the first stage.
        activation: makes the nonlinearity.

    Returns:
        The network.
    """
    return ResNet([2, 2, 2, 2], width, classes, activation=activation)


def resnet32(classes: int = 10, width: int = 16, activation: Callable[[], nn.Module] = nn.ReLU) -> ResNet:
    """Return ResNet-32 with parameter-free shortcuts: 464,154 parameters at 10 classes.

    Args:
        classes: outputs.
        width: channels of the first stage.
        activation: makes the nonlinearity.

    Returns:
        The network.
    """
    return ResNet([5, 5, 5], width, classes, shortcut="pad", activation=activation)


class _Pad(nn.Module):
    """Every second pixel, and zeros for the new channels, half of them before and half behind."""

    def __init__(self, new: int, stride: int) -> None:
        super().__init__()
        self.new, self.stride = new, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))


def _convolution(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def _projection(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
