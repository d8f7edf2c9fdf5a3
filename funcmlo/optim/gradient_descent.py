"""Gradient descent and the optimizers that divide by a mean square of the gradient."""

from __future__ import annotations

from funcmlo.errors import DefinitionError
from funcmlo.optim.decay import decay
from funcmlo.optim.hyperparameters import Hyperparameter, check, is_nothing
from funcmlo.optim.rates import descend, scale_by_schedule
from funcmlo.optim.scale_by_adadelta import scale_by_adadelta
from funcmlo.optim.scale_by_rms import scale_by_rms
from funcmlo.optim.scale_by_rss import scale_by_rss
from funcmlo.optim.schedules import Schedule, inverse_time
from funcmlo.optim.trace import trace
from funcmlo.optim.transformation import Mended, chain


def sgd(
    lr: Hyperparameter | Schedule,
    momentum: Hyperparameter = 0.0,
    dampening: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    nesterov: bool = False,
    *,
    moment_requires_grad: bool = False,
    maximize: bool = False,
) -> Mended:
    """Gradient descent: m ← μ m + (1 − τ)(g + λ p) and p ← p − lr m.

    Every real hyperparameter is a number, a 0-d tensor, or a tree of them over the parameters' tree.

    Args:
        lr: the learning rate, or a function of the step's number.
        momentum: μ.
        dampening: τ; the first gradient is taken in full.
        weight_decay: λ.
        nesterov: whether the step is along g + λ p + μ m.
        moment_requires_grad: taken for torchopt's sake; the state is differentiated by where a transform asks for it.
        maximize: whether to ascend.

    Returns:
        The optimizer.

    Raises:
        DefinitionError: a hyperparameter has no meaning.

    Example:
        >>> import torch
        >>> params = {"a": torch.ones(2), "b": torch.ones(())}
        >>> optimizer = sgd({"a": torch.tensor([0.1, 0.2]), "b": 0.5})
        >>> optimizer.update(params, optimizer.init(params), params=params)[0]
        {'a': tensor([-0.1000, -0.2000]), 'b': tensor(-0.5000)}

    References:
        Sutskever et al. 2013, Proceedings of Machine Learning Research 28. A learned rate for each parameter, lr a tree like
        the parameters, is Meta-SGD: Li et al. 2017, arXiv 1707.09835.
    """
    del moment_requires_grad
    check("sgd", "momentum", momentum)
    check("sgd", "dampening", dampening)
    check("sgd", "weight_decay", weight_decay)
    if nesterov and (is_nothing(momentum) or not is_nothing(dampening)):
        raise DefinitionError("sgd: nesterov=True needs a momentum, and no dampening.")
    return chain(decay(weight_decay, maximize), trace(momentum, dampening, nesterov), descend("sgd", lr), name="sgd")


def rmsprop(
    lr: Hyperparameter | Schedule = 1e-2,
    alpha: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum: Hyperparameter = 0.0,
    centered: bool = False,
    *,
    initial_scale: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Mended:
    """RMSprop: v ← α v + (1 − α) g² and p ← p − lr g / (√v + ε), with momentum in the step where it is given.

    Every real hyperparameter is a number, a 0-d tensor, or a tree of them over the parameters' tree.

    Args:
        lr: the learning rate, or a function of the step's number.
        alpha: α.
        eps: ε.
        weight_decay: λ of g + λ p.
        momentum: μ.
        centered: whether the running mean's square is taken off v.
        initial_scale: where v begins.
        nesterov: whether the momentum is Nesterov's.
        maximize: whether to ascend.

    Returns:
        The optimizer.

    Raises:
        DefinitionError: a hyperparameter has no meaning.

    Example:
        >>> import torch
        >>> optimizer = rmsprop(0.1, alpha=torch.tensor(0.75))
        >>> optimizer.update(torch.tensor([2.0, -1.0]), optimizer.init(torch.zeros(2)))[0]
        tensor([-0.2000,  0.2000])

    References:
        Tieleman and Hinton 2012, lecture 6.5 of Neural Networks for Machine Learning.
    """
    check("rmsprop", "alpha", alpha)
    check("rmsprop", "eps", eps)
    check("rmsprop", "weight_decay", weight_decay)
    check("rmsprop", "momentum", momentum)
    if nesterov and is_nothing(momentum):
        raise DefinitionError("rmsprop: nesterov=True needs a momentum.")
    direction = scale_by_rms(alpha, eps, initial_scale, centered)
    return chain(
        decay(weight_decay, maximize), direction, trace(momentum, 0.0, nesterov), descend("rmsprop", lr), name="rmsprop"
    )


def adagrad(
    lr: Hyperparameter | Schedule = 1e-2,
    lr_decay: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: Hyperparameter = 1e-10,
    *,
    maximize: bool = False,
) -> Mended:
    """Adagrad: s ← s + g² and p ← p − lr / (1 + κ t) · g / (√s + ε).

    Every real hyperparameter is a number, a 0-d tensor, or a tree of them over the parameters' tree.

    Args:
        lr: the learning rate, or a function of the step's number.
        lr_decay: κ.
        weight_decay: λ of g + λ p.
        initial_accumulator_value: where s begins.
        eps: ε.
        maximize: whether to ascend.

    Returns:
        The optimizer.

    Raises:
        DefinitionError: a hyperparameter has no meaning.

    Example:
        >>> import torch
        >>> optimizer = adagrad({"a": 0.1, "b": torch.tensor(0.2)})
        >>> params = {"a": torch.ones(()), "b": torch.ones(())}
        >>> optimizer.update(params, optimizer.init(params))[0]
        {'a': tensor(-0.1000), 'b': tensor(-0.2000)}

    References:
        Duchi, Hazan and Singer 2011, Journal of Machine Learning Research 12.
    """
    check("adagrad", "lr_decay", lr_decay)
    check("adagrad", "weight_decay", weight_decay)
    check("adagrad", "eps", eps)
    check("adagrad", "initial_accumulator_value", initial_accumulator_value)
    slower = None if is_nothing(lr_decay) else scale_by_schedule(inverse_time(lr_decay))
    direction = scale_by_rss(initial_accumulator_value, eps)
    return chain(decay(weight_decay, maximize), direction, slower, descend("adagrad", lr), name="adagrad")


def adadelta(
    lr: Hyperparameter | Schedule = 1e-3,
    rho: Hyperparameter = 0.9,
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    *,
    moment_requires_grad: bool = False,
) -> Mended:
    """Adadelta: u = √((ν + ε) / (μ + ε)) g with running means μ of g² and ν of u², and p ← p − lr u.

    Every real hyperparameter is a number, a 0-d tensor, or a tree of them over the parameters' tree. The paper has no
    learning rate; torchopt's default is 10⁻³, torch.optim's is 1.

    Args:
        lr: the learning rate, or a function of the step's number.
        rho: the decay of both means.
        eps: ε.
        weight_decay: λ of g + λ p.
        moment_requires_grad: taken for torchopt's sake; the state is differentiated by where a transform asks for it.

    Returns:
        The optimizer.

    Raises:
        DefinitionError: a hyperparameter has no meaning.

    Example:
        >>> import torch
        >>> optimizer = adadelta(1.0)
        >>> updates, _ = optimizer.update(torch.ones(1), optimizer.init(torch.ones(1)))
        >>> f"{float(updates):.5f}"  # √(10⁻⁶ / (0.1 + 10⁻⁶))
        '-0.00316'

    References:
        Zeiler 2012, arXiv 1212.5701.
    """
    del moment_requires_grad
    check("adadelta", "rho", rho, below=1)
    check("adadelta", "eps", eps)
    check("adadelta", "weight_decay", weight_decay)
    return chain(decay(weight_decay), scale_by_adadelta(rho, eps), descend("adadelta", lr), name="adadelta")
