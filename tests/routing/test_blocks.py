"""Blocks that generators and coroutines open; tasks inside of checkpointed functions; how many ids a batch needs."""

import asyncio
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from small_models import images
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec, checkpoint_context


def tuned(sam):
    config = TALoraConfig(tasks=["a", "b"], r=4, init_weights=False)
    model = get_peft_model(sam.double(), config, autocast_adapter_dtype=False).eval()
    assert (embed_as(model, "a") - embed_as(model, "b")).abs().max() > 1e-3
    return model


def embed(model):
    with torch.no_grad():
        return model.vision_encoder(images()).last_hidden_state


def embed_as(model, task):
    with model.use_task(task):
        return embed(model)


def gradients(model, output, **backward):
    model.zero_grad()
    output.square().sum().backward(**backward)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestInterleavedBlocks:
    """Generators and coroutines are suspended inside of their blocks: each sees its own task, whatever the others do."""

    def test_generators(self, sam):
        model = tuned(sam)
        expected = {task: embed_as(model, task) for task in ("a", "b")}

        def maps(task):
            with model.use_task(task):
                for _ in range(3):
                    yield embed(model)

        for first, second in zip(maps("a"), maps("b"), strict=True):
            assert torch.equal(first, expected["a"]) and torch.equal(second, expected["b"])
        model.set_task("b")
        assert torch.equal(embed(model), expected["b"])

    def test_coroutines(self, sam):
        model = tuned(sam)
        expected = {task: embed_as(model, task) for task in ("a", "b")}

        async def serve(task, wait, work):
            await asyncio.sleep(wait)
            with model.use_task(task):
                await asyncio.sleep(work)
                return torch.equal(embed(model), expected[task])

        async def serve_all():
            return await asyncio.gather(serve("a", 0, 0.03), serve("b", 0.01, 0.04))

        assert asyncio.run(serve_all()) == [True, True]
        model.set_task("b")
        assert torch.equal(embed(model), expected["b"])

    def test_a_call_outside_of_a_suspended_generator_is_refused(self, sam):
        model = tuned(sam)

        def inside():
            with model.use_task("b"):
                yield

        generator = inside()
        next(generator)
        with pytest.raises(RuntimeError, match="'inside', which opened it, is suspended"):
            embed(model)
        with model.use_task("a"):
            assert torch.equal(embed(model), embed_as(model, "a"))
        generator.close()
        model.set_task("b")
        assert torch.equal(embed(model), embed_as(model, "b"))

    def test_a_suspended_block_concerns_no_call_that_has_no_use_of_it(self, sam_factory):
        model, student = tuned(sam_factory()), tuned(sam_factory()).train()
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        expected = gradients(student, student.vision_encoder(images()).last_hidden_state)
        with model.disable_adapter():
            plain = embed(model)

        def inside():
            with model.use_task("b"):
                yield

        for _ in inside():
            got = gradients(student, student.vision_encoder(images()).last_hidden_state)
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[name], value) for name, value in expected.items())
            with model.disable_adapter():
                assert torch.equal(embed(model), plain)
            with pytest.raises(RuntimeError, match="is suspended"):
                model.vision_encoder(images())

    @pytest.mark.parametrize("given", [{"tasks": ["depth"]}, {"task_ids": ["depth", "edges"]}, {}])
    def test_an_msam_whose_call_says_its_tasks(self, sam, given):
        msam = MSamForMultiTask.from_sam(sam.double(), {"depth": TaskSpec("depth"), "edges": TaskSpec("binary")})
        model = get_peft_model(msam, TALoraConfig(r=2, init_weights=False), autocast_adapter_dtype=False).eval()
        expected = model(images(), **given).logits

        def inside():
            with model.use_task("edges"):
                yield

        for _ in inside():
            logits = model(images(), **given).logits
            assert logits.keys() == expected.keys() and all(
                torch.equal(logits[name], expected[name]) for name in logits
            )

    def test_context_managers_of_the_users_own(self, sam):
        model = tuned(sam)

        @contextmanager
        def second_task():
            with model.use_task("b"):
                yield

        with second_task():
            assert torch.equal(embed(model), embed_as(model, "b"))


class TestTasksChosenInsideACheckpoint:
    @pytest.mark.parametrize("way", ["use_task", "task_ids"])
    def test_the_replay_chooses_them_again(self, sam, way):
        model, pixels = tuned(sam), images()

        def run(x):
            if way == "use_task":
                with model.use_task("b"):
                    return model.vision_encoder(x).last_hidden_state
            return model(x, task_ids=["b", "a"], multimask_output=False).pred_masks

        expected = gradients(model, run(pixels))
        got = gradients(model, checkpoint(run, pixels, use_reentrant=False, context_fn=checkpoint_context))
        assert all(torch.equal(value, got[name]) for name, value in expected.items())

    def test_a_graph_that_is_kept_is_replayed_again(self, sam):
        model = tuned(sam)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        with model.use_task("b"):
            output = model.vision_encoder(images()).last_hidden_state
        model.set_task("a")
        first = gradients(model, output, retain_graph=True)
        second = gradients(model, output)
        assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("kwargs", [None, {}])
def test_checkpointing_without_arguments_is_not_reentrant(sam, kwargs):
    model = tuned(sam)
    with model.use_task("b"):
        expected = gradients(model, model.vision_encoder(images()).last_hidden_state)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.train()
    with model.use_task("b"):
        output = model.vision_encoder(images()).last_hidden_state
    model.set_task("a")
    got = gradients(model, output)
    assert all(torch.allclose(value, got[name], atol=1e-12) for name, value in expected.items())


@pytest.mark.parametrize("call", ["get_image_embeddings", "vision_encoder"])
def test_the_number_of_ids_is_checked_by_submodules(sam, call):
    model = tuned(sam)
    with model.use_task(["a", "b", "a"]), pytest.raises(ValueError, match=r"3 samples, but the batch has 2"):
        getattr(model, call)(images())


class Timed(nn.Module):
    """A model of one's own whose first argument has no batch dimension."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, time, x):
        return self.linear(x) + time


def test_the_batch_may_be_that_of_any_argument():
    model = get_peft_model(Timed(), TALoraConfig(tasks=["a", "b"], target_modules=["linear"], init_weights=False))
    time, x = torch.ones(1), torch.randn(2, 4)
    mixed = model(time, x, task_ids=["a", "b"])
    for row, task in enumerate(["a", "b"]):
        model.set_task(task)
        torch.testing.assert_close(mixed[row], model(time, x)[row])
    with pytest.raises(ValueError, match="names the tasks of 3 samples"):
        model(time, x, task_ids=["a", "b", "a"])


def test_a_batch_without_samples():
    config = TALoraConfig(tasks=["a", "b"], target_modules=["linear"], init_weights=False)
    model, none = get_peft_model(Timed(), config), torch.zeros(0, dtype=torch.long)
    assert model(torch.ones(1), torch.zeros(0, 4), task_ids=none).shape == (0, 6)
    with pytest.raises(ValueError, match="names the tasks of 0 samples"):
        model(torch.ones(1), torch.zeros(2, 4), task_ids=none)


def test_an_id_without_dimensions_is_one_task_for_all(sam):
    model = tuned(sam)
    with model.use_task(torch.tensor(1)):
        assert torch.equal(embed(model), embed_as(model, "b"))
