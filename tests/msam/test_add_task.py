"""A task that is added to a trained adapter: what it is, and that the other tasks do not notice."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from process_groups import in_a_process_group
from small_growth import (
    EDGES,
    TASKS,
    assert_equal,
    edge_labels,
    fresh,
    in_use,
    layers_of,
    predict,
    train,
    trained_names,
)
from small_models import images, label_maps, make_sam
from torch import nn

from peft_talora import (
    MSamForMultiTask,
    TALoraConfig,
    TaskSpec,
    add_task,
)


class TestOtherTasks:
    @pytest.mark.parametrize(
        "kind, mode, number",
        [
            ("talora", "prompt", 1),
            ("talora", "prompt", 2),
            ("talora", "token", 2),
            ("convlora", "prompt", 2),
            ("lora", "token", 2),
        ],
    )
    def test_keep_every_bit(self, kind, mode, number):
        model = in_use(kind, dict(list(TASKS.items())[:number]), mode)
        ids = torch.tensor([0, number - 1, 0])
        before, mixed = predict(model), predict(model, task_ids=ids)
        state = copy.deepcopy(model.state_dict())
        if number == 2:
            assert (before["semantic"][:, :1] - before["depth"]).abs().max() > 1e-3
        add_task(model, "edges", EDGES)
        start = predict(model)
        assert list(start) == [*before, "edges"]
        train(model)
        after = predict(model)
        for logits in (start, after, predict(model, tasks=list(before))):
            assert_equal(logits, before)
        assert_equal(predict(model, task_ids=ids), mixed)
        assert (after["edges"] - start["edges"]).abs().max() > 1e-2
        for name, value in model.state_dict().items():
            if name in state:
                assert torch.equal(value[: len(value) - 1] if "talora_U3" in name else value, state[name]), name

    def test_stay_frozen_whatever_peft_switches_on(self):
        model = in_use()
        add_task(model, "edges", EDGES)
        expected = trained_names(model)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).float().double()]
        for one in (model, *copies):
            one.set_adapter("default")
            with one.disable_adapter():
                pass
            one.set_requires_grad("default")
            assert trained_names(one) == expected
            torch.testing.assert_close(predict(one), predict(model), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kind", ["talora", "convlora", "lora"])
    def test_stay_frozen_in_other_parameters(self, kind):
        model = in_use(kind)
        add_task(model, "edges", EDGES)
        expected, state = trained_names(model), copy.deepcopy(model.state_dict())
        for load in (
            lambda: model.load_state_dict(state, assign=True),
            lambda: set_peft_model_state_dict(model, get_peft_model_state_dict(model), low_cpu_mem_usage=True),
        ):
            load()
            model.set_adapter("default")
            with model.disable_adapter():
                pass
            assert trained_names(model) == expected

    def test_a_second_one_freezes_the_first(self):
        model = in_use()
        add_task(model, "edges", EDGES)
        train(model)
        model.requires_grad_(False)
        before = predict(model)
        add_task(model, "normals", {"kind": "normals"})
        assert all(".normals." in name or "talora_own_row" in name for name in trained_names(model))
        labels = {"normals": label_maps(3)["normals"].double()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
        model.train()(images(3), labels=labels).loss.backward()
        optimizer.step()
        assert list(predict(model)) == ["semantic", "depth", "edges", "normals"]
        assert_equal(predict(model), before)


class TestTheNewTask:
    def test_what_it_trains(self):
        model = in_use()
        add_task(model, "edges", EDGES)
        part = "base_model.model."
        decoder = make_sam().mask_decoder
        names = {n for n, _ in decoder.named_parameters()}
        unused = ("iou_prediction_head.", *(f"output_hypernetworks_mlps.{i}." for i in (1, 2, 3)))
        expected = {
            *(f"{part}vision_encoder.layers.{i}.attn.qkv.talora_own_row.default" for i in range(3)),
            *(f"{part}mask_decoders.edges.modules_to_save.default.{n}" for n in names if not n.startswith(unused)),
            f"{part}no_mask_embeds.edges.modules_to_save.default.weight",
        }
        assert trained_names(model) == expected
        train(model, steps=1)
        assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
        # of its weight every number, also those of the row
        for name, p in model.named_parameters():
            if "talora_own_row" in name:
                assert p.shape == (1, 4) and p.grad.abs().min() > 0

    @pytest.mark.parametrize("mode", ["prompt", "token"])
    def test_starts_as_the_sam_with_the_mean_update(self, mode):
        model = in_use(mode=mode)
        rows = [layer.talora_U3["default"].clone() for layer in layers_of(model)]
        add_task(model, "semantic2", TaskSpec("semantic", num_channels=5))
        for layer, old in zip(layers_of(model), rows, strict=True):
            assert torch.equal(layer.talora_U3["default"], torch.cat([old, old.mean(0, keepdim=True)]))
            deltas = [layer.get_delta_weight("default", task) for task in range(3)]
            torch.testing.assert_close(deltas[2], (deltas[0] + deltas[1]) / 2, rtol=0, atol=1e-12)
        msam = model.get_base_model()
        start = MSamForMultiTask.from_sam(
            make_sam().double(), {"semantic2": TaskSpec("semantic", num_channels=5)}, channel_mode=mode
        )
        for part in ("mask_decoders", "no_mask_embeds"):
            wrapper, sams = getattr(msam, part)["semantic2"], getattr(start, part)["semantic2"].state_dict()
            for module in (wrapper.original_module, wrapper.modules_to_save["default"]):
                state = module.state_dict()
                assert state.keys() == sams.keys() and all(torch.equal(state[key], sams[key]) for key in sams)

    @pytest.mark.parametrize("options", [{}, {"tasks": ["edges"]}, {"task_ids": ["edges", "depth", "edges"]}])
    def test_it_learns(self, options):
        model = in_use()
        add_task(model, "edges", EDGES)
        losses = train(model, steps=12, **options)
        assert losses[-1] < 0.85 * losses[0]

    def test_values_and_gradients(self):
        model = in_use()
        add_task(model, "edges", EDGES)
        layer = layers_of(model)[0]
        row = layer.talora_own_row["default"]
        row.data += 0.3
        G, U1, U2, U3 = (p.detach() for p in layer.parameters_of("default"))
        rows = torch.cat([U3[:2], row.detach()]).requires_grad_()
        x, ids = torch.randn(6, 5, 16, dtype=torch.float64), torch.tensor([2, 0, 2])
        delta = 0.5 * torch.einsum("abc,ia,ob,tc->toi", G, U1, U2, rows)
        expected = layer.base_layer(x) + torch.einsum("noi,nti->nto", delta[ids.repeat_interleave(2)], x)
        with model.use_task(ids):
            got = layer(x)
        torch.testing.assert_close(got, expected)
        cotangent = torch.randn_like(got)
        (gradient,) = torch.autograd.grad((got * cotangent).sum(), row)
        (wanted,) = torch.autograd.grad((expected * cotangent).sum(), rows)
        torch.testing.assert_close(gradient, wanted[2:])

    @in_a_process_group
    def test_no_parameter_waits_for_a_gradient(self):
        """DDP complains in the second step of one that the first step left without."""
        model = in_use()
        add_task(model, "edges", EDGES)
        parallel = nn.parallel.DistributedDataParallel(model.train())
        batches = [
            {"labels": edge_labels()},
            {"labels": {}},
            {"labels": edge_labels(), "task_ids": ["depth", "depth", "semantic"]},
            {"labels": edge_labels(), "tasks": ["edges"]},
        ]
        for batch in batches:
            parallel(images(3), **batch).loss.backward()

    @pytest.mark.slow
    def test_it_compiles(self):
        model = in_use()
        add_task(model, "edges", EDGES)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            logits = compiled(images(3), tasks=["edges"]).logits
        torch.testing.assert_close(logits, predict(model, tasks=["edges"]), rtol=0, atol=1e-9)


class TestRefusals:
    @pytest.mark.parametrize(
        "name, spec, message",
        [
            ("depth", EDGES, "a task 'depth' already"),
            ("not a name", EDGES, "Python identifier"),
            ("keys", EDGES, "attribute of torch.nn.ModuleDict"),
            (3, EDGES, "must be a string"),
            ("edges", None, "needs a `spec`"),
            ("edges", {"kind": "outline"}, "unknown task kind 'outline'"),
            ("edges", "binary", "expected a TaskSpec"),
            ("parts", {"kind": "parts"}, "needs num_channels"),
        ],
    )
    def test_names_and_specs(self, name, spec, message):
        model = fresh()
        names, state = trained_names(model), list(model.state_dict())
        with pytest.raises(ValueError, match=message):
            add_task(model, name, spec)
        assert trained_names(model) == names and list(model.state_dict()) == state
        assert model.peft_config["default"].tasks == list(TASKS) == model.get_base_model().config.task_names

    def test_no_adapter(self):
        msam = MSamForMultiTask.from_sam(make_sam(), TASKS)
        with pytest.raises(TypeError, match=r"needs a PeftModel.*got MSamForMultiTask"):
            add_task(msam, "edges", EDGES)
        with pytest.raises(TypeError, match="needs a PeftModel"):
            add_task(fresh().merge_and_unload(), "edges", EDGES)

    def test_several_adapters_share_the_tasks(self):
        model = fresh()
        model.add_adapter("other", TALoraConfig(r=2))
        with pytest.raises(ValueError, match="'default', 'other'"):
            add_task(model, "edges", EDGES)
        model.delete_adapter("other")
        add_task(model, "edges", EDGES)

    @pytest.mark.parametrize(
        "options",
        [
            {"target_modules": ["qkv", "q_proj"], "modules_to_save": []},
            {"modules_to_save": ["upscale_conv1"]},
            {"modules_to_save": ["mask_decoders.depth.iou_token"]},
        ],
    )
    def test_adapters_inside_decoders(self, options):
        msam = MSamForMultiTask.from_sam(make_sam(), TASKS)
        model = get_peft_model(msam, TALoraConfig(r=2, init_weights=False, **options))
        with pytest.raises(ValueError, match="parts inside that"):
            add_task(model, "edges", EDGES)

    def test_a_base_that_was_trained(self):
        msam = MSamForMultiTask.from_sam(make_sam(), TASKS)
        msam.mask_decoders["depth"].mask_tokens.weight.data += 1
        model = get_peft_model(msam, TALoraConfig(r=2, init_weights=False))
        with pytest.raises(ValueError, match=r"'mask_decoders\.depth' differs"):
            add_task(model, "edges", EDGES)

    def test_an_adapter_that_is_not_trained(self):
        msam = MSamForMultiTask.from_sam(make_sam(), TASKS)
        with pytest.warns(UserWarning, match="not trained yet"):
            add_task(get_peft_model(msam, TALoraConfig(r=4)), "edges", EDGES)
