"""What is wrong with a command line is said at once: importing torch and transformers takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# as python SCRIPT ARGUMENTS, where nothing that imports torch can be imported
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["compare.py", "predict.py", "train_multitask.py"])
@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [(["--help"], 0, "--output-dir"), (["picture.png", "--nonsense"], 2, "unrecognized arguments: ")],
)
def test_the_answer_needs_no_torch(script, arguments, code, told):
    path = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", WITHOUT_TORCH, str(EXAMPLES / script), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert told in (ended.stderr if code else ended.stdout)
    assert code == 0 or f"{script}: error: " in ended.stderr
