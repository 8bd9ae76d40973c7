"""`lensmith index`: several processes, local Ray, pictures decoded ahead; what train then finds in the cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
from corpus.pieces import gradient, rgb_png

from lensmith.core.errors import ConfigError
from lensmith.data import index_build, load, measure
from lensmith.data.index_ray import _FileTask, cluster
from lensmith.data.load import OPEN_FILES
from lensmith.recipe.index import index
from lensmith.recipe.prepare import prepare
from lensmith.recipe.run import load_run
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")


@pytest.fixture
def several(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run over three files in a cache of its own."""
    monkeypatch.setenv("LENSMITH_CACHE", str(tmp_path / "cache"))
    for n in range(3):
        rows = [{"text": f"a red circle, number {n} {i}"} for i in range(4 + n)]
        (tmp_path / f"part-{n}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return runs.located(tmp_path / "run", qwen25, tmp_path / "part-*.jsonl")


def measured_by_train(located: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows that a later run still has to measure."""
    seen = [0]
    own = index_build.measure

    def counted(*args: Any) -> Any:
        seen[0] += 1
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(index_build, "measure", counted)
        assert prepare(located, QUIET).read.counts()["read"] == 15
    return seen[0]


def test_an_index_made_ahead_is_used(several: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index(several, QUIET, workers=2)
    assert measured_by_train(several, monkeypatch) == 0
    with pytest.raises(ConfigError, match="--workers 0"):
        index(several, QUIET, workers=0)


def test_pictures_are_decoded_ahead_once(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture cut off behind its header is found, stays found without another look, and mended is mended."""
    monkeypatch.setenv("LENSMITH_CACHE", str(tmp_path / "cache"))
    whole = rgb_png(gradient(60, 60))
    (tmp_path / "good.png").write_bytes(whole)
    (tmp_path / "cut.png").write_bytes(whole[:-30])
    rows = [{"text": "<image> a", "images": [f"{n}.png"]} for n in ("good", "cut")] + [{"text": "no picture"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    located = runs.located(tmp_path / "run", qwen25, tmp_path / "t.jsonl", data={"max_dropped": 0.5})
    assert prepare(located, QUIET).read.counts()["dropped"] == 0
    decoded: list[str] = []
    real = measure._decoded

    def counted(*args: Any) -> Any:
        decoded.append(args[-1])
        return real(*args)

    monkeypatch.setattr(measure, "_decoded", counted)
    index(located, QUIET, decode=True)
    assert len(decoded) == 2
    assert prepare(located, QUIET).read.counts()["by_reason"] == {"IMG_TRUNCATED": 1}
    index(located, QUIET, decode=True)
    assert len(decoded) == 2, "nothing is decoded twice"
    (tmp_path / "cut.png").write_bytes(whole)
    assert prepare(located, QUIET).read.counts()["dropped"] == 0
    index(located, QUIET, decode=True)
    assert prepare(located, QUIET).read.counts()["dropped"] == 0 and len(decoded) == 3


def test_on_a_local_ray(several: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file by a task of Ray Data; in a process of its own, for Ray leaves threads and handlers behind."""
    file = tmp_path / "run.yaml"
    file.write_text(several.resolved_yaml(), encoding="utf-8")
    logs = subprocess.run(
        [sys.executable, "-c", "from lensmith.cli import main; main()", "index", str(file), "--ray", "local"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert logs.returncode == 0, logs.stderr
    assert "read 15 = train 15" in logs.stdout
    assert measured_by_train(load_run(file), monkeypatch) == 0


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_does_not_answer(address: str) -> None:
    """Asked of itself, Ray would end the process."""
    with pytest.raises(ConfigError, match=r"\[RAY\] no Ray cluster at"), cluster(address):
        pass


def test_what_ray_would_index_is_what_one_process_does(
    several: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prepare(several, QUIET).read
    monkeypatch.setenv("LENSMITH_CACHE", str(tmp_path / "other"))
    task = _FileTask(plain.spec, str(tmp_path / "other"))
    assert [task({"file": n}) for n in range(3)] == [{"file": n, "wrong": 0} for n in range(3)]
    assert measured_by_train(several, monkeypatch) == 0
    assert prepare(several, QUIET).read.table.equals(plain.table)


def test_many_files_are_neither_all_open_nor_one_tokenizer_each(
    tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two thousand shards would not all open: 1,024 descriptors are usual. Each is read in any order."""
    monkeypatch.setenv("LENSMITH_CACHE", str(tmp_path / "cache"))
    count = 3 * OPEN_FILES
    for n in range(count):
        (tmp_path / f"part-{n:03d}.jsonl").write_text(json.dumps({"text": f"a red circle, number {n}"}) + "\n")
    built = [0]
    monkeypatch.setattr(load, "TextTokenizer", counted(load.TextTokenizer, built))
    before = len(list(Path("/proc/self/fd").iterdir()))
    found = prepare(runs.located(tmp_path / "run", qwen25, tmp_path / "part-*.jsonl"), QUIET)
    assert found.read.counts()["train"] == count and built[0] <= 1
    loader = found.read.spec.build()
    for number in (*range(count), *reversed(range(0, count, 7))):
        at = found.read.ref(number)
        assert f"number {number}" in loader.sample(at.file, at.row).parts()[0].text  # type: ignore[union-attr]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + OPEN_FILES + 2


def counted(kind: Any, calls: list[int]) -> Any:
    def made(*args: Any) -> Any:
        calls[0] += 1
        return kind(*args)

    return made
