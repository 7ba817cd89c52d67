"""The plain form of the experts, as the paper writes it: the reference of these tests."""

import pytest
import torch
from torch.nn import functional as F


def plain_expert(z, scale, weight, bias):
    """down_s(GELU(conv(up_s(Z)))) of samples that share an expert; z (B, H, W, r)."""
    z = z.permute(0, 3, 1, 2)
    size = z.shape[-2:]
    if scale > 1:
        z = F.interpolate(z, scale_factor=scale, mode="bicubic", align_corners=False)
    z = F.gelu(F.conv2d(z, weight, bias, padding=1))
    if scale > 1:
        z = F.interpolate(z, size=size, mode="bicubic", align_corners=False)
    return z.permute(0, 2, 3, 1)


def plain_expert_outputs(z, index, weight, bias):
    """Sample by sample, each through its expert."""
    outputs = [plain_expert(z[b : b + 1], e + 1, weight[e], bias[e]) for b, e in enumerate(index.tolist())]
    return torch.cat(outputs)


@pytest.fixture
def plain_experts():
    return plain_expert_outputs
