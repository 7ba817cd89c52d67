"""The benchmark runs, compares equal things, and counts as it says."""

import json
import time

import pytest
import torch

from peft_talora.convlora.experts import expert_outputs

SHORT = ["--sizes", "tiny", "--rounds", "2", "--seconds", "0", "--longest", "0"]


@pytest.fixture(scope="module")
def benchmark():
    import benchmark

    return benchmark


def run(benchmark, tmp_path, *arguments):
    """What a short run writes."""
    path = tmp_path / "rows.json"
    benchmark.main([*SHORT, "--json", str(path), *arguments])
    return json.loads(path.read_text())


def a_row(**seconds):
    from benchmarks.measuring import Row

    row = Row("", "ours", "plain", minus="base" if "base" in seconds else None)
    row.seconds, row.cpu_seconds = seconds, {name: [2 * s for s in values] for name, values in seconds.items()}
    row.peak_bytes = {"ours": 1, "plain": 4}
    return row


def test_the_plain_experts_are_the_same_function():
    from benchmarks.convlora import plain_experts

    z, index = torch.randn(9, 14, 13, 3).double(), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 1])
    weight, bias = torch.randn(8, 3, 3, 3, 3).double(), torch.randn(8, 3).double()
    plain = plain_experts(z, index, weight, bias)
    torch.testing.assert_close(plain, expert_outputs(z, index, weight, bias), rtol=0, atol=1e-11)


class TestMeasuring:
    def test_the_ratio_is_of_what_is_added(self):
        row = a_row(base=[1.0, 2.0, 1.0], ours=[2.0, 3.0, 2.0], plain=[5.0, 6.0, 5.0])
        assert row.ratio() == 0.25 and row.ratios() == [0.25] * 3
        assert row.ratio("cpu_seconds") == 0.25 and row.memory_ratio() == 0.25

    def test_ratio_of_medians(self):
        row = a_row(ours=[1.0, 3.0, 2.0], plain=[8.0, 4.0, 1.0])
        assert row.ratio() == 0.5 and row.ratios() == [0.125, 0.75, 2.0]

    def test_peak_memory(self, benchmark):
        from benchmarks.measuring import peak_memory

        def call():
            first = torch.ones(2**20)
            second = first + 1
            del first
            third = second + 1
            del second, third

        assert 8 * 2**20 <= peak_memory(call, "cpu") < 8.1 * 2**20

    def test_waiting_is_no_work(self):
        from benchmarks.measuring import clocked

        wall, cpu = clocked(lambda: time.sleep(0.1), "cpu")
        assert wall >= 0.1 and cpu < 0.05

    @pytest.mark.parametrize(
        ("rounds", "elapsed", "expected"),
        [(6, 0.0, True), (7, 3.9, True), (7, 4.1, False), (2, 21.0, True), (3, 21.0, False), (6, 19.0, True)],
    )
    def test_rounds(self, benchmark, rounds, elapsed, expected):
        from benchmarks.measuring import needs_more

        assert needs_more(rounds, elapsed, benchmark.parse_arguments([])) is expected

    @pytest.mark.parametrize(("error", "fails"), [(1e-4, True), (5e-6, False), (float("nan"), True)])
    def test_two_ways_must_be_equal(self, error, fails):
        from benchmarks.measuring import assert_equal

        expected = torch.tensor([1.0, -2.0])
        if fails:
            with pytest.raises(AssertionError, match="logits: the two ways differ by"):
                assert_equal(expected + error, expected, "logits")
        else:
            assert_equal(expected + error, expected, "logits")


class TestGroups:
    def test_talora(self, benchmark, tmp_path):
        rows = run(benchmark, tmp_path, "--only", "talora")["rows"]
        assert [row["limit"] for row in rows] == [1.0, 1.1, 1.0, 1.1]
        assert all(row["of"] == "talora" and row["to"] == "lora" and row["ratio"] > 0 for row in rows)
        assert set(rows[0]["seconds"]) == {"base", "lora", "talora"}

    def test_tasks(self, benchmark, tmp_path, capsys):
        rows = run(benchmark, tmp_path, "--only", "tasks")["rows"]
        assert [row["limit"] for row in rows] == [0.72, 0.75, 0.75, 0.85, None, None]
        # what is shared is there once for three tasks
        assert {row["of"] for row in rows[3:]} == {"TA-LoRA, first half shared"}
        assert rows[3]["memory_ratio"] < 0.95 and rows[5]["memory_ratio"] > 1.05
        assert len(rows[0]["seconds"]["joint"]) == len(rows[0]["cpu_seconds"]["joint"]) == 2
        table = capsys.readouterr().out.rsplit("\n\n", 1)[1].strip().splitlines()
        assert table[0].startswith("| what | ratio |") and len(table) == 8
        assert {line.count("|") for line in table} == {8}

    def test_decoder(self, benchmark, tmp_path):
        rows = run(benchmark, tmp_path, "--only", "decoder")["rows"]
        assert [row["name"] for row in rows] == [
            "decoder alone, 13 channels, inference, tiny",
            "decoder alone, 13 channels, training, tiny",
        ]

    def test_attention(self, benchmark, tmp_path):
        rows = run(benchmark, tmp_path, "--only", "attention")["rows"]
        assert [row["memory_limit"] for row in rows] == [None, 0.25, None, None]
        assert all(row["memory_ratio"] > 0 for row in rows)

    def test_growth(self, benchmark, tmp_path):
        pytest.importorskip("matplotlib")
        plot = tmp_path / "growth.png"
        points = run(benchmark, tmp_path, "--only", "growth", "--plot", str(plot))["growth"]
        assert plot.read_bytes().startswith(b"\x89PNG")
        memory = {(p["way"], p["x"]): p["peak_bytes"] for p in points}
        assert len(memory) == len(points) == 2 * 2 + 2 * 2 + 2 * 4
        # what is shared by the tasks, and by the channels in token mode, is not there again
        assert memory["the last half", 3] < memory["all layers task-aware", 3]
        assert memory["token mode", 3] < memory["prompt mode", 3]

    @pytest.mark.slow
    def test_bfloat16(self, benchmark, tmp_path):
        groups = ("talora", "tasks", "decoder", "attention")
        rows = run(benchmark, tmp_path, "--dtype", "bfloat16", "--only", *groups)["rows"]
        assert len(rows) == 4 + 6 + 2 + 4

    @pytest.mark.slow
    def test_step(self, benchmark, tmp_path, capsys, monkeypatch):
        import benchmarks.convlora

        monkeypatch.setattr(benchmarks.convlora, "BATCH", 1)
        rows = run(benchmark, tmp_path, "--only", "step")["rows"]
        assert len(rows) == 2 and all(row["ratio"] > 0 and row["peak_bytes"]["convlora"] > 0 for row in rows)
        assert "convlora : lora" in capsys.readouterr().out

    @pytest.mark.slow
    def test_one_layer(self, benchmark):
        from benchmarks.convlora import layer_row

        row = layer_row(benchmark.parse_arguments(SHORT), "layer", (2, 4, 4), 8, compiled=False, limit=0.45)
        assert set(row.seconds) == {"base", "ours", "plain"} and row.to == "plain"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["--plot", "growth.png", "--only", "tasks"], "--plot draws the group growth, which --only leaves out"),
    ],
)
def test_bad_arguments(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(arguments)
    assert message in capsys.readouterr().err
