"""Neither the number of threads nor that of processes decides what a run of the script gives."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import train_multitask as script
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("scenes_cache")]

STEPS, IMAGES = 40, 2
OPTIONS = ["--camera", "thermal", "--image-size", "32", "--num-train", "8", "--num-test", "4", "--steps", str(STEPS)]
OPTIONS += ["--baseline", "none", "--checkpoint-every", "1000"]
# several runs in one process, for the sake of the time that a start takes
RUNS = """
import json, sys
import train_multitask as script

script.Accelerator.end_training = lambda self: None  # keep the process group
script.draw_predictions = lambda *given: None
script.EPS = float(sys.argv[1])
for argv in json.loads(sys.argv[2]):
    script.main(argv)
"""


def start(folder, processes, threads, eps=script.EPS):
    """Train with each number of threads, in a fresh process (or some): the adapters' folders."""
    outputs = [folder / f"{processes}-processes-{number}-threads-{eps}" for number in threads]
    batch = ["--batch-size", str(IMAGES // processes)]
    runs = [
        [*OPTIONS, *batch, "--num-threads", str(number), "--output-dir", str(output)]
        for number, output in zip(threads, outputs, strict=True)
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program = folder / f"runs-{processes}.py"
    program.write_text(RUNS)
    command = [*(launcher if processes > 1 else []), str(program), str(eps), json.dumps(runs)]
    # passive: where other programs use the cores, threads that wait actively take ten times as long
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(script.__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return outputs


def drift(output, expected):
    """How far two runs are apart: U2 (the norm of the difference over the norm), and the depth error (relative)."""
    own, others = (load_file(folder / "adapter_model.safetensors") for folder in (output, expected))
    names = [name for name in others if "talora_U2" in name]
    apart = sum((own[name] - others[name]).square().sum() for name in names)
    weights = apart / sum(others[name].square().sum() for name in names)
    own, others = (json.loads((folder / "metrics.json").read_text())["tasks"] for folder in (output, expected))
    return weights.sqrt().item(), abs(own["depth"]["abs_err"] / others["depth"]["abs_err"] - 1)


def test_threads_and_processes_agree(tmp_path):
    """Measured with two seeds: threads U2 1e-6 and 2e-4, the depth error 0 and 8e-5; processes 0.004 and 0.12, 0.002 and 0.2.

    With other layers, on another machine, threads were up to 4e-3 and 1.3e-3 apart. With AdamW's usual eps of 1e-8 processes are 0.3 to
    0.6 apart in U2: rounding noise decides.
    """
    with ThreadPoolExecutor() as pool:
        (one, two), (processes,) = pool.map(partial(start, tmp_path), (1, 2), ([1, 2], [1]))
    for output, furthest, worst_error in ((two, 1e-2, 5e-3), (processes, 0.25, 0.25)):
        weights, depth_error = drift(output, one)
        assert weights < furthest and depth_error < worst_error, (output.name, weights, depth_error)
