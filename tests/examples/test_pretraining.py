"""How the small SAMs are pretrained."""

import json

import numpy as np
import pretrain as script
import pytest
import torch
from pretraining.evaluation import evaluate
from pretraining.model import BASES, build_model
from pretraining.objective import decode, embed
from pretraining.rooms import normalize
from small_models import make_sam, make_sam2

# of 128 pixels, and nothing else as it is in the real ones
CONFIGS = {
    "tiny_sam": lambda: make_sam(128, patch_size=8).config,
    "tiny_sam2": lambda: make_sam2(128).config,
}
every_base = pytest.mark.parametrize("name", BASES)


def rectangles(scenes=4, side=128):
    """Scenes of a floor and two rectangles in colours of their own, as `load_arrays` gives them."""
    random = np.random.default_rng(0)
    instance = np.ones((scenes, side, side), dtype=np.uint8)
    for scene in instance:
        for number in (2, 3):
            y, x = random.integers(0, side // 2, 2)
            scene[y : y + 40, x : x + 50] = number
    colours = random.integers(0, 256, (16, 3), dtype=np.uint8)
    label = np.tile(np.array([0, 1, 3, 3] + [0] * 12, dtype=np.uint8), (scenes, 1))
    image = colours[instance].transpose(0, 3, 1, 2)
    arrays = {"image": image, "instance": instance, "label": label}
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}


def small_model(name):
    return build_model(BASES[name], CONFIGS[name]())


@pytest.fixture
def small(monkeypatch):
    """Small models and scenes for the script."""
    monkeypatch.setattr(
        script, "build_model", lambda base: small_model(next(n for n, b in BASES.items() if b is base))
    )
    monkeypatch.setattr(script, "load_arrays", lambda split, number, cache_dir: rectangles())


def arguments(name, folder, *more):
    return ["--base", name, "--minutes", "1e-6", "--scenes", "4", "--batch-size", "2", "--prompts", "4", "--no-bf16",
            "--work-dir", str(folder / "work"), "--output", str(folder / "model"), *more]  # fmt: skip


@every_base
def test_a_step(name, tmp_path):
    args = script.parse_args(arguments(name, tmp_path))
    model = small_model(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    average = small_model(name).requires_grad_(False)
    average.load_state_dict(before)
    run = script.Run(model, average, script.build_optimizers(model, args), {"step": 0, "images": 0, "elapsed": 0.0})
    # with points, boxes and ambiguity masks
    losses = [script.train_step(run, rectangles(), 0.5, args) for _ in range(6)]
    assert all(np.isfinite(losses)) and run.state == {"step": 6, "images": 12, "elapsed": 0.0}
    still = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    positions = {key for key in before if key.endswith("positional_embedding")}
    assert positions and positions <= still
    # what else stays was asked for by none of these prompts: masks, the object score, an ambiguity mask that was never best
    asleep = ("mask_embed", "obj_score", "not_a_point_embed", "mlps.1.", "mlps.2.", "mlps.3.")
    assert [key for key in still - positions if not any(part in key for part in asleep)] == []
    assert any(not torch.equal(value, before[key]) for key, value in average.state_dict().items())


@every_base
def test_features_are_those_of_the_model_itself(name):
    model = small_model(name).eval()
    images, prompt = torch.rand(2, 3, 128, 128), {"input_boxes": torch.tensor([[[20.0, 30.0, 90.0, 100.0]]] * 2)}
    with torch.no_grad():
        expected = model(pixel_values=normalize(images), multimask_output=False, **prompt)
        logits, ious = decode(model, embed(model, images), torch.arange(2), prompt)
    torch.testing.assert_close(logits, expected.pred_masks[:, 0])
    torch.testing.assert_close(ious, expected.iou_scores[:, 0])
    assert not torch.allclose(logits[0], logits[1])


def test_prompts_and_image_share_their_positions():
    model = small_model("tiny_sam2")
    assert torch.equal(
        model.prompt_encoder.shared_embedding.positional_embedding, model.shared_image_embedding.positional_embedding
    )


@every_base
@pytest.mark.usefixtures("small")
def test_the_script(name, tmp_path, capsys):
    script.main(arguments(name, tmp_path))
    first = json.loads(capsys.readouterr().out)
    assert first["step"] == 1 and 0 <= first["box"] <= 1
    model = BASES[name].model_class.from_pretrained(tmp_path / "model")
    assert evaluate(model, rectangles())["box"] == first["box"]
    card = (tmp_path / "model/README.md").read_text()
    assert f"| box | {first['box']:.3f} |" in card and "float32 in the encoder" in card and "{" not in card
    assert " --scenes 4 --batch-size 2 --prompts 4 --no-bf16`" in card
    assert (tmp_path / "model/processor_config.json").exists() == (BASES[name].processor is not None)
    script.main(arguments(name, tmp_path, "--evaluate-only"))
    assert json.loads(capsys.readouterr().out)["box"] == first["box"]
