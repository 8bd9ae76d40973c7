"""Everything before the first step: model folder, family, index, split, what is refused and what is only said."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lensmith.core.errors import ConfigError, DataError
from lensmith.data.encode import DocumentRules
from lensmith.data.holdout import hold_out, seen_in_training
from lensmith.data.index import SCHEMA, Index
from lensmith.data.index_build import build_index
from lensmith.data.load import LoaderSpec, SourceFile
from lensmith.data.mixture import Mixture, caps_of, shares_of
from lensmith.data.options import Concat, Data, Source, data_root
from lensmith.data.placement import Limits
from lensmith.data.plan import Plan
from lensmith.data.readers import expand, expand_remote, fetch, is_hub, is_remote, mask, pin_revision
from lensmith.data.resize import FirstResize
from lensmith.data.tokenizer import tokenizer_text, with_tokens
from lensmith.data.windows import StreamSpec
from lensmith.family.registry import load_family
from lensmith.model import remote_code
from lensmith.model.source import resolve
from lensmith.objective.options import KTO, compares
from lensmith.recipe.run import Located
from lensmith.recipe.stream import free_name, stream_spec
from lensmith.report.tables import Table
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
    stream: StreamSpec | None = None
    """The training data where it is read without an index; `read` and `train` are empty then."""
    has_added_tokens: bool = False
    """The model comes from a stage before, which gave `model.add_tokens` their rows."""
    code: remote_code.RemoteCode | None = None
    """What the model brings and the run file lets run."""

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
            sizes=self.train.source_sizes,
            mixture=self.mixture,
        )

    @cached_property
    def mixture(self) -> Mixture | None:
        """Which source each draw comes from; None where all sources are one."""
        run, train = self.located.run, self.train
        if isinstance(run.data.mixture, Concat):
            return None
        tokens = np.bincount(train.column("source"), train.column("tokens"), minlength=len(train.sources))
        shares = shares_of(
            run.data.mixture, train.source_sizes, [int(t) for t in tokens], [s.share for s in run.data.train]
        )
        if not any(shares):
            problem = "no source of the mixture has both a share and samples"
            raise ConfigError("CONFIG", problem, remedy="set data.train[].share above 0")
        return Mixture(shares, caps_of(run.data.mixture, train.source_sizes, [s.epochs for s in run.data.train]))

    @property
    def limits(self) -> Limits:
        run = self.located.run
        packing = run.batch.packing and self.family.packing != "one_sample_per_row"
        return Limits(run.device_tokens, run.batch.device_patches, packing)


@dataclass(frozen=True)
class Indexing:
    """How the index is made: by how many processes, on the Ray cluster that is open, with every picture decoded."""

    workers: int | None = None
    ray: bool = False
    decode: bool = False


def prepare(located: Located, terminal: Terminal, indexing: Indexing | None = None) -> Prepared:
    """Index the data of a run. Raises `UserError`s; prints and checks `read = train + dropped`."""
    run = located.run
    folder = resolve(run.model, located.folder)
    family = load_family(
        folder,
        min_pixels=run.data.min_pixels if run.data.resize == "model" else None,
        max_pixels=run.data.max_pixels if run.data.resize == "model" else None,
        check=run.model.template == "check",
        video=run.data.video,
    )
    code = remote_code.check(folder, run.model, native=family.loading.native is not None)
    if code is not None:
        rows = [(name, sha) for name, sha in code.files.items()]
        title = f"Code of the model that is run (model.remote_code: {code.pinned})"
        terminal.show("remote_code", Table(title, ("file", "SHA-256"), rows))
    tokenizer_json = with_tokens(tokenizer_text(folder), run.model.add_tokens)
    cache = cache_folder(run.data, located.folder)

    def index_of(sources: tuple[Source, ...], what: str) -> Index:
        files = source_files(sources, located.folder, cache, terminal, run.train.seed)
        spec = _loader_spec(located, files, family, tokenizer_json)
        return _index(spec, cache, terminal, _named(what, located), indexing or Indexing())

    stream = None
    if run.data.stream is not None:
        stream = stream_spec(located, _loader_spec(located, (), family, tokenizer_json))
        read = Index(tuple(SCHEMA.empty_table() for _ in stream.loader.files), stream.loader)
    else:
        read = index_of(run.data.train, "training data")
    train, held = read, None
    if run.data.eval:
        held = index_of(run.data.eval, "held-out data")
    elif run.data.holdout > 0:
        share = run.data.holdout if run.data.holdout < 1 else run.data.holdout / max(1, len(read.trainable))
        train, held = hold_out(read, min(share, 1.0), run.train.seed)
    notes = list(check_counts(run.data, read, train)) if stream is None else []
    if held is not None and not len(held.trainable):
        raise DataError("NO_ROWS", "no held-out sample can be used", remedy="look at the ledger; raise data.holdout")
    if held is not None and (both := seen_in_training(train, held)):
        notes.append(f"{both} of {len(held.trainable)} held-out samples stand in the training data too (EVAL_IN_TRAIN)")
    if run.data.eval and run.data.holdout > 0:
        notes.append("data.holdout is not used, for data.eval is set (eval: [] takes it away)")
    prepared = Prepared(located, folder, family, read, train, held, tuple(notes), stream, code=code)
    notes += _check_mixture(prepared, terminal)
    for note in notes:
        terminal.warning(note)
    return replace(prepared, notes=tuple(notes))


def _check_mixture(prepared: Prepared, terminal: Terminal) -> list[str]:
    """Say the mixture as it is resolved; warnings for options that mean nothing in it."""
    data, train = prepared.located.run.data, prepared.train
    if isinstance(data.mixture, Concat):
        unused = [name for name in ("share", "epochs") if any(name in s.model_fields_set for s in data.train)]
        return [f"data.train[].{name} means nothing without data.mixture" for name in unused]
    if prepared.stream is not None or prepared.mixture is None:
        return []
    weights = dict(zip(train.sources, prepared.mixture.weights, strict=True))
    total = sum(weights.values())
    shown = ", ".join(f"{name} {100 * w / total:.4g} %" for name, w in weights.items())
    terminal.event("mixture", f"mixture by samples: {shown}", weights=weights)
    return [f"source {n!r} has no sample to train" for n, size in zip(train.sources, train.source_sizes, strict=True)
            if not size]  # fmt: skip


def cache_folder(data: Data, run_folder: Path) -> Path:
    if data.cache is not None:
        return (run_folder / data.cache).resolve()
    return Path(os.environ.get("LENSMITH_CACHE") or Path.home() / ".cache" / "lensmith")


def index_workers() -> int:
    return max(1, len(os.sched_getaffinity(0)))


def _named(what: str, located: Located) -> str:
    return f"{what} of stage {located.stage_name}" if located.stage_name else what


def _index(spec: LoaderSpec, cache: Path, terminal: Terminal, what: str, how: Indexing) -> Index:
    spec = replace(spec, decode=how.decode)
    with terminal.progress(f"Indexing {what}", None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        if how.ray:
            from lensmith.data.index_ray import index_on_ray

            index_on_ray(spec, cache, progress)
            bar.done = 0
        index = build_index(spec, cache, workers=how.workers or index_workers(), progress=progress)
    counts = index.counts()
    cut = f" (from {counts['rows']:,} rows)" if counts["rows"] != counts["read"] else ""
    terminal.event(
        "index",
        f"{what}: read {counts['read']:,}{cut} = train {counts['train']:,} + dropped {counts['dropped']:,}"
        + (f" {counts['by_reason']}" if counts["dropped"] else ""),
        data=what,
        **counts,
    )
    return index


def _loader_spec(located: Located, files: tuple[SourceFile, ...], family: Any, tokenizer_json: str) -> LoaderSpec:
    data = located.run.data
    return LoaderSpec(
        files=files,
        family=family,
        tokenizer_json=tokenizer_json,
        roots=tuple(_roots(data, located.folder)),
        limits=data.image,
        max_tokens=data.max_tokens,
        too_long=data.too_long,
        max_row_bytes=data.max_row_bytes,
        text_tokens=located.run.model.add_tokens,
        documents=DocumentRules(data.documents.too_long, data.documents.overlap),
        videos=data.video,
        decode_timeout=data.decode_timeout,
        compare=compares(located.run.objective),
        mismatched=isinstance(located.run.objective, KTO),
        train_line_feed=data.train_line_feed,
        first_resize=_first_resize(data, family),
        drop_wrong=data.wrong_rows == "drop",
    )


def _first_resize(data: Data, family: Any) -> FirstResize | None:
    if data.resize == "model":
        return None
    return FirstResize(data.min_pixels or 32 * 32, data.max_pixels or 768 * 768, family.first_resize)


def source_files(
    sources: tuple[Source, ...], folder: Path, cache: Path, terminal: Terminal, seed: int = 0
) -> tuple[SourceFile, ...]:
    """The data files of each source. Remote ones are copied into the cache, once. `seed`: of rows chosen at random."""
    found: list[SourceFile] = []
    names: set[str] = set()
    for source in sources:
        files = _files_of(source, folder, cache, terminal)
        name = source.name or (_stem(files[0].shown) if len(files) == 1 else Path(source.path).name)
        name = free_name(name, names)
        names.add(name)
        for file in files:
            found.append(
                SourceFile(
                    name, file.path, source.format, str(file.base), source.weight, source.max_samples, file.shown,
                    source.split, source.subset, file.revision,
                    None if source.num_samples is None else (source.num_samples, seed),
                )
            )  # fmt: skip
    return tuple(found)


@dataclass(frozen=True)
class _File:
    path: str
    shown: str
    base: Path
    revision: str | None = None


def _files_of(source: Source, folder: Path, cache: Path, terminal: Terminal) -> list[_File]:
    elsewhere = (folder / source.media_dir).resolve() if source.media_dir else folder.resolve()
    if is_hub(source.path):
        return [_File(source.path, source.path, elsewhere, pin_revision(source.path, source.revision))]
    if is_remote(source.path):
        return [_File(str(_fetched(url, cache, terminal)), mask(url), elsewhere) for url in expand_remote(source.path)]
    return [
        _File(
            str(path),
            str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path),
            data_root(path, source.media_dir, folder),
        )
        for path in expand(source.path, folder)
    ]


def _stem(shown: str) -> str:
    return shown.rsplit("/", 1)[-1].rsplit(".", 1)[0] or shown


def _fetched(url: str, cache: Path, terminal: Terminal) -> Path:
    with terminal.progress(f"Copying {mask(url)}", None) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = None if total is None else total >> 20
            bar.advance((done >> 20) - bar.done)

        return fetch(url, cache, progress)


def _roots(data: Data, folder: Path) -> list[str]:
    roots: list[str] = []
    for number, root in enumerate(data.media_roots):
        path = (folder / Path(root).expanduser()).resolve()
        if not path.is_dir():
            raise ConfigError("CONFIG", f"data.media_roots[{number}] {root!r} is not a folder")
        roots.append(str(path))
    return roots


def check_counts(data: Data, read: Index, train: Index) -> list[str]:
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
