"""A task that is added to an adapter on each of the families of SAMs."""

import pytest
import torch
from peft import get_peft_model
from small_growth import TASKS
from small_models import make_sam2, make_sam3_tracker, make_sam_hq, move_saved_modules

from peft_talora import MSamForMultiTask, TALoraConfig, TaskSpec, add_task, save_adapter


@pytest.mark.parametrize(
    ("make", "mode"),
    [(make_sam2, "prompt"), (make_sam2, "token"), (make_sam_hq, "prompt"), (make_sam3_tracker, "token")],
)
def test_on_the_other_families(make, mode, tmp_path):
    base = make().double()
    msam = MSamForMultiTask.from_sam(base, TASKS, channel_mode=mode)
    model = get_peft_model(msam, TALoraConfig(r=3, init_weights=False), autocast_adapter_dtype=False)
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
