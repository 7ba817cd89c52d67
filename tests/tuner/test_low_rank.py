"""The product of a low-rank update that is added in one go is the same sum, with the same gradients."""

import pytest
import torch

from peft_talora.tuner.low_rank import add_product


def tensors(*shapes, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(output, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


# windows, tokens, rows of one token
@pytest.mark.parametrize("leading", [(2, 3, 9), (2, 11), (2, 5, 1)])
@pytest.mark.parametrize("add", [add_product, torch.compile(add_product, fullgraph=True, backend="aot_eager")])
def test_values_and_gradients(leading, add):
    inputs = result, hidden, B = tensors((*leading, 7), (*leading, 3), (7, 3))
    got, want = add(result, hidden, B), result + torch.einsum("...r,kr->...k", hidden, B)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for mine, reference in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_gradients_have_their_tensors_dtype(half):
    (x, result), (A, B) = tensors((2, 9, 7), (2, 9, 5), dtype=half), tensors((3, 7), (5, 3), dtype=torch.float32)
    with torch.autocast("cpu", dtype=half):
        output = add_product(result, torch.nn.functional.linear(x, A), B)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, result, A, B)]
    want = wide[1] + wide[0] @ wide[2].T @ wide[3].T
    torch.testing.assert_close(output.double(), want, rtol=0.03, atol=0.1)
    cotangent = torch.ones_like(output)
    got = torch.autograd.grad(output, [x, result, A, B], cotangent)
    assert [g.dtype for g in got] == [half, half, torch.float32, torch.float32]
    for mine, reference in zip(got, torch.autograd.grad(want, wide, cotangent.double()), strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=0.03, atol=0.15)


def test_a_result_of_another_dtype():
    (result,), (hidden, B) = tensors((2, 5), dtype=torch.float64), tensors((2, 3), (5, 3), dtype=torch.float32)
    got = add_product(result, hidden, B)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, result + (hidden @ B.T), rtol=0, atol=1e-6)
