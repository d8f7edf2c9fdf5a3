"""LoRA: a frozen network whose linear layers each learn an update of low rank."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """W x + b + (α/r) B A x, with W and b frozen, A (r, in) random and B (out, r) zero at first.

    Args:
        base: the layer that is adapted; its parameters are frozen in place.
        rank: r.
        alpha: α.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(5, 3)
        >>> adapted, x = LoRALinear(layer, rank=2, alpha=4.0), torch.ones(1, 5)
        >>> torch.equal(adapted(x), layer(x)), [name for name, p in adapted.named_parameters() if p.requires_grad]
        (True, ['down', 'up'])

    References:
        Hu et al. 2021, LoRA: low-rank adaptation of large language models, arXiv 2106.09685, sec. 4.1.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        like = base.weight
        self.down = nn.Parameter(torch.empty(rank, base.in_features, dtype=like.dtype, device=like.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, dtype=like.dtype, device=like.device))
        nn.init.normal_(self.down, std=base.in_features**-0.5)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) of (…, in)."""
        y: Tensor = self.base(x) + self.scale * (x @ self.down.mT @ self.up.mT)
        return y


def lora(module: nn.Module, rank: int, alpha: float) -> nn.Module:
    """Return a copy of a network that is frozen but for an adapter at each of its linear layers.

    A linear layer that shares its weight with another part, such as an output projection tied to an embedding, has none.

    Args:
        module: the network, which is not changed.
        rank: r of each adapter.
        alpha: α; an adapter's update is multiplied by α/r.

    Returns:
        The copy; what requires a gradient in it is the adapters.
    """
    adapted = copy.deepcopy(module).requires_grad_(False)
    holders: dict[int, int] = {}
    for _, p in adapted.named_parameters(remove_duplicate=False):
        holders[id(p)] = holders.get(id(p), 0) + 1
    for parent in list(adapted.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and holders[id(child.weight)] == 1:
                setattr(parent, name, LoRALinear(child, rank, alpha))
    return adapted
