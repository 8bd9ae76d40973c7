"""Log-probabilities of a reference model, known by sample and kept in a file."""

# pyright: reportUnknownMemberType=false
# (the stubs of torch and pyarrow leave parts of these types open)

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lensmith.core.encoded import Compared, PackedRow
from lensmith.core.errors import ConfigError, RunError
from lensmith.data.index import Index
from lensmith.data.plan import Step
from lensmith.objective.preference import log_probabilities
from lensmith.parallel.ranks import Ranks

SCHEMA = pa.schema([("digest", pa.int64()), ("stamp", pa.int64()), ("other", pa.int64()),
                    ("first", pa.float32()), ("second", pa.float32())])  # fmt: skip
"""digest, stamp: of the sample and of its picture files, as in the index; other: digest of the sample whose answer this
is, else 0; first, second: log-probability of its one or two answers."""


@dataclass
class Known:
    """Log-probabilities of the answers of one index's samples."""

    index: Index
    file: Path
    pairs: bool
    values_N2: np.ndarray = field(init=False)
    mismatched: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    """(sample, sample whose answer it is) -> log-probability."""

    def __post_init__(self) -> None:
        self.values_N2 = np.full((len(self.index.trainable), 2), np.nan, np.float32)
        self._digest, self._stamp = self.index.column("digest"), self.index.column("stamp")
        if (table := _table(self.file)) is not None:
            self._read(table)

    def _read(self, table: pa.Table) -> None:
        digest, stamp, other, first, second = (table.column(n).to_numpy() for n in SCHEMA.names)
        own = np.flatnonzero(other == 0)
        keys = _key(digest[own], stamp[own])
        order = np.argsort(keys, kind="stable")
        own, keys = own[order], keys[order]
        if len(own):
            place = own[np.minimum(np.searchsorted(keys, _key(self._digest, self._stamp)), len(own) - 1)]
            same = (digest[place] == self._digest) & (stamp[place] == self._stamp)
            self.values_N2[same, 0], self.values_N2[same, 1] = first[place[same]], second[place[same]]
        numbers = {int(d): n for n, d in enumerate(self._digest.tolist())} if len(own) < len(other) else {}
        for row in np.flatnonzero(other != 0).tolist():
            sample, its = numbers.get(int(digest[row])), numbers.get(int(other[row]))
            if sample is not None and its is not None and stamp[row] == self._stamp[sample]:
                self.mismatched[sample, its] = float(first[row])

    def knows(self, step: Step, *, mismatched: bool) -> bool:
        members = step.members
        if np.isnan(self.values_N2[members, : 1 + self.pairs]).any():
            return False
        return not mismatched or all(pair in self.mismatched for pair in pairs_of(step))

    def learn(self, of: Compared, logp_B: np.ndarray) -> None:
        """What comes out as not a number was computed all the same: of a sample's own answers it stands as -inf, so
        that the step that shows them is vetoed and names it."""
        if (of.other_B >= 0).any():
            pairs = zip(of.sample_B.tolist(), of.other_B.tolist(), strict=True)
            self.mismatched |= dict(zip(pairs, logp_B.tolist(), strict=True))
            return
        logp_B = np.where(np.isnan(logp_B), -np.inf, logp_B)
        if self.pairs:
            self.values_N2[of.sample_B[0::2]] = np.stack([logp_B[0::2], logp_B[1::2]], axis=1)
        else:
            self.values_N2[of.sample_B, 0] = logp_B

    def learn_from(self, row: PackedRow, at_SK: torch.Tensor) -> None:
        if row.compared is not None:
            self.learn(row.compared, log_probabilities(at_SK[:, 0], row).cpu().numpy())

    def share(self, ranks: Ranks) -> None:
        """What each rank has computed, on all of them."""
        if not ranks.several:
            return
        mine = torch.from_numpy(self.values_N2.astype(np.float64).ravel())
        every = ranks.gather_tensor(mine, "share the reference").numpy()
        found = np.fmax.reduce(every, axis=0)  # NaN where no rank knows
        self.values_N2 = found.reshape(-1, 2).astype(np.float32)
        mine_too = [[a, b, v] for (a, b), v in self.mismatched.items() if math.isfinite(v)]
        said: list[Any] = ranks.gather_json(mine_too, "share the reference")
        self.mismatched = {(int(a), int(b)): float(v) for rank in said for a, b, v in rank}

    def give_up(self, steps: Sequence[Step]) -> None:
        """Mismatched answers of these steps that are still not known never will be: too long, or not to be read."""
        for step in steps:
            for pair in pairs_of(step):
                self.mismatched.setdefault(pair, math.nan)

    def write(self) -> None:
        """Put what is known and finite beside what the file holds by now; readers see the old or the new file."""
        there = np.flatnonzero(np.isfinite(self.values_N2[:, : 1 + self.pairs]).all(axis=1))
        rows = {"digest": self._digest[there], "stamp": self._stamp[there], "other": np.zeros(len(there), np.int64),
                "first": self.values_N2[there, 0], "second": self.values_N2[there, 1]}  # fmt: skip
        if self.mismatched:
            a, b = np.array(list(self.mismatched), np.int64).T
            more = {"digest": self._digest[a], "stamp": self._stamp[a], "other": self._digest[b],
                    "first": np.array(list(self.mismatched.values()), np.float32),
                    "second": np.full(len(a), np.nan, np.float32)}  # fmt: skip
            rows = {name: np.concatenate([rows[name], more[name]]) for name in rows}
        tables = [pa.table(rows, schema=SCHEMA)]
        if (before := _table(self.file)) is not None:
            tables.append(before)
        whole = pa.concat_tables(tables)
        keys = zip(*(whole.column(n).to_numpy().tolist() for n in ("digest", "stamp", "other")), strict=True)
        first = {key: n for n, key in reversed(list(enumerate(keys)))}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
            pq.write_table(whole.take(pa.array(sorted(first.values()))), temporary)
            temporary.replace(self.file)
        except OSError as error:
            raise ConfigError("CACHE", f"log-probabilities of the reference cannot be kept: {error.strerror or error}",
                              where=str(self.file.parent),
                              remedy="set data.cache to a folder with space") from None  # fmt: skip

    def tell(self, row: PackedRow) -> None:
        """Put into a row what is known of its answers. Raises `RunError` REFERENCE."""
        of = row.compared
        if of is None or of.reference_B is not None:
            return
        if (of.other_B >= 0).any():
            pairs = zip(of.sample_B.tolist(), of.other_B.tolist(), strict=True)
            of.reference_B = np.array([self.mismatched.get(pair, np.nan) for pair in pairs], np.float32)
            return
        second = np.arange(len(of.sample_B)) % 2 if self.pairs else np.zeros(len(of.sample_B), int)
        of.reference_B = self.values_N2[of.sample_B, second]
        if np.isnan(of.reference_B).any():
            number = int(of.sample_B[np.isnan(of.reference_B)][0])
            problem = "the reference knows nothing of this sample, which could not be read before training"
            raise RunError("REFERENCE", problem, where=self.index.origin(number), remedy="run again")


def _table(file: Path) -> pa.Table | None:
    """What a file holds; None for none, and for one that a crash of the machine has cut short."""
    try:
        return pq.read_table(file, schema=SCHEMA)
    except (FileNotFoundError, pa.ArrowException):
        return None


def _key(digest: np.ndarray, stamp: np.ndarray) -> np.ndarray:
    """64 bits of both, for sorting."""
    return digest ^ (stamp * np.int64(0x1E3779B97F4A7C15))


def pairs_of(step: Step) -> Iterator[tuple[int, int]]:
    """Of each member, and the sample whose answer stands behind its prompt; a sample's own answer is none."""
    pairs = zip(step.members.tolist(), np.roll(step.members, 1).tolist(), strict=True)
    return (pair for pair in pairs if pair[0] != pair[1])
