"""How runs end: signals, mistakes, numbers that are not finite."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from training.folder import NotWritten
from training.stopping import Diverged, Interrupted, Interruption, check_finite, on_main_process, run_script

ONE_PROCESS = SimpleNamespace(num_processes=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
class TestSignals:
    def test_training_is_told_and_goes_on_to_the_end_of_its_step(self, number):
        with Interruption() as interruption:
            interruption.training = True
            assert interruption.agreed(ONE_PROCESS) is None
            os.kill(os.getpid(), number)
            assert interruption.agreed(ONE_PROCESS) == number
            with pytest.raises(Interrupted, match="without a checkpoint"):
                os.kill(os.getpid(), number)

    def test_what_is_not_training_ends_at_once(self, number):
        with Interruption(), pytest.raises(Interrupted, match=number.name):
            os.kill(os.getpid(), number)

    def test_afterwards_signals_do_what_they_did(self, number):
        former = signal.getsignal(number)
        with Interruption():
            assert signal.getsignal(number) != former
        assert signal.getsignal(number) == former


class TestNumbers:
    def accelerator(self, scaler=None):
        return SimpleNamespace(scaler=scaler)

    @pytest.mark.usefixtures("fresh_accelerator")
    def test_tasks_are_named(self):
        Accelerator(cpu=True)
        check_finite(self.accelerator(), 3.0, {"depth": 1.0})
        with pytest.raises(Diverged, match=r"^the loss of depth is nan, the loss of edges is inf$"):
            check_finite(self.accelerator(), float("nan"), {"depth": float("nan"), "a": 1.0, "edges": float("inf")})
        with pytest.raises(Diverged, match="losses are finite, the gradients are not"):
            check_finite(self.accelerator(), float("inf"), {"depth": 1.0})
        # float16's scaler leaves such a step out
        check_finite(self.accelerator(scaler=object()), float("inf"), {"depth": 1.0})


class TestExitCodes:
    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (ValueError("no column\n  'image'"), 2, "error: no column 'image'\n"),
            (FileNotFoundError("there is no such file"), 2, "error: there is no such file\n"),
            (ImportError("--report-to wandb: pip install wandb"), 2, "error: --report-to wandb: pip install wandb\n"),
            (NotImplementedError("FSDP"), 2, "error: FSDP\n"),
            (NotWritten("the disk at / is full"), 1, "error: the disk at / is full\n"),
            (Diverged("step 3: the loss of depth is nan"), 1, "error: step 3: the loss of depth is nan\n"),
            (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: CUDA out of memory\n"),
            (Interrupted(signal.SIGTERM, "step-3 is complete"), 143, "interrupted by SIGTERM: step-3 is complete\n"),
            (KeyboardInterrupt(), 130, "interrupted\n"),
        ],
    )
    def test_one_line(self, error, code, line, capsys, monkeypatch):
        def main():
            raise error

        assert run_script(main) == code
        assert capsys.readouterr().err == line
        monkeypatch.setenv("RANK", "1")
        assert run_script(main) == code and capsys.readouterr().err == ""

    def test_faults_of_ours_show_where(self):
        with pytest.raises(KeyError):
            run_script(lambda: {}["x"])

    def test_success(self):
        assert run_script(lambda: None) == 0 and run_script(lambda: 1) == 1


@pytest.mark.usefixtures("fresh_accelerator")
def test_what_fails_on_the_main_process_fails(capsys):
    accelerator = Accelerator(cpu=True)
    assert on_main_process(accelerator, lambda: 5) == 5

    def refuse():
        raise FileExistsError("not ours")

    with pytest.raises(FileExistsError, match="not ours"):
        on_main_process(accelerator, refuse)
