"""Ranks on a Ray cluster: Ray Train starts them, sets the variables of a launcher, and starts them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lensmith.core.errors import ConfigError, RunError, UserError
from lensmith.parallel.exits import CONSEQUENCES


def fit(
    work: Callable[[dict[str, Any]], None],
    given: dict[str, Any],
    *,
    ranks: int,
    gpus: bool,
    restarts: int,
    timeout: float,
    storage: str,
    name: str,
) -> None:
    """Call `work(given)` in `ranks` processes of the cluster that is open. Both travel there pickled.

    Args:
        storage: where Ray keeps its own state of the run: a folder or URL that all machines reach.

    Raises the `UserError` of the rank that failed first of its own, ConfigError RAY for a cluster that is too small.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    _require("GPU" if gpus else "CPU", ranks)
    trainer = TorchTrainer(
        work,
        train_loop_config=given,
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=gpus),
        run_config=RunConfig(name=name, storage_path=storage, failure_config=FailureConfig(max_failures=restarts)),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=int(timeout)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _first(error) from error


def _require(kind: str, ranks: int) -> None:
    """Ray would wait for ever for machines that do not come."""
    import ray

    there = int(ray.cluster_resources().get(kind, 0))
    if there < ranks:
        raise ConfigError("RAY", f"the cluster has {there} {kind}s and parallel.ranks is {ranks}",
                          remedy="ask for fewer ranks, or add machines before")  # fmt: skip


def _first(error: BaseException) -> UserError:
    found = list(_user_errors(error))
    own = [e for e in found if e.code not in CONSEQUENCES]
    if found:
        return (own or found)[0]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return RunError("RAY", f"the ranks failed: {lines[-1]}", remedy="the lines above and Ray's logs say more")


def _user_errors(error: BaseException) -> Iterator[UserError]:
    """Ours, in whatever Ray wrapped them."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    if isinstance(error, UserError):
        yield error
    inner = [getattr(error, name, None) for name in ("cause", "_base_exc", "__cause__")]
    for below in (*failures.values(), *inner):
        if isinstance(below, BaseException) and below is not error:
            yield from _user_errors(below)
