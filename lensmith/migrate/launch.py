"""How many ranks a run has: as the launcher says, or as LLaMA-Factory's command would start them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lensmith.core.errors import ConfigError

WITHOUT_EFFECT = {
    "DISABLE_VERSION_CHECK": "versions are pinned by the package",
    "FORCE_CHECK_IMPORTS": "versions are pinned by the package",
    "RECORD_VRAM": "peak memory is always reported",
    "LLAMAFACTORY_VERBOSITY": "use --quiet or --json",
    "OPTIM_TORCH": "the optimizer is torch's",
    "USE_V1": "there is one trainer",
    "MAX_CONCURRENT": "of the API server", "API_HOST": "of the API server", "API_PORT": "of the API server",
    "API_KEY": "of the API server", "API_MODEL_NAME": "of the API server", "GRADIO_SHARE": "of the web page",
    "GRADIO_SERVER_NAME": "of the web page", "GRADIO_SERVER_PORT": "of the web page",
    "RDZV_ID": "of torchrun's rendezvous; start torchrun yourself (docs/launchers.md)",
    "MIN_NNODES": "of torchrun's rendezvous; start torchrun yourself (docs/launchers.md)",
    "MAX_NNODES": "of torchrun's rendezvous; start torchrun yourself (docs/launchers.md)",
}  # fmt: skip
"""Variables that LLaMA-Factory reads and that change nothing here."""

REFUSED = {
    "USE_MCA": "Megatron is not used here; see docs/parallel.md",
    "USE_MEGATRON_BRIDGE": "Megatron is not used here; see docs/parallel.md",
    "USE_KT": "KTransformers is not used here",
    "USE_MODELSCOPE_HUB": "models and data come from folders or the Hugging Face Hub",
    "USE_OPENMIND_HUB": "models and data come from folders or the Hugging Face Hub",
}
MARKS = {"IMAGE_PLACEHOLDER": "<image>", "VIDEO_PLACEHOLDER": "<video>", "AUDIO_PLACEHOLDER": "<audio>",
         "DOWNSAMPLE_MODE": "16x"}  # fmt: skip
"""Variables of which only LLaMA-Factory's default fits."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Ranks of the run in all; `here`, what this command starts by itself; `torchrun`, the command for several nodes
    that takes its place."""

    ranks: int = 1
    here: int = 1
    why: str = "one process"
    restarts: int = 0
    torchrun: tuple[str, ...] = ()
    ray: bool = False


def launch_of(env: Mapping[str, str], devices: Callable[[], int], asked: int | None, ray_workers: int) -> Launch:
    """`asked`: an override of parallel.ranks. `devices`: counts this machine's GPUs, asked only where it matters.

    Raises `ConfigError` MIGRATE for variables that name an engine lensmith does not have.
    """
    _refuse(env)
    if "RANK" in env and "WORLD_SIZE" in env:
        ranks = _number(env, "WORLD_SIZE", 1)
        return Launch(ranks, 1, f"WORLD_SIZE={ranks}")
    if on(env, "USE_RAY"):
        return Launch(ray_workers, ray_workers, f"USE_RAY, ray_num_workers {ray_workers}", ray=True)
    if asked is not None:
        return Launch(asked, asked, f"parallel.ranks={asked}")
    found = devices()
    if not on(env, "FORCE_TORCHRUN") and found <= 1:
        return Launch()
    here = _number(env, "NPROC_PER_NODE", max(1, found))
    nodes, restarts = _number(env, "NNODES", 1), _number(env, "MAX_RESTARTS", 0)
    if nodes == 1:
        return Launch(here, here, f"{here} on this machine", restarts)
    options = {
        "nnodes": str(nodes), "node_rank": env.get("NODE_RANK", "0"), "nproc_per_node": str(here),
        "master_addr": env.get("MASTER_ADDR", "127.0.0.1"), "master_port": env.get("MASTER_PORT", "29500"),
    }  # fmt: skip
    command = (sys.executable, "-m", "torch.distributed.run", *(f"--{k}={v}" for k, v in options.items()))
    return Launch(here * nodes, 1, f"NNODES={nodes} x NPROC_PER_NODE={here}", torchrun=(*command, "-m", "lensmith"))


def without_effect(env: Mapping[str, str]) -> Sequence[str]:
    """Variables that are set and change nothing, with why."""
    return [f"{name} changes nothing here: {why}" for name, why in WITHOUT_EFFECT.items() if name in env]


def on(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "0").lower() in ("true", "y", "1")


def _refuse(env: Mapping[str, str]) -> None:
    for name, why in REFUSED.items():
        if on(env, name):
            raise ConfigError("MIGRATE", f"the environment has {name}={env[name]}: {why}", remedy=f"unset {name}")
    for name, mark in MARKS.items():
        if env.get(name, mark) != mark:
            raise ConfigError("MIGRATE", f"the environment has {name}={env[name]}: only {mark} is known",
                              remedy=f"unset {name}; data has {mark}")  # fmt: skip


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    if not text.isdecimal() or (int(text) < 1 and name != "MAX_RESTARTS"):
        raise ConfigError("MIGRATE", f"the environment has {name}={text}: not a number of processes",
                          remedy=f"set {name} to a whole number")  # fmt: skip
    return int(text)
