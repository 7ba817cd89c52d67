"""What has a task that was added: files, other tools, and models that are no mSAM."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_growth import (
    EDGES,
    assert_equal,
    edge_labels,
    fresh,
    in_use,
    layers_of,
    predict,
    train,
    trained_names,
)
from small_models import images, make_sam
from transformers import Trainer, TrainingArguments

from peft_talora import (
    MSamForMultiTask,
    MSamProcessor,
    TALoraConfig,
    add_task,
    save_adapter,
    task_to_lora,
    task_to_sam,
)


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
            masks = sam(images(3), multimask_output=False).pred_masks[:, 0]
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
        rows = [{"pixel_values": images(3)[i], "labels": edge_labels()["edges"][i]} for i in range(3)]

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
            return model.vision_encoder(images(3)).last_hidden_state

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
                loss = model.vision_encoder(images(3)).last_hidden_state.square().mean()
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
