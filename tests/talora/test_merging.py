"""The update of one task in the base layer's weight, and out of it again."""

import copy

import pytest
import torch
from peft import get_peft_model
from small_talora import tuned_linear
from torch import nn

from peft_talora import TALoraConfig


class TestMerge:
    @pytest.mark.parametrize("safe_merge", [False, True])
    @pytest.mark.parametrize("enabled", [None, [True, False, True]])
    def test_merge_gives_the_active_task_and_unmerge_the_base(self, safe_merge, enabled):
        model, layer = tuned_linear(enable_qkv=enabled)
        x = torch.randn(4, 10, dtype=torch.float64)
        before = layer.get_base_layer().weight.clone()
        for task in ("c", "a"):
            model.set_task(task)
            expected = model(x)
            model.merge_adapter(safe_merge=safe_merge)
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
            model.unmerge_adapter()
            torch.testing.assert_close(layer.get_base_layer().weight, before, rtol=0, atol=1e-14)

    def test_another_task_while_merged_raises(self):
        model, _ = tuned_linear()
        x = torch.randn(2, 10, dtype=torch.float64)
        model.set_task("b")
        model.merge_adapter()
        model(x, task_ids=["b", "b"])
        with pytest.raises(ValueError, match=r"merged for the task 'b'.*'c'"):
            model(x, task_ids=["b", "c"])
        # compiled code cannot look at the ids before it runs
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, task_ids=torch.tensor([1, 1])), model(x))
        with pytest.raises(RuntimeError, match="merged for the task 'b'"):
            compiled(x, task_ids=torch.tensor([1, 2]))
        model.set_task("a")
        with pytest.raises(ValueError, match=r"merged for the task 'b'.*'a'"):
            model(x)
        # unmerging takes out what was merged, whatever task is active now
        model.unmerge_adapter()
        model.set_task("b")
        model(x)

    def test_safe_merge_refuses_nan_and_leaves_the_weight(self):
        model, layer = tuned_linear()
        before = layer.get_base_layer().weight.clone()
        layer.talora_G["default"].data[0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(layer.get_base_layer().weight, before) and not layer.merged

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_safe_merge_leaves_the_layers_before_the_broken_one(self, merge):
        base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).double()
        config = TALoraConfig(tasks=["a", "b"], r=2, target_modules=["0", "1", "2"], init_weights=False)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        x = torch.randn(2, 4, dtype=torch.float64)
        before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
        expected = model(x)
        model.base_model.model[2].talora_U3["default"].data[0, 0] = float("inf")
        with pytest.raises(ValueError, match="NaNs detected"):
            getattr(model, merge)(safe_merge=True)
        assert [name for name, _ in model.named_modules()] == names
        model.base_model.model[2].talora_U3["default"].data[0, 0] = before["base_model.model.2.talora_U3.default"][
            0, 0
        ]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(x), expected)
        model.set_task("b")  # nothing is merged
        model(x)

    def test_merge_and_unload_returns_plain_linear(self):
        model, _ = tuned_linear()
        x = torch.randn(2, 10, dtype=torch.float64)
        model.set_task("b")
        expected = model(x)
        merged = model.merge_and_unload()
        assert type(merged[0]) is nn.Linear and not merged._forward_pre_hooks
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-12)

    def test_several_adapters_are_added_and_merged_together(self):
        model, layer = tuned_linear()
        config = TALoraConfig(tasks=["b", "c"], target_modules=["0"], r=2, init_weights=False)
        model.add_adapter("second", config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(["default", "second"])
        x = torch.randn(2, 10, dtype=torch.float64)
        model.set_task("c")
        assert model.active_task == {"default": "c", "second": "c"}
        delta = layer.get_delta_weight("default", 2) + layer.get_delta_weight("second", 1)
        expected = layer.get_base_layer()(x) + x @ delta.T
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
        model.unmerge_adapter()
        # "a" is no task of "second": that is an error, not a silent other task
        with model.use_task("a"), pytest.raises(ValueError, match="adapter 'second'"):
            model(x)
