"""A task that is added to a trained adapter: what it is, and that the other tasks do not notice."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import label_maps, make_sam, make_sam2, make_sam3_tracker, make_sam_hq, move_saved_modules
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_talora import (
    ConvLoraConfig,
    MSamForMultiTask,
    MSamProcessor,
    TALoraConfig,
    TALoraLayer,
    TaskSpec,
    add_task,
    default_modules_to_save,
    save_adapter,
    task_to_lora,
    task_to_sam,
)

TASKS = {"semantic": TaskSpec("semantic", num_channels=3), "depth": TaskSpec("depth")}
CONFIGS = {
    "talora": lambda msam: TALoraConfig(r=3, init_weights=False, ortho_reg_weight=0.1),
    "convlora": lambda msam: ConvLoraConfig(r=2, init_weights=False),
    "lora": lambda msam: LoraConfig(
        r=2, target_modules=["qkv"], init_lora_weights=False, modules_to_save=default_modules_to_save(msam)
    ),
}
EDGES = TaskSpec("binary")


def fresh(kind="talora", tasks=TASKS, mode="prompt"):
    """An adapter as training leaves it."""
    msam = MSamForMultiTask.from_sam(make_sam().double(), tasks, channel_mode=mode)
    model = get_peft_model(msam, CONFIGS[kind](msam), autocast_adapter_dtype=False)
    return move_saved_modules(model).eval()


def in_use(*args, **options):
    """The same, frozen as from_adapter has it: torch multiplies weights that require gradients in another order."""
    return fresh(*args, **options).requires_grad_(False)


def pixels(batch=3):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predict(model, **options):
    return model.eval()(pixels(), **options).logits


def assert_equal(got, expected):
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def edge_labels(batch=3):
    labels = torch.ones(batch, 1, 32, 32, dtype=torch.float64)
    labels[..., :4] = 0
    return {"edges": labels}


def train(model, steps=3, **options):
    """The losses of a few steps that decay all they can reach."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(pixels(), labels=edge_labels(), **options).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, TALoraLayer)]


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


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
        model.train()(pixels(), labels=labels).loss.backward()
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

    def test_no_parameter_waits_for_a_gradient(self, tmp_path):
        """DDP complains in the second step of one that the first step left without."""
        model = in_use()
        add_task(model, "edges", EDGES)
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model.train())
            batches = [
                {"labels": edge_labels()},
                {"labels": {}},
                {"labels": edge_labels(), "task_ids": ["depth", "depth", "semantic"]},
                {"labels": edge_labels(), "tasks": ["edges"]},
            ]
            for batch in batches:
                parallel(pixels(), **batch).loss.backward()
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.slow
    def test_it_compiles(self):
        model = in_use()
        add_task(model, "edges", EDGES)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            logits = compiled(pixels(), tasks=["edges"]).logits
        torch.testing.assert_close(logits, predict(model, tasks=["edges"]), rtol=0, atol=1e-9)


class TestFiles:
    @pytest.mark.parametrize("kind, mode", [("talora", "token"), ("convlora", "token"), ("lora", "prompt")])
    def test_round_trip(self, kind, mode, tmp_path):
        save_adapter(fresh(kind, mode=mode), tmp_path / "old")
        model = MSamForMultiTask.from_adapter(tmp_path / "old", base_model=make_sam().double(), dtype=torch.float64)
        before = predict(model)
        add_task(model, "edges", EDGES)
        train(model)
        trained = predict(model)
        assert_equal(trained, before)
        save_adapter(model, tmp_path / "new")
        loaded = MSamForMultiTask.from_adapter(tmp_path / "new", base_model=make_sam().double(), dtype=torch.float64)
        again = predict(loaded)
        assert_equal(again, before)
        torch.testing.assert_close(again["edges"], trained["edges"], rtol=0, atol=1e-9)
        old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("old", "new"))
        old, new = ({k: v for k, v in state.items() if "settings:" not in k} for state in (old, new))
        for name, value in old.items():
            assert torch.equal(new[name][: len(value)], value), name
        grown = {name for name in old if new[name].shape != old[name].shape}
        assert grown == {name for name in old if name.endswith("talora_U3")}
        assert all(".edges." in name for name in new.keys() - old.keys())
        assert not [name for name in new if "own_row" in name]
        # all tasks are trained again
        further = MSamForMultiTask.from_adapter(
            tmp_path / "new", base_model=make_sam().double(), is_trainable=True, dtype=torch.float64
        )
        assert any("layer_norm1" in name for name in trained_names(further))

    def test_bytes_that_it_adds(self, tmp_path):
        model = in_use()
        save_adapter(model, tmp_path / "old")
        add_task(model, "edges", EDGES)
        save_adapter(model, tmp_path / "new")
        size = {
            name: sum(v.nbytes for v in load_file(tmp_path / name / "adapter_model.safetensors").values())
            for name in ("old", "new")
        }
        own = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert size["new"] - size["old"] == own

    def test_states_have_the_row_in_U3_alone(self, tmp_path):
        model = in_use()
        add_task(model, "edges", EDGES)
        start = copy.deepcopy(model.state_dict())
        train(model)
        state = copy.deepcopy(model.state_dict())
        rows = {name: value for name, value in state.items() if "talora_U3" in name}
        assert len(rows) == 3 and not [name for name in state if "own_row" in name]
        for name, value in rows.items():
            assert value.shape == (3, 4) and (value[2] != start[name][2]).all()
        trained = predict(model)
        model.load_state_dict(start)
        assert (predict(model)["edges"] - trained["edges"]).abs().max() > 1e-3
        # what says nothing of it leaves it alone
        train(model)
        expected = predict(model)
        model.load_state_dict(
            {name: v for name, v in model.state_dict().items() if "talora" not in name}, strict=False
        )
        assert_equal(predict(model), expected)
        model.load_state_dict(copy.deepcopy(state), assign=True)
        torch.testing.assert_close(predict(model), trained, rtol=0, atol=1e-9)

    def test_a_checkpoint_is_loaded_over_it(self, tmp_path):
        """As Trainer does that resumes, or keeps the best."""
        model = in_use()
        add_task(model, "edges", EDGES)
        train(model)
        trained, names = predict(model), trained_names(model)
        model.save_pretrained(tmp_path)
        train(model)
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert trained_names(model) == names
        assert_equal(predict(model), trained)
        other = in_use()
        with pytest.raises(ValueError, match="edges"):
            other.load_adapter(tmp_path, "default")

    def test_what_knows_of_it(self, tmp_path):
        model = in_use()
        model.set_task("depth")
        add_task(model, "edges", EDGES)
        assert model.active_task == "depth"
        config = model.peft_config["default"]
        assert config.tasks == ["semantic", "depth", "edges"] and config.added_tasks == 1
        assert model.get_base_model().config.task_names == config.tasks
        assert list(MSamProcessor.from_model(model.get_base_model()).tasks) == config.tasks
        save_adapter(model, tmp_path)
        values = json.loads((tmp_path / "adapter_config.json").read_text())
        assert [task["name"] for task in values["msam"]["tasks"]] == config.tasks
        assert {"mask_decoders.edges", "no_mask_embeds.edges"} <= set(values["modules_to_save"])
        assert "edges" in (tmp_path / "README.md").read_text()

    def test_how_many_were_added(self):
        for wrong in (2, -1, True, "1"):
            with pytest.raises(ValueError, match="`added_tasks` must be"):
                TALoraConfig(tasks=["a", "b"], added_tasks=wrong)


class TestWithTheRest:
    def test_merge_and_exports(self):
        model = in_use()
        before = predict(model)
        add_task(model, "edges", EDGES)
        train(model)
        expected = predict(model)
        for name in ("edges", "depth"):
            sam = task_to_sam(model, name)
            masks = sam(pixels(), multimask_output=False).pred_masks[:, 0]
            torch.testing.assert_close(masks, expected[name], rtol=0, atol=1e-9)
            _, state = task_to_lora(model, name)
            A, B = (
                state[f"base_model.model.vision_encoder.layers.0.attn.qkv.lora_{factor}.weight"] for factor in "AB"
            )
            delta = layers_of(model)[0].get_delta_weight("default", list(expected).index(name))
            torch.testing.assert_close(B @ A, delta, rtol=0, atol=1e-12)
        model.set_task("edges")
        model.merge_adapter()
        torch.testing.assert_close(predict(model, tasks=["edges"])["edges"], expected["edges"], rtol=0, atol=1e-9)
        with pytest.raises(ValueError, match="merged"):
            add_task(model, "more", EDGES)
        model.unmerge_adapter()
        torch.testing.assert_close(predict(model)["depth"], before["depth"], rtol=0, atol=1e-9)
        merged = model.merge_and_unload()
        assert merged.config.task_names == ["edges"] and list(merged.mask_decoders) == ["edges"]
        torch.testing.assert_close(predict(merged)["edges"], expected["edges"], rtol=0, atol=1e-9)

    def test_keep_tasks_after_unload(self):
        model = in_use()
        add_task(model, "edges", EDGES)
        msam = model.unload()
        msam.keep_tasks(["edges", "depth"])
        assert list(predict(msam)) == ["depth", "edges"]

    def test_trainer(self, tmp_path):
        model = in_use()
        before = predict(model)
        add_task(model, "edges", EDGES)
        rows = [{"pixel_values": pixels()[i], "labels": edge_labels()["edges"][i]} for i in range(3)]

        def collate(items):
            stacked = {key: torch.stack([item[key] for item in items]) for key in items[0]}
            return {**stacked, "labels": {"edges": stacked["labels"]}, "tasks": ["edges"]}

        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2, weight_decay=0.1, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        assert_equal(predict(model), before)


class TestOtherModels:
    def tuned(self):
        model = get_peft_model(
            make_sam().double(), TALoraConfig(tasks=["a", "b"], r=3, init_weights=False), autocast_adapter_dtype=False
        )
        return model.eval()

    def encode(self, model, task):
        with torch.no_grad(), model.use_task(task):
            return model.vision_encoder(pixels()).last_hidden_state

    def test_a_row_alone(self, tmp_path):
        model = self.tuned()
        before = {task: self.encode(model, task) for task in ("a", "b")}
        mixed = self.encode(model, ["b", "a", "b"])
        add_task(model, "edges")
        assert {name.rpartition(".talora_")[2] for name in trained_names(model)} == {"own_row.default"}
        start = self.encode(model, "edges")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            with model.use_task("edges"):
                loss = model.vision_encoder(pixels()).last_hidden_state.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_equal({task: self.encode(model, task) for task in before}, before)
        assert torch.equal(self.encode(model, ["b", "a", "b"]), mixed)
        after = self.encode(model, "edges")
        assert (after - start).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_sam().double(), tmp_path, autocast_adapter_dtype=False).eval()
        assert loaded.peft_config["default"].tasks == ["a", "b", "edges"]
        assert torch.equal(self.encode(loaded, "edges"), after) and torch.equal(self.encode(loaded, "a"), before["a"])

    def test_the_active_adapter_gets_it(self):
        model = self.tuned()
        model.add_adapter("other", TALoraConfig(tasks=["a"], r=2, init_weights=False))
        model.set_adapter("other")
        other = self.encode(model, "a")
        model.set_adapter("default")
        expected = self.encode(model, "b")
        add_task(model, "edges")
        assert model.peft_config["other"].tasks == ["a"]
        assert torch.equal(self.encode(model, "b"), expected)
        model.set_adapter("other")
        assert torch.equal(self.encode(model, "a"), other)
        assert all(name.endswith(".other") for name in trained_names(model))
        model.set_adapter("default")
        assert all(name.endswith("own_row.default") for name in trained_names(model))
        model.delete_adapter("default")
        assert not [name for name, _ in model.named_parameters() if "own_row" in name]

    def test_refusals(self):
        model = self.tuned()
        with pytest.raises(ValueError, match="`spec` is for an MSamForMultiTask"):
            add_task(model, "edges", EDGES)
        lora = get_peft_model(make_sam(), LoraConfig(target_modules=["qkv"]))
        with pytest.raises(ValueError, match="knows no tasks"):
            add_task(lora, "edges")
        assert model.peft_config["default"].tasks == ["a", "b"]


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


@pytest.mark.parametrize(
    ("make", "mode"),
    [(make_sam2, "prompt"), (make_sam2, "token"), (make_sam_hq, "prompt"), (make_sam3_tracker, "token")],
)
def test_on_the_other_families(make, mode, tmp_path):
    base = make().double()
    msam = MSamForMultiTask.from_sam(base, TASKS, channel_mode=mode)
    model = get_peft_model(msam, CONFIGS["talora"](msam), autocast_adapter_dtype=False)
    model = move_saved_modules(model).eval().requires_grad_(False)
    images = torch.randn(2, 3, msam.config.image_size, msam.config.image_size, dtype=torch.float64)
    with torch.no_grad():
        before = model(images, tasks=list(TASKS)).logits
    add_task(model, "parts", TaskSpec("parts", num_channels=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.1)
    labels = {"parts": torch.randint(0, 4, (2, 16, 16))}
    losses = []
    for _ in range(3):
        output = model(images, tasks=["parts"], labels=labels)
        assert output.logits["parts"].shape[1] == 4
        losses.append(output.loss.item())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        after = model.eval()(images).logits
    assert all(torch.equal(after[name], before[name]) for name in TASKS)
    save_adapter(model, tmp_path / "adapter")
    loaded = MSamForMultiTask.from_adapter(tmp_path / "adapter", base_model=base, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images).logits, after, rtol=1e-6, atol=1e-6)
