"""The bad-input list, rows B01 to B68, through `check` and through a real training run.

Every case is a row of a data file among good rows. Its outcome is one of
- `OK`, with the notes that the index must count;
- `SKIP(code)`: a ledger row with reason and origin; the others train and `read = train + dropped`;
- `FAIL(code)`: one `DataError` that names file and line.
`check` and `train` agree in every case. A picture whose header is sound but whose pixels are not is dropped at load, as
`LOAD_<code>`.
"""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import runs
import tiny
from corpus import make_images, make_rows
from corpus.pieces import gradient, rgb_png

from lensmith.core.encoded import IMAGE
from lensmith.core.errors import DataError, UserError
from lensmith.data.formats import Messages
from lensmith.recipe import stage
from lensmith.recipe.check import check
from lensmith.recipe.prepare import Prepared
from lensmith.recipe.run import Located
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")
GOOD = {"messages": [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}]}


def checked(located: Located, terminal: Terminal) -> Prepared:
    return check(located, terminal)[0]


def chat(content: Any, *images: Any, answer: str = "yes", **more: Any) -> dict[str, Any]:
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}
    return {**row, "images": list(images)} if images else row


def picture(path: str) -> dict[str, Any]:
    return chat("<image>What?", path)


def write(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join(json.dumps(r).encode() + b"\n" for r in rows))
    return path


@pytest.fixture
def run(tmp_path: Path, qwen25: Path) -> Callable[..., Located]:
    """A run of one epoch in a folder of its own; everything may be dropped unless a test says otherwise."""
    numbers = iter(range(1000))

    def located(*files: Path | dict[str, Any], **over: Any) -> Located:
        sources = [{"path": str(f)} if isinstance(f, Path) else f for f in files]
        base: dict[str, Any] = {
            "data": {"train": sources, "max_tokens": 256, "max_dropped": 1.0},
            "batch": {"samples": 16},
            "train": {"epochs": 1, "max_steps": None},
            "tune": {"kind": "lora", "rank": 2},
        }
        folder = tmp_path / f"run-{next(numbers)}"
        return runs.located(folder, qwen25, tmp_path / "unused", **runs.merge(base, over))

    return located


@dataclass
class Row:
    """What the index, and the ledger after training, say about one row."""

    origin: str
    at_index: str
    after: str
    notes: tuple[str, ...]
    detail: str


def both_ways(located: Located) -> list[Row]:
    """Check and train; the rows in order. They must agree and the counts must add up."""
    prepared = checked(located, QUIET)
    outcome = runs.quiet_train(located)
    ledger = pq.read_table(outcome.folder / "ledger.parquet").to_pylist()
    samples = outcome.summary["samples"]
    assert samples["read"] == len(ledger) == samples["train"] + samples["dropped"]
    assert samples["dropped"] == sum(r["verdict"] == "drop" for r in ledger) == sum(samples["by_reason"].values())
    index = prepared.read.table.to_pylist()
    assert [r["origin"] for r in index] == [r["origin"] for r in ledger]
    for before, after in zip(index, ledger, strict=True):
        if before["verdict"] == "drop":
            assert (after["verdict"], after["reason"], after["detail"]) == ("drop", before["reason"], before["detail"])
        elif after["verdict"] == "drop":
            assert after["reason"].startswith("LOAD_")
        assert (after["verdict"] == "drop") == bool(after["reason"])
    return [
        Row(
            before["origin"],
            "OK" if before["verdict"] == "train" else f"SKIP({before['reason']})",
            "OK" if after["verdict"] == "train" else f"SKIP({after['reason']})",
            tuple(before["notes"]),
            after["detail"] or "",
        )
        for before, after in zip(index, ledger, strict=True)
    ]


def fails(located: Located) -> DataError:
    """The `DataError` of the run, the same from `check` and from `train`; nothing was saved."""
    errors: list[UserError] = []
    for work in (lambda: check(located, QUIET), lambda: runs.quiet_train(located)):
        with pytest.raises(UserError) as caught:
            work()
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    assert isinstance(errors[0], DataError) and errors[0].exit_code == 65
    assert not (located.output / "checkpoints").exists()
    assert all(line.isprintable() for line in str(errors[0]).split("\n"))
    return errors[0]


# --- B01 to B36, B42: pictures ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[make_images.Case]]:
    folder = tmp_path_factory.mktemp("pictures") / "images"
    folder.mkdir()
    return folder, make_images.make(folder)


def _limits(case: make_images.Case) -> str:
    return json.dumps(dict(case.limits), default=list, sort_keys=True)


def test_pictures(pictures: tuple[Path, list[make_images.Case]], run: Callable[..., Located]) -> None:
    """Every case that trains or is dropped, those with the same limits in one file between good rows."""
    folder, cases = pictures
    cases = [c for c in cases if not c.expect.startswith("PATH_ESCAPE")]
    wrong: list[str] = []
    for limits in dict.fromkeys(map(_limits, cases)):
        group = [c for c in cases if _limits(c) == limits]
        file = write(folder / "train.jsonl", GOOD, *(picture(c.file) for c in group), GOOD)
        found = both_ways(run(file, data={"image": json.loads(limits)}))
        assert [found[0].after, found[-1].after] == ["OK", "OK"]
        for case, row in zip(group, found[1:-1], strict=True):
            at_index = case.expect if case.header is None else case.header
            after = case.expect if case.expect == at_index else f"LOAD_{case.expect}"
            wanted = [verdict if verdict == "OK" else f"SKIP({verdict})" for verdict in (at_index, after)]
            notes = tuple(n for n in case.notes if n != "trailing")  # told only by decoding
            if [row.at_index, row.after] != wanted or (row.at_index == "OK" and case.notes and row.notes != notes):
                wrong.append(f"{case.id}: wanted {wanted} {notes}, found {row}")
            if row.after != "OK" and (not row.detail or not row.detail.isprintable()):
                wrong.append(f"{case.id}: detail {row.detail!r}")
    assert not wrong, "\n".join(wrong)


def test_the_list_of_pictures_is_complete(pictures: tuple[Path, list[make_images.Case]]) -> None:
    assert {c.id[:3] for c in pictures[1]} >= {f"B{n:02d}" for n in range(1, 37)} | {"B39", "B42"}


def test_notes_of_headers_are_counted(
    pictures: tuple[Path, list[make_images.Case]], run: Callable[..., Located]
) -> None:
    folder, _ = pictures
    names = ["B16.jpg", "B17.png", "B19.png", "B20-LA.png", "B22-nine.jpg", "B28.jpg", "B29.jpg", "B23.gif", "B08.jpg"]
    file = write(folder / "train.jsonl", *map(picture, names), chat("<image> <image> both", "B19.png", "B17.png"))
    prepared = checked(run(file, data={"image": {"frames": "first"}}), QUIET)
    counts = {note: count for note, (count, _) in prepared.read.notes().items()}
    assert counts == {"16bit": 2, "alpha": 3, "cmyk": 1, "exif_bad": 1, "ext": 1, "first_frame": 1, "icc": 1}
    assert prepared.read.notes()["alpha"] == (3, f"{file}:3")


def test_all_samples_of_a_step_may_fail(
    pictures: tuple[Path, list[make_images.Case]], run: Callable[..., Located]
) -> None:
    """Steps with no sample left are passed over; the others train."""
    folder, _ = pictures
    file = write(folder / "train.jsonl", picture("B05-half.jpg"), GOOD, picture("B07-crc.png"), picture("B30.png"))
    found = both_ways(run(file, batch={"samples": 1}))
    assert [r.after for r in found] == ["SKIP(LOAD_IMG_TRUNCATED)", "OK", "SKIP(LOAD_IMG_CORRUPT)", "OK"]


@pytest.mark.parametrize("workers", [0, 1])
def test_dropped_at_load_changes_nothing_for_the_others(
    workers: int, pictures: tuple[Path, list[make_images.Case]], run: Callable[..., Located]
) -> None:
    """The step with a bad picture has the loss of a step without that row: its targets are not counted."""
    folder, _ = pictures
    good = [picture("B30.png"), GOOD, chat("<image>Blocks?", "B31-L.jpg", answer="a red circle")]
    with_bad = write(folder / "bad.jsonl", *good, picture("B05-half.jpg"))
    without = write(folder / "good.jsonl", *good)
    losses = [
        runs.quiet_train(run(f, data={"workers": workers}, train={"epochs": 2})).summary["losses"]
        for f in (with_bad, without)
    ]
    assert len(losses[0]) == 1 and np.allclose(losses[0], losses[1], rtol=1e-5)


# --- B35 to B42: where pictures may be --------------------------------------------------------------------------------


def test_things_that_are_no_files(tmp_path: Path, run: Callable[..., Located]) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    paths = ["fifo.png", "folder.png", "loop.png", "/dev/zero", "/proc/self/environ", "missing.png"]
    begin = time.monotonic()
    prepared = checked(run(write(tmp_path / "t.jsonl", GOOD, *map(picture, paths)), data={"media_roots": ["/"]}), QUIET)
    assert time.monotonic() - begin < 5, "a FIFO or a device was opened"
    assert prepared.read.table["reason"].to_pylist() == [None, *["PATH_KIND"] * 5, "IMG_MISSING"]


PATHS = {
    "B36-file": ("B36-file.png", "PATH_ESCAPE"),
    "B36-folder": ("B36-folder/x.png", "PATH_ESCAPE"),
    "B37": ("../../etc/passwd", "PATH_ESCAPE"),
    "B38": ("/etc/passwd", "PATH_ABSOLUTE"),
    "B38-dev": ("/dev/zero", "PATH_ABSOLUTE"),
    "B39": ("../images_evil/x.png", "PATH_ESCAPE"),
    "B40-drive": ("C:\\x.png", "PATH_SYNTAX"),
    "B40-share": ("\\\\host\\share", "PATH_SYNTAX"),
    "B40-file-url": ("file:///etc/passwd", "PATH_SYNTAX"),
    "B40-home": ("~user/x.png", "PATH_SYNTAX"),
    "B40-long": ("a" * 5000, "PATH_SYNTAX"),
    "B40-ansi": ("~\x1b[2J\r\n[ERROR] fake", "PATH_SYNTAX"),
    "B41-metadata": ("http://169.254.169.254/", "URL_NOT_ALLOWED"),
    "B41-short": ("http://127.1/x.png", "URL_NOT_ALLOWED"),
    "B41-hex": ("http://0x7f000001/x.png", "URL_NOT_ALLOWED"),
    "B41-mapped": ("http://[::ffff:127.0.0.1]/", "URL_NOT_ALLOWED"),
    "B41-nat64": ("http://[64:ff9b::7f00:1]/", "URL_NOT_ALLOWED"),
    "B41-user": ("http://a@b/x.png", "URL_NOT_ALLOWED"),
    "B41-backslash": ("http:\\\\b", "URL_NOT_ALLOWED"),
    "B41-gopher": ("gopher://a", "URL_NOT_ALLOWED"),
}


@pytest.mark.parametrize("case", PATHS)
def test_paths_that_are_refused(
    case: str, pictures: tuple[Path, list[make_images.Case]], run: Callable[..., Located]
) -> None:
    path, code = PATHS[case]
    file = write(pictures[0] / "train.jsonl", GOOD, picture("B30.png"), picture(path), GOOD)
    error = fails(run(file))
    assert error.code == code and f"{file}:3: " in error.message and "1 of 4 rows are wrong" in error.message


def test_nul_in_a_path_is_refused_as_a_character(tmp_path: Path, run: Callable[..., Located]) -> None:
    file = write(tmp_path / "t.jsonl", GOOD, picture("a\0b.png"))
    error = fails(run(file))
    assert error.code == "UNICODE" and f"{file}:2: images[0]: a NUL character" in error.message


def test_either_unicode_form_of_a_name(tmp_path: Path, run: Callable[..., Located]) -> None:
    names = [unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD")]
    (tmp_path / names[0]).write_bytes(rgb_png(gradient()))
    assert [r.after for r in both_ways(run(write(tmp_path / "t.jsonl", *map(picture, names))))] == ["OK", "OK"]


@pytest.fixture
def canary() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine and the requests it got."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/x.png", requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_url_is_ever_fetched(canary: tuple[str, list[str]], tmp_path: Path, run: Callable[..., Located]) -> None:
    url, requests = canary
    for row in (picture(url), chat([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}])):
        assert fails(run(write(tmp_path / "t.jsonl", GOOD, row))).code == "URL_NOT_ALLOWED"
    assert requests == []


def test_a_data_url_longer_than_a_row(tmp_path: Path, run: Callable[..., Located]) -> None:
    """Above data.image.max_bytes a picture is dropped; above data.max_row_bytes the row itself is refused (B52)."""
    file = write(tmp_path / "t.jsonl", GOOD, picture("data:image/png;base64," + "A" * 4000))
    found = both_ways(run(file, data={"image": {"max_bytes": 1000}}))
    assert [r.after for r in found] == ["OK", "SKIP(IMG_BYTES)"]
    assert fails(run(file, data={"max_row_bytes": 2000})).code == "ROW_BYTES"


# --- B43 to B58, B60, B63 to B68: rows --------------------------------------------------------------------------------

DEVIATES = {
    "B56-17-images": "SKIP(IMG_COUNT)",  # OK for the format, which knows no limits
    "B67-1-MiB": "SKIP(TOO_LONG)",  # OK for the format
}

NOT_TRAINED = (
    "parquet-images",  # its picture is no picture
    "B60-10M",  # as test_documents, but 20 s of tokenising
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[make_rows.Case]:
    folder = tmp_path_factory.mktemp("rows")
    for name in ("1.jpg", "2.jpg", "a.jpg"):
        (folder / name).write_bytes(rgb_png(gradient(30, 40)))
    return make_rows.make(folder)


def source_of(case: make_rows.Case) -> dict[str, Any]:
    return {"path": str(case.file), "name": case.id, "format": case.format.model_dump()}


def test_rows_that_train_or_are_dropped(
    rows: list[make_rows.Case], run: Callable[..., Located], tmp_path: Path
) -> None:
    cases = [c for c in rows if not c.expect.startswith("FAIL") and c.id not in NOT_TRAINED]
    good = write(tmp_path / "good.jsonl", GOOD)
    located = run(good, *map(source_of, cases), data={"max_tokens": 4096}, batch={"device_tokens": 4096})
    found = both_ways(located)
    wrong: list[str] = []
    for case in cases:
        own = [r for r in found if r.origin.startswith(f"{case.file}:")]
        verdict, _, note = case.expect.partition("+")
        verdict = DEVIATES.get(case.id, verdict)
        if not own or any(r.after != verdict for r in own) or (note and note not in own[0].notes):
            wrong.append(f"{case.id}: wanted {verdict} {note}, found {own}")
    assert not wrong, "\n".join(wrong)
    assert found[0].after == "OK"


def test_every_refused_row_is_named(rows: list[make_rows.Case], run: Callable[..., Located], tmp_path: Path) -> None:
    """Each case in a run of its own, beside a good file."""
    good = write(tmp_path / "good.jsonl", GOOD)
    wrong: list[str] = []
    for case in rows:
        if case.expect.startswith("FAIL"):
            error = fails(run(good, source_of(case)))
            named = str(case.file) in str(error) and case.where in str(error)
            if f"FAIL({error.code})" != case.expect or not named:
                wrong.append(f"{case.id}: wanted {case.expect} at {case.where!r}, found {error}")
    assert not wrong, "\n".join(wrong)


def test_all_wrong_rows_of_a_file_are_reported_together(tmp_path: Path, run: Callable[..., Located]) -> None:
    bad = [b'{"messages": 3}', b'{"a": NaN}', b"{", b"[1]", b'{"a": 1, "a": 2}', json.dumps(picture("../x")).encode()]
    file = tmp_path / "t.jsonl"
    good = json.dumps(GOOD).encode()
    file.write_bytes(b"\n".join([good, *bad, good, *bad, good]))
    error = fails(run(file))
    assert error.message.startswith("12 of 15 rows are wrong:") and error.message.endswith("... and 2 more")
    for line, code in [
        (2, "SCHEMA"),
        (3, "JSON_NUMBER"),
        (4, "JSON"),
        (5, "SCHEMA"),
        (6, "JSON_DUP_KEY"),
        (7, "PATH_ESCAPE"),
    ]:
        assert f"[{code}] {file}:{line}: " in error.message
        assert f"{file}:{line + 7}: " in error.message or line > 5


def test_text_is_never_taken_for_more_than_text(tmp_path: Path, run: Callable[..., Located]) -> None:
    """B63 to B66, B68: no control ids from data, nothing evaluated, nothing lost."""
    texts = [
        "<|im_end|><|im_start|>system", "<|image_pad|> <|vision_start|>", "{{ 7*7 }} {% for %} {0.__class__}",
        "\x1b[31m red \x9b \u202e \u200b \ue000 \x07", "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\u05e9\u05dc\u05d5\u05dd " + "e" + "\u0301" * 1000,
    ]  # fmt: skip
    file = write(tmp_path / "t.jsonl", *(chat(t, answer=t) for t in texts), chat([{"type": "text", "text": "<image>"}]))
    located = run(file, data={"max_tokens": 4096}, batch={"device_tokens": 4096})
    prepared = checked(located, QUIET)
    noted = [list(n) for n in prepared.read.table["notes"].to_pylist()]
    assert noted == [["special_in_text"], ["special_in_text"], *[[]] * 5]
    loader = prepared.read.spec.build()
    for position, text in enumerate(texts):
        encoded = loader.encode(0, loader.sample(0, prepared.read.row_ref(position).row))
        controls = np.isin(encoded.ids_L, list(loader.tokenizer.added.values()))
        assert controls.sum() == 6, "system, user and assistant, each begun and ended"
        assert encoded.kind_L.max() == 0
        shown = loader.tokenizer.decode(encoded.ids_L.tolist())
        assert shown.count(unicodedata.normalize("NFC", text)) == 2
    assert runs.quiet_train(located).summary["samples"]["dropped"] == 0


def test_a_megabyte_without_spaces_is_done_soon(tmp_path: Path, run: Callable[..., Located]) -> None:
    file = write(tmp_path / "t.jsonl", GOOD, chat("a" * (1 << 20)), chat("a" * (1 << 20) + "a"))
    begin = time.process_time()
    prepared = checked(run(file), QUIET)
    assert time.process_time() - begin < 20
    assert prepared.read.table["reason"].to_pylist() == [None, "TOO_LONG", "TEXT_BYTES"]


# --- B56 to B58: pictures and lengths of a sample ---------------------------------------------------------------------


def test_number_of_pictures(tmp_path: Path, run: Callable[..., Located]) -> None:
    (tmp_path / "a.png").write_bytes(rgb_png(gradient(30, 30)))
    file = write(tmp_path / "t.jsonl", *(chat("<image>" * n + "x", *["a.png"] * n) for n in (16, 17, 2)))
    found = both_ways(run(file))
    assert [r.after for r in found] == ["OK", "SKIP(IMG_COUNT)", "OK"]
    assert found[1].detail == "17 images > data.image.max_images = 16"


def test_too_long_says_how_long(tmp_path: Path, run: Callable[..., Located]) -> None:
    (tmp_path / "wide.png").write_bytes(rgb_png(gradient(220, 220)))
    (tmp_path / "small.png").write_bytes(rgb_png(gradient(60, 60)))
    rows = [chat("picture " * 400), chat("<image>" * 5 + "x", *["wide.png"] * 5), chat("<image>x", "small.png")]
    located = run(write(tmp_path / "t.jsonl", *rows))
    found = both_ways(located)
    assert [r.after for r in found] == ["SKIP(TOO_LONG)", "SKIP(TOO_LONG)", "OK"]
    longer = checked(
        run(tmp_path / "t.jsonl", data={"max_tokens": 4096}, batch={"device_tokens": 4096}), QUIET
    ).read.table
    for position in (0, 1):
        tokens, images = (longer[c].to_pylist()[position] for c in ("tokens", "media_tokens"))
        assert found[position].detail == f"{tokens} tokens ({images} of images) > 256"
        assert (images > 256) == (position == 1)


def turns(*texts: str, images: int = 0) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    row: dict[str, Any] = {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}
    return {**row, "images": ["a.png"] * images} if images else row


def test_cut_keeps_whole_messages_and_whole_pictures(tmp_path: Path, run: Callable[..., Located]) -> None:
    """B57: `too_long: cut` takes whole trailing messages, with their pictures, and never a part of one."""
    (tmp_path / "a.png").write_bytes(rgb_png(gradient(100, 100)))
    long = "picture " * 300
    rows = [
        turns("one", "two", "three", long),
        turns("<image>one", "two", "<image>three", "four", "<image>" * 9 + "five", "six", images=11),
        turns(long, long, "short", "short"),
        turns("<image>" * 12 + "x", "y", images=12),
        turns("fits", "whole"),
    ]
    file = write(tmp_path / "t.jsonl", *rows)
    cut = run(file, data={"too_long": "cut", "max_tokens": 200})
    assert [r.after for r in both_ways(cut)] == ["OK", "OK", "SKIP(TOO_LONG)", "SKIP(TOO_LONG)", "OK"]
    prepared: Prepared = checked(cut, QUIET)
    whole = checked(run(file, data={"max_tokens": 4096}, batch={"device_tokens": 4096}), QUIET)
    kept = {0: (2, 0), 1: (4, 2), 4: (2, 0)}
    for position, (messages, images) in kept.items():
        loader, other = prepared.read.spec.build(), whole.read.spec.build()
        ref = prepared.read.row_ref(position).row
        short, full = (each.encode(0, each.sample(0, ref)) for each in (loader, other))
        n = short.num_tokens
        assert (
            n <= 200 and np.array_equal(short.ids_L, full.ids_L[:n]) and np.array_equal(short.kind_L, full.kind_L[:n])
        )
        end = [i for i, t in enumerate(short.ids_L.tolist()) if t == loader.tokenizer.control("<|im_end|>")]
        assert len(end) == messages + 1, "and the system turn"
        assert len(short.images) == images
        assert int((short.kind_L == IMAGE).sum()) == sum(b.num_tokens for b in short.images)
        assert loader.tokenizer.decode(short.ids_L[end[-1] :].tolist()) == "<|im_end|>\n"
        assert short.num_supervised == int(short.trained_L.sum())
    assert [r.after for r in both_ways(run(file, data={"max_tokens": 200}))] == ["SKIP(TOO_LONG)"] * 4 + ["OK"]


def test_nothing_left_to_train_after_the_cut(tmp_path: Path, run: Callable[..., Located]) -> None:
    row = turns("one", "two", "three", "picture " * 300)
    row["messages"][1]["train"] = False
    found = both_ways(run(write(tmp_path / "t.jsonl", GOOD, row), data={"too_long": "cut", "max_tokens": 100}))
    assert [r.after for r in found] == ["OK", "SKIP(NO_TARGETS)"]
    assert found[1].detail == "no supervised token"


# --- B60: documents ---------------------------------------------------------------------------------------------------


def test_documents(tmp_path: Path, run: Callable[..., Located]) -> None:
    rows = [{"text": "a red circle"}, {"text": " \n\t\u3000"}, {"text": ""}, {"text": "circle " * 3000}]
    file = write(tmp_path / "t.jsonl", *rows)
    found = both_ways(run(file, data={"documents": {"too_long": "drop"}}))
    assert [r.after for r in found] == ["OK", "SKIP(EMPTY)", "SKIP(EMPTY)", "SKIP(TOO_LONG)"]
    cut = both_ways(run(file))
    assert [r.after for r in cut] == ["OK", "SKIP(EMPTY)", "SKIP(EMPTY)", *["OK"] * (len(cut) - 3)] and len(cut) > 10


# --- B61, B62: across rows --------------------------------------------------------------------------------------------


def test_the_same_id_twice(tmp_path: Path, run: Callable[..., Located]) -> None:
    file = write(
        tmp_path / "t.jsonl", {**GOOD, "id": "a"}, {**GOOD, "id": 1}, {**GOOD, "id": "a"}, {**GOOD, "id": "1"}, GOOD
    )
    error = fails(run(file))
    assert error.code == "DUP_ID"
    assert f"'a' stands in {file}:1, {file}:3" in error.message
    assert f"'1' stands in {file}:2, {file}:4" in error.message
    found = both_ways(run({"path": str(file), "format": Messages(id_column="none").model_dump()}))
    assert [r.after for r in found] == ["OK"] * 5


def test_held_out_rows_that_stand_in_the_training_data(
    tmp_path: Path, run: Callable[..., Located], capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.jsonl", *(chat(f"question {i}") for i in range(6)))
    held = write(tmp_path / "held.jsonl", *(chat(f"question {i}") for i in range(4, 9)))
    located = run(train, data={"eval": str(held)})
    said = "2 of 5 held-out samples stand in the training data too (EVAL_IN_TRAIN)"
    assert checked(located, QUIET).notes == (said,)
    assert f"warning: {said}" in capsys.readouterr().err
    runs.quiet_train(located)
    assert f"warning: {said}" in capsys.readouterr().err
    clean = run(train, data={"eval": str(write(tmp_path / "new.jsonl", chat("other")))})
    assert checked(clean, QUIET).notes == ()


# --- the limit of dropped rows ----------------------------------------------------------------------------------------


def test_more_drops_than_allowed(tmp_path: Path, run: Callable[..., Located]) -> None:
    file = write(tmp_path / "t.jsonl", *[GOOD] * 8, picture("gone.png"), chat("picture " * 400))
    error = fails(run(file, data={"max_dropped": 0.19}))
    assert error.code == "TOO_MANY_DROPPED"
    assert "2 of 10 rows" in error.message and "1 IMG_MISSING, 1 TOO_LONG" in error.message
    assert sum(r.after == "OK" for r in both_ways(run(file, data={"max_dropped": 0.2}))) == 8


def test_nothing_left(tmp_path: Path, run: Callable[..., Located]) -> None:
    error = fails(run(write(tmp_path / "t.jsonl", *[picture("gone.png")] * 3)))
    assert error.code == "NO_SAMPLES" and "3 IMG_MISSING" in error.message


# --- F61, F62: pictures that change between index and training --------------------------------------------------------


@pytest.mark.faults("F61", "deleted, made a pipe")
@pytest.mark.faults("F62", "another size, cut short")
def test_pictures_that_change_after_the_index(
    tmp_path: Path, run: Callable[..., Located], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gone", "larger", "cut", "same", "fifo"):
        (tmp_path / f"{name}.png").write_bytes(rgb_png(gradient(60, 60)))
    names = ["gone", "larger", "cut", "same", "fifo"]
    file = write(tmp_path / "t.jsonl", GOOD, *(picture(f"{n}.png") for n in names))
    located = run(file)
    build = stage.build

    def meddle(prepared: Prepared, **carried: Any) -> Any:
        built = build(prepared, **carried)
        (tmp_path / "gone.png").unlink()
        (tmp_path / "larger.png").write_bytes(rgb_png(gradient(60, 200)))
        (tmp_path / "cut.png").write_bytes(rgb_png(gradient(60, 60))[:-20])
        (tmp_path / "same.png").write_bytes(rgb_png(gradient(60, 60)[::-1].copy()))
        (tmp_path / "fifo.png").unlink()
        os.mkfifo(tmp_path / "fifo.png")
        return built

    monkeypatch.setattr(stage, "build", meddle)
    outcome = runs.quiet_train(located)
    ledger = pq.read_table(outcome.folder / "ledger.parquet").to_pylist()
    wanted = [None, "LOAD_IMG_MISSING", "LOAD_CHANGED", "LOAD_IMG_TRUNCATED", None, "LOAD_PATH_KIND"]
    assert [r["reason"] for r in ledger] == wanted
    assert outcome.summary["samples"] == {
        "read": 6, "train": 2, "dropped": 4, "held_out": 0,
        "by_reason": {r: 1 for r in wanted if r is not None},
    }  # fmt: skip
    reasons = [r["reason"] for r in ledger if r["reason"]]
    written = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    told = [f"LOAD_{r['reason']}" for r in written if r.get("name") == "dropped"]
    assert sorted(told) == sorted(reasons)


def test_mended_pictures_train_next_time(tmp_path: Path, run: Callable[..., Located]) -> None:
    """What was dropped for its picture is looked at again, though the index is cached."""
    file = write(tmp_path / "t.jsonl", GOOD, picture("a.png"))
    assert [r.after for r in both_ways(run(file))] == ["OK", "SKIP(IMG_MISSING)"]
    (tmp_path / "a.png").write_bytes(rgb_png(gradient(60, 60)))
    assert [r.after for r in both_ways(run(file))] == ["OK", "OK"]


def test_good_data_passes_untouched(tmp_path: Path, run: Callable[..., Located]) -> None:
    found = both_ways(run(tiny.make_chat(tmp_path, 20), data={"max_dropped": 0}))
    assert len(found) == 20 and {(r.at_index, r.after, r.notes) for r in found} == {("OK", "OK", ())}
