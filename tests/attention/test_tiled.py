"""Tiled attention against softmax over all logits at once."""

import pytest
import torch

from peft_talora.attention import tiled as module
from peft_talora.attention.tiled import tiled_attention

HEIGHT, WIDTH, SCALE = 5, 3, 0.7


def inputs():
    """query, key, value, rows, columns of 2 images and 3 heads."""
    channels = (4, 4, 4, HEIGHT, WIDTH)
    return [torch.randn(2, 3, HEIGHT * WIDTH, c, dtype=torch.float64, requires_grad=True) for c in channels]


def reference(query, key, value, rows, columns):
    logits = SCALE * query @ key.mT
    for j in range(HEIGHT * WIDTH):
        logits = logits + torch.nn.functional.one_hot(torch.tensor(j), HEIGHT * WIDTH) * (
            rows[..., j // WIDTH, None] + columns[..., j % WIDTH, None]
        )
    return logits.softmax(-1) @ value


# 15 tokens, 6 heads: everything at once; some heads; one head and some queries, the last tiles being smaller
@pytest.mark.parametrize(("logits", "number"), [(2**22, 1), (4 * 15 * 15, 2), (4 * 15, 6 * 4), (1, 6 * 15)])
def test_values_and_gradients(monkeypatch, logits, number):
    monkeypatch.setattr(module, "_TILE", logits)
    assert len(list(module.tiles(6, 15))) == number
    tensors = inputs()
    cotangent = torch.randn(2, 3, HEIGHT * WIDTH, 4, dtype=torch.float64)
    outputs = [tiled_attention(*tensors, SCALE), reference(*tensors)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad(output, tensors, cotangent) for output in outputs)
    for name, got, want in zip(("query", "key", "value", "rows", "columns"), found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11, msg=name)
        assert want.abs().max() > 1e-2, name


def test_tiles_cover_everything_once(monkeypatch):
    monkeypatch.setattr(module, "_TILE", 100)
    covered = torch.zeros(7, 33)
    for tile in module.tiles(7, 33):
        covered[tile] += 1
    assert (covered == 1).all()
