"""Where a run is: everything of the loop that a checkpoint holds beside tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lensmith.engine.guard import History
from lensmith.engine.scale import LossScale
from lensmith.engine.spikes import SpikeWindow


@dataclass
class Progress:
    step: int = 0
    """Plan steps done, vetoed ones included."""
    applied: int = 0
    """Updates applied; what the schedule counts."""
    cursor: int = 0
    epoch: float = 0.0
    tokens: int = 0
    supervised: float = 0.0
    samples: int = 0
    best: float | None = None
    """The early stop's best score."""
    worse: int = 0
    """Evaluations since then."""
    best_kept: float | None = None
    """The best score that has a checkpoint."""
    bad_in_a_row: int = 0
    recent_bad: list[int] = field(default_factory=list[int])
    """Of the last steps, those that were not finite."""
    excluded: dict[int, int] = field(default_factory=dict[int, int])
    """Sample -> number of the first step that leaves it out. Append-only, like `history`."""
    stream: dict[str, Any] | None = None
    """Where a stream goes on; None for planned data."""
    history: History = field(default_factory=History)
    spikes: SpikeWindow = field(default_factory=SpikeWindow)
    scale: LossScale | None = None
    """None: gradients are not scaled."""

    def to_json(self) -> dict[str, Any]:
        """Keys of a mapping are text in JSON: `excluded` is a list of pairs."""
        return asdict(self) | {"excluded": sorted(self.excluded.items())}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Progress:
        """Of `to_json`; what an earlier version did not write is as at the beginning."""
        made = dict(values)
        made["excluded"] = {int(k): int(v) for k, v in values["excluded"]}
        kinds: dict[str, Any] = {"history": History, "spikes": SpikeWindow, "scale": LossScale}
        for key, kind in kinds.items():
            if values.get(key) is not None:
                made[key] = kind(**values[key])
        return Progress(**made)
