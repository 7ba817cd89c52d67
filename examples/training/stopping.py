"""How a run ends before its time: Ctrl-C and SIGTERM, mistakes, numbers that are not finite."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from .folder import NotWritten

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: what was received, and what is left of the run."""

    def __init__(self, received: int, left: str = "nothing was trained yet"):
        super().__init__(f"interrupted by {signal.Signals(received).name}: {left}")
        self.received = received


class Diverged(Exception):
    """Numbers that are not finite: the run cannot come back from them."""


class Interruption:
    """Waits for Ctrl-C and SIGTERM: training ends after the step that it is in, anything else at once.

    A second signal ends training at once, too.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.training = False
        self._former: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        # only the main thread may, and only there they arrive
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.training or self.received is not None:
            raise Interrupted(number, "at once, without a checkpoint" if self.training else "it was not training")
        self.received = number

    def agreed(self, accelerator: Accelerator) -> int | None:
        """The signal that any of the processes received, or None; all of them ask at the same step."""
        if accelerator.num_processes == 1:
            return self.received
        received = torch.tensor(self.received or 0, device=accelerator.device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return received.item() or None


def on_main_process(accelerator: Accelerator, do: Callable[[], Any]) -> Any:
    """What `do` gives on the main process, on all of them; where it fails, it fails on all of them."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [do()]
        except (ValueError, OSError) as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def check_finite(accelerator: Accelerator, norm: float, losses: dict[str, float]) -> None:
    """Refuse gradients that are not finite; all processes have the same norm, each its own losses.

    Raises:
        Diverged: Naming the tasks whose loss is not finite.
    """
    if math.isfinite(norm):
        return
    found = dict(gather_object([(name, loss) for name, loss in losses.items() if not math.isfinite(loss)]))
    if found:
        raise Diverged(", ".join(f"the loss of {name} is {loss}" for name, loss in found.items()))
    # float16's scaler leaves out steps whose gradients overflowed
    if accelerator.scaler is None:
        raise Diverged(f"the losses are finite, the gradients are not (their norm is {norm})")


def run_script(main: Callable[[], int | None]) -> int:
    """Call `main`; what a user can cure is said in one line, by the first process. The exit code.

    It is 2 for mistakes, 1 for numbers that are not finite and for memory that does not suffice, and 128 + its number for a signal, as
    shells have it. Anything else is a fault of ours and shows its traceback, as everything does under ``python -X dev``.
    """
    if sys.flags.dev_mode:
        return main() or 0
    try:
        return main() or 0
    except Interrupted as error:
        return _end(str(error), 128 + error.received)
    except (Diverged, NotWritten, torch.OutOfMemoryError) as error:
        return _end(f"error: {error}", 1)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        return _end(f"error: {error}", 2)
    except KeyboardInterrupt:
        return _end("interrupted", 128 + signal.SIGINT)


def _end(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":
        # below a progress bar, not behind it
        tqdm.write(" ".join(message.split()), file=sys.stderr)
    return code
