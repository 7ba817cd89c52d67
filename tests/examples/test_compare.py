"""The comparison of methods: which runs it makes, and what it says of their numbers."""

import json
import math
import re
import shutil
import statistics

import compare as script
import numpy as np
import pytest
import training.options
from comparison import one_run
from comparison.jobs import Job, run_if_missing
from comparison.plan import (
    METHODS,
    RATE_FACTORS,
    ROWS,
    Amount,
    Entry,
    Plan,
    count_parameters,
    matching_ranks,
    split_common,
)
from comparison.rates import choose_rate
from comparison.report import difference, set_parameter_axis
from comparison.results import Result, half_width, interval, mean_and_spread, noise_of, paired_differences, read_result

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


class TestPlan:
    plan = Plan("out", TASKS, {"talora": 4})

    def test_every_number_has_a_folder_of_its_own(self, tmp_path):
        plan, folders = Plan(tmp_path, TASKS, {}), []
        for entry in (*map(Entry, METHODS), Entry("talora", 8), Entry("lora", 8)):
            for rate in (1e-3, 1e-4):
                for amount in (Amount(16), Amount(64), Amount(16, one_task_each=True)):
                    for cell in ((0, "test"), (1, "test"), (0, "validation"), (0, "test", 2)):
                        folders += [j.folder for j in plan.jobs(entry, {entry.name: rate}, amount, *cell).values()]
        # one LoRA per task has two
        assert len(folders) == len(set(folders)) == (len(METHODS) + 2 + 2) * 2 * 3 * 4

    def test_arguments(self, tmp_path):
        plan = Plan(tmp_path, TASKS, {"talora": 4}, ("--steps", "7"))
        rates = {"decoder": 0.02, "talora": 0.03, "full": 0.04, "lora_per_task": 0.05}
        (job,) = plan.jobs(Entry("talora"), rates, Amount(16, one_task_each=True), 5, "validation").values()
        expected = {"--method": "talora", "--seed": "5", "--num-train": "16", "--evaluate-on": "validation", "--steps": "7",
                    "--decoder-lr": "0.02", "--lr": "0.03", "--rank": "4", "--one-task-each": "depth", "--tasks": "depth"}  # fmt: skip
        assert {name: option(job, name) for name in expected} == expected
        assert job.arguments[-2:] == TASKS
        (job,) = plan.jobs(Entry("full"), rates, Amount(16), 5).values()
        assert option(job, "--lr") == option(job, "--norm-lr") == "0.04" and "--rank" not in job.arguments
        assert "--targets" not in job.arguments
        (job,) = plan.jobs(Entry("talora", 8), rates, Amount(16), 5).values()
        assert option(job, "--rank") == "8" and option(job, "--targets") == "qkv" and option(job, "--layers") == "all"
        (job,) = plan.jobs(Entry("talora_last_half"), {"talora_last_half": 0.1}, Amount(16), 5).values()
        assert option(job, "--layers") == "last-half" and option(job, "--method") == "talora"
        (job,) = plan.jobs(Entry("lora_all"), {"lora_all": 0.1}, Amount(16), 5).values()
        assert option(job, "--targets") == "all" and option(job, "--lr") == "0.1"
        parts = plan.jobs(Entry("lora_per_task"), rates, Amount(16), 5)
        assert [(task, job.arguments[-2:]) for task, job in parts.items()] == [(t, ("--tasks", t)) for t in TASKS]

    def test_images_labelled_for_one_task_are_seen_as_often_in_one_model_as_in_several(self, tmp_path):
        plan, amount = Plan(tmp_path, TASKS, {}, steps=7), Amount(16, one_task_each=True)
        (joint,) = plan.jobs(Entry("lora"), {"lora": 0.1}, amount, 0).values()
        own = plan.jobs(Entry("lora_per_task"), {"lora_per_task": 0.1}, amount, 0)
        assert option(joint, "--steps") == "14" and all("--steps" not in job.arguments for job in own.values())

    def test_ranks_with_as_many_parameters(self, base):
        # two layers of 32 -> 96: LoRA has 128 r, TA-LoRA 128 r + r r 4 and 4 for each task
        config = pt.msam.loading.load_sam(base).config.vision_config
        width, tasks = config.hidden_size, ("a", "b", "c")
        talora = 4 * width * 16 + 16 * 16 * 4 + 3 * 4
        ranks = matching_ranks(base, 16, tasks)
        assert ranks["talora"] == 16 and ranks["convlora"] == 3 and not {"decoder", "full"} & set(ranks)
        assert ranks["lora"] == round(talora / (4 * width)) and ranks["lora_per_task"] == round(
            talora / (4 * width) / 3
        )
        target = config.num_hidden_layers * talora
        for name in ranks.keys() - {"convlora"}:
            counts = [
                count_parameters(config, METHODS[name], tasks, rank)
                for rank in range(ranks[name] - 1, ranks[name] + 2)
                if rank
            ]
            nearest = count_parameters(config, METHODS[name], tasks, ranks[name])
            assert abs(nearest - target) == min(abs(number - target) for number in counts), name

    @pytest.mark.parametrize("text", ["magic", "talora:0", "talora:x", "talora:"])
    def test_impossible_methods(self, text, capsys):
        with pytest.raises(SystemExit):
            script.parse_args(["--methods", text])
        assert text.partition(":")[0] in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            (["--seed", "7"], "--seed"),
            (["--seed=7"], "--seed"),
            (["--see", "7"], "--seed"),
            (["--method=lora"], "--method"),
            (["--meth", "lora"], "--method"),
            (["--evaluate-on=validation"], "--evaluate-on"),
            (["--evaluate", "validation"], "--evaluate-on"),
            (["--one-task-each", "depth"], "--one-task-each"),
            (["--lr=0.1"], "--lr"),
            (["--targets", "all"], "--targets"),
            (["--layers", "last-half"], "--layers"),
            (["--decoder-l", "0.1"], "--decoder-lr"),
            (["--steps", "3", "--output-d", "x", "--resume", "latest"], "--resume"),
            (["--num-tr", "3"], "--max-train-images"),
        ],
    )
    def test_what_is_varied_cannot_be_given(self, arguments, name, capsys):
        with pytest.raises(SystemExit) as error:
            script.parse_args(arguments)
        message = capsys.readouterr().err
        assert error.value.code == 2 and message.count("\n") == 1
        assert f"{name} is what this script varies or decides" in message

    @pytest.mark.parametrize(
        "arguments", [["--stepz", "3"], ["--steps", "no"], ["--camera", "photo", "--dataset", "x"]]
    )
    def test_mistakes_in_options_of_the_training_script_are_told_before_a_run(self, arguments, capsys):
        with pytest.raises(SystemExit) as error:
            script.parse_args(arguments)
        message = capsys.readouterr().err
        assert error.value.code == 2 and message.count("\n") == 1 and message.startswith("compare.py: error: ")

    @pytest.mark.parametrize("start", [["--init-weights", "lora"], ["--init-weights=lora"], ["--init-w", "lora"]])
    def test_what_only_one_method_takes_goes_to_its_runs(self, tmp_path, start):
        args, rest = script.parse_args([*start, "--steps", "7"])
        common, special = split_common(rest, args.training)
        assert common == ("--steps", "7")
        plan = Plan(tmp_path, TASKS, {}, common, 7, special)
        for name in METHODS:
            arguments = next(iter(plan.jobs(Entry(name), {name: 0.1}, Amount(8), 0).values())).arguments
            assert ("--init-weights" in arguments) == (METHODS[name].method == "talora")
            assert one_run.make_parser().parse_known_args(arguments)[1]
            training.options.parse_args(one_run.make_parser().parse_known_args(arguments)[1])


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

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rate-seeds", "1", "1"], "--rate-seeds: one seed says nothing of the noise"),
            (["--noise", "2", "--num-threads", "2"], "--noise 2 is the number of threads that all runs have"),
        ],
    )
    def test_what_would_say_nothing(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            script.parse_args(arguments)
        assert message in capsys.readouterr().err

    def test_seeds(self):
        args, _ = script.parse_args([])
        assert (args.seeds, args.few_seeds, args.rate_seeds) == ([0, 1, 2, 3, 4], [0, 1, 2], [0, 1])
        assert script.parse_args(["--seeds", "7"])[0].rate_seeds == [7, 8]

    def test_amounts_that_there_are(self):
        args, _ = script.parse_args(["--few-labels", "--methods", "lora", "--seeds", "0"])
        amounts = {amount for _, amount, _ in script.cells(args, 100)}
        assert {str(amount) for amount in amounts} == {
            "100 images", "100 images, each labelled for one task", "16 images", "64 images",
        }  # fmt: skip

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
            "decoder": 4e-4, "lora": 5e-3, "lora_per_task": 5e-3, "talora": 0.013, "convlora": 8e-4, "full": 3e-4,
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
        assert lora.split(" | ")[3] == "**-13.5 ± 6.4**"
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

    def test_a_folder_with_another_run_is_not_taken_for_this_one(self, command):
        script.main([*command, "--methods", "talora", "--no-tuning"])
        with pytest.raises(ValueError, match=r"seed-3 has a run with other arguments.*--output-dir"):
            script.main([*command, "--methods", "talora", "--no-tuning", "--steps", "9"])

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


def make_result(name, seed, delta_b, threads=None):
    return Result(Entry(name), Amount(8), seed, 0.1, {}, 1, 1, 1, 1.0, delta_b, True, threads)


class TestNumbers:
    def test_mean_and_spread(self):
        assert mean_and_spread([1.0, 2.0, 6.0]) == (3.0, statistics.stdev([1, 2, 6]))
        assert mean_and_spread([5.0]) == (5.0, 0.0)

    def test_interval(self):
        # by hand: t is 4.303 with two degrees of freedom
        mean, half = interval([1.0, 2.0, 6.0])
        assert mean == 3.0 and half == pytest.approx(4.3027 * statistics.stdev([1, 2, 6]) / math.sqrt(3), rel=1e-4)
        assert interval([5.0]) == (5.0, math.inf)
        assert difference([1.0, 1.1, 0.9]) == "**+1.0 ± 0.2**" and difference([1.0, 2.0, 6.0]) == "+3.0 ± 6.6"
        assert difference([1.0]) == "+1.0 (one seed)" and difference([]) == "-"

    def test_interval_covers_the_mean_as_often_as_it_says(self):
        random = np.random.default_rng(0)
        found = [interval(list(random.normal(7.0, 2.0, 5))) for _ in range(2000)]
        assert 0.94 < sum(abs(mean - 7.0) <= half for mean, half in found) / 2000 < 0.96

    def test_noise_is_that_of_paired_differences(self):
        """What a seed does to all methods alike is no noise."""
        common, own = [10.0, -10.0, 0.0], {"lora": [0.0, 0.0, 0.0], "talora": [1.0, 2.0, 3.0]}
        results = [make_result(name, seed, common[seed] + own[name][seed]) for name in own for seed in range(3)]
        noise = noise_of(results, Amount(8))
        assert (noise.seeds, noise.spread, noise.shifts) == (3, pytest.approx(1.0), ())
        assert noise.size == pytest.approx(half_width(1.0, 3))
        repeated = [make_result("talora", seed, common[seed] + own["talora"][seed] + 9.0, 2) for seed in range(3)]
        assert noise_of(results, Amount(8), repeated).size == pytest.approx(9.0)
        assert noise_of([r for r in results if r.seed == 0], Amount(8)) is None

    @pytest.mark.parametrize(
        ("gains", "chosen"),
        [
            # better by a little in both seeds, but the seeds differ by more
            ({1.0: {0: 1.0, 1: 2.0}, 2.0: {0: 1.5, 1: 2.5}}, 1.0),
            ({1.0: {0: 1.0, 1: 1.1}, 2.0: {0: 1.5, 1: 1.7}}, 2.0),
            ({1.0: {0: 1.0, 1: 1.1}, 2.0: {0: 0.0, 1: 3.0}}, 1.0),
            ({0.5: {0: 4.0, 1: 4.1}, 1.0: {0: 1.0, 1: 1.1}, 2.0: {0: 5.0, 1: 5.1}}, 2.0),
            ({0.5: {0: 4.0, 1: 4.1}, 1.0: {0: 1.0, 1: 1.1}, 2.0: {0: 5.0}}, 0.5),
            ({0.5: {0: -4.0, 1: -4.1}, 1.0: {0: 1.0, 1: 1.1}, 2.0: {}}, 1.0),
            # one seed says nothing
            ({1.0: {0: 1.0}, 2.0: {0: 5.0}}, 1.0),
            # the default failed
            ({0.5: {0: 4.0, 1: 4.1}, 1.0: {}, 2.0: {0: 5.0, 1: 2.0}}, 0.5),
            ({0.5: {}, 1.0: {}}, 1.0),
        ],
    )
    def test_a_rate_is_taken_for_more_than_noise(self, gains, chosen):
        assert choose_rate(1.0, gains) == chosen

    def test_differences_are_paired_by_seed(self, tmp_path, fake_runs):
        plan, amount, rates = Plan(tmp_path, TASKS, {}), Amount(8), {"decoder": 4e-4, "lora": 5e-3, "talora": 0.013}
        results = []
        for name, seeds in (("decoder", (1, 2, 3)), ("lora", (3, 1)), ("talora", (1, 2, 3))):
            for seed in seeds:
                for job in plan.jobs(Entry(name), rates, amount, seed).values():
                    job.run(None)
                results.append(read_result(plan, Entry(name), rates, amount, seed))
        found = paired_differences(results, Entry("talora"), Entry("lora"), amount)
        assert found == pytest.approx([21 - 10, 23 - 10])

    def test_delta_b_is_over_the_baseline_of_the_same_seed_amount_and_split(self, tmp_path, monkeypatch):
        """Every run has an error of its own, so that any other baseline gives another number."""
        plan, rates = Plan(tmp_path, TASKS, {}), {"decoder": 4e-4, "lora": 5e-3}
        errors = {}
        runs = [(Amount(8), 1, "test"), (Amount(8), 2, "test"), (Amount(16), 1, "test"),
                (Amount(8, one_task_each=True), 1, "test"), (Amount(8), 1, "validation")]  # fmt: skip
        for number, cell in enumerate(runs):
            for name, error in (("decoder", 1.0 + number), ("lora", 0.5)):
                (job,) = plan.jobs(Entry(name), rates, *cell).values()
                errors[job.folder] = error
        assert len(errors) == 2 * len(runs)
        values = {"trainable_parameters": 1, "adapter_bytes": 1, "train_seconds": 1.0, "steps": 1}
        monkeypatch.setattr(Job, "result", lambda job: values | {"tasks": {"depth": {"abs_err": errors[job.folder]}}})
        for number, cell in enumerate(runs):
            found = read_result(plan, Entry("lora"), rates, *cell)
            assert found.delta_b == pytest.approx(100 * (0.5 + number) / (1.0 + number)), cell

    def test_unfinished(self, tmp_path):
        assert read_result(Plan(tmp_path, TASKS, {}), Entry("lora"), {"lora": 1.0}, Amount(8), 0) is None


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
