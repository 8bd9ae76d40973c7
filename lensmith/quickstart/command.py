"""`lensmith quickstart`: write data files and a run file, then the ordinary `train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lensmith.quickstart import easy_vqa
from lensmith.report.terminal import Terminal

MODEL = Path(__file__).parents[1] / "assets" / "tiny_vqa"


def quickstart(folder: Path, overrides: Sequence[str], terminal: Terminal) -> None:
    """Fill `folder` (what is there is reused), train, and print the held-out figures."""
    folder = folder.resolve()
    for split in ("train", "test"):
        path = folder / "data" / f"{split}.jsonl"
        if not path.is_file():
            easy_vqa.write_lines(path, easy_vqa.question_rows(split))
    run_file = folder / "quickstart.yaml"
    if not run_file.is_file() or str(MODEL) not in run_file.read_text(encoding="utf-8"):  # made by another environment
        pictures = easy_vqa.pictures("train")[0].path.parents[2]
        template = (Path(__file__).parent / "quickstart.yaml").read_text(encoding="utf-8")
        run_file.write_text(
            template.format(model=json.dumps(str(MODEL)), pictures=json.dumps(str(pictures))), encoding="utf-8"
        )
    terminal.event(
        "quickstart",
        "easy-vqa: 38,575 questions on 4,000 pictures to learn from, 9,673 on 1,000 others to be asked; "
        f"files in {folder}",
        folder=str(folder),
    )
    from lensmith.recipe.train import train
    from lensmith.report.tables import held_out

    outcome = train(run_file, overrides, terminal=terminal)
    terminal.show("held_out", held_out(outcome.summary["heldout"]))
    terminal.event(
        "report", f"Open {outcome.folder / 'report.html'} in a browser.", path=str(outcome.folder / "report.html")
    )
