"""The index made on a Ray cluster: each file by a task of Ray Data, into a cache folder that all nodes share."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.core.errors import ConfigError, DataError
from lensmith.data.index_build import Pool, Told, index_file
from lensmith.data.index_store import stored_at
from lensmith.data.load import LoaderSpec

LOCAL = "local"


@contextmanager
def cluster(address: str, ranks: int = 0) -> Iterator[bool]:
    """A connection to the cluster at `address` (`auto`, or where it is), or a Ray of this machine's own for `local`.
    One that is there already is used and left. Yields whether it has GPUs.

    Args:
        ranks: processes that a local Ray must take, however few processors there are.

    Raises ConfigError EXTRA without Ray, RAY when no cluster answers.
    """
    ray = _ray()
    if ray.is_initialized():
        yield ray.cluster_resources().get("GPU", 0) > 0
        return
    try:
        _reach(address)
        ray.init(
            address=None if address == LOCAL else address, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR,
            num_cpus=max(ranks, len(os.sched_getaffinity(0))) if address == LOCAL else None,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError("RAY", f"no Ray cluster at {address!r}: {error}",
                          remedy="start one with `ray start --head`, or use --ray local") from None  # fmt: skip
    try:
        yield ray.cluster_resources().get("GPU", 0) > 0
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError or ValueError where nothing listens: Ray would end the whole process without an exception."""
    if address in (LOCAL, "auto"):
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()


def index_on_ray(spec: LoaderSpec, cache: Path, progress: Callable[[int, int], None]) -> None:
    """Make the stored index of every file that has none. What is wrong in a file is found again, and said, by
    `build_index` afterwards. Works in the `cluster` that is open."""
    missing = [n for n in range(len(spec.files)) if not stored_at(spec, n, cache).is_file()]
    if not missing:
        return
    ray = _ray()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"file": number} for number in missing]
    made = ray.data.from_items(items, override_num_blocks=len(items)).map(_FileTask(spec, str(cache)))
    for done, _ in enumerate(made.iter_rows(), 1):
        progress(done, len(items))


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("EXTRA", "Ray is not installed", remedy='pip install "lensmith[ray]"') from None
    return ray


@dataclass(frozen=True)
class _FileTask:
    """Indexes one file in a process of the cluster."""

    spec: LoaderSpec
    cache: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["file"])
        try:
            with Pool(self.spec, 1) as pool:
                stored = stored_at(self.spec, number, Path(self.cache))
                wrong = index_file(self.spec, number, stored, pool, Told(self.spec, None)).count
        except DataError:  # said by whoever reads the index
            wrong = 1
        return {"file": number, "wrong": wrong}
