"""Everything before the first step: model folder, family, index, split, what is refused and what is only said."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.core.errors import ConfigError, DataError
from lensmith.data.index import Index, build_index, hold_out, seen_in_training
from lensmith.data.load import LoaderSpec, SourceFile
from lensmith.data.options import Data, Source, data_root
from lensmith.data.placement import Limits
from lensmith.data.plan import Plan
from lensmith.data.readers import expand
from lensmith.data.tokenizer import TextTokenizer, with_tokens
from lensmith.family.registry import load_family
from lensmith.model.source import resolve
from lensmith.recipe.run import Located
from lensmith.report.terminal import Terminal


@dataclass(frozen=True)
class Prepared:
    """What check, show, index and train share."""

    located: Located
    model_folder: Path
    family: Any
    read: Index
    train: Index
    held: Index | None
    notes: tuple[str, ...]

    @property
    def plan(self) -> Plan:
        run = self.located.run
        return Plan(
            num_samples=len(self.train.trainable),
            seed=run.train.seed,
            samples=run.samples_per_step,
            tokens=run.batch.tokens,
            partial=run.batch.partial,
            epochs=run.train.epochs,
            max_steps=run.train.max_steps,
            num_tokens=self.train.column("tokens") if run.batch.tokens else None,
        )

    @property
    def limits(self) -> Limits:
        run = self.located.run
        packing = run.batch.packing and self.family.packing == "segments"  # a family says what is exact for it
        return Limits(run.device_tokens, run.batch.device_patches, packing)


def prepare(located: Located, terminal: Terminal) -> Prepared:
    """Index the data of a run. Raises `UserError`s; prints and checks `read = train + dropped`."""
    run = located.run
    folder = resolve(run.model, located.folder)
    family = load_family(
        folder, min_pixels=run.data.min_pixels, max_pixels=run.data.max_pixels, check=run.model.template == "check"
    )
    tokenizer_json = with_tokens(tokenizer_text(folder), run.model.add_tokens)
    cache = cache_folder(run.data, located.folder)
    read = _index(located, run.data.train, family, tokenizer_json, cache, terminal, "training data")
    train, held = read, None
    if run.data.eval:
        held = _index(located, run.data.eval, family, tokenizer_json, cache, terminal, "held-out data")
    elif run.data.holdout > 0:
        train, held = hold_out(read, run.data.holdout, run.train.seed)
    notes = list(_check_counts(run.data, read, train))
    if held is not None and not len(held.trainable):
        raise DataError("NO_ROWS", "no held-out sample can be used", remedy="look at the ledger; raise data.holdout")
    if held is not None and (both := seen_in_training(train, held)):
        notes.append(f"{both} of {len(held.trainable)} held-out samples stand in the training data too (EVAL_IN_TRAIN)")
    for note in notes:
        terminal.warning(note)
    return Prepared(located, folder, family, read, train, held, tuple(notes))


def tokenizer_text(folder: Path) -> str:
    file = folder / "tokenizer.json"
    return file.read_text(encoding="utf-8") if file.is_file() else TextTokenizer.from_folder(folder).full_json()


def cache_folder(data: Data, run_folder: Path) -> Path:
    if data.cache is not None:
        return (run_folder / data.cache).resolve()
    return Path(os.environ.get("LENSMITH_CACHE") or Path.home() / ".cache" / "lensmith")


def index_workers() -> int:
    return max(1, len(os.sched_getaffinity(0)))


def _index(
    located: Located,
    sources: tuple[Source, ...],
    family: Any,
    tokenizer_json: str,
    cache: Path,
    terminal: Terminal,
    what: str,
) -> Index:
    data = located.run.data
    spec = LoaderSpec(
        files=source_files(sources, located.folder),
        family=family,
        tokenizer_json=tokenizer_json,
        roots=tuple(_roots(data, located.folder)),
        limits=data.image,
        max_tokens=data.max_tokens,
        too_long=data.too_long,
        max_row_bytes=data.max_row_bytes,
        text_tokens=located.run.model.add_tokens,
    )
    with terminal.progress(f"Indexing {what}", None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        index = build_index(spec, cache, workers=index_workers(), progress=progress)
    counts = index.counts()
    terminal.event(
        "index",
        f"{what}: read {counts['read']:,} = train {counts['train']:,} + dropped {counts['dropped']:,}"
        + (f" {counts['by_reason']}" if counts["dropped"] else ""),
        data=what,
        **counts,
    )
    return index


def source_files(sources: tuple[Source, ...], folder: Path) -> tuple[SourceFile, ...]:
    found: list[SourceFile] = []
    names: set[str] = set()
    for source in sources:
        paths = expand(source.path, folder)
        name = source.name or (paths[0].stem if len(paths) == 1 else Path(source.path).name)
        name = name if name not in names else f"{name}-{len(names)}"
        names.add(name)
        for path in paths:
            base = data_root(path, source.media_dir, folder)
            shown = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
            found.append(
                SourceFile(name, str(path), source.format, str(base), source.weight, source.max_samples, shown)
            )
    return tuple(found)


def _roots(data: Data, folder: Path) -> list[str]:
    roots: list[str] = []
    for number, root in enumerate(data.media_roots):
        path = (folder / Path(root).expanduser()).resolve()
        if not path.is_dir():
            raise ConfigError("CONFIG", f"data.media_roots[{number}] {root!r} is not a folder")
        roots.append(str(path))
    return roots


def _check_counts(data: Data, read: Index, train: Index) -> list[str]:
    counts = read.counts()
    if not counts["read"]:
        raise DataError("NO_ROWS", "the training data has no rows")
    reasons = ", ".join(f"{n} {r}" for r, n in sorted(counts["by_reason"].items(), key=lambda i: -i[1]))
    first = "".join(
        f"\n  {r['origin']}: {r['reason']} {r['detail'] or ''}" for r in read.dropped.slice(0, 10).to_pylist()
    )
    if not len(train.trainable):
        raise DataError(
            "NO_SAMPLES",
            f"no sample can be trained: {reasons or 'all are held out'}{first}",
            remedy="TOO_LONG: raise data.max_tokens or lower data.max_pixels; else mend the rows",
        )
    share = counts["dropped"] / counts["read"]
    if share > data.max_dropped:
        raise DataError(
            "TOO_MANY_DROPPED",
            f"{counts['dropped']} of {counts['read']} rows are dropped ({reasons}), more than "
            f"data.max_dropped = {data.max_dropped}{first}",
            remedy="mend these rows, or raise data.max_dropped",
        )
    return [f"{counts['dropped']} of {counts['read']} rows are dropped: {reasons}"] if counts["dropped"] else []


def require_steps(prepared: Prepared, steps: int) -> None:
    """Raises `DataError` NO_STEPS for a plan without a step."""
    if not steps:
        problem = f"{len(prepared.train.trainable)} samples do not fill one step, and batch.partial is drop"
        raise DataError("NO_STEPS", problem, remedy="lower batch.samples, or set batch.partial: carry")
