"""The training script, on a tiny SAM for a few steps."""

import math
from functools import partial
from itertools import chain, islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_multitask as script
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from shared_folder import PHOTOS
from small_training import double_batch, gradients
from training.data import load_data
from training.options import ADAPTER_LR, METHODS, parse_args
from training.run import Run

from peft_talora import MSamForMultiTask, TALoraLayer
from peft_talora.msam.tasks import parse_tasks

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.usefixtures("scenes_cache")
def test_scenes_are_seen_by_the_camera_that_was_asked_for(arguments):
    from scenes import render_scene, scene_seed

    def first_image(*more):
        args = parse_args(arguments("unused", "--num-train", "1", "--num-test", "1", *more))
        return np.asarray(load_data(args, 32).train[0]["image"])

    for camera in ("photo", "thermal", "ultrasound"):
        expected = render_scene(scene_seed("train", 0), 32, camera)["image"]
        np.testing.assert_array_equal(first_image("--camera", camera), expected)
    # photos are what the small SAM knows
    np.testing.assert_array_equal(first_image(), render_scene(scene_seed("train", 0), 32, "ultrasound")["image"])


class TestLayers:
    """Which layers of the encoder get an adapter: of three blocks with four linear layers each."""

    def adapted(self, base, *more):
        args = parse_args(["--base", base, "--rank", "2", *more])
        model = script.make_model(args, args.method, parse_tasks({"depth": {"kind": "depth"}}))
        names = {n for n, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)}
        assert all(name.startswith("vision_encoder.layers.") for name in names)
        return {name.removeprefix("vision_encoder.layers.") for name in names}

    @pytest.mark.parametrize("method", ["talora", "convlora", "lora"])
    def test_every_adapter_has_the_same(self, base, method):
        blocks = ("0.", "1.", "2.")
        all_linear = {block + name for block in blocks for name in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")}
        every_qkv = {f"{block}attn.qkv" for block in blocks}
        assert self.adapted(base, "--method", method) == (all_linear if method == "talora" else every_qkv)
        assert self.adapted(base, "--method", method, "--targets", "qkv") == every_qkv
        assert self.adapted(base, "--method", method, "--targets", "all") == all_linear
        last_half = self.adapted(base, "--method", method, "--targets", "qkv", "--layers", "last-half")
        assert last_half == {"1.attn.qkv", "2.attn.qkv"}
        both = self.adapted(base, "--method", method, "--targets", "all", "--layers", "last-half")
        assert both == {name for name in all_linear if not name.startswith("0.")}

    def test_a_shared_half_has_one_update_for_all_tasks(self, base):
        args = parse_args(["--base", base, "--rank", "2", "--layers", "shared-half"])
        model = script.make_model(
            args, args.method, parse_tasks({"depth": {"kind": "depth"}, "edges": {"kind": "binary"}})
        )
        rows = {
            name.split("layers.")[1].partition(".")[0]: len(layer.talora_U3["default"])
            for name, layer in model.named_modules()
            if isinstance(layer, TALoraLayer)
        }
        assert rows == {"0": 1, "1": 2, "2": 2}

    def test_shared_layers_of_a_persons_own(self, base, data_folder, tmp_path):
        args = parse_args(["--base", base, "--rank", "2", "--config", "shared_layers=[0,2]"])
        model = script.make_model(args, args.method, parse_tasks({"depth": {"kind": "depth"}}))
        shared = [layer.is_shared["default"] for layer in model.modules() if isinstance(layer, TALoraLayer)]
        # of each block four linear layers
        assert shared == [True] * 4 + [False] * 4 + [True] * 4
        with pytest.raises(ValueError, match=r"\[7\] are not: those are \[0, 1, 2\]"):
            script.main(["--base", base, "--dataset", data_folder, "--config", "shared_layers=[7]", "--baseline", "train",
                         "--output-dir", str(tmp_path / "run")])  # fmt: skip
        assert not (tmp_path / "run/baseline.json").exists()

    def test_another_choice_is_another_run(self, data_folder, tmp_path, base):
        def identity(*more):
            args = parse_args(["--base", base, "--dataset", data_folder, *more])
            data = load_data(args, 32)
            return Run(args, Accelerator(cpu=True), data, None, args.method, "", tmp_path).identity()

        plain = identity()
        assert (
            plain
            != identity("--targets", "qkv")
            != identity("--layers", "last-half")
            != identity("--layers", "all")
            != plain
            != identity("--no-flip")
        )


@pytest.mark.slow
@pytest.mark.usefixtures("scenes_cache")
class TestRuns:
    @pytest.mark.parametrize("method", METHODS)
    def test_leaves_everything_and_the_adapter_loads_again(self, base, run, tmp_path, method):
        output = tmp_path / "run"
        metrics = run(output, "--method", method, "--checkpoint-every", "1")
        assert metrics["method"] == method and metrics["steps"] == 2
        assert list(metrics["tasks"]) == ["semantic", "depth", "normals"]
        values = [value for task in metrics["tasks"].values() for value in task.values()]
        assert all(math.isfinite(value) for value in values)
        assert (metrics["baseline"] is None) == (method == "decoder") == (metrics["delta_b"] is None)
        weights = output / "adapter_model.safetensors"
        assert metrics["adapter_bytes"] == weights.stat().st_size > metrics["trainable_parameters"] * 4
        assert Image.open(output / "predictions.png").size[0] > 300
        for step in (1, 2):
            checkpoint = output / "checkpoints" / f"step-{step}"
            state = torch.load(checkpoint / "training_state.pt", weights_only=True)
            assert state["scheduler"]["last_epoch"] == step
        last = MSamForMultiTask.from_adapter(checkpoint).eval()
        loaded = MSamForMultiTask.from_adapter(output, base_model=base).eval()
        pixels = torch.randn(1, 3, 32, 32)
        for task, logits in loaded(pixels).logits.items():
            torch.testing.assert_close(logits, last(pixels).logits[task])

    def test_equal_seeds_give_equal_numbers_and_a_baseline_file_is_used(self, run, tmp_path):
        first = run(tmp_path / "a", "--baseline", "none")
        again = run(tmp_path / "b", "--baseline", str(tmp_path / "a/metrics.json"))
        assert first["tasks"] == again["tasks"] == again["baseline"] and again["delta_b"] == 0.0
        assert run(tmp_path / "c", "--baseline", "none", "--seed", "1")["tasks"] != first["tasks"]

    def test_sequential_passes_accumulation_checkpointing_and_evaluations(self, run, tmp_path):
        options = ["--task-pass", "sequential", "--grad-accumulation", "2", "--gradient-checkpointing"]
        metrics = run(tmp_path / "run", *options, "--eval-every", "1", "--tasks", "depth", "saliency", "edges")
        assert list(metrics["tasks"]) == ["depth", "saliency", "edges"]

    def test_the_published_decoder_and_the_recipes_crops(self, base, run, tmp_path):
        run(tmp_path / "run", "--channel-mode", "prompt", "--crop-scales", "1", "1.5", "--baseline", "none")
        loaded = MSamForMultiTask.from_adapter(tmp_path / "run", base_model=base).get_base_model()
        assert loaded.config.channel_mode == "prompt" and loaded.no_mask_embeds["normals"].weight.shape[0] == 3

    def test_pushes_what_it_saved(self, run, tmp_path, monkeypatch):
        pushed = []
        monkeypatch.setattr(script.pt, "push_adapter", lambda model, hub_id, **more: pushed.append((hub_id, more)))
        metrics = run(tmp_path / "run", "--baseline", "none", "--push-to-hub", "me/rooms")
        assert pushed == [("me/rooms", {"metrics": metrics["tasks"], "dataset": "scenes"})]

    @pytest.mark.parametrize("backward", ["backward_joint", "backward_sequential"])
    def test_auxiliary_losses_are_accumulated_like_the_others(self, trainer, backward, monkeypatch):
        regularised = partial(script.pt.TALoraConfig, ortho_reg_weight=0.1)
        monkeypatch.setattr(script.pt, "TALoraConfig", regularised)
        model, rows = trainer()
        plugin = GradientAccumulationPlugin(2, sync_with_dataloader=False)
        accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        for part in range(2):
            with accelerator.accumulate(model):
                getattr(script, backward)(accelerator, model, double_batch(rows[part::2]), None)
        actual = gradients(model)
        model.zero_grad()
        output = model(**double_batch(rows))
        auxiliary = script.pt.auxiliary_loss(model)
        assert auxiliary > 0.1
        output.loss.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("task_pass", ["joint", "sequential"])
    @pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[0, 1], [5, 3], [4, 2]]])
    def test_partly_labelled_images_count_alike_in_every_forward_of_a_step(
        self, trainer, partly_labelled_folder, task_pass, parts, monkeypatch
    ):
        """A step with several forwards has the gradients of one forward of all their images."""
        options = ("--dataset", partly_labelled_folder, "--task-pass", task_pass)
        model, _ = trainer(*options)
        args = parse_args(["--base", model.get_base_model().name_or_path, *options])
        data = load_data(args, 32)
        processor = script.pt.MSamProcessor.from_model(model.get_base_model())
        dataset = script.MultiTaskDataset(data.train, data.tasks, processor)
        monkeypatch.setattr(script, "update", lambda *_: None)
        found = []
        for rows in ([list(range(6))], parts):
            model.zero_grad()
            plugin = GradientAccumulationPlugin(len(rows), sync_with_dataloader=False)
            accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
            batches = [double_batch([dataset[row] for row in part]) for part in rows]
            losses = script.train_step(accelerator, args, model, None, None, batches)
            found.append((losses, gradients(model)))
        (losses, expected), (parts_losses, actual) = found
        assert losses["normals"] > 0.1 and parts_losses == pytest.approx(losses)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-11)

    def test_accumulated_sequential_passes_give_the_gradients_of_one_joint_pass(self, trainer):
        model, rows = trainer()
        joint = Accelerator(cpu=True)
        losses = script.backward_joint(joint, model, double_batch(rows), None)
        expected = gradients(model)
        assert losses.keys() == {"semantic", "depth", "normals"}
        assert any(gradient.abs().max() > 0 for name, gradient in expected.items() if "talora_U2" in name)
        for backward in (script.backward_joint, script.backward_sequential):
            for halves in (1, 2):
                model.zero_grad()
                plugin = GradientAccumulationPlugin(halves, sync_with_dataloader=False)
                accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
                for part in range(halves):
                    with accelerator.accumulate(model):
                        backward(accelerator, model, double_batch(rows[part::halves]), None)
                assert accelerator.sync_gradients
                actual = gradients(model)
                assert actual.keys() == expected.keys()
                for name, gradient in expected.items():
                    torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("method", METHODS)
    def test_sequential_passes_share_a_trunk_exactly(self, trainer, method, monkeypatch):
        model, rows = trainer("--method", method)
        accelerator, passes = Accelerator(cpu=True), []
        trunk = model.get_base_model().encode_trunk
        monkeypatch.setattr(model.get_base_model(), "encode_trunk", lambda pixels: passes.append(1) or trunk(pixels))
        actual = {}
        for backward in (script.backward_joint, script.backward_sequential):
            model.zero_grad()
            # Conv-LoRA's noise
            torch.manual_seed(0)
            backward(accelerator, model, double_batch(rows), None)
            actual[backward] = gradients(model)
        assert len(passes) == 1
        expected, sequential = actual.values()
        assert sequential.keys() == expected.keys() and any(gradient.abs().max() > 0 for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(sequential[name], gradient, rtol=1e-9, atol=1e-12)

    def test_bfloat16_runs_and_keeps_the_weights_in_float32(self, base, run, tmp_path):
        metrics = run(tmp_path / "run", "--mixed-precision", "bf16", "--baseline", "none", "--method", "convlora")
        assert all(math.isfinite(value) for task in metrics["tasks"].values() for value in task.values())
        loaded = MSamForMultiTask.from_adapter(tmp_path / "run", base_model=base)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}

    @pytest.mark.skipif(not PHOTOS.exists(), reason="the real photos (../shared/data) are not here")
    def test_real_partly_labelled_photos(self, run, tmp_path):
        metrics = run(tmp_path / "run", "--dataset", str(PHOTOS), "--baseline", "train")
        assert list(metrics["tasks"]) == ["semantic", "depth", "normals"]
        # one of four photos is held out for the test: a task that it has no label of has no number
        values = [value for task in metrics["tasks"].values() for value in task.values() if value is not None]
        assert values and all(map(math.isfinite, values))


class TestOptimizer:
    """Which parameter has which learning rate, and in which share of the steps it climbs."""

    RATES = ["--lr", "0.1", "--decoder-lr", "0.2", "--norm-lr", "0.3", "--embedding-lr", "0.4"]
    DECODER, EMBEDDING, NORM, ADAPTER = (0.2, 0.05), (0.4, 0.05), (0.3, 0.4), (0.1, 0.4)

    def rates(self, base, *options):
        args = parse_args(["--base", base, "--weight-decay", "0.5", *options])
        model = script.make_model(args, args.method, parse_tasks({"depth": {"kind": "depth"}}))
        groups = script.make_optimizer(model, args).param_groups
        assert {(group["weight_decay"], group["eps"]) for group in groups} == {(0.5, 1e-5)}
        found = {id(p): (group["lr"], group["warmup"]) for group in groups for p in group["params"]}
        assert len(found) == sum(len(group["params"]) for group in groups)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert {id(p) for p in trained.values()} == found.keys()
        return {name: found[id(p)] for name, p in trained.items()}

    @pytest.mark.parametrize("method", METHODS)
    def test_every_trained_parameter_is_in_the_group_of_its_module(self, base, method):
        rates = self.RATES if method in ADAPTER_LR else self.RATES[2:]
        adapters = {
            "talora": ".talora_",
            "convlora": ".convlora_",
            "lora": ".lora_",
            "full": ".mlp.lin1.",
            "decoder": None,
        }
        seen = set()
        for name, rate in self.rates(base, "--method", method, *rates).items():
            if "mask_decoders.depth" in name:
                # the decoder's own norms are no norms of the encoder
                expected = self.DECODER
            elif "no_mask_embeds" in name:
                expected = self.EMBEDDING
            elif "layer_norm" in name:
                expected = self.NORM
            else:
                expected = self.ADAPTER
                assert "vision_encoder" in name and (method == "full" or adapters[method] in name), name
            assert rate == expected, name
            seen.add(expected)
            seen.update(part for part in (".layer_norm_final_attn.", adapters[method]) if part and part in name)
        encoder = set() if method == "decoder" else {self.NORM, self.ADAPTER, adapters[method]}
        assert seen == {self.DECODER, self.EMBEDDING, ".layer_norm_final_attn."} | encoder

    def test_rates_that_are_not_given(self, base):
        for method, rate in {"talora": 5e-3, "convlora": 2e-3, "lora": 5e-3, "full": 3e-4}.items():
            assert set(self.rates(base, "--method", method).values()) == {
                (1e-3, 0.05), (1e-2, 0.05), (1e-3, 0.4), (rate, 0.4)
            }  # fmt: skip

    @pytest.mark.parametrize(("gradient", "expected"), [([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])])
    def test_gradients_are_clipped_to_norm_one(self, gradient, expected):
        model, accelerator = torch.nn.Linear(2, 1, bias=False), Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        before = model.weight.detach().clone()
        model.weight.grad = torch.tensor([gradient])
        script.update(accelerator, model, optimizer, scheduler, {})
        torch.testing.assert_close(before - model.weight, torch.tensor([expected]))
        assert model.weight.grad is None and scheduler.scheduler.last_epoch == 1


class TestEvaluation:
    def prepare(self, base, data_folder, *options):
        args = parse_args(
            ["--base", base, "--dataset", data_folder, "--tasks", "depth", "--batch-size", "2", *options]
        )
        data = load_data(args, 32)
        model = script.make_model(args, args.method, data.tasks)
        return args, model, data, script.pt.MSamProcessor.from_model(model.get_base_model())

    def test_neither_noise_nor_dropout_and_training_goes_on(self, base, data_folder):
        args, model, data, processor = self.prepare(base, data_folder, "--method", "convlora")
        for name, parameter in model.named_parameters():
            if "convlora" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        loader = script.make_test_loader(data.test, data.tasks, processor, args)
        pixels = torch.randn(1, 3, 32, 32)
        assert not torch.equal(model.train()(pixels).logits["depth"], model(pixels).logits["depth"])

        def evaluate():
            return script.evaluate(Accelerator(cpu=True), model, loader, processor, data.tasks)[0]

        first = evaluate()
        assert model.training and model.get_base_model().training
        assert first == evaluate()
        model.eval()
        assert first == evaluate() and not model.training

    def test_processes_see_every_image_once(self, base, data_folder):
        args, _, data, processor = self.prepare(base, data_folder)
        loader = script.make_test_loader(data.test, data.tasks, processor, args)
        even = script.make_accelerator(args).even_batches
        shares = [prepare_data_loader(loader, num_processes=2, process_index=i, even_batches=even) for i in range(2)]
        assert [[len(batch["pixel_values"]) for batch in share] for share in shares] == [[2], [1]]


class CountingRows(torch.utils.data.Dataset):
    """Rows that say which they are and in which epoch they were loaded."""

    def __init__(self, number):
        self.number, self.epoch, self.loaded = number, 0, 0

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        self.loaded += 1
        return {"pixel_values": torch.tensor([self.epoch, index]), "labels": {}}

    def set_epoch(self, epoch):
        self.epoch = epoch


class TestDataOrder:
    """Batches of eleven rows, of which every epoch leaves out some."""

    def batches(self, count, size=2, processes=1, index=0, start=0, seed=3, rows=11):
        dataset = CountingRows(rows)
        accelerator = SimpleNamespace(num_processes=processes, process_index=index, device="cpu")
        args = SimpleNamespace(batch_size=size, seed=seed, num_workers=0)
        batches = islice(script.endless(accelerator, dataset, args, start), count)
        return [batch["pixel_values"].tolist() for batch in batches], dataset

    def test_every_epoch_has_every_row_at_most_once_and_an_order_of_its_own(self):
        batches, _ = self.batches(15)
        epochs = [list(chain(*batches[first : first + 5])) for first in (0, 5, 10)]
        for number, epoch in enumerate(epochs):
            rows = [row for _, row in epoch]
            assert {e for e, _ in epoch} == {number} and len(set(rows)) == 10 and set(rows) <= set(range(11))
        assert len({tuple(row for _, row in epoch) for epoch in epochs}) == 3
        assert self.batches(15)[0] == batches != self.batches(15, seed=4)[0]

    @pytest.mark.parametrize("start", [1, 4, 5, 7, 10, 14])
    def test_starts_anywhere_without_loading_what_was_before(self, start):
        batches, _ = self.batches(15)
        state = torch.get_rng_state()
        rest, dataset = self.batches(15 - start, start=start)
        assert rest == batches[start:]
        assert dataset.loaded == 2 * len(rest)
        # whatever the model draws afterwards does not depend on how often an iterator was made
        assert torch.equal(torch.get_rng_state(), state)

    def test_processes_share_the_batches_of_one(self):
        whole, _ = self.batches(12, size=4)
        parts = [self.batches(12, size=2, processes=2, index=index)[0] for index in (0, 1)]
        assert [first + second for first, second in zip(*parts, strict=True)] == whole

    def test_few_rows(self):
        assert len(self.batches(1, size=8, rows=3)[0][0]) == 3
        with pytest.raises(ValueError, match="1 rows to train on, too few for 2 processes"):
            self.batches(1, processes=2, rows=1)


def write_parquet(folder, rows):
    import datasets

    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


def test_each_group_climbs_in_its_own_time_and_all_fall():
    groups = [{"params": [torch.zeros(1)], "lr": lr, "warmup": warmup} for lr, warmup in ((1.0, 0.05), (2.0, 0.4))]
    optimizer = torch.optim.SGD(groups)
    scheduler, rates = script.make_scheduler(optimizer, 100), []
    for _ in range(100):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    expected = {
        0: (0.2, 0.05),
        3: (0.8 * 0.97, 0.2 * 0.97),
        4: (0.96, 0.25 * 0.96),
        39: (0.61, 1.22),
        70: (0.3, 0.6),
        99: (0.01, 0.02),
    }
    for step, values in expected.items():
        assert rates[step] == pytest.approx(values), step


def test_the_schedule_does_not_depend_on_the_number_of_processes():
    def rates(processes):
        optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 1.0, "warmup": 0.4}])
        scheduler, found = script.make_scheduler(optimizer, 10, processes), []
        for _ in range(10):
            found += scheduler.get_last_lr()
            optimizer.step()
            for _ in range(processes):
                scheduler.step()
        return found

    assert rates(3) == pytest.approx(rates(1))


class TestBadInput:
    def test_dataset_without_image(self, arguments, tmp_path):
        data = write_parquet(tmp_path / "data", [{"picture": 1, "depth": [[1.0]]}])
        with pytest.raises(ValueError, match=r"no column 'image'.*picture"):
            script.main(arguments(tmp_path / "run", "--dataset", data))

    def test_task_without_a_column(self, arguments, tmp_path):
        image = np.zeros((3, 8, 8), dtype=np.float32).tolist()
        data = write_parquet(tmp_path / "data", [{"image": image, "depth": [[[1.0] * 8] * 8]}])
        with pytest.raises(ValueError, match=r"task 'saliency' needs the column 'saliency'.*depth"):
            script.main(arguments(tmp_path / "run", "--dataset", data, "--tasks", "depth", "saliency"))

    def test_missing_checkpoint(self, arguments, tmp_path):
        missing = str(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            script.main(arguments(tmp_path / "run", "--base", missing))

    def test_missing_dataset(self, arguments, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing-here"):
            script.main(arguments(tmp_path / "run", "--dataset", str(tmp_path / "nothing-here")))

    def test_split_weights(self, arguments, tmp_path, monkeypatch):
        monkeypatch.setattr("training.launch.Accelerator.distributed_type", DistributedType.FSDP)
        with pytest.raises(NotImplementedError, match="FSDP splits the weights"):
            script.main(arguments(tmp_path / "run"))
