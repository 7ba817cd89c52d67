"""The gate of Conv-LoRA: which expert a sample gets, and the loss that keeps the experts in use.

Everything here is computed in float32 at least, whatever the model's data type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# the smallest standard deviation of the noise
NOISE_FLOOR = 0.01
_CV_EPS = 1e-10


@dataclass(frozen=True)
class Choice:
    """The experts that a gate chose.

    Args:
        index: The expert of each sample, LongTensor (B,).
        logits: What it was chosen by, (B, n).
        loss: The balancing loss, not weighted, ().
    """

    index: Tensor
    logits: Tensor
    loss: Tensor

    def factor(self) -> Tensor:
        """Exactly 1 for each sample, (B,), with the gradient of the chosen expert's log-probability.

        It is the expert's softmax probability over its own value. As a factor of the expert's output it changes nothing but
        the gate's gradient: the logits move as if the chosen output had been weighted by its probability, the step being
        the same whether that probability is large or small.
        """
        log_probability = self.logits.log_softmax(dim=1).gather(1, self.index[:, None])[:, 0]
        return 1 + (log_probability - log_probability.detach())


def choose(features: Tensor, gate: Tensor, noise: Tensor, noisy: bool) -> Choice:
    """Choose one expert per sample: the one with the largest logit, of equal ones the first.

        clean = g W_gate,  std = softplus(g W_noise) + 0.01,  logits = clean + N(0, 1) std, or clean without noise

    Args:
        features: g, the mean of Z over the grid, (B, r).
        gate: W_gate (r, n).
        noise: W_noise (r, n).
        noisy: Whether to add noise: one `torch.randn_like(clean)`.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    # autocast would round the products
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(dtype)
        clean = features @ gate.to(dtype)
        logits, std = clean, None
        if noisy:
            std = F.softplus(features @ noise.to(dtype)) + NOISE_FLOOR
            logits = clean + torch.randn_like(clean) * std
        index = logits.argmax(dim=1)
        return Choice(index, logits, balancing_loss(clean, logits, std, index))


def balancing_loss(clean: Tensor, logits: Tensor, std: Tensor | None, index: Tensor) -> Tensor:
    """CV2(importance) + CV2(load) over the experts, with CV2 = unbiased variance / mean^2. 0 for a single expert.

    The importance of an expert is the number of its samples. Its load is, with noise, the expected number of them if the
    noise of this expert alone were drawn again, P(clean + N(0, 1) std > threshold) summed over the samples; the threshold is
    the largest logit of the other experts. Without noise the load is the number, too. Only the noisy load has a gradient.

    Args:
        clean: (B, n).
        logits: What the experts were chosen by, (B, n).
        std: Standard deviation of the noise, (B, n), or None without noise.
        index: The chosen experts, (B,).
    """
    num_experts = clean.shape[1]
    if num_experts == 1:
        return clean.new_zeros(())
    chosen = index[:, None] == torch.arange(num_experts, device=index.device)
    importance = chosen.sum(0).to(clean.dtype)
    if std is None:
        return 2 * _cv_squared(importance)
    largest = logits.gather(1, index[:, None])
    others = logits.masked_fill(chosen, -torch.inf)
    second = logits.gather(1, others.argmax(dim=1, keepdim=True))
    threshold = torch.where(chosen, second, largest)
    probability = (1 + torch.erf((clean - threshold) / (std * 2**0.5))) / 2
    return _cv_squared(importance) + _cv_squared(probability.sum(0))


def _cv_squared(x: Tensor) -> Tensor:
    """The squared coefficient of variation of (n,) values."""
    return x.var() / (x.mean() ** 2 + _CV_EPS)
