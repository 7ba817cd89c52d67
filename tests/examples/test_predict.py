"""The prediction script, on a tiny SAM with adapters whose decoders were moved at random."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import predict as script
import pytest
import tiles
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

        monkeypatch.setattr(script, "save_numbers", killed)
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
    assert "nowhere' does not exist" in message(photo, "--adapter", adapter, "--base", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_sheets")
def test_a_base_that_was_moved(base, photo, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "sam")
    adapter = make_adapter(str(tmp_path / "sam"), tmp_path / "first", TASKS)
    (tmp_path / "sam").rename(tmp_path / "moved")
    script.load_base.cache_clear()
    command = [str(photo), "--adapter", adapter, "--output-dir", str(tmp_path / "out"), "--tasks", "depth"]
    assert script.main(command) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'sam'}' does not exist" in told and "say with --base where it is now" in told
    assert script.main([*command, "--base", str(tmp_path / "moved")]) == 0
    assert (Path(script.parse_args(["x", "--base", "tiny_sam"]).base) / "model.safetensors").is_file()


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


@pytest.mark.usefixtures("no_sheets")
class TestNamesAndFiles:
    def test_a_dollar_is_one(self, base, tmp_path, monkeypatch):
        monkeypatch.undo()  # the sheets are what is drawn here
        tasks = {"semantic": pt.TaskSpec("semantic", 3, class_names=["$x_{", "_wall", "\\frac"])}
        adapter = make_adapter(base, tmp_path / "first", tasks)
        path = tmp_path / "cost $5_{.png"
        Image.fromarray(picture()).save(path)
        output = tmp_path / "out"
        assert script.main([str(path), "--adapter", adapter, "--output-dir", str(output)]) == 0
        assert Image.open(output / path.stem / "overview.png").size[0] > 500
        assert Image.open(output / "contact_sheet.png").size[0] > 500

    def test_tasks_that_are_called_as_other_files(self, base, photo, tmp_path):
        names = ["overview", "depth", "depth_overlay", "file", "allow_pickle"]
        adapter = make_adapter(base, tmp_path / "first", {name: pt.TaskSpec("depth") for name in names})
        output = tmp_path / "out"
        assert script.main([str(photo), "--adapter", adapter, "--output-dir", str(output)]) == 0
        found = arrays(output / "photo")
        assert set(found) == set(names) and len(list((output / "photo").glob("*.png"))) == 2 * len(names) + 1
        for name, values in found.items():
            colours = np.array(Image.open(output / "photo" / f"{name}.png"))
            assert (
                colours
                == script.draw(pt.TaskSpec("depth"), values, script.color_range(pt.TaskSpec("depth"), [values]))
            ).all()

    @pytest.mark.parametrize("tasks", [["depth", "Depth"], ["a_overlay", "a"], ["overview", "overview_overlay"]])
    def test_no_two_files_share_a_name(self, tasks):
        names = script.OutputFiles(tasks).all()
        assert len({name.lower() for name in names}) == len(names) == 3 * len(tasks) + 1

    def test_one_failing_picture_does_not_take_the_others(self, adapter, tmp_path, monkeypatch, capsys):
        for index in range(4):
            Image.fromarray(picture(seed=index)).save(tmp_path / f"p{index}.png")
        forward, draw = pt.MSamForMultiTask.forward, script.draw
        bad = pt.MSamProcessor(32)(picture(seed=1))["pixel_values"][0]

        def fails(model, pixel_values=None, **kwargs):
            if any(torch.equal(bad, one) for one in pixel_values):
                raise RuntimeError("out of memory")
            return forward(model, pixel_values=pixel_values, **kwargs)

        drawn = []

        def draws(*arguments):
            drawn.append(1)
            if len(drawn) == 2:
                raise RuntimeError("cannot draw")
            return draw(*arguments)

        monkeypatch.setattr(pt.MSamForMultiTask, "forward", fails)
        monkeypatch.setattr(script, "draw", draws)
        output = tmp_path / "out"
        pictures = [str(tmp_path / f"p{index}.png") for index in range(4)]
        assert script.main([*pictures, "--adapter", adapter, "--output-dir", str(output), "--tasks", "depth"]) == 1
        assert {path.name for path in output.iterdir()} == {"p0", "p3", "contact_sheet.png"}
        shown = capsys.readouterr().err
        assert "p1.png: RuntimeError: out of memory" in shown and "p2.png: RuntimeError: cannot draw" in shown

    def test_a_sheet_that_cannot_be_drawn_loses_no_map(self, adapter, photo, tmp_path, monkeypatch, capsys):
        def fails(*arguments):
            raise RuntimeError("no font")

        monkeypatch.setattr(script, "save_sheet", fails)
        output = tmp_path / "out"
        assert script.main([str(photo), "--adapter", adapter, "--output-dir", str(output)]) == 0
        assert set(arrays(output / "photo")) == set(TASKS)
        assert "overview.png could not be drawn: no font" in capsys.readouterr().err

    def test_pictures_with_too_many_pixels(self, adapter, photo, tmp_path, capsys):
        large = tmp_path / "large.png"
        Image.new("1", (9000, 9000)).save(large)
        output = tmp_path / "out"
        command = [str(large), str(photo), "--adapter", adapter, "--output-dir", str(output), "--tasks", "depth"]
        assert script.main(command) == 1
        assert "large.png has 9000 x 9000 pixels, that is 81 megapixels" in capsys.readouterr().err
        assert script.main([*command, "--max-megapixels", "0.0001"]) == 2
        assert "photo.png has 28 x 20 pixels" in capsys.readouterr().err

    def test_files_of_others_are_kept(self, adapter, photo, tmp_path, capsys):
        output = tmp_path / "out"
        (output / "photo").mkdir(parents=True)
        truth = output / "photo/depth.png"
        Image.fromarray(picture()).save(truth)
        before = truth.read_bytes()
        command = [str(photo), "--adapter", adapter, "--output-dir", str(output), "--tasks", "depth"]
        assert script.main(command) == 2
        assert (
            "depth.png is there already and not from a prediction: --overwrite replaces it" in capsys.readouterr().err
        )
        assert truth.read_bytes() == before and len(list((output / "photo").iterdir())) == 1
        assert script.main([*command, "--overwrite"]) == script.main(command) == 0
        assert truth.read_bytes() != before


@pytest.mark.usefixtures("no_sheets")
class TestTiles:
    def test_the_map_is_that_of_the_tiles(self, adapter, tmp_path):
        """Where tiles do not overlap the map is the model's own for the tile."""
        model = script.load_model(Path(adapter), None, torch.device("cpu"))
        processor = pt.MSamProcessor.from_model(model)
        image = picture(32, 80)
        found = script.predict_tiled(model, processor, 32, 2, image, "depth")
        # of three tiles of 32 the first begins at 0, the last at 48
        for left, inner in ((0, slice(0, 24)), (48, slice(56, 80))):
            tile = image[:, left : left + 32]
            with torch.no_grad():
                output = model(processor([tile])["pixel_values"], tasks=["depth"])
            expected = model.get_base_model().post_process(output, [(32, 32)])[0]["depth"]
            torch.testing.assert_close(found[:, inner], expected[:, inner.start - left : inner.stop - left])

    @pytest.mark.parametrize("size", [(20, 28), (33, 100), (70, 64)])
    def test_from_the_command_line(self, adapter, tmp_path, size):
        path, output = tmp_path / "field.png", tmp_path / "out"
        Image.fromarray(picture(*size)).save(path)
        command = [str(path), "--adapter", adapter, "--output-dir", str(output), "--tile", "--tile-side", "24"]
        assert script.main(command) == 0
        found = arrays(output / "field")
        assert {name: values.shape[-2:] for name, values in found.items()} == dict.fromkeys(TASKS, size)
        np.testing.assert_allclose(np.linalg.norm(found["normals"], axis=0), 1, atol=1e-5)
        assert Image.open(output / "field/depth.png").size == size[::-1]

    @pytest.mark.parametrize("length", [32, 33, 56, 57, 200])
    def test_tiles_cover_everything_and_overlap(self, length):
        starts = tiles.tile_starts(length, 32)
        assert starts[0] == 0 and starts[-1] == length - 32
        assert all(0 < after - before <= 24 for before, after in pairwise(starts))

    def test_options(self, photo, capsys):
        for option in (["--tile-side", "8"], ["--tile", "--tile-side", "0"], ["--max-megapixels", "nan"]):
            with pytest.raises(SystemExit):
                script.parse_args([str(photo), *option])
