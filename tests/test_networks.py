"""Networks as lower levels: they train, and their hypergradients are what each estimator claims, with dropout on.

The networks are narrow here, and wide under `--run-slow`. Where a residual network is put to the Taylor test it has a smooth
nonlinearity, because every step h of the test moves some of its thousands of ReLU units across their kink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn
from torchopt.base import GradientTransformation

import funcmlo as fm
from paper_repro.networks import LSTM, LoRALinear, ResNet, Transformer, lora, resnet18, resnet32
from paper_repro.networks.transformer import Attention

EXAMPLES, TOKENS, LENGTH, CLASSES = 6, 7, 5, 3
Params = dict[str, Tensor]


def transformer(**sizes: int) -> Transformer:
    return Transformer(TOKENS, LENGTH, heads=2, **sizes)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: resnet18(CLASSES, width=2, activation=nn.Softplus),
    "resnet32": lambda: resnet32(CLASSES, width=2, activation=nn.Softplus),
    "transformer": lambda: transformer(width=8),
    "lstm": lambda: LSTM(TOKENS, width=6),
    "lora": lambda: lora(transformer(width=8), rank=2, alpha=4.0),
}
# Their Hessians are laid out, so few parameters are trained.
SMALL: dict[str, Callable[[], fm.Stateless]] = {
    "resnet": lambda: fm.Stateless(ResNet([1, 1], 1, CLASSES, shortcut="pad", activation=nn.Softplus).double()),
    "transformer": lambda: fm.Stateless(
        transformer(width=8, layers=1).double(), train=("tokens.weight", "norm.*", "*.project_out.*")
    ),
    "lstm": lambda: fm.Stateless(LSTM(TOKENS, width=3, layers=1).double()),
    "lora": lambda: fm.Stateless(lora(transformer(width=8, layers=1), rank=1, alpha=2.0).double()),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A network with a few examples; the upper level weights them, and is judged on others."""

    net: fm.Stateless
    x: Tensor
    y: Tensor
    x_valid: Tensor
    y_valid: Tensor
    anchor: float = 0.0  # ρ of ρ/2 ‖y − y₀‖²
    same_masks: bool = False  # whether all steps share the dropout masks, so that there is a solution to converge to

    def losses(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        output = self.net(params, x)
        each = F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="none")
        return each.reshape(len(y), -1).mean(dim=1)

    def lower(self, net: Params, weights: Tensor) -> Tensor:
        if self.same_masks:
            torch.manual_seed(7)  # the library puts the generator back after each evaluation
        cost = (weights.sigmoid() * self.losses(net, self.x, self.y)).mean()
        start = self.net.params()
        pull = torch.stack([((p - start[name]) ** 2).sum() for name, p in net.items()]).sum()
        return cost + self.anchor / 2 * pull

    def upper(self, weights: Tensor, net: Params) -> Tensor:
        return self.losses(net, self.x_valid, self.y_valid).mean()

    def program(self, response: fm.BestResponse, optimizer: Any = None, steps: int = 3) -> fm.Multilevel:
        return fm.Multilevel(
            fm.Level("net", self.lower, optimizer or torchopt.sgd(0.2), steps=steps, response=response),
            fm.Level("weights", self.upper, torchopt.adam(0.1)),
        )

    def state(self, program: fm.Multilevel, seed: int = 0) -> fm.State:
        weights = torch.linspace(-1, 1, EXAMPLES, dtype=torch.float64)
        return program.init({"net": self.net.params(), "weights": weights}, seed=seed)


def case(net: fm.Stateless, size: int = 8, anchor: float = 0.0) -> Case:
    """Random examples for a float64 network."""
    if "stem.0.weight" in net.params():
        x = torch.randn(2 * EXAMPLES, 3, size, size, dtype=torch.float64)
        y = torch.randint(CLASSES, (2 * EXAMPLES,))
    else:
        x = torch.randint(TOKENS, (2 * EXAMPLES, LENGTH))
        y = (3 * x + 1) % TOKENS  # what there is to learn
    return Case(net, x[:EXAMPLES], y[:EXAMPLES], x[EXAMPLES:], y[EXAMPLES:], anchor)


@pytest.fixture
def networks(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return case(fm.Stateless(MODULES[request.param]().double()))


@pytest.fixture
def small(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return case(SMALL[request.param](), size=4, anchor=3.0)


every_network = pytest.mark.parametrize("networks", MODULES, indirect=True)
every_small = pytest.mark.parametrize("small", SMALL, indirect=True)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes() -> None:
    # He et al. 2016, table 6, has 0.46 M for ResNet-32; ResNet-18 has 11.69 M at 1,000 classes and a 7×7 stem, that is
    # 11,173,962 with 3 · 64 · (49 − 9) fewer in the stem and 513 · 990 fewer in the head.
    assert count(resnet18()) == 11_689_512 - 3 * 64 * 40 - 513 * 990 == 11_173_962
    assert count(resnet32()) == 464_154
    # Tied: V·w once; positions; per layer four norms' vectors, and 12 w² + 9 w; the last norm.
    v, w, t = 100, 128, 32
    assert count(Transformer(v, t)) == v * w + t * w + 2 * (4 * w + 12 * w**2 + 9 * w) + 2 * w
    assert count(LSTM(v)) == v * w + 2 * (8 * w**2 + 8 * w) + (w + 1) * v
    assert count(LSTM(v, layers=1, classes=3)) == v * w + 8 * w**2 + 8 * w + (w + 1) * 3
    adapters = lora(Transformer(v, t), rank=4, alpha=8.0)
    # r (in + out) for in, out = (w, 3w), (w, w), (w, 4w), (4w, w), in two layers; the tied head has none.
    assert sum(p.numel() for p in adapters.parameters() if p.requires_grad) == 2 * 4 * (4 + 2 + 5 + 5) * w


def test_resnets_shapes_and_depths() -> None:
    for module, depth in ((resnet18(width=2), 18), (resnet32(width=2), 32)):
        layers = [
            p for p in module.modules() if isinstance(p, nn.Linear) or (isinstance(p, nn.Conv2d) and p.kernel_size == (3, 3))
        ]
        assert len(layers) == depth
    features = resnet18(width=2).stages(torch.zeros(1, 2, 32, 32))
    assert features.shape == (1, 16, 4, 4)


def test_option_a_passes_the_input_on_by_zeros_and_strides() -> None:
    block = ResNet([1, 1], 2, shortcut="pad").stages[1][0]
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    passed = block.shortcut(x)
    assert torch.equal(passed[:, 1:3], x[:, :, ::2, ::2])
    assert not passed[:, [0, 3]].any()


def test_a_causal_transformer_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    early, late = torch.zeros(1, LENGTH, dtype=torch.int64), torch.zeros(1, LENGTH, dtype=torch.int64)
    late[0, -1] = 1
    for causal in (True, False):
        net = Transformer(TOKENS, LENGTH, 8, 2, causal=causal).eval()
        moved = float((net(early) - net(late)).detach()[0, :-1].abs().max())
        assert moved < 1e-6 if causal else moved > 1e-4


def test_attention_weights_are_dropped_while_training() -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, 2, dropout=0.5, causal=False), torch.randn(2, LENGTH, 8)
    assert not torch.equal(attention(x), attention(x))
    assert torch.equal(attention.eval()(x), attention(x))


def test_the_embedding_is_tied_and_held_once() -> None:
    net = fm.Stateless(transformer(width=8))
    params = net.params()
    assert "tokens.weight" in params
    assert "head.weight" not in params
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    blank = {**params, "tokens.weight": torch.zeros_like(params["tokens.weight"])}
    assert not net(blank, tokens).any()  # the logits too are of that weight


def test_lora_begins_as_the_frozen_network_and_trains_its_adapters_alone() -> None:
    torch.manual_seed(0)
    base = transformer(width=8).eval()
    adapted = lora(base, rank=2, alpha=4.0)
    tokens = torch.randint(TOKENS, (3, LENGTH))
    assert torch.equal(adapted(tokens), base(tokens))
    assert not any(isinstance(part, LoRALinear) for part in base.modules())
    assert all(p.requires_grad for p in base.parameters())
    net = fm.Stateless(adapted)
    assert {name.rpartition(".")[2] for name in net.params()} == {"down", "up"}
    assert len(net.params()) == 2 * 4 * 2
    # W x + (α/r) B A x, against the product laid out
    layer = LoRALinear(nn.Linear(4, 3).double(), rank=2, alpha=6.0)
    nn.init.normal_(layer.up)
    x = torch.randn(5, 4, dtype=torch.float64)
    weight = layer.base.weight + 3.0 * layer.up @ layer.down
    assert torch.allclose(layer(x), F.linear(x, weight, layer.base.bias), rtol=1e-12)


@every_network
@pytest.mark.parametrize(
    "response", [fm.ITD(), fm.AID(fm.CG(5, damping=1.0)), fm.FiniteDifference()], ids=lambda r: type(r).__name__
)
def test_it_trains(networks: Case, response: fm.BestResponse) -> None:
    # LoRA's frozen network leaves little to be gained in a few steps, so it takes larger ones.
    rate = 2.0 if len(networks.net.params()) == 16 else 0.3
    program = networks.program(response, torchopt.sgd(rate))
    state = networks.state(program)
    losses = [training_loss(networks, state)]
    for _ in range(5):
        state, metrics = program.step(state, {})
        losses.append(training_loss(networks, state))
    assert losses[-1] < 0.95 * losses[0]
    assert float(metrics["weights"]["gradient_norm"]) > 0


def training_loss(case: Case, state: fm.State) -> float:
    """The unweighted loss, under masks that are the same at every call."""
    torch.manual_seed(1)
    return float(case.losses(state.params["net"], case.x, case.y).mean())


@every_network
def test_dropout_is_on(networks: Case) -> None:
    program = networks.program(fm.ITD())
    first, second = (float(program.cost(networks.state(program, seed), {}, of="weights")) for seed in (0, 1))
    assert (first != second) == any(
        isinstance(part, nn.Dropout) for part in networks.net.module(networks.net.params()).modules()
    )


@every_network
def test_itd_passes_the_taylor_test(networks: Case) -> None:
    program = networks.program(fm.ITD())
    state = networks.state(program)
    assert float(program.hypergradient(state, {}, of="weights").norm()) > 1e-3
    fm.testing.taylor_test(program, state, {}, of="weights", directions=1, raise_on_failure=True)


class Dense(fm.BestResponse):
    """−∇²_xy g · w with Hw = v, H laid out by autograd and solved; or w = v."""

    claims = fm.Claims(target="implicit")

    def __init__(self, identity: bool = False) -> None:
        self.identity = identity

    def vjp(self, solved: fm.Solved, cotangent: Params, state: Any) -> Any:
        with torch.enable_grad():
            y = {name: p.detach().requires_grad_() for name, p in solved.params.items()}
            x = {name: p.detach().requires_grad_() for name, p in solved.inputs.items()}
            gradient = flat(torch.autograd.grad(solved.loss(y, x), list(y.values()), create_graph=True))
            w = flat(cotangent.values())
            if not self.identity:
                w = torch.linalg.solve(hessian(gradient, list(y.values())), w)
            products = torch.autograd.grad(-(gradient @ w), list(x.values()))
        return dict(zip(x, products, strict=True)), state, fm.Stats()


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def hessian(gradient: Tensor, y: list[Tensor]) -> Tensor:
    return torch.stack([flat(torch.autograd.grad(entry, y, retain_graph=True)) for entry in gradient])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@every_small
def test_cg_solves_the_same_system_as_a_dense_solver(small: Case) -> None:
    # Three inner steps: nothing is converged, the masks are the last step's for both.
    cg, dense = small.program(fm.AID(fm.CG(400, tol=1e-12))), small.program(Dense())
    found, stats = cg.hypergradient(small.state(cg), {}, of="weights", with_stats=True)
    expected = dense.hypergradient(small.state(dense), {}, of="weights")
    assert stats["net"].converged
    # a residual of 1e-12 and a condition number below a hundred
    assert relative(found, expected) < 1e-10


@every_small
def test_finite_differences_make_the_cross_product(small: Case) -> None:
    found, expected = (
        program.hypergradient(small.state(program), {}, of="weights")
        for program in (small.program(fm.FiniteDifference()), small.program(Dense(identity=True)))
    )
    # ε of about the cube root of 2e-16: ε² of truncation, and 2e-16 / ε of rounding
    assert relative(found, expected) < 1e-7


def newton(case: Case, weights: Tensor) -> tuple[Params, GradientTransformation]:
    """The lower solution at these weights, and gradient steps preconditioned by the inverse Hessian there."""
    y = {name: p.requires_grad_() for name, p in case.net.params().items()}
    inverse = 0.1 * torch.eye(sum(p.numel() for p in y.values()), dtype=torch.float64)  # gradient descent, far away
    for t in range(50):
        gradient = flat(torch.autograd.grad(case.lower(y, weights), list(y.values()), create_graph=True))
        if t in (40, 44):  # chords otherwise
            inverse = torch.linalg.inv(hessian(gradient, list(y.values())))
        step = (inverse @ gradient.detach()).split([p.numel() for p in y.values()])
        y = {name: (p - s.reshape(p.shape)).detach().requires_grad_() for (name, p), s in zip(y.items(), step, strict=True)}

    def update(gradient: Params, state: Any, *, params: Any = None, inplace: bool = False) -> tuple[Params, Any]:
        step = (inverse @ flat(gradient.values())).split([g.numel() for g in gradient.values()])
        return {name: -s.reshape(g.shape) for (name, g), s in zip(gradient.items(), step, strict=True)}, state

    return {name: p.detach() for name, p in y.items()}, GradientTransformation(lambda params: (), update)


@every_small
def test_implicit_differentiation_passes_the_taylor_test_where_the_lower_level_is_solved(small: Case) -> None:
    still = replace(small, same_masks=True)
    weights = torch.linspace(-1, 1, EXAMPLES, dtype=torch.float64)
    solution, optimizer = newton(still, weights)
    program = still.program(fm.AID(fm.CG(400, tol=1e-13)), optimizer, steps=8)
    state = program.init({"net": solution, "weights": weights})
    assert float(program.hypergradient(state, {}, of="weights").norm()) > 1e-4
    fm.testing.taylor_test(program, state, {}, of="weights", directions=1, raise_on_failure=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet18(CLASSES, activation=nn.Softplus),
        lambda: resnet32(CLASSES, activation=nn.Softplus),
        lambda: Transformer(TOKENS, LENGTH),
        lambda: LSTM(TOKENS),
        lambda: lora(Transformer(TOKENS, LENGTH), rank=4, alpha=8.0),
    ],
    ids=list(MODULES),
)
def test_itd_passes_the_taylor_test_at_full_size(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    whole = case(fm.Stateless(make().double()))
    program = whole.program(fm.ITD(), torchopt.sgd(0.02), steps=2)
    fm.testing.taylor_test(program, whole.state(program), {}, of="weights", directions=1, raise_on_failure=True)
