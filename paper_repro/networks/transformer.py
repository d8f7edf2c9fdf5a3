"""A small transformer, causal or bidirectional, whose token embedding is tied to the output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Transformer(nn.Module):
    """Embeddings, pre-norm blocks, a final norm, and logits by the token embedding's own weight.

    Args:
        vocabulary: the number of tokens.
        length: the longest sequence.
        width: of the residual stream.
        heads: of the attention.
        layers: blocks.
        dropout: the probability, for embeddings, attention weights and residual branches.
        causal: whether a position sees those before it only.

    Example:
        >>> import torch
        >>> net = Transformer(vocabulary=11, length=6, width=8, heads=2)
        >>> net(torch.zeros(3, 6, dtype=torch.int64)).shape
        torch.Size([3, 6, 11])

    References:
        Vaswani et al. 2017, arXiv 1706.03762; Press and Wolf 2017 (tied embeddings), arXiv 1608.05859; Xiong et al. 2020
        (pre-norm), arXiv 2002.04745.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.1,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout, causal) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=width**-0.5)  # logits of a normed stream are then of size one
        nn.init.normal_(self.positions, std=0.1 * width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, (n, length, vocabulary), of token numbers, (n, length)."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(self.dropout(x))))
        return logits


class Block(nn.Module):
    """x + attention(norm(x)), then the same with a two-layer perceptron.

    Args:
        width: of the residual stream.
        heads: of the attention.
        dropout: the probability.
        causal: whether a position sees those before it only.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, length, width) of (n, length, width)."""
        x = x + self.dropout(self.attention(self.before_attention(x)))
        x = x + self.dropout(self.mlp(self.before_mlp(x)))
        return x


class Attention(nn.Module):
    """Multi-head self-attention by `F.scaled_dot_product_attention`.

    Args:
        width: of the inputs and outputs.
        heads: how many.
        dropout: the probability, for the attention weights.
        causal: whether a position sees those before it only.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.project_in, self.project_out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, length, width) of (n, length, width)."""
        q, k, v = rearrange(self.project_in(x), "n t (three h c) -> three n h t c", three=3, h=self.heads)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        projected: Tensor = self.project_out(rearrange(y, "n h t c -> n t (h c)"))
        return projected
