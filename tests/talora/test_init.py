"""What every start of the factors leaves a layer with."""

import pytest
import torch
from peft import get_peft_model
from small_talora import factors_of, tuned_linear
from torch import nn

from peft_talora import TALoraConfig


def starts_as_loras(model, layer, x):
    """G, U1, U2 and U3 of a layer of 40 inputs that changes nothing yet: LoRA's own start in U1, and U2 zero."""
    G, U1, U2, U3 = factors_of(layer)
    assert not U2.any() and torch.equal(model(x), layer.get_base_layer()(x))
    assert U1.abs().max() <= 40**-0.5 and U1.std() > 0.4 * 40**-0.5
    return G, U1, U2, U3


def step_on(model, U2):
    """A step of gradient descent on U2, which makes the other factors' gradients."""
    with torch.no_grad():
        U2.sub_(0.1 * U2.grad)
    model.zero_grad()


class TestInit:
    @pytest.mark.parametrize("init_weights", [True, "orthogonal", "normalized"])
    def test_starts_as_the_base_model_and_trains(self, init_weights):
        model, layer = tuned_linear(init_weights=init_weights)
        x = torch.randn(5, 10, dtype=torch.float64)
        assert torch.equal(model(x), layer.get_base_layer()(x))
        model(x).sum().backward()
        G, *others = factors_of(layer)
        assert G.grad.abs().max() > 0 and not G.any() and all(u.abs().min() > 0 for u in others)

    def test_lora_start_is_a_shared_lora_whose_first_step_moves_all_outputs(self):
        model, layer = tuned_linear(in_features=40, init_weights="lora", r_in=4, r_out=3, r_task=4)
        x = torch.randn(5, 40, dtype=torch.float64)
        G, U1, U2, U3 = starts_as_loras(model, layer, x)
        for task in range(3):
            torch.testing.assert_close(layer._core("default", task) / 0.5, torch.eye(4, 3, dtype=torch.float64))
        model(x).sin().sum().backward()
        assert torch.linalg.matrix_rank(U2.grad) == 3 and not G.grad.any() and not U1.grad.any()
        # one step on, the tasks part: the slices of G are one for each task, at zero, and I for all of them
        assert torch.equal(U3, torch.cat([torch.eye(3), torch.ones(3, 1)], dim=1).double()) and not G[:, :, :3].any()
        step_on(model, U2)
        with model.base_model.use_task([1] * 5):
            model(x).sin().sum().backward()
        assert [bool(slice_.any()) for slice_ in G.grad.unbind(2)] == [False, True, False, True]
        assert torch.equal(G.grad[:, :, 1], G.grad[:, :, 3])
        assert U3.grad[1].any() and not U3.grad[[0, 2]].any() and U1.grad.any()

    @pytest.mark.parametrize(
        ("tasks", "slices", "rows"),
        [("abc", 1, [[1]] * 3), ("abc", 2, [[1, 1]] * 3), ("abc", 3, [[1, 0, 1], [0, 1, 1], [1, 0, 1]]),
         ("abc", 5, [[1, 0, 0, 1, 1], [0, 1, 0, 1, 1], [0, 0, 1, 1, 1]]), ("a", 1, [[1]]), ("a", 2, [[1, 1]])],
    )  # fmt: skip
    @pytest.mark.parametrize("ranks", [(4, 3), (3, 4)])
    def test_lora_start_of_any_shape(self, tasks, slices, rows, ranks):
        _, layer = tuned_linear(tasks=list(tasks), init_weights="lora", r_in=ranks[0], r_out=ranks[1], r_task=slices)
        G, *_, U3 = factors_of(layer)
        assert U3.tolist() == rows and G.count_nonzero() == 3
        for task in range(len(tasks)):
            assert torch.equal(layer._core("default", task) / 0.5, torch.eye(*ranks, dtype=torch.float64))

    def test_half_start_shares_half_of_the_ranks_and_deals_out_the_others(self):
        model, layer = tuned_linear(in_features=40, init_weights="half", r_in=8, r_out=9, r_task=4)
        x = torch.randn(6, 40, dtype=torch.float64)
        G, _, U2, U3 = starts_as_loras(model, layer, x)
        for task, own in enumerate([(4, 7), (5,), (6,)]):
            expected = torch.zeros(8, 9, dtype=torch.float64)
            for rank in (0, 1, 2, 3, *own):
                expected[rank, rank] = 0.5
            assert torch.equal(layer._core("default", task), expected)
        with model.base_model.use_task([1] * 6):
            model(x).sin().sum().backward()
        assert [bool(column.any()) for column in U2.grad.T] == [rank in (0, 1, 2, 3, 5) for rank in range(9)]
        step_on(model, U2)
        with model.base_model.use_task([1] * 6):
            model(x).sin().sum().backward()
        assert [bool(slice_.any()) for slice_ in G.grad.unbind(2)] == [False, True, False, True]
        assert U3.grad[1].any() and not U3.grad[[0, 2]].any()

    @pytest.mark.parametrize(
        ("tasks", "ranks", "slices", "common", "own"),
        [
            (3, 5, 4, 2, 3),
            (3, 6, 1, 6, 0),
            (5, 6, 3, 3, 2),
            (5, 6, 6, 1, 5),
            (6, 8, 7, 2, 6),
            (5, 4, 6, 1, 5),
            (8, 8, 9, 1, 8),
            (2, 32, 4, 16, 2),
            (1, 4, 4, 2, 1),
            (2, 1, 4, 1, 2),
        ],
    )
    def test_half_start_of_any_shape(self, tasks, ranks, slices, common, own):
        names = [f"t{index}" for index in range(tasks)]
        _, layer = tuned_linear(tasks=names, init_weights="half", r_in=ranks, r_out=ranks, r_task=slices)
        cores = torch.stack([layer._core("default", task) / 0.5 for task in range(tasks)])
        diagonals = cores.diagonal(dim1=1, dim2=2)
        assert torch.equal(cores, torch.diag_embed(diagonals)) and set(diagonals.unique().tolist()) <= {0, 1}
        # every rank is somebody's, and only the first ones are everybody's
        assert diagonals.any(dim=0).all() and diagonals[:, :common].all()
        assert torch.equal(diagonals, diagonals[torch.arange(tasks) % max(own, 1)])
        # each has a slice of its own, if there are as many
        assert len(factors_of(layer)[3].unique(dim=0)) == max(own, 1)
        if own:
            assert (diagonals[:own, common:].sum(dim=0) == 1).all()
            # and a rank of its own, if one is left for all
            assert ranks <= own or diagonals[:own, common:].any(dim=1).all()

    def test_split_start_deals_the_ranks_out_to_the_tasks(self):
        model, layer = tuned_linear(in_features=40, init_weights="split", r_in=8, r_out=7, r_task=4)
        x = torch.randn(6, 40, dtype=torch.float64)
        G, U1, U2, U3 = starts_as_loras(model, layer, x)
        for task, own in enumerate([(0, 3, 6), (1, 4), (2, 5)]):
            expected = torch.zeros(8, 7, dtype=torch.float64)
            for rank in own:
                expected[rank, rank] = 0.5
            assert torch.equal(layer._core("default", task), expected)
        with model.base_model.use_task([1, 1, 1, 1, 1, 1]):
            model(x).sin().sum().backward()
        # a task moves its own ranks alone
        assert [bool(column.any()) for column in U2.grad.T] == [rank % 3 == 1 for rank in range(7)]
        step_on(model, U2)
        with model.base_model.use_task([0, 1, 2, 0, 1, 2]):
            model(x).sin().sum().backward()
        # nothing is dead: the slice that is left over, and what couples the tasks, get gradients
        assert G.grad[:, :, 3].any() and G.grad[0, 1].any() and U3.grad[1].any() and U1.grad[:, 1].any()

    @pytest.mark.parametrize(
        ("tasks", "ranks", "slices", "shares"), [(5, 4, 3, 3), (5, 2, 8, 2), (2, 6, 1, 1), (1, 4, 4, 1), (7, 8, 7, 7)]
    )
    def test_split_start_of_any_shape(self, tasks, ranks, slices, shares):
        names = [f"t{index}" for index in range(tasks)]
        _, layer = tuned_linear(tasks=names, init_weights="split", r_in=ranks, r_out=ranks, r_task=slices)
        cores = [layer._core("default", task) / 0.5 for task in range(tasks)]
        for task, core in enumerate(cores):
            assert core.any() and torch.equal(core, cores[task % shares])
        # together they hold every rank once
        assert torch.equal(sum(cores[:shares]), torch.eye(ranks, dtype=torch.float64))

    def test_published_start_is_standard_normal(self):
        _, layer = tuned_linear(200, 210, tasks=[f"t{i}" for i in range(100)], r=64, r_in=None, r_out=None, r_task=50,
                                init_weights=True)  # fmt: skip
        for factor in factors_of(layer)[1:]:
            assert abs(factor.std().item() - 1) < 0.05 and abs(factor.mean().item()) < 0.05

    def test_orthogonal_start(self):
        _, layer = tuned_linear(init_weights="orthogonal")
        for factor in (layer.talora_U1["default"], layer.talora_U2["default"]):
            gram = factor.T @ factor
            torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-6)

    def test_first_step_of_the_normalized_start_moves_the_weight_as_lora_does(self):
        from peft import LoraConfig

        rank, d, k = 16, 256, 384
        moved = {}
        for name, config in {
            "lora": LoraConfig(r=rank, lora_alpha=rank // 2, target_modules=["0"]),
            "talora": TALoraConfig(tasks=["a", "b", "c"], r=rank, init_weights="normalized", target_modules=["0"]),
        }.items():
            model = get_peft_model(nn.Sequential(nn.Linear(d, k)), config)
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            before = model.base_model.model[0].get_delta_weight("default").clone()
            (model(torch.randn(64, d)) * torch.randn(64, k)).sum().backward()
            optimizer.step()
            moved[name] = (model.base_model.model[0].get_delta_weight("default") - before).std().item()
        assert 0.5 < moved["talora"] / moved["lora"] < 2.0

    def test_nothing_is_zero_without_init(self):
        _, layer = tuned_linear(init_weights=False)
        assert all(factor.abs().min() > 0 for factor in factors_of(layer))
