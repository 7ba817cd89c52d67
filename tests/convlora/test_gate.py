"""The gate and the balancing loss against a plain loop."""

import math

import pytest
import torch
from torch.distributions import Normal

from peft_talora.convlora import gate as gate_module
from peft_talora.convlora.gate import choose


def make(batch=12, rank=3, num_experts=8, dtype=torch.float64):
    features = torch.randn(batch, rank, dtype=dtype, requires_grad=True)
    gate = torch.randn(rank, num_experts, dtype=dtype, requires_grad=True)
    noise = torch.randn(rank, num_experts, dtype=dtype, requires_grad=True)
    return features, gate, noise


def cv_squared(values):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return variance / (mean**2 + 1e-10)


def reference(features, gate, noise, drawn):
    """(index, loss), one sample and expert at a time; `drawn` is the noise, None in eval."""
    batch, num_experts = features.shape[0], gate.shape[1]
    importance, load, index = [0.0] * num_experts, [0.0] * num_experts, []
    for b in range(batch):
        clean = [features[b] @ gate[:, e] for e in range(num_experts)]
        if drawn is None:
            chosen = max(range(num_experts), key=lambda e: clean[e].item())
            load[chosen] = load[chosen] + 1.0
        else:
            std = [torch.nn.functional.softplus(features[b] @ noise[:, e]) + 0.01 for e in range(num_experts)]
            logits = [clean[e] + drawn[b, e] * std[e] for e in range(num_experts)]
            ranking = sorted(range(num_experts), key=lambda e: -logits[e].item())
            chosen = ranking[0]
            for e in range(num_experts):
                threshold = logits[ranking[1]] if e == chosen else logits[chosen]
                load[e] = load[e] + Normal(0.0, 1.0).cdf((clean[e] - threshold) / std[e])
        importance[chosen] += 1.0
        index.append(chosen)
    return index, cv_squared(importance) + cv_squared(load)


@pytest.fixture
def drawn(monkeypatch):
    """What `torch.randn_like` gives, and the shapes it was asked for."""
    calls = []

    def randn_like(tensor):
        calls.append(torch.randn(tensor.shape, dtype=tensor.dtype))
        return calls[-1]

    monkeypatch.setattr(torch, "randn_like", randn_like)
    return calls


@pytest.mark.parametrize("num_experts", [2, 4, 8])
def test_training_matches_a_plain_loop(num_experts, drawn):
    parameters = make(num_experts=num_experts)
    choice = choose(*parameters, noisy=True)
    assert [d.shape for d in drawn] == [(12, num_experts)]
    index, loss = reference(*parameters, drawn[0])
    assert choice.index.tolist() == index
    torch.testing.assert_close(choice.loss, loss, rtol=0, atol=1e-11)
    for got, want in zip(
        torch.autograd.grad(choice.loss, parameters), torch.autograd.grad(loss, parameters), strict=True
    ):
        assert want.abs().max() > 1e-6
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_eval_counts_and_draws_nothing(drawn):
    parameters = make()
    choice = choose(*parameters, noisy=False)
    index, loss = reference(*parameters, None)
    assert choice.index.tolist() == index and not drawn
    assert choice.loss.item() == pytest.approx(float(loss), abs=1e-12) and not choice.loss.requires_grad


def test_equal_logits_give_the_first_expert():
    features, gate, noise = make()
    assert not choose(features, torch.zeros_like(gate), noise, noisy=False).index.any()
    with torch.no_grad():
        gate[:, 2:6] = gate[:, :1] + 5 * features.mean()  # four experts with one logit
        gate[:, [0, 1, 6, 7]] = gate[:, 2:3]
        gate[:, 0] -= 1000 * features[0]
    assert choose(features[:1], gate, noise, noisy=False).index.item() == 1


def test_a_single_expert_has_nothing_to_balance():
    choice = choose(*make(num_experts=1), noisy=True)
    assert choice.index.eq(0).all() and choice.loss.item() == 0


def test_a_single_sample():
    choice = choose(*make(batch=1), noisy=True)
    choice.loss.backward()
    assert choice.loss.isfinite()
    # one of 8 experts used: mean 1/8, variance 1/8
    assert choose(*make(batch=1), noisy=False).loss.item() == pytest.approx(16, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_float32_whatever_the_model_has(dtype, autocast):
    features, gate, noise = (p.detach().to(dtype).requires_grad_() for p in make())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        choice = choose(features, gate, noise, noisy=True)
        quiet = choose(features, gate, noise, noisy=False)
    assert choice.logits.dtype == choice.loss.dtype == torch.float32
    expected = features.float() @ gate.float()
    torch.testing.assert_close(quiet.logits, expected, rtol=0, atol=1e-6)
    choice.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in (features, gate, noise))


def test_far_away_logits_stay_finite():
    features, gate, noise = make(dtype=torch.float32)
    choice = choose(1e4 * features, gate, noise, noisy=True)
    choice.loss.backward()
    assert choice.loss.isfinite() and gate.grad.isfinite().all() and noise.grad.isfinite().all()


def test_factor_is_one_with_the_gradient_of_the_log_probability():
    parameters = make()
    choice = choose(*parameters, noisy=False)
    factor = choice.factor()
    assert factor.shape == (12,) and factor.eq(1).all()
    weights = torch.randn(12, dtype=torch.float64)
    (got,) = torch.autograd.grad((factor * weights).sum(), choice.logits, retain_graph=True)
    # <output, gradient> x (one-hot - softmax)
    want = weights[:, None] * (torch.eye(8, dtype=torch.float64)[choice.index] - choice.logits.softmax(1))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_noise_floor_of_a_fresh_gate():
    features, gate, noise = make(batch=20_000)
    choice = choose(features, torch.zeros_like(gate), torch.zeros_like(noise), noisy=True)
    std = math.log(2) + 0.01
    assert choice.logits.std().item() == pytest.approx(std, rel=0.02)
    counts = choice.index.bincount()
    assert len(counts) == 8 and counts.min() > 2000  # every expert gets its share
    assert gate_module.NOISE_FLOOR == 0.01
