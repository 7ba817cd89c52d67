"""Runs of the training script as processes of their own: what is finished is not run again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from peft_talora.saving.directory import written_aside

SCRIPT = Path(__file__).parents[1] / "train_multitask.py"
# of train_multitask.py; they change nothing that is measured
GOING_ON = ("--resume", "latest", "--checkpoint-every", "100", "--keep-checkpoints", "1", "--baseline", "none")


@dataclass(frozen=True)
class Job:
    """A run of the training script: its folder, and the arguments that say what is trained."""

    folder: Path
    arguments: tuple[str, ...]

    def result(self) -> dict | None:
        """The finished run's metrics.json; None where it is not finished.

        Raises:
            ValueError: The folder has a run with other arguments.
        """
        record = self.folder / "arguments.json"
        if record.is_file():
            earlier = json.loads(record.read_text())
            if earlier != list(self.arguments):
                raise ValueError(
                    f"{self.folder} has a run with other arguments: {' '.join(earlier)}; now they are "
                    f"{' '.join(self.arguments)}. Remove it, or choose another --output-dir."
                )
        metrics = self.folder / "metrics.json"
        return json.loads(metrics.read_text()) if metrics.is_file() else None

    def run(self, threads: int | None) -> dict:
        """Train, or go on with training, unless it is finished: metrics.json.

        Raises:
            RuntimeError: The script failed; the message names its log and has the last line of it.
        """
        finished = self.result()
        if finished is not None:
            return finished
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_aside(self.folder) as aside:
            (aside / "arguments.json").write_text(json.dumps(self.arguments) + "\n")
        command = [sys.executable, str(SCRIPT), *self.arguments, *GOING_ON, "--output-dir", str(self.folder)]
        if threads is not None:
            command += ["--num-threads", str(threads)]
        log = self.folder / "log.txt"
        with log.open("a") as stream:
            code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
        if code != 0:
            lines = log.read_text(errors="replace").strip().splitlines() or ["it is empty"]
            raise RuntimeError(f"{self.folder}: the training script ended with code {code}, see {log}: {lines[-1]}")
        # what a finished run goes on from is of no use any more
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return self.result()


def run_all(jobs: Iterable[Job], at_once: int, threads: int | None, done: Callable[[Job, int, int], None]) -> None:
    """Run all jobs, some at once. One that fails does not stop the others.

    Args:
        jobs: What to run.
        at_once: How many processes at once.
        threads: CPU threads of each; None leaves it to the script.
        done: Is called with a job that was not finished before, how many are done, and how many there are.

    Raises:
        RuntimeError: Some failed; the message names them all.
        ValueError: A folder has a run with other arguments.
    """
    missing = [job for job in dict.fromkeys(jobs) if job.result() is None]
    failures = []
    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(job.run, threads): job for job in missing}
        try:
            for number, future in enumerate(as_completed(running), start=1):
                try:
                    future.result()
                except RuntimeError as error:
                    failures.append(str(error))
                done(running[future], number, len(missing))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise RuntimeError("\n".join(failures))
