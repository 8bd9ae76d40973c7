"""The vision cache: limits, eviction, what others do to its folder, and that it changes no loss and no resume."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch

from lensmith.family.qwen_vl import QwenVL
from lensmith.model.vision_cache import VisionCache, feature_key, fingerprint
from lensmith.recipe import build as build_module
from lensmith.recipe import session as session_module
from lensmith.recipe import stage
from lensmith.recipe.build import build
from lensmith.recipe.prepare import prepare
from lensmith.recipe.probe import probe_row
from lensmith.report.terminal import Terminal


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "write_report", lambda folder: folder)


def features(number: int, values: int = 256) -> torch.Tensor:
    """1 KiB each."""
    return torch.full((values // 4, 4), float(number))


def key(number: int) -> str:
    return feature_key(f"{number:032x}", (1, 4, 4))


def test_memory_holds_its_limit_least_recently_used_out_first() -> None:
    cache = VisionCache(3 * 1024)
    for n in (1, 2, 3):
        cache.put(key(n), features(n))
    assert cache.get(key(1)) is not None  # used again: 2 is now the oldest
    cache.put(key(4), features(4))
    assert [n for n in (1, 2, 3, 4) if key(n) in cache] == [1, 3, 4]
    assert cache.get(key(2)) is None
    value = cache.get(key(4))
    assert value is not None and torch.equal(value, features(4))
    cache.put(key(9), features(9, 4096))  # larger than everything: not kept, and nothing is pushed out for it
    assert [n for n in (1, 3, 4, 9) if key(n) in cache] == [1, 3, 4]
    assert (cache.hits, cache.misses) == (2, 1)


def test_a_kept_feature_is_a_copy() -> None:
    cache, value = VisionCache(1 << 20), features(1)
    cache.put(key(1), value)
    value.zero_()
    assert torch.equal(cache.get(key(1)), features(1))  # type: ignore[arg-type]


def test_disk_holds_its_limit_and_serves_the_next_run(tmp_path: Path) -> None:
    first = VisionCache(0, 4000, tmp_path)
    for n in range(5):
        first.put(key(n), features(n))
        os.utime(tmp_path / f"{key(n)}.safetensors", (1000 + n, 1000 + n))
    kept = [n for n in range(5) if key(n) in first]
    assert kept == [2, 3, 4]  # 1,024 bytes of values and a header each
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 4000
    second = VisionCache(1 << 20, 4000, tmp_path)
    assert torch.equal(second.get(key(3)), features(3))  # type: ignore[arg-type]
    assert second.get(key(0)) is None
    smaller = VisionCache(0, 1500, tmp_path)  # the limit was lowered: the oldest go at once
    assert [n for n in range(5) if key(n) in smaller] == [4]
    assert len(list(tmp_path.iterdir())) == 1


def damaged(path: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "removed":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-9] ^= 16
        path.write_bytes(data)


DAMAGES = ["truncated", "empty", "removed", "flipped bit"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_as_if_it_were_not_there(tmp_path: Path, how: str) -> None:
    VisionCache(0, 1 << 20, tmp_path).put(key(1), features(1))
    cache = VisionCache(1 << 20, 1 << 20, tmp_path)
    damaged(tmp_path / f"{key(1)}.safetensors", how)
    assert key(1) in cache
    assert not cache.hold([key(1)])
    assert cache.get(key(1)) is None and key(1) not in cache
    cache.put(key(1), features(1))
    assert torch.equal(VisionCache(0, 1 << 20, tmp_path).get(key(1)), features(1))  # type: ignore[arg-type]


def test_what_is_held_survives_eviction(tmp_path: Path) -> None:
    cache = VisionCache(1024, 1 << 20, tmp_path)
    for n in (1, 2):
        cache.put(key(n), features(n))
    assert cache.hold([key(1), key(2)])
    for n in range(3, 9):
        cache.put(key(n), features(n))
    shutil.rmtree(tmp_path)
    assert all(torch.equal(cache.get(key(n)), features(n)) for n in (1, 2))  # type: ignore[arg-type]
    assert cache.hold([])
    assert cache.get(key(1)) is None


def test_a_full_disk_ends_the_disk_tier_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lensmith.model import vision_cache

    cache = VisionCache(1 << 20, 1 << 20, tmp_path)
    cache.put(key(1), features(1))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vision_cache, "save_file", full)
    cache.put(key(2), features(2))
    assert cache.trouble is not None and "No space left" in cache.trouble
    assert torch.equal(cache.get(key(2)), features(2))  # type: ignore[arg-type]
    monkeypatch.undo()
    cache.put(key(3), features(3))
    assert [f.stem for f in tmp_path.iterdir()] == [key(1)]


def test_leftovers_of_dead_runs_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 5)):
        (tmp_path / f"{name}.1.tmp").write_bytes(b"x")
        os.utime(tmp_path / f"{name}.1.tmp", (time.time() - age,) * 2)
    VisionCache(0, 1 << 20, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["new.1.tmp"]


def test_known_are_learnt_pictures_whose_features_are_here() -> None:
    cache = VisionCache(2 * 1024)
    cache.learn({f"/p/{n}.png": f"{n:032x}" for n in range(4)})
    for n in range(4):
        cache.put(key(n), features(n))
    handles = [f"/p/{n}.png" for n in range(9)]
    assert cache.known(handles) == cache.known() == {f"/p/{n}.png": f"{n:032x}" for n in (2, 3)}
    assert cache.known(["/p/2.png", "/p/0.png"]) == {"/p/2.png": f"{2:032x}"}


def test_the_fingerprint_tells_weights_and_settings_apart() -> None:
    w = torch.arange(6.0).reshape(2, 3)
    marks = [
        fingerprint([("w", w)], "a"), fingerprint([("w", w)], "b"), fingerprint([("v", w)], "a"),
        fingerprint([("w", w + 1e-6)], "a"), fingerprint([("w", w.reshape(3, 2))], "a"),
        fingerprint([("w", w.half())], "a"),
    ]  # fmt: skip
    assert len(set(marks)) == len(marks)
    assert marks[0] == fingerprint([("w", w.clone())], "a")


# -- training ---------------------------------------------------------------------------------------------------------

LORA = {"kind": "lora", "rank": 4}
PROJECTOR = {"kind": "freeze", "train": ["projector", "language"]}
FEATURE_BYTES = 8_000
"""About four of the test's pictures."""


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_chat(tmp_path_factory.mktemp("chat"), 24, pictures=9, text_only=0.15)


def mode(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """off; memory for all; memory for a few; memory for a few and disk for a few more; disk for all."""
    limits = {
        "memory": (1 << 30, 0),
        "tiny": (FEATURE_BYTES, 0),
        "tiny+disk": (FEATURE_BYTES, 2 * FEATURE_BYTES),
        "disk": (0, 1 << 30),
    }

    def made(memory: int, disk: int = 0, cache_folder: Path | None = None) -> VisionCache:
        memory, disk = limits[name]
        return VisionCache(memory, disk, cache_folder)

    monkeypatch.setattr(build_module, "VisionCache", made)
    return {"enabled": name != "off", "disk_mb": int("disk" in name), "folder": str(folder)}


MODES = ["off", "memory", "tiny", "tiny+disk", "disk"]


def trained(folder: Path, qwen25: Path, chat: Path, cache: dict[str, Any], **over: Any) -> Any:
    values = runs.merge({"tune": LORA, "train": {"epochs": 3, "max_steps": None}, "batch": {"samples": 6}}, over)
    return runs.quiet_train(runs.located(folder, qwen25, chat, vision_cache=cache, **values))


@pytest.mark.parametrize("tune", [LORA, PROJECTOR], ids=["lora", "projector"])
def test_losses_do_not_depend_on_the_cache(
    tmp_path: Path, qwen25: Path, chat: Path, monkeypatch: Any, tune: Any
) -> None:
    losses = {}
    for name in MODES:
        cache = mode(name, tmp_path / f"cache-{name}", monkeypatch)
        losses[name] = trained(tmp_path / name, qwen25, chat, cache, tune=tune, optimizer={"lr": 1e-4}).summary[
            "losses"
        ]
    for name in MODES[1:]:
        # one unit in the last place of a float32 loss near 6 is 4.8e-7
        assert losses[name] == pytest.approx(losses["off"], rel=5e-7), name
    assert len(set(losses["off"])) == 12


@pytest.mark.parametrize("name", MODES)
def test_a_resume_is_bit_identical(tmp_path: Path, qwen25: Path, chat: Path, monkeypatch: Any, name: str) -> None:
    """With the disk tier as it was left, and the memory empty again."""
    over = {"save": {"every_steps": 1, "keep_last": 99}}
    cache = mode(name, tmp_path / "cache", monkeypatch)
    whole = trained(tmp_path / "run", qwen25, chat, cache, **over)
    final = state_of(whole)
    for later in range(6, 13):
        shutil.rmtree(whole.folder / "checkpoints" / f"step-{later:08d}")
    again = trained(tmp_path / "run", qwen25, chat, cache, **over)
    assert again.summary["losses"] == whole.summary["losses"]
    assert state_of(again) == final


def state_of(outcome: Any) -> bytes:
    return (Path(outcome.summary["checkpoint"]) / "state" / "training.safetensors").read_bytes()


def test_features_on_disk_are_of_one_compute_type(tmp_path: Path, qwen25: Path, chat: Path) -> None:
    """A tower in bfloat16 fills the cache; one in float32 with the same weights does not take its features."""

    def first_loss(name: str, compute: str, folder: str) -> float:
        parts = {part: {"compute": compute} for part in ("vision", "projector")}
        cache = {"disk_mb": 50, "folder": str(tmp_path / folder)}
        over = {"tune": {"kind": "lora"}, "precision": {"preset": "fp32", "parts": parts}, "vision_cache": cache}
        run = runs.located(tmp_path / name, qwen25, chat, train={"max_steps": 1}, **over)
        return runs.quiet_train(run).summary["losses"][0]

    alone = first_loss("alone", "float32", "own")
    assert first_loss("half", "bfloat16", "shared") != alone
    assert first_loss("after", "float32", "shared") == alone


def test_each_picture_is_encoded_once_in_three_epochs(
    tmp_path: Path, qwen25: Path, chat: Path, monkeypatch: Any
) -> None:
    """When all fit; none at all in a second run with the disk tier; several times when few fit."""
    counts: Counter[bytes] = Counter()
    encode = QwenVL.encode_images

    def counted(self: Any, model: Any, pixels: torch.Tensor, grids: Any, views: Any) -> list[torch.Tensor]:
        counts.update(chunk.numpy().tobytes() for chunk in pixels.split([t * h * w for t, h, w in grids]))
        return encode(self, model, pixels, grids, views)

    monkeypatch.setattr(QwenVL, "encode_images", counted)
    monkeypatch.setattr(stage, "check_borders", lambda *args: None)  # it shows a picture of its own
    for name in ("memory", "disk", "tiny", "tiny+disk"):
        counts.clear()
        cache = mode(name, tmp_path / f"cache-{name}", monkeypatch)
        trained(tmp_path / name, qwen25, chat, cache)
        assert len(counts) == 9
        if name in ("memory", "disk"):
            assert set(counts.values()) == {1}, name
        else:
            assert counts.total() > 9
    counts.clear()
    trained(tmp_path / "second", qwen25, chat, mode("disk", tmp_path / "cache-disk", monkeypatch))
    assert not counts
    trained(
        tmp_path / "pixels",
        qwen25,
        chat,
        mode("disk", tmp_path / "cache-disk", monkeypatch),
        data={"max_pixels": 112 * 112},
    )
    other = tiny.make_model(tmp_path / "other", seed=5)
    first = counts.total()
    trained(tmp_path / "weights", other, chat, mode("disk", tmp_path / "cache-disk", monkeypatch))
    assert first == 9 and counts.total() == 18
    assert len(list((tmp_path / "cache-disk").iterdir())) == 3  # a folder for each


@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_a_run_survives_damage_to_its_cache(
    tmp_path: Path, qwen25: Path, chat: Path, monkeypatch: Any, how: str
) -> None:
    """Every file is damaged while the run is between two steps."""
    cache = mode("disk", tmp_path / "cache", monkeypatch)
    plain = trained(tmp_path / "plain", qwen25, chat, cache)
    shutil.rmtree(tmp_path / "cache")
    log = stage.StageRun._log

    def spoils(self: Any, p: Any, *args: Any) -> None:
        log(self, p, *args)
        if p.step in (3, 8):
            for file in (tmp_path / "cache").rglob("*.safetensors"):
                damaged(file, how)

    monkeypatch.setattr(stage.StageRun, "_log", spoils)
    again = trained(tmp_path / "run", qwen25, chat, cache)
    assert again.summary["losses"] == plain.summary["losses"]


def test_two_runs_share_a_folder(tmp_path: Path) -> None:
    """Each keeps its own books; neither fails for what the other evicts."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            cache = VisionCache(2048, 6000, tmp_path)
            for k in range(150):
                n = (k * 7 + seed) % 11
                value = cache.get(key(n))
                assert value is None or torch.equal(value, features(n))
                cache.put(key(n), features(n))
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_gradients_come_in_one_order_whether_features_are_kept_or_not(tmp_path: Path, name: str) -> None:
    """ZeRO-2 lays the gradients of a step side by side as they come, on each rank for itself, and sums the places."""
    base = tiny.make_model(tmp_path / "base", name, dtype=torch.bfloat16)
    data = tiny.make_chat(tmp_path, 8, pictures=2)
    tune = {"kind": "freeze", "train": ["projector", "language"]}
    over: dict[str, Any] = {"tune": tune, "precision": {"preset": "bf16"}}
    prepared = prepare(runs.located(tmp_path / "run", base, data, **over), Terminal("quiet"))
    built, orders = build(prepared), []
    for name, p in built.tuned.trainable():
        p.register_post_accumulate_grad_hook(lambda _, name=name: orders[-1].append(name))
    row = probe_row(prepared)
    for _ in ("computed", "kept"):
        orders.append([])
        built.root(row)["loss"][0].backward()
    assert len(orders[0]) > 20 and orders[0] == orders[1]
