"""Batches of several adapters: each sample as if it came alone, with its own adapter and its own task."""

import threading
from collections import OrderedDict

import pytest
import torch
from peft import get_peft_model
from small_models import serve_in_threads
from torch import nn

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec
from peft_talora.routing.mixed_batch import route_adapters

NAMES = ["one", "__base__", "two", "one", "two"]
TASKS = ["a", "a", "c", "b", "b"]


def config(*tasks, **changes):
    return TALoraConfig(**{"tasks": tasks, "r": 3, "init_weights": False, **changes})


def tuned_sam(sam):
    """Two adapters of different ranks; "two" knows other tasks and leaves a layer out."""
    model = get_peft_model(sam.double(), config("a", "b"), "one")
    model.add_adapter("two", config("c", "b", r=2, enable_qkv=[True, False, True], layers_to_transform=[0, 1]))
    return model.eval()


def tuned_net():
    """Two adapters with a last layer of their own."""
    base = nn.Sequential(OrderedDict(first=nn.Linear(6, 8), act=nn.Tanh(), last=nn.Linear(8, 4))).double()
    options = {"target_modules": ["first"], "modules_to_save": ["last"]}
    model = get_peft_model(base, config("a", "b", **options), "one")
    model.add_adapter("two", config("a", "b", r=5, **options))
    with torch.no_grad():
        for copy in model.base_model.model.last.modules_to_save.values():
            copy.weight.normal_()
    return model.eval()


def images():
    return torch.randn(5, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def embed(model, pixels, **kwargs):
    return model(pixel_values=pixels, output_hidden_states=True, **kwargs).vision_hidden_states[-1]


def one_by_one(model, pixels, names, tasks):
    """The reference: a forward for every sample."""
    outputs = []
    for index, (name, task) in enumerate(zip(names, tasks, strict=True)):
        sample = pixels[index : index + 1]
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(embed(model, sample))
        else:
            model.set_adapter(name)
            with model.use_task(task):
                outputs.append(embed(model, sample))
    model.set_adapter("one")
    return torch.cat(outputs)


class TestEachSampleAsIfAlone:
    @pytest.mark.parametrize("kind", ["names", "indices", "tensor"])
    def test_own_adapter_and_own_task(self, sam, kind):
        model, pixels = tuned_sam(sam), images()
        expected = one_by_one(model, pixels, NAMES, TASKS)
        # the second sample has no adapter, so that its task does not matter
        task_ids = {"names": TASKS, "indices": [0, 7, 0, 1, 1], "tensor": torch.tensor([0, 7, 0, 1, 1])}[kind]
        found = embed(model, pixels, adapter_names=NAMES, task_ids=task_ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        wrong = one_by_one(model, pixels, NAMES, ["b", "a", "b", "a", "c"])
        changed = (found - wrong).abs().amax((1, 2, 3)) > 1e-3
        assert changed.tolist() == [True, False, True, True, True]

    def test_gradients(self, sam):
        model, pixels = tuned_sam(sam), images()
        model.set_requires_grad(["one", "two"])

        def gradients(outputs):
            model.zero_grad()
            outputs.sin().sum().backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        found = gradients(embed(model, pixels, adapter_names=NAMES, task_ids=TASKS))
        parts = []
        for index, (name, task) in enumerate(zip(NAMES, TASKS, strict=True)):
            if name != "__base__":
                model.base_model.set_adapter(name)
                model.set_requires_grad(["one", "two"])
                with model.use_task(task):
                    parts.append(gradients(embed(model, pixels[index : index + 1])))
        assert found.keys() == {name for part in parts for name in part}
        for name, gradient in found.items():
            expected = sum(part[name] for part in parts if name in part)
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)

    def test_active_tasks_without_task_ids(self, sam):
        model, pixels = tuned_sam(sam), images()
        model.set_task("c")
        expected = one_by_one(model, pixels, NAMES, ["a", "a", "c", "a", "c"])
        torch.testing.assert_close(embed(model, pixels, adapter_names=NAMES), expected, rtol=0, atol=1e-12)
        with model.use_task("b"):
            found = embed(model, pixels, adapter_names=NAMES)
        expected = one_by_one(model, pixels, NAMES, ["b"] * 5)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    def test_modules_trained_in_full_and_tokens(self):
        model = tuned_net()
        x, names = torch.randn(4, 3, 6, dtype=torch.float64), ["two", "__base__", "one", "two"]
        expected = []
        for sample, name in zip(x, names, strict=True):
            model.set_adapter("one" if name == "__base__" else name)
            with model.disable_adapter() if name == "__base__" else model.use_task("b"):
                expected.append(model(sample[None]))
        found = model(x, adapter_names=names, task_ids=["b"] * 4)
        torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)
        assert not model.base_model.model.last._forward_pre_hooks


class TestState:
    def test_threads_do_not_mix(self, sam):
        model, pixels = tuned_sam(sam), images()
        batches = {0: (NAMES, TASKS), 1: (["two"] * 5, ["c", "b"] * 2 + ["c"]), 2: (["__base__"] * 5, ["a"] * 5)}
        expected = {key: embed(model, pixels, adapter_names=n, task_ids=t) for key, (n, t) in batches.items()}

        def serve(key, meet):
            names, tasks = batches[key]
            meet()
            found = embed(model, pixels, adapter_names=names, task_ids=tasks)
            return torch.allclose(found, expected[key], rtol=0, atol=1e-12)

        assert serve_in_threads(serve, batches, rounds=5) == [True] * 3

    def test_another_thread_in_the_middle_of_a_mixed_forward(self):
        model, x, others = tuned_net(), torch.randn(2, 6, dtype=torch.float64), []
        expected, mixed = model(x), model(x, adapter_names=["two", "__base__"])
        assert (expected - mixed).abs().max() > 1e-3

        def serve_another(*_):
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=lambda: others.append(model(x)))
                thread.start()
                thread.join()

        model.base_model.model.act.register_forward_hook(serve_another)
        torch.testing.assert_close(model(x, adapter_names=["two", "__base__"]), mixed, rtol=0, atol=1e-12)
        (other,) = others
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-12)

    def test_an_exception_leaves_nothing_behind(self, sam):
        model, pixels = tuned_sam(sam), images()
        expected = embed(model, pixels)

        def explode(*_):
            raise ZeroDivisionError

        handle = model.vision_encoder.neck.register_forward_pre_hook(explode)
        with pytest.raises(ZeroDivisionError):
            embed(model, pixels, adapter_names=NAMES, task_ids=TASKS)
        handle.remove()
        assert model.base_model.task_router.override is None
        torch.testing.assert_close(embed(model, pixels), expected, rtol=0, atol=0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"adapter_names": ["one"] * 4}, r"Length of `adapter_names`.*got 4 and 5"),
            ({"adapter_names": ["one"] * 4 + ["three"]}, r"non-existing adapter\(s\): three"),
            ({"adapter_names": NAMES, "task_ids": ["a"] * 4}, r"4 samples, adapter_names the adapters of 5"),
            ({"adapter_names": NAMES, "task_ids": ["a"] * 5}, r"Unknown task 'a'.*\['c', 'b'\]"),
            (
                {"adapter_names": NAMES, "task_ids": torch.tensor([0, 0, 0, 2, 0])},
                r"index 2 is out of range.*\['a', 'b'\]",
            ),
        ],
    )
    def test_bad_arguments(self, sam, arguments, message):
        with pytest.raises(ValueError, match=message):
            embed(tuned_sam(sam), images(), **arguments)

    def test_a_layer_called_alone(self, sam):
        model = tuned_sam(sam)
        router = model.base_model.task_router
        layer = model.vision_encoder.layers[0].attn.qkv
        routing = route_adapters(router, ["one", "two"])
        with router.using(routing), pytest.raises(ValueError, match=r"2 samples.* 5 rows"):
            layer(torch.randn(5, 3, 3, 16, dtype=torch.float64))

    def test_in_training_and_while_merged(self, sam):
        model = tuned_sam(sam)
        with pytest.raises(ValueError, match="training mode"):
            embed(model.train(), images(), adapter_names=NAMES)
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter`"):
            embed(model, images(), adapter_names=NAMES)

    def test_an_msam(self, sam):
        model = get_peft_model(MSamForMultiTask.from_sam(sam, {"depth": TaskSpec("depth")}), TALoraConfig(r=2)).eval()
        with pytest.raises(ValueError, match="mSAM: its mask decoders and LayerNorms"):
            model(torch.randn(1, 3, 32, 32), adapter_names=["default"])
