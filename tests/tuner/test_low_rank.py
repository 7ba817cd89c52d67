"""Products with thin matrices: written out, they are the same products, with the same gradients."""

import pytest
import torch

from peft_talora.tuner import low_rank as thin


def tensors(*shapes, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(output, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


COMPILED = torch.compile(thin.add_product, fullgraph=True, backend="aot_eager")

# windows, tokens, rows of one token (summed as one block)
LEADING = [(2, 3, 9), (2, 11), (2, 5, 1)]


@pytest.mark.parametrize("leading", LEADING)
def test_written_out_projection(leading):
    x, A = tensors((*leading, 7), (3, 7))
    got, want = thin.Project.apply(x, A), torch.einsum("...d,rd->...r", x, A)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for mine, reference in zip(gradients(got, [x, A]), gradients(want, [x, A]), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("add", [thin.AddProduct.apply, thin.add_product, COMPILED])
def test_added_product(leading, add):
    inputs = result, hidden, B = tensors((*leading, 7), (*leading, 3), (7, 3))
    got, want = add(result, hidden, B), result + torch.einsum("...r,kr->...k", hidden, B)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for mine, reference in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_gradients_have_their_tensors_dtype(half):
    (x, result), (A, B) = tensors((2, 9, 7), (2, 9, 5), dtype=half), tensors((3, 7), (5, 3), dtype=torch.float32)
    with torch.autocast("cpu", dtype=half):
        output = thin.AddProduct.apply(result, thin.Project.apply(x, A), B)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, result, A, B)]
    want = wide[1] + wide[0] @ wide[2].T @ wide[3].T
    torch.testing.assert_close(output.double(), want, rtol=0.03, atol=0.1)
    cotangent = torch.ones_like(output)
    got = torch.autograd.grad(output, [x, result, A, B], cotangent)
    assert [g.dtype for g in got] == [half, half, torch.float32, torch.float32]
    for mine, reference in zip(got, torch.autograd.grad(want, wide, cotangent.double()), strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=0.03, atol=0.15)


@pytest.mark.parametrize(("rank", "number"), [(1, 2), (8, 2), (9, 0)])
def test_compiled_graphs_write_out_small_ranks(rank, number):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=keep)
    def update(x, result, A, B):
        return thin.add_product(result, thin.project(x, A), B)

    torch._dynamo.reset()
    inputs = x, result, A, B = tensors((2, 9, 7), (2, 9, 5), (rank, 7), (5, rank))
    torch.testing.assert_close(update(*inputs), result + x @ A.T @ B.T, rtol=0, atol=1e-11)
    assert sum("autograd_function_apply" in str(node.target) for node in graphs[0].graph.nodes) == number


def test_a_result_of_another_dtype():
    (result,), (hidden, B) = tensors((2, 5), dtype=torch.float64), tensors((2, 3), (5, 3), dtype=torch.float32)
    got = thin.add_product(result, hidden, B)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, result + (hidden @ B.T), rtol=0, atol=1e-6)
