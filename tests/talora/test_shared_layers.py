"""Layers whose update all tasks share: `TALoraConfig.shared_layers`."""

import copy
import json

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from small_growth import EDGES, edge_labels, layers_of
from small_models import MAKERS, assert_same, differ, images, label_maps, make_sam, move_saved_modules, side_of
from small_talora import factors_of, gradients, reference_delta
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_talora import (
    MSamForMultiTask,
    TALoraConfig,
    TALoraLayer,
    TaskSpec,
    add_task,
    save_adapter,
    task_to_lora,
)

NAMES = ["a", "b", "c"]
TASKS = {"semantic": TaskSpec("semantic", num_channels=3), "depth": TaskSpec("depth"), "normals": TaskSpec("normals")}


def tuned(model, autocast_adapter_dtype=False, **config):
    arguments = {
        "tasks": NAMES,
        "r_in": 4,
        "r_out": 3,
        "r_task": 2,
        "init_weights": False,
        "shared_layers": [0],
        **config,
    }
    return get_peft_model(model, TALoraConfig(**arguments), autocast_adapter_dtype=autocast_adapter_dtype)


def two_linears(**config):
    return tuned(
        nn.Sequential(*(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))).double(),
        target_modules=["0.0", "1.0"],
        **config,
    )


def tuned_msam(sam=None, **config):
    msam = MSamForMultiTask.from_sam((make_sam() if sam is None else sam).double(), TASKS)
    return move_saved_modules(tuned(msam, tasks=None, **config)).eval()


def update(layer, task):
    """dW_t entry by entry; the row of U3 is the one that there is in a shared layer."""
    return reference_delta(layer, task if len(layer.talora_U3["default"]) > 1 else 0)


class TestLayer:
    @pytest.mark.parametrize("request_, tasks", [("c", [2] * 4), ([2, 0, 1, 1], [2, 0, 1, 1])])
    def test_values_and_gradients_match_the_formula(self, request_, tasks):
        model = two_linears()
        first, second = layers_of(model)
        assert [tuple(f.shape) for f in factors_of(first)] == [(4, 3, 1), (6, 4), (6, 3), (1, 1)]
        assert [tuple(f.shape) for f in factors_of(second)] == [(4, 3, 2), (6, 4), (6, 3), (3, 2)]
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        expected = torch.stack(
            [
                (row @ (first.base_layer.weight + update(first, t)).T + first.base_layer.bias)
                @ (second.base_layer.weight + update(second, t)).T
                + second.base_layer.bias
                for row, t in zip(x, tasks, strict=True)
            ]
        )
        with model.use_task(request_):
            output = model(x)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        inputs, cotangent = [x, *factors_of(first), *factors_of(second)], torch.randn_like(output)
        for got, want in zip(
            gradients(output, cotangent, inputs), gradients(expected, cotangent, inputs), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        assert not first.is_task_aware and second.is_task_aware

    @pytest.mark.parametrize("start", [True, "split", "half", "lora", "orthogonal", "normalized"])
    def test_starts_as_one_lora(self, start):
        first = layers_of(two_linears(init_weights=start, r_in=4, r_out=4))[0]
        G, U1, U2, U3 = factors_of(first)
        assert torch.equal(update(first, 0), torch.zeros(6, 6, dtype=torch.float64))
        if start in ("split", "half", "lora"):
            assert torch.equal(G[:, :, 0] * U3[0, 0], torch.eye(4, dtype=torch.float64))
            assert U1.any() and not U2.any()

    def test_dropout_ortho_and_two_adapters(self):
        model = two_linears(ortho_reg_weight=1.0)
        assert layers_of(model)[0].auxiliary_values("default").shape == (3,)
        assert layers_of(model)[1].auxiliary_values("default").shape == (4,)
        other = TALoraConfig(tasks=NAMES, r=2, target_modules=["0.0", "1.0"], init_weights=False, shared_layers=1)
        model.add_adapter("other", other)
        x, layers = torch.randn(2, 6, dtype=torch.float64), layers_of(model)
        assert [layer.is_shared for layer in layers] == [
            {"default": True, "other": False},
            {"default": False, "other": True},
        ]
        for name, aware in (("default", [False, True]), ("other", [True, False])):
            model.set_adapter(name)
            assert [layer.is_task_aware for layer in layers] == aware
            assert differ(model(x, task_ids=["a", "a"]), model(x, task_ids=["b", "b"]))
        model.delete_adapter("other")
        assert [layer.is_shared for layer in layers] == [{"default": True}, {"default": False}]

    def test_a_checkpoint_written_by_hand_needs_no_tasks(self):
        model = two_linears()
        first, x = layers_of(model)[0], torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        with model.use_task(["a", "c"]):
            output = checkpoint(first, x, use_reentrant=False)
        (got,) = torch.autograd.grad(output.sum(), x)
        (want,) = torch.autograd.grad(first(x).sum(), x)
        torch.testing.assert_close(got, want)

    def test_compiles_to_one_graph(self):
        model, x = two_linears(), torch.randn(2, 6, dtype=torch.float64)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for ids in ([0, 1], [2, 0]):
            ids = torch.tensor(ids)
            torch.testing.assert_close(compiled(x, task_ids=ids), model(x, task_ids=ids))


class TestMerging:
    def test_merge_unmerge_and_unload(self):
        model, x = two_linears(), torch.randn(3, 6, dtype=torch.float64)
        model.set_task("b")
        expected, weights = model(x), [layer.base_layer.weight.clone() for layer in layers_of(model)]
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="merged for the task 'b'"):
            model(x, task_ids=["a", "b", "b"])
        model.set_task("c")
        model.unmerge_adapter()
        for layer, weight in zip(layers_of(model), weights, strict=True):
            torch.testing.assert_close(layer.base_layer.weight, weight, rtol=0, atol=1e-12)
        model.set_task("b")
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=0, atol=1e-12)

    def test_a_refused_merge_changes_nothing(self):
        model = two_linears()
        other = TALoraConfig(tasks=NAMES, r=2, target_modules=["0.0", "1.0"], init_weights=False, shared_layers=[0])
        model.add_adapter("other", other)
        before = copy.deepcopy(model.state_dict())
        with model.use_task(["a", "b"]), pytest.raises(ValueError, match="Only one task can be merged"):
            model.merge_adapter()
        assert not any(layer.merged for layer in layers_of(model))
        model.set_task("b")
        model.merge_adapter()
        model.set_task("c")
        with pytest.raises(ValueError, match="merged for the task 'b' already"):
            model.merge_adapter(["default", "other"])
        assert all(layer.merged_adapters == ["default"] for layer in layers_of(model))
        model.unmerge_adapter()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-12)

    def test_where_all_layers_are_shared_no_task_is_merged(self):
        model, x = two_linears(shared_layers=range(2)), torch.randn(3, 6, dtype=torch.float64)
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x, task_ids=["a", "b", "c"]), expected, rtol=0, atol=1e-12)

    def test_an_msam_with_all_layers_shared_keeps_all_tasks(self):
        model = tuned_msam(shared_layers=[0, 1, 2])
        expected = model(images()).logits
        merged = model.merge_and_unload()
        assert list(merged.task_specs) == list(TASKS)
        assert_same(merged(images()).logits, expected)
        one = tuned_msam()
        one.set_task("depth")
        assert list(one.merge_and_unload().task_specs) == ["depth"]

    def test_stock_lora_of_each_task(self):
        model = tuned(make_sam().double())
        for task in NAMES:
            model.set_task(task)
            expected = model.vision_encoder(images()).last_hidden_state
            config, state = task_to_lora(model, task)
            plain = get_peft_model(make_sam().double(), config, autocast_adapter_dtype=False).eval()
            set_peft_model_state_dict(plain, state)
            torch.testing.assert_close(plain.vision_encoder(images()).last_hidden_state, expected, rtol=0, atol=1e-10)

    def test_peft_converts_what_has_one_update(self):
        model, x = two_linears(shared_layers=[0, 1]), torch.randn(3, 6, dtype=torch.float64)
        config, state = convert_to_lora(model, rank=3)
        plain = get_peft_model(copy.deepcopy(model).unload(), config, autocast_adapter_dtype=False)
        set_peft_model_state_dict(plain, state)
        with plain.disable_adapter():
            assert differ(plain(x), model(x))
        # its singular values are float32
        torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-6)
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(two_linears(), rank=3)


class TestMSam:
    @pytest.mark.parametrize("family", MAKERS)
    def test_what_is_shared_runs_once_and_gives_what_each_task_alone_gives(self, family):
        pixels = images(size=side_of(family))
        model = tuned_msam(MAKERS[family](), shared_layers=[0, 1])
        rows, layers = [], layers_of(model)
        for layer in layers:
            layer.register_forward_hook(lambda layer, args, _: rows.append((layer.is_shared["default"], len(args[0]))))
        together = model(pixels).logits
        seen = {shared: [number for was_shared, number in rows if was_shared is shared] for shared in (True, False)}
        assert len(seen[True]) + len(seen[False]) == len(layers) and seen[True] and seen[False]
        rows.clear()
        apart = {name: model(pixels, tasks=[name]).logits[name] for name in TASKS}
        alone = {shared: [number for was_shared, number in rows if was_shared is shared] for shared in (True, False)}
        assert seen[True] * 3 == alone[True]
        assert [3 * number for number in alone[False][: len(seen[False])]] == seen[False]
        assert_same(together, apart)
        ids = torch.tensor([1, 2])
        mixed = model(pixels, task_ids=ids).logits
        torch.testing.assert_close(mixed["depth"][0], apart["depth"][0], rtol=0, atol=1e-9)
        encoded = model.encode(pixels)
        assert differ(
            *(value if isinstance(value, torch.Tensor) else value[-1] for value in list(encoded.values())[:2])
        )

    def test_gradients_are_those_of_the_tasks_apart(self):
        model, labels = tuned_msam(), label_maps()
        model(images(), labels=labels).loss.backward()
        together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        for name in TASKS:
            model(images(), tasks=[name], labels=labels).loss.backward()
        assert_same(together, {name: p.grad for name, p in model.named_parameters() if name in together})
        assert any("layers.0.attn.qkv.talora_U3" in name for name in together)

    def test_a_new_task_has_a_row_where_tasks_are_told_apart(self):
        model = tuned_msam().requires_grad_(False)
        with torch.no_grad():
            before = model(images()).logits
        add_task(model, "edges", EDGES)
        first, *others = layers_of(model)
        assert first.talora_U3["default"].shape == (1, 1) and not first.talora_own_row
        assert all(layer.talora_U3["default"].shape == (4, 2) for layer in others)
        rows = {name for name, p in model.named_parameters() if p.requires_grad and "talora" in name}
        assert len(rows) == 2 and all("talora_own_row" in name for name in rows)
        model.train()(images(3), labels=edge_labels()).loss.backward()
        assert all(layer.talora_own_row["default"].grad.any() for layer in others)
        with torch.no_grad():
            after = model.eval()(images()).logits
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_no_new_task_where_nothing_would_be_its_own(self):
        model = two_linears(shared_layers=[0, 1])
        with pytest.raises(
            ValueError, match=r"All layers of the adapter 'default' have one update .* 'd' would be the same"
        ):
            add_task(model, "d")
        assert model.peft_config["default"].tasks == NAMES
        msam = tuned_msam(shared_layers=[0, 1, 2])
        add_task(msam, "edges", EDGES)
        assert {
            name.split(".edges")[0].rpartition(".")[2] for name, p in msam.named_parameters() if p.requires_grad
        } == {
            "mask_decoders",
            "no_mask_embeds",
        }


class TestFiles:
    def test_round_trip(self, tmp_path):
        model = tuned_msam(shared_layers=[1, 0, 0])
        add_task(model, "edges", EDGES)
        expected = model(images()).logits
        save_adapter(model, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["shared_layers"] == [0, 1]
        again = MSamForMultiTask.from_adapter(tmp_path, base_model=make_sam().double(), dtype=torch.float64)
        assert_same(again(images()).logits, expected)

    def test_of_a_bare_sam(self, tmp_path):
        model = tuned(make_sam().double())
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make_sam().double(), tmp_path, autocast_adapter_dtype=False)
        for task in NAMES:
            for one in (model, again):
                one.set_task(task)
            outputs = [one.vision_encoder(images()).last_hidden_state for one in (model, again)]
            torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("other", [None, [1], [0, 1]])
    def test_another_choice_is_refused_in_words(self, other):
        state = get_peft_model_state_dict(tuned(make_sam().double()))
        model = tuned(make_sam().double(), shared_layers=other)
        with pytest.raises(ValueError, match=r"saved with shared_layers=\[0\], .* has shared_layers="):
            set_peft_model_state_dict(model, state)

    def test_an_edited_configuration_is_refused(self, tmp_path):
        tuned(make_sam().double()).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        values = json.loads(file.read_text())
        for wrong in (None, [0, 1], [1]):
            file.write_text(json.dumps({**values, "shared_layers": wrong}))
            with pytest.raises(ValueError, match=r"layers\.[01]\.attn\.qkv\.talora_G' has another shape .* expected"):
                TALoraConfig.from_pretrained(tmp_path)


class TestValidation:
    @pytest.mark.parametrize("wrong", ["0", [0, "1"], -1, [True], 1.5, [[0]], {"a": 1}])
    def test_no_indices(self, wrong):
        with pytest.raises(ValueError, match="`shared_layers` must be indices of layers, 0 or more, got "):
            TALoraConfig(shared_layers=wrong)

    @pytest.mark.parametrize(
        ("given", "kept"), [(None, None), ([], None), (2, [2]), ((3, 1, 3), [1, 3]), (range(2), [0, 1])]
    )
    def test_indices(self, given, kept):
        config = TALoraConfig(shared_layers=given)
        assert config.shared_layers == kept and copy.deepcopy(config) == config

    def test_layers_without_an_adapter(self):
        assert TALoraConfig(shared_layers=1, layers_to_transform=1).shared_layers == [1]
        with pytest.raises(ValueError, match=r"`layers_to_transform` \[1, 2\], but \[0\] are not"):
            TALoraConfig(shared_layers=[0, 1], layers_to_transform=[1, 2])

    def test_layers_that_the_model_does_not_have(self):
        sam = make_sam()
        with pytest.raises(
            ValueError, match=r"layers of the SamModel that are adapted, but \[3, 11\] are not: those are \[0, 1, 2\]"
        ):
            tuned(sam, shared_layers=[2, 3, 11])
        assert not layers_of(sam)
        with pytest.raises(ValueError, match="those are in no list of layers"):
            tuned(nn.ModuleDict({"qkv": nn.Linear(4, 4)}), target_modules=["qkv"])

    def test_all_linear_layers(self):
        model = tuned(make_sam().double(), target_modules="all-linear", shared_layers=[0, 2])
        shared = {n for n, m in model.named_modules() if isinstance(m, TALoraLayer) and m.is_shared["default"]}
        in_encoder = {name.split("vision_encoder.")[1] for name in shared if "vision_encoder.layers" in name}
        parts = ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
        assert in_encoder == {f"layers.{index}.{part}" for index in (0, 2) for part in parts}

    def test_layers_that_are_excluded(self):
        for targets in ("all-linear", "All-Linear", ["qkv"]):
            with pytest.raises(ValueError, match=r"but \[1\] are not: those are \[0, 2\]"):
                tuned(
                    make_sam(),
                    target_modules=targets,
                    exclude_modules=r"(.*layers\.1\.|mask_decoder|prompt_encoder|shared).*",
                    shared_layers=[1],
                )

    @pytest.mark.filterwarnings("error")
    def test_a_start_that_no_layer_has_is_no_warning(self):
        two_linears(init_weights="split", r_task=1, shared_layers=[0, 1])

    def test_no_choice_of_layers(self):
        assert TALoraConfig(layers_to_transform=[], shared_layers=[0]).shared_layers == [0]

    def test_an_index_that_is_set_later(self):
        config = TALoraConfig()
        config.shared_layers = 0
        assert config.settings()["shared_layers"] == [0] and config.shares("layers.0.attn.qkv")

    def test_the_indices_are_those_of_layers_to_transform(self):
        wrapped = nn.Sequential(make_sam().vision_encoder, nn.Identity())
        for encoder in (
            make_sam().vision_encoder,
            make_sam(),
            wrapped,
            nn.ModuleDict({"models": nn.ModuleList([make_sam().vision_encoder])}),
        ):
            model = tuned(encoder.double(), target_modules=["qkv"], layers_to_transform=[1, 2], shared_layers=[1])
            shared = {
                name.split("layers.")[1][0]: m.is_shared["default"]
                for name, m in model.named_modules()
                if isinstance(m, TALoraLayer)
            }
            assert shared == {"1": True, "2": False}
