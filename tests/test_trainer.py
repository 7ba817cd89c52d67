"""transformers.Trainer trains an mSAM as it is: no subclass, labels as a dict."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import MAKERS, OTHER_FAMILIES, side_of
from transformers import Trainer, TrainingArguments

from peft_talora import (
    ConvLoraConfig,
    MSamForMultiTask,
    TALoraConfig,
    TaskSpec,
    default_modules_to_save,
    save_adapter,
)
from peft_talora.data import collate

TASKS = {"semantic": TaskSpec("semantic", num_channels=3), "depth": TaskSpec("depth"), "saliency": TaskSpec("binary")}


class Rows(torch.utils.data.Dataset):
    """Images whose labels follow from their pixels; every second one has no depth."""

    def __init__(self, side=32):
        self.side = side

    def __len__(self):
        return 6

    def __getitem__(self, index):
        pixels = torch.randn(3, self.side, self.side, generator=torch.Generator().manual_seed(index))
        brightness = pixels.mean(0)
        labels = {
            "semantic": torch.bucketize(brightness, torch.tensor([-0.3, 0.3])),
            "depth": brightness[None].exp() if index % 2 else torch.zeros(1, self.side, self.side),
            "saliency": (brightness > 0).float()[None],
        }
        return {"pixel_values": pixels.double(), "labels": labels}


def tuned(sam, method):
    msam = MSamForMultiTask.from_sam(sam.double(), TASKS)
    modules = default_modules_to_save(msam)
    configs = {
        "talora": TALoraConfig(r=2),
        "convlora": ConvLoraConfig(),
        "lora": LoraConfig(r=2, target_modules=["qkv"], modules_to_save=modules),
    }
    return get_peft_model(msam, configs[method], autocast_adapter_dtype=False)


def make_trainer(model, directory, side=32, **changes):
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=0,
        **{"max_steps": 9, **changes},
    )
    return Trainer(model, arguments, data_collator=collate, train_dataset=Rows(side), eval_dataset=Rows(side))


@pytest.mark.parametrize("method", ["talora", "convlora", "lora"])
def test_it_trains_and_evaluates(sam, tmp_path, method):
    model = tuned(sam, method)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = make_trainer(model, tmp_path)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.95 * before
    with torch.no_grad():  # the mean over the batches of 4 and 2 images, weighted by their size
        model.eval()
        batches = [collate([Rows()[i] for i in rows]) for rows in (range(4), range(4, 6))]
        losses = [model(**batch).loss.item() for batch in batches]
    assert after == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6, rel=1e-4)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_the_other_families(family, tmp_path):
    trainer = make_trainer(tuned(MAKERS[family](), "talora"), tmp_path, side_of(family))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.95 * before


def test_what_it_saves_loads(sam, tmp_path):
    model = tuned(sam, "talora")
    trainer = make_trainer(model, tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "by_trainer")
    save_adapter(model, tmp_path / "by_us")
    batch, model = collate([Rows()[0]]), model.eval()
    expected = model(**batch).logits
    for name in ("by_trainer", "by_us"):
        loaded = MSamForMultiTask.from_adapter(tmp_path / name, base_model=sam).eval()
        logits = loaded(**batch).logits
        for task in TASKS:
            torch.testing.assert_close(logits[task], expected[task], rtol=0, atol=1e-6, msg=f"{name}: {task}")


def test_gradient_checkpointing_gives_the_same_losses(sam, tmp_path):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    losses = []
    for changes in ({}, checkpointing):
        trainer = make_trainer(tuned(sam, "talora"), tmp_path, max_steps=3, **changes)
        trainer.train()
        losses.append([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3
