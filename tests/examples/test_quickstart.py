"""The notebook runs offline from top to bottom, on the small SAM beside it."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/quickstart.ipynb"
STEPS, FEWER = "steps = 60\n", "steps = 3\n"


def cells(kind):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [(cell, "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_it_is_stored_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell, _ in cells("code"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_it_runs_from_top_to_bottom(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    namespace = {"__name__": "__main__"}
    for cell, source in cells("code"):
        exec(compile(source.replace(STEPS, FEWER), f"{NOTEBOOK.name}, {cell['id']}", "exec"), namespace)
    told = capsys.readouterr().out
    assert namespace["steps"] == 3 and "train: 24 images" in told and "test: 4 images" in told
    assert namespace["results"].keys() == namespace["tasks"].keys() == {"semantic", "depth"}
    assert namespace["Image"].open(namespace["work"] / "predictions.png").width > 500
    for name, logits in namespace["found"].items():
        assert (logits - namespace["expected"][name]).abs().max() < 1e-3, name
    assert (namespace["depth"] - namespace["expected"]["depth"]).abs().max() < 1e-3
    # pushing is shown alone
    assert "push_adapter" not in namespace and any("push_adapter(model" in text for _, text in cells("markdown"))
