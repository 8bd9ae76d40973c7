"""Bad (and odd but good) source files with what must come of each: rows B43 to B67 that reading and formats decide.

`expect` is `OK`, `OK+note`, `FAIL(CODE)` or `SKIP(CODE)`, for the first row that is not plainly OK. `where` is what the
error must name: a line, and for errors inside a row the path.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lensmith.data.formats import Alpaca, DocumentFormat, Messages, ShareGPT

AnyFormat = Messages | ShareGPT | Alpaca | DocumentFormat

USER = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "A cat."}
GOOD = {"messages": [USER, ANSWER]}
GOOD_LINE = json.dumps(GOOD).encode() + b"\n"


@dataclass(frozen=True)
class Case:
    id: str
    file: Path
    format: AnyFormat
    expect: str
    where: str = ""


def make(folder: Path) -> list[Case]:
    return [*_files(folder), *_rows(folder), *_documents(folder)]


def _files(folder: Path) -> list[Case]:
    """Files that are wrong as files (B43 to B52)."""
    array = json.dumps([GOOD, GOOD], indent=1).encode()
    late = GOOD_LINE * 2
    byte_cases: list[tuple[str, str, bytes, str, str]] = [
        ("B43-empty", "jsonl", b"", "FAIL(NO_ROWS)", ""),
        ("B43-blank", "jsonl", b"\n  \n\r\n\t\n", "FAIL(NO_ROWS)", ""),
        ("B43-empty-array", "json", b" [ ] \n", "FAIL(NO_ROWS)", ""),
        ("B44-bom", "jsonl", b"\xef\xbb\xbf" + GOOD_LINE, "OK+bom", ""),
        ("B44-bom-array", "json", b"\xef\xbb\xbf" + array, "OK+bom", ""),
        ("B45-utf16", "jsonl", GOOD_LINE.decode().encode("utf-16"), "FAIL(ENCODING)", ":1"),
        ("B45-utf16-no-bom", "jsonl", GOOD_LINE.decode().encode("utf-16-be"), "FAIL(ENCODING)", ":1"),
        ("B45-utf16-array", "json", array.decode().encode("utf-16-le"), "FAIL(ENCODING)", ":1"),
        ("B45-latin-1", "jsonl", late + '{"a": "Käse"}'.encode("latin-1"), "FAIL(ENCODING)", ":3"),
        ("B46-half-line", "jsonl", late + GOOD_LINE[:25], "FAIL(JSON)", ":3"),
        ("B46-half-array", "json", array[:-20], "FAIL(JSON)", ":14"),
        ("B46-open-array", "json", b"[\n" + GOOD_LINE, "FAIL(JSON)", ":2"),
        ("B46-no-bracket", "json", b"[\n" + GOOD_LINE.strip() + b",\n", "FAIL(JSON)", ":3"),
        ("B47-duplicate-key", "jsonl", late + b'{"a": {"b": 1, "c": 2, "b": 3}}', "FAIL(JSON_DUP_KEY)", ":3"),
        ("B48-nan", "jsonl", b'{"a": NaN}', "FAIL(JSON_NUMBER)", ":1"),
        ("B48-infinity", "jsonl", b'{"a": -Infinity}', "FAIL(JSON_NUMBER)", ":1"),
        ("B48-1e999", "jsonl", b'{"a": [1e999]}', "FAIL(JSON_NUMBER)", ":1"),
        ("B48-5000-digits", "jsonl", b'{"a": ' + b"9" * 5000 + b"}", "FAIL(JSON_NUMBER)", ":1"),
        ("B49-deep", "jsonl", b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "FAIL(JSON_DEPTH)", ":1"),
        ("B49-deep-open", "jsonl", b'{"a":' * 10_000, "FAIL(JSON_DEPTH)", ":1"),
        (
            "B49-deep-array",
            "json",
            b"[" + GOOD_LINE + b"," + b"[" * 10_000 + b"]" * 10_000 + b"]",
            "FAIL(JSON_DEPTH)",
            ":2",
        ),
        ("B49-brackets-in-text", "jsonl", json.dumps({"text": '\\"[{' * 500}).encode(), "OK", ""),
        ("B50-surrogate", "jsonl", late + b'{"a": ["x", "\\ud800"]}', "FAIL(UNICODE)", ":3: a[1]"),
        ("B50-surrogate-key", "jsonl", b'{"\\uDC00": 1}', "FAIL(UNICODE)", ":1: a key"),
        ("B50-pair", "jsonl", b'{"text": "\\ud83d\\ude00 \\\\ud800"}', "OK", ""),
        ("B50-raw-surrogate", "jsonl", b'{"a": "\xed\xa0\x80"}', "FAIL(ENCODING)", ":1"),
        ("B51-array-jsonl", "jsonl", array, "OK", ""),
        ("B51-lines-json", "json", late, "OK", ""),
        ("B51-csv", "jsonl", b"prompt,answer\nhello,world\n", "FAIL(JSON)", ":1"),
        ("B51-two-per-line", "jsonl", late + b"{}{}", "FAIL(JSON)", ":3"),
        ("B51-no-comma", "json", b"[\n{}\n{}]", "FAIL(JSON)", ":2"),
        ("B51-two-commas", "json", b"[" + GOOD_LINE + b",\n,{}]", "FAIL(JSON)", ":3"),
        ("B51-last-comma", "json", b"[" + GOOD_LINE + b",\n]", "FAIL(JSON)", ":3"),
        ("B51-two-arrays", "json", array + b"\n[]", "FAIL(JSON)", ":27"),
        ("B51-row-is-list", "jsonl", late + b"[1]", "FAIL(SCHEMA)", ":3"),
        ("B51-row-is-number", "json", b"[" + GOOD_LINE + b", 7]", "FAIL(SCHEMA)", ":2"),
        ("B66-nul", "jsonl", late + b'{"a": {"b": "x\\u0000y"}}', "FAIL(UNICODE)", ":3: a.b"),
        ("B66-raw-nul", "jsonl", late + b'{"a": "x\0y"}', "FAIL(UNICODE)", ":3"),
        ("B66-controls", "jsonl", json.dumps({"text": "\x1b[31m\u202e\u200b\ue000 a\u2028b"}).encode(), "OK", ""),
        ("parquet-magic", "parquet", b"PAR1 not really PAR1", "FAIL(PARQUET)", ""),
        ("parquet-empty", "parquet", b"", "FAIL(PARQUET)", ""),
    ]
    cases = []
    for name, extension, content, expect, where in byte_cases:
        file = folder / f"{name}.{extension}"
        file.write_bytes(content)
        odd = DocumentFormat() if b'"text"' in content else Messages()
        cases.append(Case(name, file, odd, expect, f"{file}{where}" if where else ""))
    return [*cases, *_long_rows(folder), *_parquet(folder)]


def _long_rows(folder: Path) -> list[Case]:
    """A row of 200 MB, as a file with a hole."""
    cases = []
    for name, start, line in (
        ("B52-line.jsonl", GOOD_LINE + b'{"a": "', 2),
        ("B52-array.json", b"[" + GOOD_LINE + b',{"a": "', 2),
    ):
        file = folder / name
        file.write_bytes(start)
        with file.open("r+b") as opened:
            opened.truncate(200_000_000)
        cases.append(Case(file.stem, file, Messages(), "FAIL(ROW_BYTES)", f"{file}:{line}"))
    return cases


def _parquet(folder: Path) -> list[Case]:
    picture = {"bytes": b"\x89PNG", "path": None}
    turns = [{**USER, "content": "<image>What?", "tool_calls": None, "train": None}, ANSWER]
    tables: list[tuple[str, pa.Table, str, str]] = [
        ("parquet-images", pa.Table.from_pylist([{"messages": turns, "images": [picture]}]), "OK", ""),
        ("parquet-no-rows", pa.table({"messages": pa.array([], pa.string())}), "FAIL(NO_ROWS)", ""),
        ("parquet-nul", pa.table({"text": ["fine", "a\0b"]}), "FAIL(UNICODE)", ":2: text"),
        ("parquet-two-columns", pa.table([["a"], ["b"]], names=["text", "text"]), "FAIL(PARQUET)", ""),
    ]
    cases = []
    for name, table, expect, where in tables:
        file = folder / f"{name}.parquet"
        pq.write_table(table, file)
        odd = DocumentFormat() if "text" in table.column_names else Messages()
        cases.append(Case(name, file, odd, expect, f"{file}{where}" if where else ""))
    return cases


def _chat(*turns: str | tuple[str, Any], **more: Any) -> dict[str, Any]:
    """A row from role names (with a text of no importance) and (role, content) pairs."""
    pairs = [(turn, "text") if isinstance(turn, str) else turn for turn in turns]
    return {"messages": [{"role": role, "content": content} for role, content in pairs], **more}


def _rows(folder: Path) -> list[Case]:
    """Rows that are JSON but no conversation (B53 to B56, B64, B65, B67)."""
    images = {"images": ["1.jpg", "2.jpg"]}
    rows: list[tuple[str, AnyFormat, Any, str, str]] = [
        ("B53-missing", Messages(), {"message": []}, "FAIL(SCHEMA)", "messages: is missing"),
        ("B53-type", Messages(), {"messages": "hello"}, "FAIL(SCHEMA)", "messages: is str"),
        ("B53-none", Messages(), {"messages": []}, "FAIL(SCHEMA)", "messages: holds no messages"),
        ("B53-turn", Messages(), {"messages": [USER, "hello"]}, "FAIL(SCHEMA)", "messages[1]: is str"),
        ("B53-null", Messages(), _chat("user", "assistant", ("user", None)), "FAIL(SCHEMA)", "messages[2].content"),
        ("B53-number", Messages(), _chat("user", ("assistant", 7)), "FAIL(SCHEMA)", "messages[1].content: is int"),
        ("B53-empty-answer", Messages(), _chat("user", ("assistant", "")), "FAIL(SCHEMA)", "messages[1].content"),
        ("B53-empty-user", Messages(), _chat(("user", " "), "assistant"), "FAIL(SCHEMA)", "messages[0].content: empty"),
        ("B53-no-role", Messages(), {"messages": [{"content": "x"}]}, "FAIL(SCHEMA)", "messages[0].role: is missing"),
        ("B53-sharegpt", ShareGPT(), {"conversations": [{"from": "human"}]}, "FAIL(SCHEMA)", "conversations[0].value"),
        ("B53-alpaca", Alpaca(), {"input": "x", "output": "y"}, "FAIL(SCHEMA)", "instruction: is missing"),
        ("B53-alpaca-empty", Alpaca(), {"instruction": "x", "output": ""}, "FAIL(SCHEMA)", "output: empty"),
        ("B53-video", Messages(), {**GOOD, "videos": ["1.mp4"]}, "FAIL(VIDEO_COUNT)", "0 video marks, 1 videos"),
        ("B54-two-users", Messages(), _chat("user", "user", "assistant"), "FAIL(ROLE_ORDER)", "messages[1]"),
        ("B54-two-answers", Messages(), _chat("user", "assistant", "assistant"), "FAIL(ROLE_ORDER)", "messages[2]"),
        ("B54-assistant-first", Messages(), _chat("assistant", "user"), "FAIL(ROLE_ORDER)", "messages[0]"),
        ("B54-late-system", Messages(), _chat("user", "assistant", "system"), "FAIL(ROLE_ORDER)", "messages[2]"),
        ("B54-unknown-role", Messages(), _chat("user", "bot"), "FAIL(ROLE_ORDER)", "messages[1].role: unknown"),
        ("B54-tool-after-user", Messages(), _chat("user", "tool", "assistant"), "FAIL(ROLE_ORDER)", "messages[1]"),
        ("B54-no-assistant", Messages(), _chat("system", "user"), "FAIL(NO_TARGET)", ""),
        ("B54-no-output", Alpaca(), {"instruction": "x"}, "FAIL(NO_TARGET)", "output"),
        ("B54-33-turns", Messages(), _chat(*["user", "assistant"] * 17), "OK", ""),
        ("B55-mark-too-many", Messages(), _chat(("user", "<image>" * 3), "assistant", **images), "FAIL(IMAGE_COUNT)",
         "3 image marks, 2 pictures"),
        ("B55-image-too-many", Messages(), _chat(("user", "<image>"), "assistant", **images), "FAIL(IMAGE_COUNT)",
         "1 image marks, 2 pictures"),
        ("B55-no-images", Messages(), _chat(("user", "<image>a"), "assistant"), "FAIL(IMAGE_COUNT)", "marks, 0"),
        ("B56-17-images", Messages(), _chat(("user", "<image>" * 17), "assistant", images=["a.jpg"] * 17), "OK", ""),
        ("B56-same-image", Messages(), _chat(("user", "<image>" * 2), "assistant", images=["a.jpg"] * 2), "OK", ""),
        ("B64-in-block", Messages(), _chat(("user", [{"type": "text", "text": "<image>"}]), "assistant"), "OK", ""),
        ("B65-template", Messages(), _chat(("user", "{{ 7*7 }} {% for %}"), "assistant"), "OK", ""),
        ("B67-1-MiB", Messages(), _chat(("user", "a" * (1 << 20)), "assistant"), "OK", ""),
        ("B67-too-long", Messages(), _chat(("user", "ä" * (1 << 19) + "b"), "assistant"), "SKIP(TEXT_BYTES)", ""),
    ]  # fmt: skip
    return [_row_case(folder, *row) for row in rows]


def _documents(folder: Path) -> list[Case]:
    long = DocumentFormat()
    rows: list[tuple[str, AnyFormat, Any, str, str]] = [
        ("B60-10M", long, {"text": "word " * 2_000_000}, "OK", ""),
        ("B60-white-space", long, {"text": " \n\t\u3000"}, "SKIP(EMPTY)", ""),
        ("B60-empty", long, {"text": ""}, "SKIP(EMPTY)", ""),
        ("B60-only-image", long, {"text": "<image>", "images": ["1.jpg"]}, "SKIP(EMPTY)", ""),
        ("B60-missing", long, {"body": "x"}, "FAIL(SCHEMA)", "text: is missing"),
        ("B60-null", long, {"text": None}, "FAIL(SCHEMA)", "text: is null"),
        ("B60-images", long, {"text": "a <image> b", "images": []}, "FAIL(IMAGE_COUNT)", "1 image marks, 0 pictures"),
    ]
    return [_row_case(folder, *row) for row in rows]


def _row_case(folder: Path, name: str, layout: AnyFormat, row: object, expect: str, where: str) -> Case:
    file = folder / f"{name}.jsonl"
    file.write_text(json.dumps(row))
    return Case(name, file, layout, expect, where)
