"""What all scripts do first: what they say where a package that only some of them need is missing."""

import importlib
import runpy
import sys
import warnings
from pathlib import Path

import extras
import pytest
from peft import LoraConfig, get_peft_model
from small_models import make_sam

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


def test_the_scripts_do_not_warn_of_what_peft_asks_for():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        importlib.reload(extras)
        get_peft_model(make_sam(), LoraConfig(target_modules=["qkv"]))
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [str(one.message) for one in warned if one.category is FutureWarning] == ["something else is deprecated"]
