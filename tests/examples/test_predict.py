"""The prediction script, on a tiny SAM with adapters whose decoders were moved at random."""

import numpy as np
import predict as script
import pytest
import torch
from PIL import Image
from small_adapters import make_adapter

import peft_talora as pt

SEMANTIC = {"semantic": pt.TaskSpec("semantic", 3, class_names=["floor", "wall", "chair"])}
TASKS = {
    **SEMANTIC,
    "depth": pt.TaskSpec("depth"),
    "normals": pt.TaskSpec("normals"),
    "saliency": pt.TaskSpec("binary"),
}


@pytest.fixture
def adapter(base, tmp_path):
    return make_adapter(base, tmp_path / "first", TASKS)


def picture(height=20, width=28, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(picture()).save(path)
    return path


@pytest.fixture
def no_sheets(monkeypatch):
    """Sheets are slow to draw."""
    monkeypatch.setattr(script, "save_sheet", lambda rows, specs, path, ranges=None: path.write_bytes(b""))


def arrays(folder):
    return {file.stem: np.load(file)[file.stem] for file in folder.glob("*.npz")}


def test_arrays_are_the_models_own_predictions(adapter, photo, tmp_path):
    output = tmp_path / "out"
    assert script.main([str(photo), "--adapter", adapter, "--output-dir", str(output), "--device", "cpu"]) == 0
    model = pt.MSamForMultiTask.from_adapter(adapter).eval()
    with torch.no_grad():
        batch = pt.MSamProcessor.from_model(model)(picture())
        expected = model.get_base_model().post_process(model(batch["pixel_values"]), [(20, 28)])[0]
    found = arrays(output / "photo")
    assert set(found) == set(TASKS)
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name].numpy(), atol=1e-5, err_msg=name)
    assert {name: (values.dtype.name, values.shape) for name, values in found.items()} == {
        "semantic": ("uint8", (20, 28)),
        "depth": ("float32", (20, 28)),
        "normals": ("float32", (3, 20, 28)),
        "saliency": ("float32", (20, 28)),
    }
    names = {f"{task}{end}" for task in TASKS for end in (".png", "_overlay.png", ".npz")} | {"overview.png"}
    assert {path.name for path in (output / "photo").iterdir()} == names
    colours = np.array(Image.open(output / "photo/semantic.png"))
    assert (colours == script.draw(TASKS["semantic"], found["semantic"])).all()
    shown = np.array(Image.open(output / "photo/semantic_overlay.png"))
    assert np.abs(shown - (picture() / 2 + colours / 2)).max() <= 0.5
    assert Image.open(output / "contact_sheet.png").size[0] > 1000


@pytest.mark.usefixtures("no_sheets")
class TestRuns:
    def test_a_batch_gives_what_single_pictures_give(self, adapter, tmp_path):
        folder = tmp_path / "pictures"
        for index, size in enumerate([(20, 28), (31, 17), (12, 12)]):
            (folder / "deep").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(*size, seed=index)).save(folder / ("deep" if index else ".") / f"p{index}.png")
        outputs = [tmp_path / "one", tmp_path / "three"]
        for output, size in zip(outputs, ("1", "3"), strict=True):
            command = [str(folder), "--adapter", adapter, "--output-dir", str(output), "--batch-size", size]
            assert script.main([*command, "--tasks", "depth", "semantic"]) == 0
        for name in ("p0", "deep/p1", "deep/p2"):
            first, second = (arrays(output / name) for output in outputs)
            assert set(first) == {"depth", "semantic"}
            np.testing.assert_allclose(first["depth"], second["depth"], atol=1e-5)
            assert (first["semantic"] == second["semantic"]).mean() > 0.99

    def test_several_adapters_on_a_base_that_is_read_once(self, adapter, base, photo, tmp_path, monkeypatch):
        other = make_adapter(base, tmp_path / "second", {"edges": pt.TaskSpec("binary")})
        script.load_base.cache_clear()
        reads = []
        monkeypatch.setattr(script, "load_sam", lambda name: reads.append(name) or pt.msam.loading.load_sam(name))
        output = tmp_path / "out"
        command = [str(photo), "--adapter", adapter, "--adapter", f"mine={other}", "--output-dir", str(output)]
        assert script.main(command) == 0
        assert reads == [base]
        assert set(arrays(output / "first/photo")) == set(TASKS) and set(arrays(output / "mine/photo")) == {"edges"}
        assert (output / "mine/contact_sheet.png").exists()

    def test_unreadable_pictures_are_named_and_skipped(self, adapter, photo, tmp_path, capsys):
        broken, output = tmp_path / "broken.jpg", tmp_path / "out"
        broken.write_bytes(photo.read_bytes()[:100])
        Image.fromarray(np.zeros((1, 900, 3), np.uint8)).save(tmp_path / "thin.png")
        pictures = [broken, photo, tmp_path / "gone.png", tmp_path / "thin.png"]
        assert script.main([*map(str, pictures), "--adapter", adapter, "--output-dir", str(output)]) == 1
        shown = capsys.readouterr()
        assert str(broken) in shown.err and "gone.png" in shown.err and "thin.png: an image of 1 x 900" in shown.err
        assert shown.out == f"1 of 4 pictures are in {output}, see contact_sheet.png\n"
        assert {path.name for path in output.iterdir()} == {"photo", "contact_sheet.png"}

    def test_without_a_readable_picture_no_sheet_is_spoken_of(self, adapter, tmp_path, capsys):
        broken, output = tmp_path / "broken.jpg", tmp_path / "out"
        broken.write_bytes(b"no picture")
        assert script.main([str(broken), "--adapter", adapter, "--output-dir", str(output)]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and not output.exists()
        assert shown.err.rstrip().endswith("error: no picture could be read, so that nothing was written")

    def test_its_own_output_is_no_input(self, adapter, photo, tmp_path):
        command = [
            str(photo.parent),
            "--adapter",
            adapter,
            "--output-dir",
            str(photo.parent / "out"),
            "--tasks",
            "depth",
        ]
        assert script.main(command) == script.main(command) == 0
        assert {path.name for path in (photo.parent / "out").iterdir()} == {"photo", "contact_sheet.png"}

    def test_a_killed_run_leaves_no_part_of_a_picture(self, adapter, photo, tmp_path, monkeypatch):
        def killed(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(np, "savez_compressed", killed)
        with pytest.raises(KeyboardInterrupt):
            script.main([str(photo), "--adapter", adapter, "--output-dir", str(tmp_path / "out")])
        assert not (tmp_path / "out/photo").exists()


def test_wrong_arguments(adapter, photo, tmp_path, capsys):
    def message(*arguments):
        try:
            code = script.main([*map(str, arguments), "--output-dir", str(tmp_path / "out")])
        except SystemExit as end:
            code = end.code
        assert code == 2
        return capsys.readouterr().err

    unknown = message(photo, "--adapter", adapter, "--tasks", "depth", "flow")
    assert "no adapter has ['flow'], only ['semantic', 'depth', 'normals', 'saliency']" in unknown
    assert "there is no folder" in message(photo, "--adapter", tmp_path / "nothing")
    assert "there is no picture" in message(tmp_path / "first", "--adapter", adapter)
    assert "--batch-size must be at least 1, got 0" in message(photo, "--batch-size", 0)
    assert "both called 'first'" in message(photo, "--adapter", adapter, "--adapter", adapter)
    assert "--device" in message(photo, "--device", "abacus")
    assert not (tmp_path / "out").exists()


def test_pictures_of_one_name_get_folders_of_their_own(tmp_path):
    files = [
        tmp_path / "a/x.png",
        tmp_path / "b/x.png",
        tmp_path / "b/x.jpg",
        tmp_path / "b/y.JPG",
        tmp_path / "b/y.txt",
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    found = script.find_pictures([files[0], tmp_path / "b", files[0]], tmp_path / "out")
    assert found == {"x": files[0], "x-2": files[2], "x-3": files[1], "y": files[3]}


def test_a_mask_is_painted_where_it_is():
    spec, image = pt.TaskSpec("binary"), picture(2, 2)
    values = np.array([[0.0, 1.0], [0.0, 0.0]], dtype=np.float32)
    shown = script.overlay(spec, image, values, np.zeros_like(image))
    assert (shown[1] == image[1]).all() and (shown[0, 0] == image[0, 0]).all()
    np.testing.assert_allclose(shown[0, 1], 0.35 * image[0, 1] + 0.65 * script.MASK_COLOR, atol=0.51)
