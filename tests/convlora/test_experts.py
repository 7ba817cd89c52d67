"""The experts' exact form on the source grid against the plain one: resize, convolve, GELU, resize."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from peft_talora.convlora.experts import expert_outputs

SIZES = [(14, 14), (16, 16), (9, 13), (64, 64)]
# less than the reach of the interpolation, one token, a tile that is not full, one tile along one axis only
ODD_SIZES = [(1, 1), (2, 3), (1, 20), (17, 5), (16, 37)]


def make(size, index, num_experts=8, rank=3, dtype=torch.float64):
    index = torch.as_tensor(index)
    z = torch.randn(len(index), *size, rank, dtype=dtype)
    weight = torch.randn(num_experts, rank, rank, 3, 3, dtype=dtype)
    bias = torch.randn(num_experts, rank, dtype=dtype)
    return z.requires_grad_(), index, weight.requires_grad_(), bias.requires_grad_()


def check(arguments, plain, atol=1e-11):
    z, _, weight, bias = arguments
    output, expected = expert_outputs(*arguments), plain(*arguments)
    torch.testing.assert_close(output, expected, rtol=0, atol=atol)
    cotangent = torch.randn_like(expected)
    got = torch.autograd.grad(output, (z, weight, bias), cotangent)
    want = torch.autograd.grad(expected, (z, weight, bias), cotangent)
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", range(1, 9))
def test_every_scale(scale, size, plain_experts):
    check(make(size, [scale - 1] * 2), plain_experts)


@pytest.mark.parametrize("size", SIZES + ODD_SIZES, ids=str)
def test_samples_with_different_experts(size, plain_experts):
    check(make(size, [5, 1, 0, 7, 3, 1, 6, 2, 4]), plain_experts)


@pytest.mark.parametrize("scale", range(1, 9))
def test_borders_are_exact_and_would_be_noticed(scale, plain_experts):
    # a map that is large at its border, where zero padding and replication differ most
    z, index, weight, bias = make((9, 13), [scale - 1])
    with torch.no_grad():
        z[:, 0] += 30
        z[:, -1] -= 30
        z[:, :, 0] += 20
        z[:, :, -1] -= 20
    output, expected = expert_outputs(z, index, weight, bias), plain_experts(z, index, weight, bias)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    for border in (output[:, 0], output[:, -1], output[:, :, 0], output[:, :, -1]):
        assert border.abs().max() > 1


@pytest.mark.parametrize(("num_experts", "rank"), [(1, 3), (2, 1), (4, 4), (11, 2)])
def test_other_numbers_of_experts_and_ranks(num_experts, rank, plain_experts):
    check(make((7, 10), [0, num_experts - 1, num_experts // 2], num_experts, rank), plain_experts)


def test_unused_experts_get_zero_gradients():
    z, index, weight, bias = make((6, 6), [2, 2, 5])
    expert_outputs(z, index, weight, bias).sum().backward()
    for e in range(8):
        used = e in (2, 5)
        assert weight.grad[e].any().item() == used and bias.grad[e].any().item() == used


def test_gradients_match_finite_differences():
    z, index, weight, bias = make((3, 5), [1, 3], num_experts=4, rank=2)
    assert torch.autograd.gradcheck(lambda *a: expert_outputs(a[0], index, *a[1:]), (z, weight, bias))


@pytest.mark.parametrize("size", [(14, 14), (40, 20)])
def test_shapes_do_not_depend_on_the_routing(size):
    """What runs, and on which shapes, is the same for every routing, and nothing waits for the device."""

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            shape = tuple(output.shape) if isinstance(output, torch.Tensor) else None
            self.calls.append((str(func), shape))
            return output

    records = []
    for index in ([0] * 6, [7] * 6, [0, 3, 3, 7, 1, 2]):
        arguments = make(size, index)
        with Record() as record:
            expert_outputs(*arguments).sum().backward()
        records.append(record.calls)
    assert records[0] == records[1] == records[2]
    forbidden = ("nonzero", "_local_scalar_dense", "item", "unique", "masked_select", "upsample")
    assert not [call for call, _ in records[0] if any(name in call for name in forbidden)]
    # no map at a higher resolution: all that is computed for a token are 16 values in each of the r channels
    assert max(torch.Size(shape).numel() for _, shape in records[0] if shape) <= 6 * size[0] * size[1] * 16 * 3 * 1.6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision(dtype, plain_experts):
    arguments = make((14, 14), range(8), dtype=dtype)
    output = expert_outputs(*arguments)
    assert output.dtype == dtype
    expected = plain_experts(arguments[0].double(), arguments[1], *(a.double() for a in arguments[2:]))
    tolerance = {torch.float16: 0.1, torch.bfloat16: 0.6, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)
    output.float().sum().backward()
    assert all(a.grad.isfinite().all() for a in (arguments[0], *arguments[2:]))


@pytest.mark.slow
def test_compiles_once_for_all_routings_and_open_sizes(plain_experts):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(expert_outputs, fullgraph=True, dynamic=True, backend=counter)
    for size in [(20, 24), (27, 9), (13, 32)]:
        for index in ([0, 1, 2], [7, 7, 3]):
            arguments = make(size, index)
            torch.testing.assert_close(compiled(*arguments), plain_experts(*arguments), rtol=0, atol=1e-11)
            compiled(*arguments).sum().backward()
    assert counter.frame_count == 1
