"""Adam and its relatives."""

from __future__ import annotations

from collections.abc import Callable

from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.optim.decay import decay, masked
from funcmlo.optim.hyperparameters import Hyperparameter, check
from funcmlo.optim.rates import descend
from funcmlo.optim.scale_by_adam import scale_by_adam
from funcmlo.optim.scale_by_adamax import scale_by_adamax
from funcmlo.optim.scale_by_radam import scale_by_radam
from funcmlo.optim.schedules import Schedule
from funcmlo.optim.transformation import Mended, chain

Betas = tuple[Hyperparameter, Hyperparameter]


def adam(
    lr: Hyperparameter | Schedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    *,
    eps_root: Hyperparameter = 0.0,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> Mended:
    """Adam: p ← p − lr m̂ / (√(v̂ + ε_r) + ε).

    Every real hyperparameter is a number, a 0-d tensor, or a tree of them over the parameters' tree.

    Args:
        lr: the learning rate, or a function of the step's number.
        betas: β₁ and β₂, the decays of the running means m of g and v of g².
        eps: ε.
        weight_decay: λ of g + λ p.
        eps_root: ε_r, which bounds the derivative where v is small: there it is 1/ε otherwise.
        moment_requires_grad: taken for torchopt's sake; the state is differentiated by where a transform asks for it.
        maximize: whether to ascend.
        use_accelerated_op: taken for torchopt's sake; its fused operation has no forward mode and cannot be mapped, so
            the same numbers are computed without it.

    Returns:
        The optimizer.

    Raises:
        DefinitionError: a hyperparameter has no meaning.

    Example:
        >>> import torch
        >>> rates = {"lr": torch.tensor(-2.3), "b1": torch.tensor(2.2), "b2": torch.tensor(6.9)}
        >>> optimizer = adam(rates["lr"].exp(), (torch.sigmoid(rates["b1"]), torch.sigmoid(rates["b2"])))
        >>> optimizer.update(torch.tensor([1.0, -3.0]), optimizer.init(torch.zeros(2)))[0]
        tensor([-0.1003,  0.1003])

    References:
        Kingma and Ba 2015, arXiv 1412.6980.
    """
    del moment_requires_grad, use_accelerated_op
    b1, b2 = _checked("adam", betas, eps, weight_decay)
    check("adam", "eps_root", eps_root)
    return chain(decay(weight_decay, maximize), scale_by_adam(b1, b2, eps, eps_root), descend("adam", lr), name="adam")


def adamw(
    lr: Hyperparameter | Schedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    *,
    eps_root: Hyperparameter = 0.0,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> Mended:
    """Adam with decoupled weight decay: p ← p − lr (m̂ / (√(v̂ + ε_r) + ε) + λ p).

    Every real hyperparameter is a number, a 0-d tensor, or a tree of them over the parameters' tree.

    Args:
        lr: the learning rate, or a function of the step's number.
        betas: β₁ and β₂, the decays of the running means m of g and v of g².
        eps: ε.
        weight_decay: λ.
        eps_root: ε_r, as in `adam`.
        mask: which leaves decay: booleans in a tree that is a prefix of the parameters' tree, or a function of the
            parameters that returns one; None for all.
        moment_requires_grad: taken for torchopt's sake, as in `adam`.
        maximize: whether to ascend.
        use_accelerated_op: taken for torchopt's sake, as in `adam`.

    Returns:
        The optimizer.

    Raises:
        DefinitionError: a hyperparameter has no meaning.

    Example:
        >>> import torch
        >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> optimizer = adamw(0.1, weight_decay=torch.tensor(0.5), mask={"w": True, "b": False})
        >>> optimizer.update(params, optimizer.init(params), params=params)[0]
        {'w': tensor([-0.1500]), 'b': tensor([-0.1000])}

    References:
        Loshchilov and Hutter 2019, arXiv 1711.05101.
    """
    del moment_requires_grad, use_accelerated_op
    b1, b2 = _checked("adamw", betas, eps, weight_decay)
    check("adamw", "eps_root", eps_root)
    decays = decay(weight_decay)
    if mask is not None and decays is not None:
        decays = masked(decays, mask)
    return chain(decay(0.0, maximize), scale_by_adam(b1, b2, eps, eps_root), decays, descend("adamw", lr), name="adamw")


def adamax(
    lr: Hyperparameter | Schedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> Mended:
    """AdaMax: n ← max(β₂ n, |g| + ε) and p ← p − lr m / ((1 − β₁^t) n).

    Every real hyperparameter is a number, a 0-d tensor, or a tree of them over the parameters' tree. In torch.optim ε is
    10⁻⁸ by default.

    Args:
        lr: the learning rate, or a function of the step's number.
        betas: β₁, the decay of the running mean m of g, and β₂, that of n.
        eps: ε.
        weight_decay: λ of g + λ p.
        moment_requires_grad: taken for torchopt's sake, as in `adam`.

    Returns:
        The optimizer.

    Raises:
        DefinitionError: a hyperparameter has no meaning.

    Example:
        >>> import torch
        >>> optimizer = adamax(torch.tensor(0.1))
        >>> optimizer.update(torch.tensor([1.0, -3.0]), optimizer.init(torch.zeros(2)))[0]
        tensor([-0.1000,  0.1000])

    References:
        Kingma and Ba 2015, arXiv 1412.6980, section 7.1.
    """
    del moment_requires_grad
    b1, b2 = _checked("adamax", betas, eps, weight_decay)
    return chain(decay(weight_decay), scale_by_adamax(b1, b2, eps), descend("adamax", lr), name="adamax")


def radam(
    lr: Hyperparameter | Schedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> Mended:
    """Rectified Adam: Adam with its step scaled by r_t, and p ← p − lr m̂ while the variance of 1/√v̂ cannot be told.

    Every real hyperparameter is a number, a 0-d tensor, or a tree of them over the parameters' tree. In torch.optim ε is
    10⁻⁸ by default.

    Args:
        lr: the learning rate, or a function of the step's number.
        betas: β₁ and β₂, the decays of the running means m of g and v of g².
        eps: ε.
        weight_decay: λ of g + λ p.
        moment_requires_grad: taken for torchopt's sake, as in `adam`.

    Returns:
        The optimizer.

    Raises:
        DefinitionError: a hyperparameter has no meaning.

    Example:
        >>> import torch
        >>> optimizer = radam(0.1)
        >>> optimizer.update(torch.tensor([1.0, -3.0]), optimizer.init(torch.zeros(2)))[0]
        tensor([-0.1000,  0.3000])

    References:
        Liu et al. 2020, arXiv 1908.03265.
    """
    del moment_requires_grad
    b1, b2 = _checked("radam", betas, eps, weight_decay)
    return chain(decay(weight_decay), scale_by_radam(b1, b2, eps), descend("radam", lr), name="radam")


def _checked(name: str, betas: Betas, eps: Hyperparameter, weight_decay: Hyperparameter) -> Betas:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        came = f"{len(betas)} of them" if isinstance(betas, tuple | list) else type(betas).__name__
        raise DefinitionError(f"{name}: betas is {came}; expected the pair (β₁, β₂), each a number, a tensor or a tree.")
    for i, beta in enumerate(betas):
        check(name, f"betas[{i}]", beta, below=1)
    check(name, "eps", eps)
    check(name, "weight_decay", weight_decay)
    return betas[0], betas[1]
