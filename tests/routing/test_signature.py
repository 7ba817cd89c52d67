"""transformers' Trainer keeps a column task_ids, which it would drop in silence."""

import copy
import inspect
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import SamModel, Trainer, TrainingArguments

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x, scale=1.0, **others):
        return self.lin(x) * scale


def tuned(model, **changes):
    return get_peft_model(model, TALoraConfig(tasks=["a", "b"], r=2, init_weights=False, **changes))


class SquareTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = model(**inputs, multimask_output=False).pred_masks.square().mean()
        return (loss, None) if return_outputs else loss


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_trainer_trains_the_task_of_every_row(sam, tmp_path, remove_unused_columns):
    model = tuned(sam)
    factors = [parameter for name, parameter in model.named_parameters() if "talora_U3" in name]
    before = [factor.detach().clone() for factor in factors]
    pixels, points = torch.randn(4, 3, 32, 32), 32 * torch.rand(4, 1, 1, 2)
    rows = [{"pixel_values": pixels[i], "input_points": points[i], "task_ids": i % 2, "name": "x"} for i in range(4)]
    if not remove_unused_columns:
        rows = [{key: value for key, value in row.items() if key != "name"} for row in rows]
    arguments = TrainingArguments(tmp_path, max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[],
                                  save_strategy="no", disable_tqdm=True,
                                  remove_unused_columns=remove_unused_columns)  # fmt: skip
    SquareTrainer(model, arguments, train_dataset=rows).train()
    moved = [
        [(old[task] - new[task]).abs().max() > 0 for task in (0, 1)] for old, new in zip(before, factors, strict=True)
    ]
    assert torch.tensor(moved).all()


class TestSignature:
    def test_has_one_more_parameter(self):
        model = tuned(Net(), target_modules=["lin"]).get_base_model()
        assert list(inspect.signature(model.forward).parameters) == ["x", "scale", "task_ids", "others"]
        assert isinstance(model, Net) and type(model).__name__ == "Net" and repr(model).startswith("Net(")

    def test_the_model_is_what_it_was_without_the_adapter(self, sam):
        assert type(tuned(sam).unload()) is SamModel
        model = tuned(sam)
        model.add_adapter("second", TALoraConfig(tasks=["c"], r=2))
        assert type(model.merge_and_unload()) is SamModel

    def test_one_that_names_task_ids_is_left_alone(self, sam):
        msam = MSamForMultiTask.from_sam(sam, {"depth": TaskSpec("depth")})
        assert type(get_peft_model(msam, TALoraConfig(r=2)).get_base_model()) is MSamForMultiTask

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, duplicate):
        model, x = tuned(Net(), target_modules=["lin"]).eval(), torch.randn(2, 4)
        other = duplicate(model)
        with torch.no_grad():
            other.get_base_model().lin.base_layer.bias += 1
        torch.testing.assert_close(other(x, task_ids=[1, 0]), model(x, task_ids=[1, 0]) + 1)
        assert "task_ids" in inspect.signature(other.get_base_model().forward).parameters
        assert type(other.unload()) is Net

    def test_saved_and_loaded(self, sam_factory, tmp_path):
        tuned(sam_factory()).save_pretrained(tmp_path)
        mapping = PeftModel.from_pretrained(sam_factory(), tmp_path).peft_config["default"].auto_mapping
        assert mapping == {"base_model_class": "SamModel", "parent_library": "transformers.models.sam.modeling_sam"}

    def test_compiled(self):
        model, x = tuned(Net(), target_modules=["lin"]).eval(), torch.randn(2, 4)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, task_ids=torch.tensor([1, 0])), model(x, task_ids=[1, 0]))
