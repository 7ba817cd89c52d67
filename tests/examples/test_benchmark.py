"""The benchmark runs, compares equal things, and counts as it says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from peft_talora.convlora.experts import expert_outputs

SCRIPT = Path(__file__).parents[2] / "examples/benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_script"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark_script"]


def test_the_plain_experts_are_the_same_function(benchmark):
    z, index = torch.randn(9, 14, 13, 3).double(), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 1])
    weight, bias = torch.randn(8, 3, 3, 3, 3).double(), torch.randn(8, 3).double()
    plain = benchmark.plain_experts(z, index, weight, bias)
    torch.testing.assert_close(plain, expert_outputs(z, index, weight, bias), rtol=0, atol=1e-11)


def test_the_ratio_is_of_what_is_added(benchmark):
    row = benchmark.Row("", "ours", "plain", minus="base")
    row.seconds = {"base": [1.0, 2.0, 1.0], "ours": [2.0, 3.0, 2.0], "plain": [5.0, 6.0, 5.0]}
    assert row.ratio() == 0.25 and row.ratios() == [0.25] * 3


def test_peak_memory(benchmark):
    def call():
        first = torch.ones(2**20)
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert 8 * 2**20 <= benchmark.peak_memory(call, "cpu") < 8.1 * 2**20


@pytest.mark.slow
def test_writes_json(benchmark, tmp_path, capsys):
    path = tmp_path / "rows.json"
    benchmark.main(["--only", "step", "--rounds", "2", "--seconds", "0", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 and all(row["ratio"] > 0 and row["peak_bytes"]["convlora"] > 0 for row in rows)
    assert "convlora : lora" in capsys.readouterr().out
