"""A language model, or a classifier of sequences, with a long short-term memory."""

from __future__ import annotations

from torch import Tensor, nn


class LSTM(nn.Module):
    """An embedding, `nn.LSTM`, dropout and a linear head.

    Args:
        vocabulary: the number of tokens.
        width: of the embedding and of the memory.
        layers: of the LSTM.
        dropout: the probability, for embeddings, between layers and before the head.
        classes: of whole sequences, decided at their last position; None for a language model, which has logits for the
            next token at every position.

    Example:
        >>> import torch
        >>> tokens = torch.zeros(3, 6, dtype=torch.int64)
        >>> LSTM(11, width=8)(tokens).shape, LSTM(11, width=8, classes=2)(tokens).shape
        (torch.Size([3, 6, 11]), torch.Size([3, 2]))

    References:
        Hochreiter and Schmidhuber 1997, Neural Computation 9(8); Zaremba et al. 2014 (where the dropout goes),
        arXiv 1409.2329.
    """

    def __init__(
        self, vocabulary: int, width: int = 128, layers: int = 2, dropout: float = 0.1, classes: int | None = None
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        between = dropout if layers > 1 else 0.0  # with one layer there is nothing between
        self.memory = nn.LSTM(width, width, layers, dropout=between, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.whole = classes is not None
        self.head = nn.Linear(width, vocabulary if classes is None else classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of token numbers, (n, length): (n, length, vocabulary), or (n, classes)."""
        states: Tensor
        states, _ = self.memory(self.dropout(self.tokens(tokens)))
        logits: Tensor = self.head(self.dropout(states[:, -1] if self.whole else states))
        return logits
