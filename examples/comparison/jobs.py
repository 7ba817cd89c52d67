"""Runs of the training script as processes of their own: what is finished is not run again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from peft_talora.saving.directory import written_aside

SCRIPT = Path(__file__).parent / "one_run.py"
# of the training script; they change nothing that is measured. The folder has files of ours: its log and its arguments
GOING_ON = (
    "--resume",
    "latest",
    "--overwrite",
    "--checkpoint-every",
    "100",
    "--keep-checkpoints",
    "1",
    "--baseline",
    "none",
)


def values_of(arguments: Iterable[str]) -> dict[str, list[str]]:
    """{option: its values}: options in another order are the same run, and of one that is there twice the last counts."""
    options: dict[str, list[str]] = {}
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            values = options[name] = [value] if equals else []
        else:
            values.append(word)
    return options


@dataclass(frozen=True)
class Job:
    """A run of the training script.

    Attributes:
        folder: Where everything of it goes.
        arguments: What is trained.
        threads: CPU threads, where the run is there to see what they change.
    """

    folder: Path
    arguments: tuple[str, ...]
    threads: int | None = None

    @property
    def conditions_file(self) -> Path:
        return self.folder / "conditions.json"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def is_finished(self) -> bool:
        return self.metrics_file.is_file()

    @property
    def alone(self) -> bool:
        """Whether no other run of a comparison was beside it, so that its time says something."""
        return self.conditions_file.is_file() and json.loads(self.conditions_file.read_text())["runs_at_once"] == 1

    def result(self) -> dict | None:
        """The finished run's metrics.json; None where it is not finished.

        Raises:
            ValueError: The folder has a run with other arguments.
        """
        record = self.folder / "arguments.json"
        if record.is_file():
            earlier = json.loads(record.read_text())
            if values_of(earlier) != values_of(self.arguments):
                raise ValueError(
                    f"{self.folder} has a run with other arguments: {' '.join(earlier)}; now they are "
                    f"{' '.join(self.arguments)}. Remove it, or choose another --output-dir."
                )
        return json.loads(self.metrics_file.read_text()) if self.is_finished else None

    def run(self, threads: int | None, at_once: int = 1) -> dict:
        """Train, or resume training, unless it is finished: metrics.json.

        Args:
            threads: CPU threads, unless the run has a number of its own; None leaves it to the script.
            at_once: How many runs there are at once.

        Raises:
            RuntimeError: The script failed; the message names its log and has the last line of it.
        """
        finished = self.result()
        if finished is not None:
            return finished
        self.folder.mkdir(parents=True, exist_ok=True)
        # what was interrupted began beside others
        at_once = max(at_once, 2 if self.conditions_file.is_file() and not self.alone else 1)
        threads = self.threads or threads
        with written_aside(self.folder) as aside:
            (aside / "arguments.json").write_text(json.dumps(self.arguments) + "\n")
            (aside / self.conditions_file.name).write_text(
                json.dumps({"runs_at_once": at_once, "threads": threads}) + "\n"
            )
        command = [sys.executable, str(SCRIPT), *self.arguments, *GOING_ON, "--output-dir", str(self.folder)]
        if threads is not None:
            command += ["--num-threads", str(threads)]
        log = self.folder / "log.txt"
        with log.open("a") as stream:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
        if code != 0:
            lines = log.read_text(errors="replace").strip().splitlines() or ["it is empty"]
            raise RuntimeError(f"{self.folder}: the training script ended with code {code}, see {log}: {lines[-1]}")
        # what a finished run would resume from is of no use any more
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return self.result()


def run_if_missing(what: str, jobs: Iterable[Job], at_once: int, threads: int | None) -> list[str]:
    """Run what is not finished, some at once, and say how far it is: what failed. A failure does not stop the others.

    Args:
        what: What the jobs are for.
        jobs: They may contain the same run twice.
        at_once: How many processes at once.
        threads: CPU threads of each; None leaves it to the script.

    Raises:
        ValueError: A folder has a run with other arguments.
    """
    missing = [job for job in dict.fromkeys(jobs) if job.result() is None]
    failures, started = [], time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(job.run, threads, min(at_once, len(missing))): job for job in missing}
        try:
            for number, future in enumerate(as_completed(running), start=1):
                try:
                    future.result()
                except RuntimeError as error:
                    failures.append(str(error))
                    print(error, file=sys.stderr)
                seconds = time.perf_counter() - started
                left = seconds / number * (len(missing) - number)
                print(f"{what}: {number}/{len(missing)}, {short(running[future].folder)}; {seconds / 60:.0f} min, about "
                      f"{left / 60:.0f} min left", flush=True)  # fmt: skip
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def short(folder: Path) -> str:
    """A run's folder without what all runs have in common."""
    return str(folder).rpartition(f"{os.sep}runs{os.sep}")[2]
