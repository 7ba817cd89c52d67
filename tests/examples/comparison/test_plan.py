"""Which runs a comparison makes."""

import pytest
import training.options
from comparison import one_run
from comparison.methods import METHODS, Entry
from comparison.plan import Amount, Cell, Plan, check_fields, count_parameters, matching_ranks
from small_models import make_sam2

import peft_talora as pt

TASKS = ("depth", "normals")


def option(job, name):
    return job.arguments[job.arguments.index(name) + 1]


def given_to(job):
    """What the training script makes of a run's arguments."""
    return training.options.parse_args(one_run.make_parser().parse_known_args(job.arguments)[1])


class TestPlan:
    plan = Plan("out", TASKS, {"talora": 4})

    def test_every_number_has_a_folder_of_its_own(self, tmp_path):
        plan, folders = Plan(tmp_path, TASKS, {}), []
        for entry in (*map(Entry, METHODS), Entry("talora", 8), Entry("lora", 8)):
            for rate in (1e-3, 1e-4):
                for amount in (Amount(16), Amount(64), Amount(16, one_task_each=True)):
                    for rest in ((0, "test"), (1, "test"), (0, "validation"), (0, "test", 2)):
                        folders += [
                            j.folder for j in plan.jobs(Cell(entry, amount, *rest), {entry.name: rate}).values()
                        ]
        # one LoRA per task has two
        assert len(folders) == len(set(folders)) == (len(METHODS) + 2 + 2) * 2 * 3 * 4

    def test_arguments(self, tmp_path):
        plan = Plan(tmp_path, TASKS, {"talora": 4}, ("--steps", "7"))
        rates = {"decoder": 0.02, "talora": 0.03, "full": 0.04, "lora_per_task": 0.05}
        (job,) = plan.jobs(Cell(Entry("talora"), Amount(16, one_task_each=True), 5, "validation"), rates).values()
        expected = {"--method": "talora", "--seed": "5", "--num-train": "16", "--evaluate-on": "validation", "--steps": "7",
                    "--decoder-lr": "0.02", "--lr": "0.03", "--rank": "4", "--one-task-each": "depth", "--tasks": "depth"}  # fmt: skip
        assert {name: option(job, name) for name in expected} == expected
        assert job.arguments[-2:] == TASKS
        (job,) = plan.jobs(Cell(Entry("full"), Amount(16), 5), rates).values()
        assert option(job, "--lr") == option(job, "--norm-lr") == "0.04" and "--rank" not in job.arguments
        assert "--targets" not in job.arguments
        (job,) = plan.jobs(Cell(Entry("talora", 8), Amount(16), 5), rates).values()
        assert (
            option(job, "--rank") == "8"
            and option(job, "--targets") == "all"
            and option(job, "--layers") == "shared-half"
        )
        (job,) = plan.jobs(Cell(Entry("talora_unshared", 8), Amount(16), 5), rates | {"talora_unshared": 0.1}).values()
        assert option(job, "--layers") == "all" and option(job, "--targets") == "qkv"
        (job,) = plan.jobs(Cell(Entry("talora_last_half"), Amount(16), 5), {"talora_last_half": 0.1}).values()
        assert option(job, "--layers") == "last-half" and option(job, "--method") == "talora"
        (job,) = plan.jobs(Cell(Entry("lora_all"), Amount(16), 5), {"lora_all": 0.1}).values()
        assert option(job, "--targets") == "all" and option(job, "--lr") == "0.1"
        parts = plan.jobs(Cell(Entry("lora_per_task"), Amount(16), 5), rates)
        assert [(task, job.arguments[-2:]) for task, job in parts.items()] == [(t, ("--tasks", t)) for t in TASKS]

    def test_images_labelled_for_one_task_are_seen_as_often_in_one_model_as_in_several(self, tmp_path):
        plan, amount = Plan(tmp_path, TASKS, {}, steps=7), Amount(16, one_task_each=True)
        (joint,) = plan.jobs(Cell(Entry("lora"), amount, 0), {"lora": 0.1}).values()
        own = plan.jobs(Cell(Entry("lora_per_task"), amount, 0), {"lora_per_task": 0.1})
        assert option(joint, "--steps") == "14" and all("--steps" not in job.arguments for job in own.values())

    def test_ranks_with_as_many_parameters(self, base, recwarn):
        # two layers of 32 -> 96: LoRA has 128 r, TA-LoRA 128 r + r r 4 and 4 for each task
        sam = pt.msam.loading.load_sam(base)
        config = sam.config.vision_config
        width, tasks = config.hidden_size, ("a", "b", "c")
        talora = 4 * width * 16 + 16 * 16 * 4 + 3 * 4
        ranks = matching_ranks(base, 16, tasks)
        # ranks are tried for their number of parameters alone: nobody is to be warned of how such an adapter would start
        assert not [warning for warning in recwarn if "TALoraConfig" in str(warning.message)]
        assert ranks["talora_unshared"] == 16 and ranks["convlora"] == 3 and not {"decoder", "full"} & set(ranks)
        assert ranks["lora"] == round(talora / (4 * width)) and ranks["lora_per_task"] == round(
            talora / (4 * width) / 3
        )
        target = config.num_hidden_layers * talora
        for name in ranks.keys() - {"convlora"}:
            counts = [
                count_parameters(sam, METHODS[name], tasks, rank)
                for rank in range(ranks[name] - 1, ranks[name] + 2)
                if rank
            ]
            nearest = count_parameters(sam, METHODS[name], tasks, ranks[name])
            assert abs(nearest - target) == min(abs(number - target) for number in counts), name

    def test_ranks_on_another_family(self, tmp_path):
        # Hiera: seven blocks of their own widths, so that an equal number of parameters is a sum over them
        sam = make_sam2()
        sam.save_pretrained(tmp_path)
        widths = [(m.in_features, m.out_features) for n, m in sam.named_modules() if n.endswith("attn.qkv")]
        assert len(widths) == 7 and len(set(widths)) > 4
        ranks, tasks = matching_ranks(str(tmp_path), 4, ("a", "b", "c")), ("a", "b", "c")
        talora = sum(4 * (d + k) + 4 * 4 * 4 + 3 * 4 for d, k in widths)
        assert count_parameters(sam, METHODS["talora_unshared"], tasks, 4) == talora
        each = sum(map(sum, widths))
        assert ranks["lora"] == round(talora / each) and ranks["lora_per_task"] == round(talora / each / 3)
        # the last half of the blocks has most of them: Hiera grows wider
        wide = sum(4 * (d + k) + 4 * 4 * 4 + 3 * 4 for d, k in widths[3:])
        assert count_parameters(sam, METHODS["talora_last_half"], tasks, 4) == wide
        # three of the seven have one update for all tasks: one slice of G, and one row of U3 with one entry
        shared = talora - sum(4 * 4 * 3 + 3 * 4 - 1 for _ in widths[:3])
        assert count_parameters(sam, METHODS["talora_qkv"], tasks, 4) == shared
        assert set(ranks) == METHODS.keys() - {"decoder", "full"} and ranks["convlora_equal"] > 1
        # five tasks have a slice of G each, and one for all
        talora = sum(4 * (d + k) + 4 * 4 * 6 + 5 * 6 for d, k in widths)
        assert count_parameters(sam, METHODS["talora_unshared"], tuple("abcde"), 4) == talora

    def test_fields_of_its_own_go_to_the_runs_of_a_row(self, tmp_path):
        entry = Entry.parse("talora:8:init_weights=lora:scaling=1")
        plan = Plan(tmp_path, TASKS, {"talora": 4}, ("--steps", "7"), 7)
        (job,) = plan.jobs(Cell(entry, Amount(8), 0), {str(entry.line): 0.1}).values()
        given = given_to(job)
        assert given.config == {"init_weights": "lora", "scaling": 1} and given.rank == 8
        assert job.folder.parts[-3:-1] == ("talora-8-init_weights=lora-scaling=1", "rate-0.1")
        assert entry.label == "TA-LoRA, r=8, init_weights=lora, scaling=1"

    @pytest.mark.parametrize(
        ("row", "config"),
        [
            ("talora", {"init_weights": "half", "scaling": 1.4}),
            ("talora:scaling=1", {"init_weights": "half", "scaling": 1}),
            ("talora:init_weights=split", {"init_weights": "split"}),
            ("lora", {}),
            ("convlora", {}),
        ],
    )
    def test_runs_say_the_start_that_the_script_would_choose(self, tmp_path, row, config):
        """A folder with runs of another version's start is not taken for the same."""
        entry = Entry.parse(row)
        plan = Plan(tmp_path, TASKS, {}, (), 7)
        for job in plan.jobs(Cell(entry, Amount(8), 0), {str(entry.line): 0.1}).values():
            given = given_to(job)
            assert given.config == config

    @pytest.mark.parametrize(
        ("row", "targets"), [("talora", "all"), ("talora_qkv", "qkv"), ("talora_unshared", "qkv")]
    )
    def test_a_row_can_say_which_layers_are_shared(self, tmp_path, row, targets):
        entry = Entry.parse(f"{row}:shared_layers=[0,1,2,3]")
        plan = Plan(tmp_path, TASKS, {}, (), 7)
        (job,) = plan.jobs(Cell(entry, Amount(8), 0), {str(entry.line): 0.1}).values()
        given = given_to(job)
        assert given.config["shared_layers"] == [0, 1, 2, 3] and given.targets == targets

    def test_fields_are_checked_before_any_run(self):
        check_fields([Entry.parse("talora:scaling=1"), Entry.parse("lora:use_dora=true"), Entry("decoder")])
        check_fields([Entry.parse("talora:shared_layers=[0,1,2,3]")])
        with pytest.raises(ValueError, match=r"scalign=1: TALoraConfig has no such field.*did you mean scaling"):
            check_fields([Entry("talora"), Entry.parse("talora:scalign=1")])
        with pytest.raises(ValueError, match=r"`num_experts` must be .*got 0"):
            check_fields([Entry.parse("convlora:num_experts=0")])
        with pytest.raises(ValueError, match="bias=some"):
            check_fields([Entry.parse("lora:bias=some")])

    def test_other_fields_have_a_learning_rate_of_their_own_and_other_ranks_have_not(self, tmp_path):
        plan, rates = Plan(tmp_path, TASKS, {}), {"talora": 0.1, "talora-scaling=1": 0.2}
        for text, rate in (
            ("talora", "0.1"),
            ("talora:8", "0.1"),
            ("talora:scaling=1", "0.2"),
            ("talora:8:scaling=1", "0.2"),
        ):
            (job,) = plan.jobs(Cell(Entry.parse(text), Amount(8), 0), rates).values()
            assert option(job, "--lr") == rate
