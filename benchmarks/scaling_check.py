"""`lensmith plan` against runs with one and two ranks on this machine: step time, memory, bytes handed to collectives.

    python benchmarks/scaling_check.py [SETTING ...] [--folder DIR]

The model of `memory_check.py` (101 million parameters), 6 conversations a step in rows of up to 2,048 tokens (LoRA 16
in rows of up to 4,096, as there), four steps of which the first is not counted. Rank variables are set as a launcher
sets them, and each rank calls `lensmith train`'s own function with one thread. Seconds are processor time of the first
rank, which has the dearest row of each step: the wall clock, which is printed beside, measures what else runs on the
machine. Memory is the peak above what the imports leave, of the rank with most. Bytes are counted where torch hands
them to gloo, in a run of their own, and must be equal. The network's rate is measured first, with two processes that
sum 64 MiB.

oneDNN keeps what it compiled for each shape of a matrix product, up to 1,024 of them, and every row has shapes of its
own: with bfloat16 on AMX that grew by 50 MiB a step, which no prediction counts. Here it keeps 32.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import memory_check
import runs

from lensmith.report.terminal import Terminal

FP32, BF16 = {"preset": "fp32"}, {"preset": "bf16"}
FSDP2 = {"engine": {"kind": "fsdp2"}}
LORA: dict[str, Any] = {"precision": BF16, "tune": {"kind": "lora"}, "batch": {"samples": 16, "device_tokens": 4096}}
SETTINGS: dict[str, dict[str, Any]] = {
    "full, fp32": {"precision": FP32},
    "LoRA, bf16": LORA,
    "full, fp32, FSDP2": {"precision": FP32, "parallel": FSDP2},
    "LoRA, bf16, FSDP2": {**LORA, "parallel": FSDP2},
}
STEPS, PASSED_OVER = 4, 1
KINDS = {"allreduce_": "all_reduce", "allgather_": "flags", "_allgather_base_": "all_gather",
         "_reduce_scatter_base_": "reduce_scatter"}  # fmt: skip


def values(name: str, folder: Path, output: Path) -> dict[str, Any]:
    batch = {"samples": 6, "device_tokens": 2048}
    train = {"max_steps": STEPS, "threads": 1}
    data = {"cache": str(folder / "cache"), "train": str(folder / "long.jsonl"), "max_tokens": 2048, "workers": 0}
    same = {"batch": batch, "train": train, "data": data, "log": {"every_steps": 1}, "vision_cache": {"enabled": False}}
    same |= {"save": {"every_minutes": None}, "guard": {"watch_every": 0, "check_every": 0}}
    run = runs.located(output, folder / "qwen2_5_vl", folder / "long.jsonl", **runs.merge(same, SETTINGS[name]))
    return run.run.model_dump(mode="json") | {"output": str(output)}


# -- what is measured -------------------------------------------------------------------------------------------------


class Handed(TorchDispatchMode):
    """Bytes that this rank hands to collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (kind := KINDS.get(func.overloadpacket.__name__)):
            given = args[0] if kind == "all_reduce" else args[1]
            given = [given] if isinstance(given, torch.Tensor) else given
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in given)
        return func(*args, **(kwargs or {}))


class Watching(Terminal):
    """Notes time and bytes at every step."""

    def __init__(self, handed: Handed):
        super().__init__("quiet", err=io.StringIO())
        self.handed, self.seen = handed, []

    def event(self, name: str, message: str = "", **fields: Any) -> None:
        if name == "step":
            self.seen.append((time.process_time(), time.perf_counter(), dict(self.handed.bytes)))


def one_rank(file: Path, *, count: bool) -> None:
    """A rank: prints what it needed as JSON."""
    import peft  # noqa: F401
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

    import lensmith.recipe.session  # noqa: F401
    from lensmith.recipe.run import load_run
    from lensmith.recipe.train import train

    before = memory_check.memory("VmRSS")
    handed = Handed()
    watching = Watching(handed)
    with handed if count else nullcontext():  # seeing every operation takes an eighth of the time
        train(load_run(file), terminal=watching)
    found: dict[str, Any] = {"memory": memory_check.memory("VmHWM") - before}
    if watching.seen:
        (cpu, wall, sent), (last_cpu, last_wall, last_sent) = watching.seen[PASSED_OVER - 1], watching.seen[-1]
        steps = len(watching.seen) - PASSED_OVER
        found |= {"cpu": (last_cpu - cpu) / steps, "wall": (last_wall - wall) / steps}
        found["sent"] = {kind: (last_sent[kind] - sent.get(kind, 0)) / steps for kind in last_sent}
    print(json.dumps(found))


def network(rank: int) -> None:
    """Prints bytes per second that a rank sends in a sum over two."""
    dist.init_process_group("gloo")
    x = torch.ones(16 << 20)
    times: list[float] = []
    for _ in range(6):
        begin = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - begin)
    if rank == 0:
        print(json.dumps(x.numel() * 4 / min(times)))
    dist.destroy_process_group()


def in_ranks(ranks: int, *arguments: str) -> list[Any]:
    """What each rank printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started: list[subprocess.Popen[str]] = []
    for rank in range(ranks):
        variables = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
                     "ONEDNN_PRIMITIVE_CACHE_CAPACITY": 32}  # fmt: skip
        given = os.environ | {name: str(value) for name, value in variables.items()}
        started.append(
            subprocess.Popen([sys.executable, __file__, *arguments], env=given, stdout=subprocess.PIPE, text=True)
        )
    told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a rank failed")
    return [json.loads(text.splitlines()[-1]) for text in told if text.strip()]


# -- what is predicted ------------------------------------------------------------------------------------------------


def predicted(file: Path, ranks: int, rate: float) -> dict[str, Any]:
    """By the first of as many processes as there will be ranks: the machine is measured as busy as it will be."""
    command = [sys.executable, "-m", "lensmith", "plan", str(file), "--device", "cpu", "--ranks", str(ranks), "--json",
               "--network", str(rate / 1e9)]  # fmt: skip
    given = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=given) for _ in range(ranks)]
    told, *_ = [process.communicate()[0] for process in started]
    events = [json.loads(line) for line in told.splitlines()]
    engine = json.loads(file.read_text())["parallel"]["engine"]["kind"] if ranks > 1 else "local"
    return next(e for e in events if e["event"] == "row" and e["engine"] == engine)


def handed(want: dict[str, Any]) -> dict[str, int]:
    """What was predicted for the steps that count: what goes with micro-batches, by theirs."""
    own = want["of_steps"][PASSED_OVER:]
    by_batch = sum(own) / len(own) / want["micro_batches"]
    return {k: round(v * by_batch) if k in ("all_gather", "reduce_scatter") else v for k, v in want["sent"].items()}


def check(name: str, ranks: int, folder: Path, rate: float) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "run.yaml"
        file.write_text(json.dumps(values(name, folder, Path(scratch) / "out")))
        want = predicted(file, ranks, rate)
        told = in_ranks(ranks, "--rank", str(file))
        again = Path(scratch) / "again.yaml"
        again.write_text(json.dumps(values(name, folder, Path(scratch) / "again")))
        counted = in_ranks(ranks, "--rank", str(again), "--count")[0] if ranks > 1 else told[0]
    first, memory = told[0], max(rank["memory"] for rank in told)
    step, sent = want["step_seconds"] / first["cpu"] - 1, {k: int(v) for k, v in counted["sent"].items() if v}
    room, same = want["memory_bytes"] / memory - 1, sent == handed(want)
    good = abs(step) <= 0.25 and abs(room) <= 0.15 and same
    print(f"{name:22} {ranks:5} {want['step_seconds']:9.2f} {first['cpu']:8.2f} {step:+7.1%} {first['wall']:8.2f} "
          f"{want['memory_bytes'] >> 20:9,} {memory >> 20:8,} {room:+7.1%} {sum(sent.values()):14,} "
          f"{'equal' if same else handed(want)} {'' if good else '<-'}", flush=True)  # fmt: skip
    if not same:
        print(f"   sent {sent}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help=f"of: {', '.join(SETTINGS)}")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--network", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        return one_rank(args.rank, count=args.count)
    if args.network:
        return network(int(os.environ["RANK"]))
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        memory_check.make_base(folder / "qwen2_5_vl", "qwen2_5_vl")
        if not (folder / "long.jsonl").is_file():
            memory_check.make_data(folder)
        rate = in_ranks(2, "--network")[0]
        print(f"network {rate / 1e9:.2f} GB/s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
        print(f"{'setting':22} {'ranks':>5} {'predicted':>9} {'measured':>8} {'':7} {'wall':>8} "
              f"{'MiB':>9} {'measured':>8} {'':7} {'bytes sent':>14}")  # fmt: skip
        found = [check(name, int(ranks), folder, rate) for name in args.settings or SETTINGS
                 for ranks in args.ranks.split(",") if int(ranks) > 1 or "parallel" not in SETTINGS[name]]  # fmt: skip
    sys.exit(0 if all(found) else 1)


if __name__ == "__main__":
    main()
