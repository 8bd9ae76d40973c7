"""The example files of clusters and the commands of docs/launchers.md: parsed, and run with two local processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "examples" / "clusters"
PAGE = (ROOT / "docs" / "launchers.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, qwen25: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    values: dict[str, Any] = {
        "model": {"path": str(qwen25)},
        "data": {"train": str(tiny.make_chat(folder / "chat", 24)), "max_tokens": 512, "workers": 0},
        "batch": {"samples": 4, "device_tokens": 512}, "tune": {"kind": "lora", "rank": 2},
        "precision": {"preset": "fp32"}, "schedule": {"kind": "constant", "warmup_steps": 0},
        "train": {"epochs": None, "max_steps": 2, "device": "cpu", "threads": 1}, "output": "out",
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.fixture
def work(run_file: Path, tmp_path: Path) -> Path:
    """A working folder with the run file, and nothing of an earlier run."""
    shutil.copy(run_file, tmp_path / "run.yaml")
    return tmp_path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(work: Path, **more: str) -> dict[str, str]:
    """With commands of the test's own before others: `srun`, `scontrol`."""
    path = f"{work / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **own, **more}


def command(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def trained(work: Path) -> None:
    """Two ranks made the run: both wrote their share of the checkpoint."""
    summary = json.loads((work / "out" / "summary.json").read_text())
    assert summary["outcome"] == "finished" and summary["steps"] == 2
    shares = {p.name for p in (Path(summary["checkpoint"]) / "state").glob("*-of-00002.safetensors")}
    assert {"training-00001-of-00002.safetensors", "training-00002-of-00002.safetensors"} <= shares


def test_slurm(work: Path) -> None:
    """Two machines with a rank each: the `srun` of this test runs its command once for either."""
    command(work / "bin", "scontrol", 'test "$*" = "show hostnames node[1-2]" && echo localhost')
    command(work / "bin", "srun", 'test "$1" = --kill-on-bad-exit=1 && shift\n"$@" & "$@" & wait -n && wait -n')
    port_of_job = free_port() - 20000
    about = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
             "SLURM_JOB_ID": str(port_of_job if 0 <= port_of_job < 20000 else 12345)}  # fmt: skip
    done = subprocess.run(
        ["bash", str(CLUSTERS / "slurm.sbatch")], cwd=work, env=environment(work, **about), capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    trained(work)


def test_slurm_options_are_known() -> None:
    lines = (CLUSTERS / "slurm.sbatch").read_text().splitlines()
    options = {line.split("--", 1)[1].partition("=")[0] for line in lines if line.startswith("#SBATCH --")}
    known = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "signal", "requeue", "open-mode"}
    assert options == known and lines[0] == "#!/bin/bash"


def test_kubernetes(work: Path) -> None:
    """Two pods with a rank each, with the variables that the operator sets."""
    job = yaml.safe_load((CLUSTERS / "kubernetes_pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    port, pods = str(free_port()), list[subprocess.Popen[str]]()
    for rank, role in enumerate(("Master", "Worker")):
        assert replicas[role]["replicas"] == 1
        (container,) = replicas[role]["template"]["spec"]["containers"]
        own = {entry["name"]: entry["value"] for entry in container["env"]}
        assert own == {"MACHINES": "2", "RANKS_EACH": "8"} and container["resources"]["limits"]["nvidia.com/gpu"] == 8
        about = {**own, "RANKS_EACH": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        pods.append(
            subprocess.Popen([*container["command"], *container["args"]], cwd=work, text=True, stderr=subprocess.PIPE,
                             env=environment(work, **about, RANK=str(rank)))
        )  # fmt: skip
    said = [pod.communicate(timeout=240)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], said
    trained(work)


def shown(word: str) -> list[str]:
    """The command of the page that begins with a word."""
    (found,) = re.findall(
        rf"^({word} (?:.*\\\n)*.*)$", "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)), re.M
    )
    return found.replace("\\\n", " ").split()


def test_torchrun(work: Path) -> None:
    words = shown("torchrun")
    swaps = {"--nnodes=2": "--nnodes=1", "--nproc-per-node=8": "--nproc-per-node=2",
             "--rdzv-endpoint=first:29500": f"--rdzv-endpoint=localhost:{free_port()}"}  # fmt: skip
    assert set(swaps) <= set(words)
    done = subprocess.run(
        [swaps.get(w, w) for w in words], cwd=work, env=environment(work), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("checkpoint ") == 1
    trained(work)


def test_deepspeed(work: Path) -> None:
    """Without other machines its launcher takes those devices that it is told of."""
    pytest.importorskip("deepspeed")
    words = shown("deepspeed")
    assert words[1] == "--hostfile=hostfile"
    words[1:2] = ["--num_gpus=2", f"--master_port={free_port()}"]
    done = subprocess.run(words, cwd=work, env=environment(work), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    trained(work)
