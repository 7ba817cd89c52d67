"""Tasks by name, index and sample; threads; exceptions; activation checkpointing."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from small_models import serve_in_threads
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_talora import TALoraConfig, checkpoint_context, set_task, use_task
from peft_talora.routing.checkpointing import RoutedCheckpoint


def tuned_sam(sam, **config):
    arguments = {"tasks": ["a", "b", "c"], "r": 4, "init_weights": False, **config}
    return get_peft_model(sam.double(), TALoraConfig(**arguments), autocast_adapter_dtype=False)


def images(batch=3):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


def embed(model, pixels, **kwargs):
    return model.vision_encoder(pixels, **kwargs).last_hidden_state


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class TestRequests:
    def test_first_task_is_active_and_all_spellings_agree(self, sam):
        model, pixels = tuned_sam(sam), images()
        assert model.active_task == "a"
        outputs = {}
        for task in ("a", "b", "c"):
            model.set_task(task)
            assert model.active_task == task
            outputs[task] = embed(model, pixels)
        assert (outputs["a"] - outputs["b"]).abs().max() > 1e-3 < (outputs["b"] - outputs["c"]).abs().max()
        model.set_task(0)
        for request in ("b", 1, ["b"] * 3, [1, 1, 1], torch.tensor([1, 1, 1]), torch.ones(3, dtype=torch.int32)):
            with model.use_task(request):
                torch.testing.assert_close(embed(model, pixels), outputs["b"], rtol=0, atol=1e-12)
        mixed = torch.stack([outputs["c"][0], outputs["a"][1], outputs["b"][2]])
        for request in (["c", "a", "b"], [2, 0, 1], torch.tensor([2, 0, 1])):
            with use_task(model, request):
                torch.testing.assert_close(embed(model, pixels), mixed, rtol=0, atol=1e-12)
        assert model.active_task == "a"

    def test_task_ids_of_a_sam_with_prompts(self, sam):
        model, pixels = tuned_sam(sam).eval(), images(2)
        points = torch.rand(2, 1, 1, 2, dtype=torch.float64) * 32
        expected = []
        for row, task in enumerate(["c", "b"]):
            model.set_task(task)
            expected.append(model(pixels[row : row + 1], input_points=points[row : row + 1]).pred_masks)
        output = model(pixel_values=pixels, input_points=points, task_ids=["c", "b"]).pred_masks
        torch.testing.assert_close(output, torch.cat(expected), rtol=0, atol=1e-10)

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ("d", r"Unknown task 'd'.*\['a', 'b', 'c'\]"),
            (3, r"index 3 is out of range.*\['a', 'b', 'c'\]"),
            (-1, r"index -1 is out of range"),
            (["a", "x", "b"], r"Unknown task 'x'"),
            (torch.tensor([0, 1, 3]), r"index 3 is out of range.*\['a', 'b', 'c'\]"),
            (torch.tensor([0.0, 1.0, 2.0]), r"must be integers"),
            (torch.tensor([[0, 1, 2]]), r"shape \(batch,\)"),
            (True, "name or an index"),
            (None, "name, an index"),
        ],
    )
    def test_bad_requests(self, sam, request_, message):
        model = tuned_sam(sam)
        with pytest.raises(ValueError, match=message), model.use_task(request_):
            pass

    @pytest.mark.parametrize("ids", [["a"], ["a", "b"], [0] * 6, torch.tensor([0, 1, 2, 0])])
    def test_wrong_length_names_both_numbers(self, sam, ids):
        model, pixels = tuned_sam(sam), images()
        with pytest.raises(ValueError, match=rf"{len(ids)} samples.*3"):
            model(pixel_values=pixels, task_ids=ids)
        with pytest.raises(ValueError, match=rf"{len(ids)} samples.*3"), model.use_task(ids):
            model(pixel_values=pixels)

    def test_a_single_task_as_task_ids_is_refused(self, sam):
        with pytest.raises(ValueError, match="one task per sample"):
            tuned_sam(sam)(pixel_values=images(), task_ids="a")

    def test_without_a_tuned_layer_there_is_no_task(self, sam):
        with pytest.raises(ValueError, match="no task-aware"):
            set_task(get_peft_model(sam, LoraConfig(target_modules=["qkv"])), "a")


def test_free_functions_serve_injected_adapters(sam):
    config = TALoraConfig(tasks=["a", "b"], r=4, init_weights=False)
    model = inject_adapter_in_model(config, sam)
    pixels = torch.randn(2, 3, 32, 32)
    set_task(model, "b")
    second = embed(model, pixels)
    with use_task(model, ["a", "b"]):
        mixed = embed(model, pixels)
    torch.testing.assert_close(mixed[1], second[1])
    assert (mixed[0] - second[0]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="use_task"):
        model(pixel_values=pixels, task_ids=["a", "b"])


class TestState:
    def test_an_exception_leaves_nothing_behind(self, sam):
        model, pixels = tuned_sam(sam), images()
        expected = embed(model, pixels)

        class Boom(Exception):
            pass

        def explode(*_):
            raise Boom

        handle = model.vision_encoder.layers[2].register_forward_pre_hook(explode)
        for call in (lambda: model(pixel_values=pixels, task_ids=[2, 1, 0]), lambda: _in_block(model, pixels)):
            with pytest.raises(Boom):
                call()
        handle.remove()
        torch.testing.assert_close(embed(model, pixels), expected, rtol=0, atol=0)

    def test_blocks_nest(self, sam):
        model, pixels = tuned_sam(sam), images()
        with model.use_task("b"):
            outer = embed(model, pixels)
            with model.use_task("c"):
                inner = embed(model, pixels)
            torch.testing.assert_close(embed(model, pixels), outer, rtol=0, atol=0)
        assert (inner - outer).abs().max() > 1e-3

    def test_threads_do_not_see_each_others_tasks(self, sam):
        model, pixels = tuned_sam(sam).eval(), images(1)

        def hidden(**kwargs):
            return model(pixel_values=pixels, output_hidden_states=True, **kwargs).vision_hidden_states[-1]

        expected = {}
        for task in ("a", "b", "c"):
            with model.use_task(task):
                expected[task] = hidden()
        assert (expected["a"] - expected["b"]).abs().max() > 1e-3 < (expected["b"] - expected["c"]).abs().max()

        def serve(task, meet):
            with model.use_task(task):
                meet()
                in_block = hidden()
            meet()
            with_ids = hidden(task_ids=[task])
            return all(torch.allclose(found, expected[task], rtol=0, atol=1e-12) for found in (in_block, with_ids))

        assert serve_in_threads(serve, expected, rounds=10) == [True] * 3
        assert model.base_model.task_router.override is None


def _in_block(model, pixels):
    with model.use_task("c"):
        embed(model, pixels)


class TestCheckpointing:
    """Two forwards of equal shape for different tasks, and a set_task, come before one backward."""

    def run(self, model, pixels):
        model.zero_grad()
        first = model.vision_encoder(pixels).last_hidden_state
        with model.use_task([2, 1, 0]):
            second = embed(model, pixels)
        third = model(pixel_values=pixels, task_ids=["b", "b", "c"]).pred_masks
        model.set_task("c")
        (first.sin().sum() + second.cos().sum() + third.sum()).backward()
        model.set_task("a")
        return gradients(model)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_gradients_are_those_without_checkpointing(self, sam, when):
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        if when == "before":
            sam.gradient_checkpointing_enable(**kwargs)
        model, pixels = tuned_sam(sam).train(), images()
        if when == "after":
            model.gradient_checkpointing_enable(**kwargs)
        checkpointed = self.run(model, pixels)
        assert isinstance(model.vision_encoder.layers[0]._gradient_checkpointing_func, RoutedCheckpoint)
        model.gradient_checkpointing_disable()
        plain = self.run(model, pixels)
        assert checkpointed.keys() == plain.keys() and plain
        for name, value in plain.items():
            torch.testing.assert_close(checkpointed[name], value, rtol=0, atol=1e-9)

    def test_reentrant_is_refused_with_the_reason(self, sam):
        model = tuned_sam(sam).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(ValueError, match="use_reentrant"):
            embed(model, images())

    def test_hand_written_checkpointing(self):
        base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
        config = TALoraConfig(tasks=["a", "b"], target_modules=["0", "2"], r=2, init_weights=False)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        x = torch.randn(4, 6, dtype=torch.float64)

        def run(forward):
            model.zero_grad()
            with model.use_task([0, 1, 1, 0]):
                first = forward(x)
            second = forward(x)
            model.set_task("b")
            (first.sum() + second.pow(2).sum()).backward()
            model.set_task("a")
            return gradients(model)

        plain = run(model)
        replayed = run(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=checkpoint_context))
        for name, value in plain.items():
            torch.testing.assert_close(replayed[name], value, rtol=0, atol=1e-12)
        with pytest.raises(RuntimeError, match=r"context_fn=peft_talora\.checkpoint_context"):
            run(lambda x: checkpoint(model, x, use_reentrant=False))

    def test_unload_leaves_the_checkpoint_function_as_it_was(self, sam):
        sam.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        function = sam.vision_encoder.layers[0]._gradient_checkpointing_func
        model = tuned_sam(sam).train()
        embed(model, images())
        base = model.unload()
        assert base.vision_encoder.layers[0]._gradient_checkpointing_func is function
        assert not any(module._forward_pre_hooks for module in base.modules())


@pytest.mark.slow
def test_compiles_to_one_graph_for_any_mix(sam):
    model, pixels = tuned_sam(sam).eval(), images()
    encode = torch.compile(lambda x, ids: _encode_with(model, x, ids), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    for ids in ([0, 1, 2], [2, 2, 0], [1, 0, 1]):
        with torch._dynamo.config.patch(error_on_recompile=ids != [0, 1, 2]):
            output = encode(pixels, torch.tensor(ids))
        with model.use_task(ids):
            torch.testing.assert_close(output, embed(model, pixels), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_task_ids_of_a_forward_compile_to_one_graph_for_any_mix():
    base = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    config = TALoraConfig(tasks=["a", "b"], target_modules=["0", "2"], r=2, init_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch._dynamo.reset()
    forward = torch.compile(lambda x, ids: model(x, task_ids=ids), fullgraph=True, backend="aot_eager")
    for ids in ([0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]):
        with torch._dynamo.config.patch(error_on_recompile=ids != [0, 1, 1, 0]):
            output = forward(x, torch.tensor(ids))
        with model.use_task(ids):
            torch.testing.assert_close(output, model(x), rtol=0, atol=1e-12)


def _encode_with(model, pixels, ids):
    with model.use_task(ids):
        return model.vision_encoder(pixels).last_hidden_state
