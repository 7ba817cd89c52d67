"""What the scripts say where a package that only some of them need is missing."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def end(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return ended.value.code


def test_the_demo_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert end(monkeypatch, "demo.py", "--help") == 0
    assert "--share" in capsys.readouterr().out
    assert end(monkeypatch, "demo.py") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: the page is made with Gradio, which is not installed: pip install -e '.[demo]'"
    ]


SCRIPTS = [
    "benchmark.py",
    "compare.py",
    "demo.py",
    "predict.py",
    "real_data.py",
    "scenes.py",
    "tiny_sam/pretrain.py",
    "train_multitask.py",
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("package", ["datasets", "matplotlib"])
def test_without_what_all_scripts_need(script, package, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "extras", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert end(monkeypatch, script) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: not installed: {package}; the scripts need pip install -e '.[examples]'"
    ]
