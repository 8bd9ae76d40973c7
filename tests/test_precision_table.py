"""The table of docs/numerics.md: every preset with every way of tuning, as measured in memory and on disk.

`python tests/test_precision_table.py` writes it anew.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import all_families
import pytest
import runs
import tiny
import torch

from lensmith.checkpoint.export import SavedTypes, write_adapter, write_model
from lensmith.model.load import SAFETENSORS_DTYPES, read_header
from lensmith.model.options import Lora
from lensmith.model.precision import PRESETS, part_in
from lensmith.recipe.build import build
from lensmith.recipe.prepare import prepare
from lensmith.report.terminal import Terminal

DOCS = Path(__file__).parents[1] / "docs" / "numerics.md"
BEGIN, END = "<!-- precision table -->\n", "<!-- end of precision table -->\n"
TUNINGS: dict[str, Any] = {
    "full": {"kind": "full"},
    "freeze: language": {"kind": "freeze", "train": ["language"]},
    "lora": {"kind": "lora", "rank": 2, "parts": ["language", "vision"]},
}
PARTS = ("vision", "projector", "language", "embeddings", "head", "adapter")
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
Row = tuple[str, ...]


def measured(base: Path, data: Path, folder: Path, preset: str, tuning: str) -> tuple[dict[str, str], str]:
    """Part -> its types in memory, a star where it trains; and the types of what is saved."""
    run = runs.located(
        folder, base, data, precision={"preset": preset}, tune=TUNINGS[tuning],
        data={"max_tokens": 4096}, batch={"device_tokens": 4096},
    )  # fmt: skip
    prepared = prepare(run, Terminal("quiet"))
    built = build(prepared)
    part_of, model = prepared.family.part_of, built.tuned.model
    found: dict[str, set[str]] = defaultdict(set)
    for name, p in model.named_parameters():
        found[part_in(part_of, name)].add(SHORT[p.dtype] + ("*" if p.requires_grad else ""))
    if isinstance(run.run.tune, Lora):
        write_adapter(folder / "saved", built.tuned.peft, base, "base", built.precision.of("adapter").saved)
    else:
        write_model(folder / "saved", model, base, SavedTypes.planned(built.precision, part_of))
    headers = [read_header(f) for f in (folder / "saved").glob("*.safetensors")]
    disk = {SHORT[SAFETENSORS_DTYPES[entry["dtype"]]] for header in headers for entry in header.values()}
    return {part: "+".join(sorted(types)) for part, types in found.items()}, "+".join(sorted(disk))


def rows_of(name: str, folder: Path) -> dict[tuple[str, str], Row]:
    """(preset, tuning) -> types of the parts in memory and of what is saved; "" for a part the family has not."""
    base = all_families.make(folder / name, name, torch.bfloat16)
    data = tiny.make_chat(folder / f"{name}-data", 4, pictures=2)
    out: dict[tuple[str, str], Row] = {}
    for preset in PRESETS:
        for tuning in TUNINGS:
            memory, disk = measured(base, data, folder / f"{name}-{preset}-{tuning[:4]}", preset, tuning)
            out[preset, tuning] = (*(memory.get(part, "") for part in PARTS), disk)
    return out


def table(found: dict[str, dict[tuple[str, str], Row]]) -> str:
    """One line for each (preset, tuning); where a family has no such part, the others say."""
    lines = [
        f"| preset | tuning | {' | '.join(PARTS)} | saved |\n",
        f"| --- | --- | {' | '.join('---' for _ in PARTS)} | --- |\n",
    ]
    for key in next(iter(found.values())):
        cells = []
        for column in zip(*(rows[key] for rows in found.values()), strict=True):
            said = {value for value in column if value}
            assert len(said) <= 1, f"{key}: families differ: {dict(zip(found, column, strict=True))}"
            cells.append(said.pop() if said else "")
        lines.append(f"| `{key[0]}` | {key[1]} | {' | '.join(cells)} |\n")
    names = ", ".join(f"`{name}`" for name in found)
    return f"{''.join(lines)}\nA star: it trains. Equal in {names}; families with a tied head have none.\n"


def in_docs() -> str:
    text = DOCS.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


@pytest.mark.parametrize("name", all_families.MAKERS)
def test_the_table_is_what_is_measured(name: str, tmp_path: Path) -> None:
    lines = [line for line in in_docs().splitlines() if line.startswith("| `")]
    listed = {(cells[1].strip(" `"), cells[2].strip()): cells[3:-1] for cells in (line.split("|") for line in lines)}
    found = rows_of(name, tmp_path)
    assert found.keys() == listed.keys()
    for key, row in found.items():
        assert all(value in ("", said.strip()) for value, said in zip(row, listed[key], strict=True)), (key, row)
        assert row[2] and row[-1]
    assert f"`{name}`" in in_docs().splitlines()[-1]


def write() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        text = DOCS.read_text(encoding="utf-8")
        new = table({name: rows_of(name, Path(folder)) for name in all_families.MAKERS})
        DOCS.write_text(text.replace(in_docs(), new, 1) if in_docs() else text.replace(BEGIN, BEGIN + new, 1), "utf-8")


if __name__ == "__main__":
    sys.exit(write())
