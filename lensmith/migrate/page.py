"""The tables of docs/llamafactory.md, made from the keys.

`python -m lensmith.migrate.page docs/llamafactory.md` makes everything below the mark anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from lensmith.migrate.given import shown
from lensmith.migrate.keys import Key, all_keys

MARK = "<!-- Generated below: python -m lensmith.migrate.page docs/llamafactory.md -->"


def tables() -> str:
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    for group, keys in groupby(all_keys().values(), key=lambda key: key.group):
        yield f"\n### {group}\n"
        yield "| Key | Default | Decision | In lensmith | About |"
        yield "| --- | --- | --- | --- | --- |"
        yield from map(_row, keys)


def _row(key: Key) -> str:
    default = f"`{shown(key.default)}`" if key.default != "" else ""
    to = ", ".join(f"`{name}`" for name in key.to.split(", ")) if key.to else ""
    cells = (f"`{key.name}`", default, key.verdict, to, key.about)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(text: str) -> str:
    """The page with its tables made anew."""
    above, _, _ = text.partition(MARK)
    return f"{above}{MARK}\n{tables()}\n"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")
