"""The problem: source data in many styles, few target examples, and the three levels' costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_repro.data import Dataset
from paper_repro.domains.newton import softmax_regression
from paper_repro.domains.styles import SOURCES, TARGET, restyle


@dataclass(frozen=True)
class Settings:
    """The sizes and rates of a run.

    Attributes:
        per_source: examples of each source.
        train: target examples to finetune on.
        valid: target examples for the third level.
        outer: updates of the third level.
        upper_lr: its learning rate (Adam).
        pretrain_steps: the unrolled pretrain level's updates.
        finetune_steps: the unrolled finetune level's updates.
        lower_lr: the unrolled levels' learning rate (with momentum 0.9).
        threads: how many threads torch uses, None for its own choice; on small problems one is twice as fast as two.
    """

    per_source: int
    train: int
    valid: int
    outer: int
    upper_lr: float = 0.5
    pretrain_steps: int = 30
    finetune_steps: int = 12
    lower_lr: float = 0.3
    threads: int | None = 1


@dataclass(frozen=True, eq=False)
class Domains:
    """One draw of the problem, and its costs; θ, φ are (65, 10) matrices of softmax regressions.

    Attributes:
        x: source inputs, (n, 65) float64.
        y: their labels as given, (n,) int64.
        source: which source each belongs to, (n,) int64.
        group: which entry of λ weights each, (n,) int64: the source's number, or the example's own.
        x_train: target inputs to finetune on.
        y_train: their labels.
        x_valid: target inputs for the third level.
        y_valid: their labels.
        x_test: target inputs to measure on.
        y_test: their labels.
        decay: ρ of pretrain.
        pull: μ of finetune.
    """

    x: Tensor
    y: Tensor
    source: Tensor
    group: Tensor
    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    y_test: Tensor
    decay: float = 1e-2
    pull: float = 3e-2

    def per_example(self) -> Domains:
        """Return the problem with a weight for each source example, which knows nothing of the styles."""
        return replace(self, group=torch.arange(len(self.x)))

    def with_validation(self) -> Domains:
        """Return the problem with the validation examples among those to finetune on."""
        x, y = torch.cat([self.x_train, self.x_valid]), torch.cat([self.y_train, self.y_valid])
        return replace(self, x_train=x, y_train=y)

    def logits(self) -> Tensor:
        """Return the λ that weights all source examples alike: zero, one for each group."""
        return self.x.new_zeros(int(self.group.max()) + 1)

    def oracle(self) -> Tensor:
        """Return the λ, one for each source, that believes the helpful sources alone."""
        helpful = torch.tensor([source.helpful for source in SOURCES])
        return torch.where(helpful, torch.inf, -torch.inf).to(self.x.dtype)

    def classifier(self) -> Tensor:
        """Return the classifier that knows nothing, (65, 10)."""
        return self.x.new_zeros(self.x.shape[1], 10)

    def weights(self, reweight: Tensor) -> Tensor:
        """w_i = σ(λ_group(i)) / Σ_j σ(λ_group(j)), (n,)."""
        raw = torch.sigmoid(reweight)[self.group]
        return raw / raw.sum()

    def pretrain(self, pretrain: Tensor, reweight: Tensor) -> Tensor:
        """g₁(θ, λ) = Σ_i w_i(λ) CE_i(θ) + ρ/2 ‖θ‖², over all sources."""
        losses = F.cross_entropy(self.x @ pretrain, self.y, reduction="none")
        return self.weights(reweight) @ losses + self.decay / 2 * (pretrain**2).sum()

    def finetune(self, finetune: Tensor, pretrain: Tensor) -> Tensor:
        """g₂(φ, θ) = mean CE of the target's training examples + μ/2 ‖φ − θ‖²."""
        fit = F.cross_entropy(self.x_train @ finetune, self.y_train)
        return fit + self.pull / 2 * ((finetune - pretrain) ** 2).sum()

    def reweight(self, reweight: Tensor, finetune: Tensor) -> Tensor:
        """f(φ) = mean CE of the target's validation examples; λ does not enter directly."""
        del reweight
        return F.cross_entropy(self.x_valid @ finetune, self.y_valid)

    def solve_pretrain(self, pretrain: Tensor, reweight: Tensor) -> Tensor:
        """Return argmin g₁ over θ, started from the θ that is there."""
        weights, zero = self.weights(reweight), torch.zeros_like(pretrain)
        return softmax_regression(self.x, self.y, weights, self.decay, centre=zero, start=pretrain)

    def solve_finetune(self, finetune: Tensor, pretrain: Tensor) -> Tensor:
        """Return argmin g₂ over φ, started from the φ that is there."""
        weights = self.x_train.new_full((len(self.x_train),), 1 / len(self.x_train))
        return softmax_regression(self.x_train, self.y_train, weights, self.pull, centre=pretrain, start=finetune)

    def pipeline(self, reweight: Tensor) -> Tensor:
        """Return the finetuned classifier under fixed weights, both levels solved: the program without a third level."""
        pretrained = self.solve_pretrain(self.classifier(), reweight)
        return self.solve_finetune(pretrained, pretrained)

    def accuracy(self, classifier: Tensor) -> float:
        """Return the share of the target's test examples that are classified right."""
        return float(((self.x_test @ classifier).argmax(dim=1) == self.y_test).double().mean())


def draw(data: Dataset, settings: Settings, seed: int, *, tuning: bool = False) -> Domains:
    """Deal the training digits out to the sources and to the target, no digit twice, and put each part into its style.

    Args:
        data: the digits.
        settings: the sizes.
        seed: decides who gets what.
        tuning: whether to measure on training digits that nobody got rather than on the test digits.

    Returns:
        The problem, with a weight for each source.

    Raises:
        ValueError: the data set is smaller than the settings ask for.
    """
    sizes = [settings.per_source] * len(SOURCES) + [settings.train, settings.valid]
    if sum(sizes) >= len(data.x):
        raise ValueError(f"{data.name} has {len(data.x):,} training examples; {sum(sizes):,} were asked for.")
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
    *parts, train, valid, rest = torch.split(order, [*sizes, len(order) - sum(sizes)])
    source = torch.arange(len(SOURCES)).repeat_interleave(settings.per_source)
    x_test, y_test = (data.x[rest], data.y[rest]) if tuning else (data.x_test, data.y_test)
    return Domains(
        x=torch.cat([restyle(data.x[part], s.style) for part, s in zip(parts, SOURCES, strict=True)]),
        y=torch.cat([(data.y[part] + s.label_shift) % 10 for part, s in zip(parts, SOURCES, strict=True)]),
        source=source,
        group=source,
        x_train=restyle(data.x[train], TARGET),
        y_train=data.y[train],
        x_valid=restyle(data.x[valid], TARGET),
        y_valid=data.y[valid],
        x_test=restyle(x_test, TARGET),
        y_test=y_test,
    )
