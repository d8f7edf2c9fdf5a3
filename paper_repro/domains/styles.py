"""The styles: what is done to the digits, and which of them the sources and the target have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Style = Callable[[Tensor], Tensor]
"""From images (n, 1, 8, 8) in [0, 1] to such images."""


def tilted(degrees: float) -> Style:
    """Return the style that turns images about their centre, with bilinear interpolation and white beyond the edge."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def turn(images: Tensor) -> Tensor:
        matrix = images.new_tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]).expand(len(images), 2, 3)
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    return turn


@dataclass(frozen=True)
class Source:
    """One part of the source data.

    Attributes:
        name: for tables and figures.
        style: what is done to its images.
        helpful: whether an oracle would learn from it; the programs never read this.
        label_shift: what is added to its labels, modulo ten; other than 0 all of its labels are wrong.
    """

    name: str
    style: Style
    helpful: bool = False
    label_shift: int = 0


TARGET: Style = tilted(30)

SOURCES = (
    Source("tilted 15°", tilted(15), helpful=True),
    Source("tilted 45°", tilted(45), helpful=True),
    Source("upright", lambda images: images),
    Source("tilted −30°", tilted(-30)),
    Source("tilted 180°", tilted(180)),
    Source("mirrored", lambda images: images.flip(-1)),
    Source("transposed", lambda images: images.transpose(-1, -2)),
    Source("negative", lambda images: 1 - images),
    Source("tilted 30°, wrong labels", tilted(30), label_shift=1),
)


def restyle(x: Tensor, style: Style) -> Tensor:
    """Put digits into a style and append the constant 1 that a bias multiplies.

    Args:
        x: flattened images, (n, 64).
        style: what to do to them.

    Returns:
        Inputs for the classifier, (n, 65) float64.
    """
    styled = style(x.double().reshape(-1, 1, 8, 8)).reshape(len(x), -1)
    return torch.cat([styled, styled.new_ones(len(x), 1)], dim=1)
