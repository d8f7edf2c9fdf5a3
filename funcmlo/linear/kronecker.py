"""A network's curvature layer by layer, as Kronecker products that curvlinops computes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from funcmlo.errors import EstimatorError, listing

Fisher = Literal["type-2", "mc", "empirical", "forward-only"]
Sharing = Literal["expand", "reduce"]


@dataclass(frozen=True)
class Settings:
    """Which Kronecker products stand for the curvature.

    Attributes:
        fisher: which covariance of the outputs' gradients.
        samples: how many labels are drawn for each example by ``"mc"``.
        sharing: how layers that are applied at many places of one example are summed up.
        eigenvalue_corrected: whether the eigenvalues are measured instead of multiplied.
        seed: of what ``"mc"`` draws.
    """

    fisher: Fisher
    samples: int
    sharing: Sharing
    eigenvalue_corrected: bool
    seed: int


@dataclass(frozen=True)
class Block:
    """One layer's curvature W ↦ Q_B (Λ ⊙ Q_Bᵀ W Q_A) Q_Aᵀ; a bias is one more column of W.

    Attributes:
        weight: the name of W.
        bias: the name of the bias; None without one.
        left: Q_B, the eigenvectors of the covariance B of the gradients by the layer's outputs.
        right: Q_A, the eigenvectors of the second moment A of the layer's inputs.
        eigenvalues: Λ ≥ 0, shaped as W: λ_B λ_Aᵀ, or measured.
    """

    weight: str
    bias: str | None
    left: Tensor
    right: Tensor
    eigenvalues: Tensor

    def solve(self, r: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return (block + damping · I)⁻¹ r.

        Args:
            r: tensors by parameter name; those of other layers are not looked at.
            damping: a positive number.

        Returns:
            This layer's part of the answer by parameter name, in the dtypes of r.
        """
        weight = r[self.weight]
        columns = weight.reshape(weight.shape[0], -1).to(self.left.dtype)
        if self.bias is not None:
            columns = torch.cat([columns, r[self.bias].to(self.left.dtype)[:, None]], dim=1)
        rotated = (self.left.T @ columns @ self.right) / (self.eigenvalues + damping)
        solved = self.left @ rotated @ self.right.T
        if self.bias is None:
            return {self.weight: solved.reshape(weight.shape).to(weight.dtype)}
        return {
            self.weight: solved[:, :-1].reshape(weight.shape).to(weight.dtype),
            self.bias: solved[:, -1].to(r[self.bias].dtype),
        }


def blocks(module: nn.Module, loss: nn.Module, inputs: Tensor, targets: Tensor, settings: Settings) -> list[Block]:
    """Return the block of every linear and two-dimensional convolutional layer of a network.

    Args:
        module: the network, nobody else's: hooks are put on it.
        loss: the loss of its outputs and the targets.
        inputs: X, examples first.
        targets: y; looked at by the empirical Fisher alone, since the other curvatures do not depend on labels.
        settings: which Kronecker products.

    Returns:
        The blocks, in the order of the network's layers.

    Raises:
        EstimatorError: the network's outputs, the targets or the network itself are not what K-FAC can be taken of.
    """
    curvlinops = load()
    layers = _layers(module)
    outputs = _outputs_of(module, layers, inputs)
    if settings.eigenvalue_corrected and outputs.dim() != 2:
        raise EstimatorError(
            f"KFAC(eigenvalue_corrected=True) takes outputs of shape (examples, outputs), but {tuple(outputs.shape)} came."
        )
    labels = _check_targets(loss, outputs, targets, settings.fisher)
    named = dict(module.named_parameters())
    make = curvlinops.EKFACLinearOperator if settings.eigenvalue_corrected else curvlinops.KFACLinearOperator
    try:
        with torch.enable_grad():
            operator = make(
                module,
                loss,
                [named[name] for layer in layers for name in layer.names],
                [(inputs, labels)],
                check_deterministic=False,  # it draws from the global generator
                seed=settings.seed,
                fisher_type=settings.fisher,
                mc_samples=settings.samples,
                kfac_approx=settings.sharing,
                separate_weight_and_bias=False,
            )
            operator.compute_kronecker_factors()
            if settings.eigenvalue_corrected:
                operator.compute_eigenvalue_correction()
        return [_block(operator.state_dict(), layer, settings.eigenvalue_corrected) for layer in layers]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise EstimatorError(
            f"KFAC: the Kronecker factors have no eigenvectors, is something not finite? ({error})"
        ) from error


def load() -> Any:
    """Import curvlinops.

    Returns:
        The package.

    Raises:
        EstimatorError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a dependency of it still uses torch.jit
            import curvlinops
    except ImportError as error:
        raise EstimatorError(
            f"KFAC takes its Kronecker factors from curvlinops, which cannot be imported ({error}): "
            "pip install 'funcmlo[kfac]'."
        ) from error
    return curvlinops


def covered(module: nn.Module) -> set[str]:
    """Return the names of the parameters that K-FAC knows: weights and biases of Linear and Conv2d layers."""
    return {name for layer in _layers(module) for name in layer.names}


@dataclass(frozen=True)
class _Layer:
    """A layer's path in the network and the names of its parameters."""

    path: str
    weight: str
    bias: str | None

    @property
    def names(self) -> list[str]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def _layers(module: nn.Module) -> list[_Layer]:
    known = {name for name, p in module.named_parameters() if p.requires_grad}
    found = []
    for path, part in module.named_modules():
        weight, bias = (f"{path}.{name}".lstrip(".") for name in ("weight", "bias"))
        if isinstance(part, (nn.Linear, nn.Conv2d)) and weight in known:  # a parametrized weight has another name
            found.append(_Layer(path, weight, bias if bias in known else None))
    return found


def _outputs_of(module: nn.Module, layers: list[_Layer], inputs: Tensor) -> Tensor:
    """The network's outputs, having seen that every layer is called once: curvlinops sums over calls, or misses them."""
    calls = {layer.path: 0 for layer in layers}
    handles = []
    for path in calls:

        def count(*_: Any, path: str = path) -> None:
            calls[path] += 1

        handles.append(module.get_submodule(path).register_forward_hook(count))
    with torch.no_grad():
        outputs = module(inputs)
    for handle in handles:
        handle.remove()
    if odd := [f"'{path}' {times} times" for path, times in calls.items() if times != 1]:
        raise EstimatorError(
            f"KFAC takes networks that call every Linear and Conv2d layer once, but {type(module).__name__} calls "
            f"{listing(odd)} (a layer inside attention is used without being called)."
        )
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        came = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise EstimatorError(f"KFAC takes outputs of shape (examples, …, outputs), but the network returned {came}.")
    return outputs


def _check_targets(loss: nn.Module, outputs: Tensor, targets: Tensor, fisher: Fisher) -> Tensor:
    """The targets where they matter, and else any labels of their shape."""
    classes = isinstance(loss, nn.CrossEntropyLoss)
    shape = outputs.shape[:1] + outputs.shape[2:] if classes else outputs.shape
    if isinstance(loss, nn.CrossEntropyLoss) and bool(torch.eq(targets, loss.ignore_index).any()):
        raise EstimatorError(f"KFAC counts every example, but the targets have labels that {loss} ignores; leave them out.")
    if fisher != "empirical":
        return torch.zeros(shape, dtype=torch.int64 if classes else outputs.dtype, device=outputs.device)
    if targets.shape != shape or targets.is_floating_point() == classes:
        kind = "class indices" if classes else "numbers"
        raise EstimatorError(
            f"KFAC(fisher='empirical') takes targets that are {kind} of shape {tuple(shape)}, but {targets.dtype} of shape "
            f"{tuple(targets.shape)} came."
        )
    return targets


def _block(state: dict[str, Any], layer: _Layer, corrected: bool) -> Block:
    if corrected:
        left = state["gradient_covariances_eigenvectors"][layer.path]
        right = state["input_covariances_eigenvectors"][layer.path]
        measured = state["corrected_eigenvalues"][layer.path]
        if isinstance(measured, dict):  # of a layer without a bias: by the position of the weight
            (measured,) = measured.values()
        return Block(layer.weight, layer.bias, left, right, measured.reshape(len(left), len(right)))
    # A covariance's negative eigenvalues are rounding; a product of two would not be.
    of_gradients, left = torch.linalg.eigh(state["gradient_covariances"][layer.path])
    of_inputs, right = torch.linalg.eigh(state["input_covariances"][layer.path])
    return Block(layer.weight, layer.bias, left, right, torch.outer(of_gradients.clamp(min=0), of_inputs.clamp(min=0)))
