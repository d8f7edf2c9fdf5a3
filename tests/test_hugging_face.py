"""A Hugging Face model, from a config, as it is: a pure function of its parameters, and a level."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo.operators import ravel
from tests.oracles import bits, fingerprint

WORDS, LENGTH = 17, 5


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    """The library without torchvision, whose build for GPUs cannot be imported beside torch's for CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        if "transformers" not in sys.modules:
            patch.setitem(sys.modules, "torchvision", None)
        yield pytest.importorskip("transformers")


def config(transformers: Any, **fields: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=LENGTH + 4,
        **fields,
    )


def classifier(transformers: Any) -> torch.nn.Module:
    """A classifier with dropout and the library's own choice of attention."""
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config(transformers, num_labels=3)).double().train()


def bert(transformers: Any) -> fm.Stateless:
    return fm.Stateless(classifier(transformers))


def program(net: fm.Stateless, response: fm.BestResponse, steps: int = 3) -> fm.Multilevel:
    def weighted(model: Any, weights: Tensor, batch: Any) -> Any:
        ids, labels = batch
        losses = torch.nn.functional.cross_entropy(net(model, input_ids=ids).logits, labels, reduction="none")
        decay = sum((p**2).sum() for p in model.values())
        return (torch.sigmoid(weights) * losses).sum() + 0.05 * decay, {"loss": losses.mean()}

    def valid(weights: Tensor, model: Any, batch: Any) -> Tensor:
        ids, labels = batch
        return net.eval()(model, input_ids=ids, labels=labels).loss

    return fm.Multilevel(
        fm.Level("model", weighted, torchopt.sgd(0.1), steps=steps, response=response),
        fm.Level("weights", valid, torchopt.sgd(0.1)),
    )


def batches() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)

    def some(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(0, WORDS, (n, LENGTH), generator=draw), torch.randint(0, 3, (n,), generator=draw)

    return {"model": some(6), "weights": some(4)}


def start(p: fm.Multilevel, net: fm.Stateless) -> fm.State:
    return p.init({"model": net.params(), "weights": torch.zeros(6, dtype=torch.float64)}, seed=2)


def test_its_hypergradient_passes_the_taylor_test_with_dropout_on(transformers: Any) -> None:
    net = bert(transformers)
    p = program(net, fm.ITD())
    test = fm.testing.taylor_test(p, start(p, net), batches(), of="weights")
    assert test.passed, test


def test_second_derivatives_go_through_its_attention(transformers: Any) -> None:
    """Which by itself takes a fused kernel that has none; differences of gradients agree to their own error."""
    net = bert(transformers)
    answers = {}
    for name, response in {
        "products": fm.AID(fm.CG(6, damping=1.0)),
        "differences": fm.AID(fm.CG(6, damping=1.0), curvature=fm.Hessian("finite_difference"), cross="finite_difference"),
        "identity": fm.AID(fm.Identity()),
        "darts": fm.FiniteDifference(),
    }.items():
        p = program(net, response)
        answers[name] = ravel(p.hypergradient(start(p, net), batches(), of="weights"))
    for exact, differences in (("products", "differences"), ("identity", "darts")):
        # The step of a central difference in float64 costs about ε^(2/3) ≈ 4e-11, times the loss's own scale.
        assert (answers[exact] - answers[differences]).norm() <= 1e-6 * answers[exact].norm()
        assert answers[exact].norm() > 0


@pytest.mark.parametrize("response", [fm.ITD(), fm.AID(fm.CG(5, damping=1.0)), fm.FiniteDifference()], ids=str)
def test_it_trains_and_the_module_stays_as_it_is(transformers: Any, response: fm.BestResponse) -> None:
    module = classifier(transformers)
    net = fm.Stateless(module)
    before = {name: x.clone() for name, x in (*module.named_parameters(), *module.named_buffers())}
    p = program(net, response)
    state, costs = start(p, net), []
    for _ in range(6):
        state, metrics = p.step(state, batches())
        costs.append(float(metrics["model"]["aux"]["loss"]))
    assert costs[-1] < 0.95 * costs[0]
    after = dict((*module.named_parameters(), *module.named_buffers()))
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_it_is_a_pure_function(transformers: Any) -> None:
    """A language model whose head is tied to its embeddings."""
    torch.manual_seed(0)
    module = transformers.BertForMaskedLM(config(transformers)).double()
    net = fm.Stateless(module)
    params, ids = net.params(), torch.randint(0, WORDS, (3, 5))
    before = fingerprint((dict(module.named_parameters()), dict(module.named_buffers())))
    assert "cls.predictions.decoder.weight" not in params  # tied to the embeddings
    assert "bert.embeddings.position_ids" in net.buffers()
    torch.manual_seed(1)
    expected = module(input_ids=ids, labels=ids)
    gradients = torch.autograd.grad(expected.loss, list(module.parameters()))

    def loss(p):
        torch.manual_seed(1)
        return net(p, input_ids=ids, labels=ids).loss

    torch.manual_seed(1)
    assert type(net(params, input_ids=ids, labels=ids)) is type(expected)
    leaves = {key: value.requires_grad_() for key, value in net.params().items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        cost = loss(leaves)
        assert torch.allclose(cost, expected.loss, rtol=1e-12)
        g = torch.autograd.grad(cost, list(leaves.values()), create_graph=True)
        assert all(torch.allclose(a, e, rtol=1e-9, atol=1e-12) for a, e in zip(g, gradients, strict=True))
        v = [torch.randn_like(a) for a in g]
        Hv = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, v, strict=True)), list(leaves.values()))

        def shifted(step):
            # Central differences of the gradient have error O(h²|v|²), 1e-8 of the product here, rounding ε/h is 1e-10.
            return torch.func.grad(loss)({k: (x + step * d).detach() for (k, x), d in zip(leaves.items(), v, strict=True)})

        h = 1e-6
        up, down = shifted(h), shifted(-h)
    difference = torch.cat([((up[k] - down[k]) / (2 * h)).reshape(-1) for k in leaves])
    product = torch.cat([x.reshape(-1) for x in Hv])
    assert torch.linalg.vector_norm(difference - product) <= 1e-6 * torch.linalg.vector_norm(product)
    new = net.eval()(params, input_ids=ids, buffers=net.buffers())[1]
    assert bits(new) == bits(net.buffers())
    assert fingerprint((dict(module.named_parameters()), dict(module.named_buffers()))) == before
