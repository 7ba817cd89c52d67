"""The comparison of methods: which runs it makes, and what it says of their numbers."""

import json
import os
import re
import shlex
import shutil

import compare as script
import pytest
from comparison.jobs import Job, run_if_missing
from comparison.methods import METHODS, RATE_FACTORS, ROWS, Entry
from comparison.plan import Amount, Cell, Plan
from comparison.report import set_parameter_axis
from comparison.results import paired_differences, read_result
from training.stopping import run_script

import peft_talora as pt

TASKS = ("depth", "normals")


def option(job, name):
    return job.arguments[job.arguments.index(name) + 1]


def fake_metrics(arguments, threads=None):
    """Numbers that follow from the arguments: half of the default rate's error at the best rate."""
    job = Job(None, tuple(arguments))
    method, seed = option(job, "--method"), int(option(job, "--seed"))
    name = "--decoder-lr" if method == "decoder" else "--lr"
    best = {"decoder": 4e-4, "lora": 5e-3, "talora": 0.013, "convlora": 8e-4, "full": 3e-4}[method]
    gain = {"decoder": 0.0, "lora": 0.1, "talora": 0.2, "convlora": 0.05, "full": 0.3}[method]
    error = 1.0 - gain - 0.01 * seed * (method == "talora") + 0.1 * (float(option(job, name)) != best)
    error += 0.004 * (threads or 0) * (method == "talora")
    tasks = job.arguments[job.arguments.index("--tasks") + 1 :]
    values = {"depth": {"abs_err": error}, "normals": {"mean_angle": 10 * error}}
    return {
        "tasks": {task: values[task] for task in tasks},
        "trainable_parameters": 100 * len(tasks) + 7 * (method != "decoder"),
        "adapter_bytes": 400,
        "train_seconds": 6.0,
        "steps": 3,
    }


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that only write their numbers; gives the list of those that were made."""
    made = []

    def run(job, threads, at_once=1):
        made.append(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "arguments.json").write_text(json.dumps(job.arguments))
        (job.folder / "conditions.json").write_text(json.dumps({"runs_at_once": at_once}))
        (job.folder / "metrics.json").write_text(json.dumps(fake_metrics(job.arguments, job.threads)))
        return job.result()

    monkeypatch.setattr(Job, "run", run)
    return made


@pytest.fixture
def command(base, tmp_path):
    return ["--base", base, "--output-dir", str(tmp_path / "out"), "--tasks", *TASKS, "--seeds", "3", "4"]


def read(tmp_path):
    return json.loads((tmp_path / "out/comparison.json").read_text())


class TestUsersData:
    """What is compared on a folder: its tasks, and as many images as it has."""

    def look(self, *arguments):
        return script.look_at_data(script.parse_args(list(arguments))[0])

    def test_tasks_and_number_of_images(self, data_folder):
        assert self.look("--dataset", data_folder) == (("semantic", "depth", "normals"), 6)
        assert self.look("--dataset", data_folder, "--tasks", "depth", "--num-train", "4") == (("depth",), 4)
        assert self.look() == (("semantic", "depth", "normals"), 512)

    def test_few_labels_need_more_images(self, data_folder):
        with pytest.raises(ValueError, match=r"--few-labels compares \(16, 64, 256\) images with more, .* has 6"):
            self.look("--dataset", data_folder, "--few-labels")
        with pytest.raises(ValueError, match=r"--num-train 7: .* has 6 images"):
            self.look("--dataset", data_folder, "--num-train", "7")

    def test_amounts_that_there_are(self):
        args, _ = script.parse_args(["--few-labels", "--methods", "lora", "--seeds", "0"])
        amounts = {cell.amount for cell in script.cells(args, 100)}
        assert {str(amount) for amount in amounts} == {
            "100 images", "100 images, each labelled for one task", "16 images", "64 images",
        }  # fmt: skip

    def test_few_labels_of_rows_with_fields_of_their_own(self):
        args, _ = script.parse_args(
            ["--few-labels", "--methods", "talora:scaling=1", "talora:8", "convlora", "--seeds", "0"]
        )
        few = {str(cell.entry) for cell in script.cells(args, 100) if cell.amount.images == 16}
        assert few == {"decoder", "talora-scaling=1"}

    def test_a_folder_without_a_validation_split(self, data_folder, tmp_path):
        for split in ("train", "test"):
            shutil.copy(f"{data_folder}/{split}-00000-of-00001.parquet", tmp_path)
        assert self.look("--dataset", str(tmp_path))[1] == 6

    def test_parameters_that_are_alike_have_numbers_at_their_axis(self, tmp_path):
        from matplotlib import pyplot

        axis = pyplot.figure().subplots()
        set_parameter_axis(axis, [149_760, 151_368])
        axis.plot([149_760, 151_368], [0, 1])
        axis.figure.canvas.draw()
        texts = [label.get_text() for label in axis.get_xticklabels()]
        assert len(texts) >= 2 and all("," in text for text in texts)


@pytest.mark.usefixtures("fake_runs")
class TestComparison:
    def test_the_best_rate_of_every_method_is_taken(self, command, tmp_path):
        assert script.main(command) == 0
        found = read(tmp_path)
        assert found["rates"] == {
            "decoder": 4e-4, "lora": 5e-3, "lora_per_task": 5e-3, "lora_all": 5e-3, "talora": 0.013, "convlora": 8e-4, "full": 3e-4,
        }  # fmt: skip
        assert len(found["tuning"]) == len(ROWS) * len(RATE_FACTORS)
        # 0.8 + 0.1 of the default against the baseline's 1.0 + 0.1
        gains = {(trial["method"], trial["rate"]): trial["delta_b"]["3"] for trial in found["tuning"]}
        assert gains["decoder", 1e-3] == 0 and gains["decoder", 4e-4] == pytest.approx(100 * 0.1 / 1.1)
        assert gains["talora", 0.013] == pytest.approx(100 * (1.0 - 0.77))
        assert gains["talora", 5e-3] == pytest.approx(100 * (1.0 - 0.87))

    def test_numbers_of_the_table(self, command, tmp_path):
        script.main(command)
        results = {(r["method"], r["seed"]): r for r in read(tmp_path)["results"]}
        assert len(results) == len(ROWS) * 2
        assert [results["talora", seed]["delta_b"] for seed in (3, 4)] == pytest.approx([23, 24])
        assert results["talora", 3]["seconds_per_step"] == 2 and results["lora_per_task", 3]["seconds_per_step"] == 4
        assert results["lora_per_task", 3]["trainable_parameters"] == 214
        assert (
            results["lora_per_task", 3]["encoder_parameters"] == 14
            and results["decoder", 3]["encoder_parameters"] == 0
        )
        text = (tmp_path / "out/comparison.md").read_text()
        row = next(line for line in text.splitlines() if line.startswith("| TA-LoRA "))
        assert row == "| TA-LoRA | 0.765 ± 0.007 | 7.65 ± 0.07 | +23.5 ± 0.7 | 207 | 7 | 0.0 | 2.00 |"
        # of two seeds: t with one degree of freedom is 12.7, times 0.5
        lora = next(line for line in text.splitlines() if line.startswith("| PEFT LoRA, shared by the tasks |  | "))
        assert lora.split(" | ")[4] == "**-13.5 ± 6.4**"
        assert "differ by less than" in text and "over 2 seeds" in text and "≈" not in text
        assert (tmp_path / "out/comparison.png").stat().st_size > 10_000

    def test_nothing_is_run_twice_and_more_can_be_asked_for(self, command, tmp_path, fake_runs):
        script.main([*command, "--methods", "lora", "talora"])
        # three rates of three methods and their results, for two seeds
        assert len(fake_runs) == len({job.folder for job in fake_runs}) == 3 * 3 * 2 + 3 * 2
        script.main([*command, "--methods", "lora", "talora"])
        assert len(fake_runs) == 24
        script.main([*command, "--methods", "lora", "talora", "talora:2", "--few-labels", "--few-seeds", "3"])
        # the other rank for two seeds, and three methods for four amounts of data
        assert len(fake_runs) == 24 + 2 + 3 * 4
        text = (tmp_path / "out/comparison.md").read_text()
        assert (
            "| method | 512 images | 512 images, each labelled for one task | 16 images | 64 images | 256 images |"
            in text
        )

    def test_rows_with_fields_of_their_own(self, command, tmp_path, fake_runs, monkeypatch):
        from matplotlib.axes import Axes

        drawn, errorbar = [], Axes.errorbar
        monkeypatch.setattr(
            Axes, "errorbar", lambda *a, **more: drawn.append((more["label"], more["color"])) or errorbar(*a, **more)
        )
        rows = ["talora", "talora:scaling=1", "talora:2:scaling=1"]
        with pytest.raises(ValueError, match="scalign"):
            script.main([*command, "--no-tuning", "--methods", "talora", "talora:scalign=1"])
        assert not fake_runs
        script.main([*command, "--no-tuning", "--methods", *rows])
        assert len(fake_runs) == 4 * 2
        assert [r["method"] for r in read(tmp_path)["results"]][:4] == [
            "decoder", "talora", "talora-scaling=1", "talora-2-scaling=1",
        ]  # fmt: skip
        text = (tmp_path / "out/comparison.md").read_text()
        for label in ("TA-LoRA", "TA-LoRA, scaling=1", "TA-LoRA, r=2, scaling=1"):
            assert f"\n| {label} | 0." in text
        # two ranks with the same fields are one line of the plot
        assert [label for label, _ in drawn] == ["TA-LoRA", "TA-LoRA, scaling=1"]
        assert len({color for _, color in drawn}) == 2

    def test_rates_of_rows_with_fields_of_their_own(self, command, tmp_path, fake_runs):
        script.main([*command, "--methods", "talora", "talora:scaling=1"])
        assert read(tmp_path)["rates"] == {"decoder": 4e-4, "talora": 0.013, "talora-scaling=1": 0.013}
        text = (tmp_path / "out/comparison.md").read_text()
        assert "\n| TA-LoRA, scaling=1 | 0.002: " in text and "**0.013: " in text

    def test_no_tuning(self, command, tmp_path, fake_runs):
        script.main([*command, "--no-tuning", "--methods", "talora"])
        assert len(fake_runs) == 4
        assert read(tmp_path)["rates"] == {"decoder": 1e-3, "talora": 5e-3} and read(tmp_path)["tuning"] == []

    def test_another_number_of_threads(self, command, tmp_path, fake_runs):
        script.main([*command, "--no-tuning", "--methods", "talora", "--noise", "2", "--num-threads", "1"])
        again = [job for job in fake_runs if job.threads]
        assert [option(job, "--method") for job in again] == ["decoder", "talora"] * 2 and {
            j.threads for j in again
        } == {2}
        assert {(r["threads"], r["method"]) for r in read(tmp_path)["repeated"]} == {(2, "talora")}
        text = (tmp_path / "out/comparison.md").read_text()
        # 0.008 of the baseline's error of 1.1
        assert (
            "(2) moves the Delta_b of TA-LoRA by -0.7 points in the mean, and by 0.7 at most in one of 2 seeds" in text
        )

    def test_times_of_runs_beside_others_are_rough(self, command, tmp_path):
        script.main([*command, "--no-tuning", "--methods", "talora", "--jobs", "2"])
        text = (tmp_path / "out/comparison.md").read_text()
        assert "| ≈2.00 |" in text and "≈: other runs were beside it" in text

    def test_report_alone_runs_nothing(self, command, tmp_path, fake_runs):
        script.main([*command, "--methods", "talora", "--no-tuning", "--seeds", "3"])
        number = len(fake_runs)
        assert script.main([*command, "--methods", "talora", "--no-tuning", "--report"]) == 0
        assert len(fake_runs) == number and {r["seed"] for r in read(tmp_path)["results"]} == {3}

    def test_what_is_ahead_is_told_before_the_first_run(self, command, tmp_path, fake_runs, capsys):
        # three rates of two methods for two seeds, and a result of each (with a rate that is not the default); then of a third method, too
        for methods, runs, finished in ((["talora"], 16, "0"), (["lora", "talora"], 24, "12 or more")):
            script.main([*command, "--methods", *methods])
            first = capsys.readouterr().out.splitlines()[0]
            assert first == f"{runs} runs, {finished} of them finished, in {tmp_path / 'out'}; seeds 3 4"
            assert len(fake_runs) == runs

    def test_other_seeds_go_on_with_the_rates_that_were_chosen(self, command, tmp_path, fake_runs):
        """In the runs that are there the decoders' rate is one that was chosen, not the default."""
        for seeds in (["0", "1", "2"], ["1", "2", "3"]):
            assert script.main([*command, "--methods", "talora", "--seeds", *seeds]) == 0
        assert {result["seed"] for result in read(tmp_path)["results"]} == {1, 2, 3}
        assert read(tmp_path)["rates"]["decoder"] != METHODS["decoder"].default_rate
        # the second time three rates of both with seed 2, which chooses now, and both with seed 3
        assert len(fake_runs) == 12 + 6 + 6 + 2

    def test_one_seed_is_taken_for_what_it_is(self, command, tmp_path, capsys):
        script.main([*command, "--methods", "talora", "--seeds", "2", "--no-tuning"])
        assert capsys.readouterr().out.splitlines()[0] == (
            f"2 runs, 0 of them finished, in {tmp_path / 'out'}; one seed, number 2: no intervals, --seeds 0 1 2 would be three "
            "seeds"
        )

    def test_a_report_of_something_unfinished_says_what_makes_the_rest(self, command, tmp_path, capsys):
        options = [*command, "--methods", "talora", "--no-tuning", "--steps", "80"]
        script.main([*options, "--seeds", "3"])
        assert capsys.readouterr().out.endswith("comparison.json, .md and .png\n")
        script.main([*options, "--report"])
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(f"2 of 4 results are in {tmp_path / 'out'}: ")
        assert last.endswith(
            f"; this makes what is missing: {shlex.join(['python', os.path.relpath(script.__file__), *options])}"
        )

    @pytest.mark.parametrize("name", ["nowhere", "empty"])
    def test_a_report_of_nothing(self, tmp_path, name, capsys):
        (tmp_path / "empty").mkdir()
        assert run_script(lambda: script.main(["--report", "--output-dir", str(tmp_path / name)])) == 2
        assert capsys.readouterr().err == (
            f"error: --report: {tmp_path / name} has no finished run; this makes what is missing: python {os.path.relpath(script.__file__)} "
            f"--output-dir {tmp_path / name}\n"
        )
        assert not list(tmp_path.rglob("comparison.*"))

    def test_a_folder_with_another_run_is_not_taken_for_this_one(self, command):
        script.main([*command, "--methods", "talora", "--no-tuning"])
        with pytest.raises(ValueError, match=r"seed-3 has a run with other arguments.*--output-dir"):
            script.main([*command, "--methods", "talora", "--no-tuning", "--steps", "9"])

    def test_options_in_another_order_are_the_same_run(self, command, fake_runs):
        options = ["--steps", "9", "--batch-size", "2"]
        for rest in (options, options[2:] + options[:2], ["--steps=9", "--batch-size=2"]):
            assert script.main([*command, "--methods", "talora", "--no-tuning", *rest]) == 0
            assert len(fake_runs) == 4

    def test_a_failure_is_told_and_the_rest_goes_on(self, command, tmp_path, monkeypatch, capsys):
        run = Job.run

        def sometimes(job, threads, at_once):
            if option(job, "--method") == "lora":
                raise RuntimeError(f"{job.folder}: out of memory")
            return run(job, threads, at_once)

        monkeypatch.setattr(Job, "run", sometimes)
        assert script.main([*command, "--no-tuning", "--methods", "lora", "talora"]) == 1
        assert "seed-4: out of memory" in capsys.readouterr().err
        assert {r["method"] for r in read(tmp_path)["results"]} == {"decoder", "talora"}


class TestNumbers:
    def test_differences_are_paired_by_seed(self, tmp_path, fake_runs):
        plan, amount, rates = Plan(tmp_path, TASKS, {}), Amount(8), {"decoder": 4e-4, "lora": 5e-3, "talora": 0.013}
        results = []
        for name, seeds in (("decoder", (1, 2, 3)), ("lora", (3, 1)), ("talora", (1, 2, 3))):
            for seed in seeds:
                cell = Cell(Entry(name), amount, seed)
                for job in plan.jobs(cell, rates).values():
                    job.run(None)
                results.append(read_result(plan, cell, rates))
        found = paired_differences(results, Entry("talora"), Entry("lora"), amount)
        assert found == pytest.approx([21 - 10, 23 - 10])

    def test_delta_b_is_over_the_baseline_of_the_same_seed_amount_and_split(self, tmp_path, monkeypatch):
        """Every run has an error of its own, so that any other baseline gives another number."""
        plan, rates = Plan(tmp_path, TASKS, {}), {"decoder": 4e-4, "lora": 5e-3}
        errors = {}
        runs = [(Amount(8), 1, "test"), (Amount(8), 2, "test"), (Amount(16), 1, "test"),
                (Amount(8, one_task_each=True), 1, "test"), (Amount(8), 1, "validation")]  # fmt: skip
        for number, rest in enumerate(runs):
            for name, error in (("decoder", 1.0 + number), ("lora", 0.5)):
                (job,) = plan.jobs(Cell(Entry(name), *rest), rates).values()
                errors[job.folder] = error
        assert len(errors) == 2 * len(runs)
        values = {"trainable_parameters": 1, "adapter_bytes": 1, "train_seconds": 1.0, "steps": 1}
        monkeypatch.setattr(Job, "result", lambda job: values | {"tasks": {"depth": {"abs_err": errors[job.folder]}}})
        for number, rest in enumerate(runs):
            found = read_result(plan, Cell(Entry("lora"), *rest), rates)
            assert found.delta_b == pytest.approx(100 * (0.5 + number) / (1.0 + number)), rest

    def test_unfinished(self, tmp_path):
        assert read_result(Plan(tmp_path, TASKS, {}), Cell(Entry("lora"), Amount(8), 0), {"lora": 1.0}) is None


@pytest.mark.slow
@pytest.mark.usefixtures("scenes_cache")
class TestRealRuns:
    def test_one_step_of_two_methods(self, base, tmp_path):
        options = ["--num-train", "4", "--num-test", "2", "--steps", "1", "--batch-size", "2", "--tasks", "depth"]
        options += ["--methods", "talora", "--seeds", "0", "--no-tuning", "--base", base, "--rank", "2", "--jobs", "2"]
        assert script.main([*options, "--output-dir", str(tmp_path / "out"), "--num-threads", "1"]) == 0
        decoder, talora = read(tmp_path)["results"]
        assert talora["tasks"]["depth"].keys() == decoder["tasks"]["depth"].keys() == {"abs_err", "rel_err", "rmse"}
        assert (
            talora["delta_b"] == pytest.approx(pt.delta_b(talora["tasks"], decoder["tasks"]))
            and decoder["delta_b"] == 0
        )
        assert not list((tmp_path / "out").rglob("checkpoints"))

    def test_a_failing_run_is_named_with_the_last_line_of_its_log(self, tmp_path):
        job = Job(tmp_path / "run", ("--base", str(tmp_path / "nowhere"), "--steps", "1"))
        (failure,) = run_if_missing("runs", [job], 1, 1)
        assert re.search(r"run: the training script ended with code 2, see .*log.txt: error: .*nowhere", failure)
        assert job.result() is None
