"""The demo page: its results, and the page itself in a headless Chromium."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_adapters import make_adapter
from small_models import make_sam

import peft_talora as pt
from peft_talora.drawing import color_range, draw

pytest.importorskip("gradio", reason="the demo page needs gradio")
import demo as script

CLASSES = ["<b>floor</b>", "${1 + 1}", "{{wall}}"]
TASKS = {
    "semantic": pt.TaskSpec("semantic", 3, class_names=CLASSES),
    "depth": pt.TaskSpec("depth"),
    "saliency": pt.TaskSpec("binary"),
}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900"
)


def picture(height=40, width=60, seed=0):
    """Four plain fields, so that a mean colour says what is shown."""
    fields = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return fields.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def save(image, path):
    Image.fromarray(image).save(path)
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """{name: folder} of two adapters with tasks of their own."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    make_sam().save_pretrained(folder / "sam")
    tasks = {"rooms": TASKS, "lines": {"edges": pt.TaskSpec("binary")}}
    return {name: make_adapter(str(folder / "sam"), folder / name, tasks[name]) for name in tasks}


@torch.no_grad()
def predicted(folder, image, *tasks):
    """{task: array}, computed directly."""
    model = pt.MSamForMultiTask.from_adapter(folder).eval()
    batch = pt.MSamProcessor.from_model(model)(image)
    maps = model.get_base_model().post_process(model(batch["pixel_values"], tasks=list(tasks)), [image.shape[:2]])[0]
    return {name: values.numpy() for name, values in maps.items()}


def unzipped(archive):
    """{name: array} of the numbers in a download."""
    with zipfile.ZipFile(archive) as files:
        arrays = [name for name in files.namelist() if name.endswith(".npz")]
        return {Path(name).stem: np.load(BytesIO(files.read(name)))[Path(name).stem] for name in arrays}


class TestResults:
    @pytest.fixture
    def results(self, adapters, tmp_path, monkeypatch):
        # sheets are slow to draw
        monkeypatch.setattr("predict.save_sheet", lambda rows, specs, path, ranges=None: path.write_bytes(b""))
        (tmp_path / "results").mkdir()
        loaded = script.load_adapters(adapters, None, torch.device("cpu"))
        return script.Results(loaded, tmp_path / "results", kept=2)

    @pytest.fixture
    def forwards(self, results):
        """The number of images in each forward of the model."""
        found = []
        for adapter in results.adapters.values():
            adapter.model.register_forward_pre_hook(
                lambda model, args, kwargs: found.append(len(kwargs["pixel_values"])), with_kwargs=True
            )
        return found

    def test_the_download_is_what_predict_writes(self, results, adapters, tmp_path):
        result = results.get(save(picture(), tmp_path / "photo.png"), "rooms", ["depth", "saliency"])
        archive = result.archive.result()
        expected = predicted(adapters["rooms"], picture(), "depth", "saliency")
        found = unzipped(archive)
        assert archive.name == "photo-maps.zip" and set(found) == {"depth", "saliency"}
        for name, values in found.items():
            np.testing.assert_allclose(values, expected[name], atol=1e-5)
        with zipfile.ZipFile(archive) as files:
            names = {f"photo/{task}{end}" for task in found for end in (".png", "_overlay.png", ".npz")}
            assert {name for name in files.namelist() if not name.endswith("/")} == names | {"photo/overview.png"}

    def test_one_forward_per_picture_adapter_and_tasks(self, results, forwards, tmp_path):
        photo, other = (save(picture(seed=seed), tmp_path / f"{seed}.png") for seed in (0, 1))
        with ThreadPoolExecutor(4) as pool:
            found = set(pool.map(lambda _: results.get(photo, "rooms", ["depth"]), range(8)))
        assert len(found) == 1 and forwards == [1]
        results.get(photo, "rooms", ["depth", "saliency"])
        assert forwards == [1, 1]
        assert results.get(photo, "rooms", ["depth"]) in found and forwards == [1, 1]
        results.get(other, "rooms", ["depth"])
        results.get(photo, "lines", ["edges"])
        assert forwards == [1] * 4

    def test_users_at_once_get_their_own(self, results, adapters, tmp_path):
        # all uploads have one name, in folders of their own
        photos = [tmp_path / str(seed) / "photo.png" for seed in range(4)]
        for seed, path in enumerate(photos):
            path.parent.mkdir()
            save(picture(seed=seed), path)

        def use(path):
            result = results.get(path, "rooms", ["saliency"])
            return unzipped(result.archive.result())["saliency"]

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(use, photos))
        for seed, values in enumerate(found):
            expected = predicted(adapters["rooms"], picture(seed=seed), "saliency")["saliency"]
            np.testing.assert_allclose(values, expected, atol=1e-5)
        assert np.abs(found[0] - found[1]).max() > 1e-3

    def test_old_results_go_with_their_files(self, results, tmp_path):
        for seed in range(4):
            results.get(save(picture(seed=seed), tmp_path / f"{seed}.png"), "lines", ["edges"]).archive.result()
        deadline = time.monotonic() + 5  # the packing thread may hold on to its last result for a moment
        while len(list(results.folder.iterdir())) > 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {path.name for path in results.folder.glob("*/*")} == {"2-maps.zip", "3-maps.zip"}

    def test_a_picture_is_taken_as_a_person_sees_it(self, results, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        Image.fromarray(picture()).convert("L").save(tmp_path / "grey.png", exif=exif)
        result = results.get(tmp_path / "grey.png", "lines", ["edges"])
        assert "grey.png, 40 x 60 pixels, adapter lines" in result.page
        assert unzipped(result.archive.result())["edges"].shape == (60, 40)

    def test_messages(self, results, forwards, tmp_path):
        broken = tmp_path / "<i>.png"
        broken.write_text("no picture")
        photo = save(picture(), tmp_path / "photo.png")

        def message(*arguments):
            page, button, result = script.show(results, *arguments)
            assert not button.interactive and button.value is None and result is None
            return re.fullmatch('<p class="message" role="alert">(.*)</p>', page)[1]

        assert message(None, "rooms", ["depth"]) == "Upload a picture first."
        assert message(str(photo), "rooms", []) == "Choose at least one task."
        assert message(str(photo), "rooms", ["edges"]) == "Choose at least one task."
        text = message(str(broken), "rooms", ["depth"])
        assert text.startswith("&lt;i&gt;.png cannot be read as a picture") and str(tmp_path) not in text
        assert not forwards

    def test_a_picture_with_too_many_pixels(self, results, forwards, tmp_path):
        large = tmp_path / "large.png"
        Image.new("1", (9000, 9000)).save(large)
        page, _, _ = script.show(results, str(large), "lines", ["edges"])
        assert "large.png has 9000 x 9000 pixels" in page and str(tmp_path) not in page and not forwards

    def test_files_that_cannot_be_written_are_said_so(self, results, tmp_path, monkeypatch, capsys):
        def fails(*arguments):
            raise OSError("no space left")

        monkeypatch.setattr(script, "save_picture", fails)
        result = results.get(save(picture(), tmp_path / "photo.png"), "lines", ["edges"])
        button = script.offer(result)
        assert button.label == "The files could not be written"
        assert not button.interactive and "no space left" in capsys.readouterr().err
        # and whoever comes next gets what is due
        monkeypatch.undo()
        other = results.get(save(picture(seed=1), tmp_path / "other.png"), "lines", ["edges"])
        assert set(unzipped(other.archive.result())) == {"edges"}


def test_wrong_arguments(adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")

    def message(*arguments):
        try:
            code = script.main([*map(str, arguments), "--device", "cpu"])
        except SystemExit as end:
            code = end.code
        assert code == 2
        return capsys.readouterr().err

    missing = message("--adapter", tmp_path / "nothing")
    assert "there is no folder" in missing and "examples/train_multitask.py trains one" in missing
    assert "--port must be from 1 to 65535, got 0" in message("--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in message("--adapter", adapters["lines"], "--port", port)


# --- The page in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(adapters, tmp_path_factory):
    """The page, served by the script as a user starts it; its files are gone in the end."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, script.__file__, "--port", str(port), "--device", "cpu"]
    command += [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: process.poll() is not None or "The page is at" in log.read_text(), 180)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}/"
        assert "Traceback" not in log.read_text(), log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not list(folder.glob("demo-*"))
    finally:
        process.kill()
        process.wait()


def wait_for(condition, seconds=60):
    """What `condition` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the demo page's test needs selenium")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        pytest.skip("the demo page's test needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path_factory.mktemp("downloads"))})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield browser
    browser.quit()


class Page:
    """The page, as a person uses it."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get_log("performance")
        browser.get(address)
        self.wait("#picture input[type=file]")

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector):
        """What is written in elements, read at one moment: the page may be changing."""
        read = "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText.trim())"
        return self.browser.execute_script(read, selector)

    def wait(self, selector):
        return wait_for(lambda: self.find(selector))[0]

    def upload(self, path):
        self.find("#picture input[type=file]")[0].send_keys(str(path))
        self.wait("#picture img")

    def choose_tasks(self, *wanted):
        for box in self.find("#tasks input"):
            if box.is_selected() != (box.get_attribute("name") in wanted):
                box.click()

    def run(self, selector):
        self.find("#run")[0].click()
        return self.wait(f"#maps {selector}")

    def requests(self):
        """The addresses that were asked for since the last call, those of the page's own data left out."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        addresses = [one["request"]["url"] for one in sent]
        return [address for address in addresses if not address.startswith(("data:", "blob:", "chrome:"))]

    def shown(self, selector):
        return np.array(Image.open(BytesIO(self.find(selector)[0].screenshot_as_png)).convert("RGB")).astype(float)


@pytest.mark.slow
class TestPage:
    @pytest.fixture
    def page(self, chromium, address):
        return Page(chromium, address)

    def test_the_map_of_one_task(self, page, address, adapters, tmp_path):
        page.upload(save(picture(), tmp_path / "photo.png"))
        page.choose_tasks("depth")
        image = page.run("figure img")
        assert len(page.find("#maps figure")) == 1

        depth = predicted(adapters["rooms"], picture(), "depth")["depth"]
        expected = draw(TASKS["depth"], depth, color_range(TASKS["depth"], [depth])).astype(float)
        data = image.get_attribute("src").partition("base64,")[2]
        np.testing.assert_allclose(np.array(Image.open(BytesIO(b64decode(data))))[..., :3], expected, atol=1)

        page.wait("#download:not([disabled])").click()
        downloads = Path(page.browser.capabilities["chrome"]["userDataDir"]).parent
        archive = wait_for(lambda: list(downloads.glob("downloads*/photo-maps.zip")))[0]
        found = unzipped(archive)
        assert set(found) == {"depth"}
        np.testing.assert_allclose(found["depth"], depth, atol=1e-5)

        asked = page.requests()
        assert asked and all(one.startswith(address) for one in asked), asked

    def test_opacity_acts_without_a_request(self, page, adapters, tmp_path):
        page.upload(save(picture(), tmp_path / "photo.png"))
        page.choose_tasks("depth")
        page.run("figure img")
        page.wait("#download:not([disabled])")
        page.requests()
        depth = predicted(adapters["rooms"], picture(), "depth")["depth"]
        covered = draw(TASKS["depth"], depth, color_range(TASKS["depth"], [depth])).mean(axis=(0, 1))
        plain = picture().mean(axis=(0, 1))
        assert np.abs(covered - plain).max() > 30
        slider = page.find("#opacity input[type=range]")[0]
        for share, key in ((script.OPACITY, ""), (0.0, "\ue011"), (1.0, "\ue010")):  # as it is; the keys Home and End
            slider.send_keys(key)
            expected = share * covered + (1 - share) * plain
            wait_for(lambda: np.abs(page.shown("#maps .over").mean(axis=(0, 1)) - expected).max() < 5)  # noqa: B023
        assert not [one for one in page.requests() if "queue" in one or "/run" in one]

    def test_what_is_no_picture_gets_a_message(self, page, tmp_path):
        page.run(".message")
        assert page.texts("#maps .message") == ["Upload a picture first."]
        path = tmp_path / "notes.png"
        path.write_text("no picture")
        page.upload(path)
        page.run(".message")
        message = wait_for(lambda: [found for found in page.texts("#maps .message") if "notes" in found])[0]
        assert message.startswith("notes.png cannot be read as a picture") and "/" not in message
        assert page.find("#download[disabled]")

    def test_tasks_follow_the_adapter(self, page, tmp_path):
        page.upload(save(picture(), tmp_path / "photo.png"))
        page.choose_tasks("semantic")
        page.run("figure img")
        named = set(page.texts("#maps .legend span"))
        assert named and named <= set(CLASSES)
        page.find("#adapter input")[0].click()
        wait_for(lambda: [one for one in page.find("[role=option]") if one.text.endswith("lines")])[0].click()
        wait_for(lambda: page.texts("#tasks label") == ["edges"])
        page.run("figure[data-task=edges]")
        assert page.texts("#maps figcaption") == ["edges"]
        assert page.texts("#maps .hint") == ["photo.png, 60 x 40 pixels, adapter lines"]
