"""`lensmith show`: one sample as the model sees it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lensmith.core.encoded import IMAGE, Encoded
from lensmith.core.errors import ConfigError, Drop
from lensmith.data.load import Loader
from lensmith.recipe.prepare import Prepared, prepare
from lensmith.recipe.run import Located
from lensmith.report.escape import terminal_safe
from lensmith.report.terminal import Terminal


def show(located: Located, number: int, terminal: Terminal) -> None:
    """Print sample `number` (over the rows read) or why it is dropped. Raises ConfigError SAMPLE."""
    quiet = Terminal("quiet")
    if located.run.data.stream is not None:
        raise ConfigError("SAMPLE", "the rows of a stream have no numbers: they are read as they are trained",
                          remedy="give it the override data.stream=null, or look at `lensmith check`")  # fmt: skip
    prepared = prepare(located, quiet)
    total = prepared.read.num_rows
    if not 0 <= number < total:
        raise ConfigError("SAMPLE", f"there is no sample {number}; the data has rows 0 to {total - 1}")
    at = prepared.read.row_ref(number)
    file = at.file
    loader = prepared.read.spec.build()
    origin = loader.rows(file).origin(at.row)
    try:
        encoded = loader.encode(file, loader.sample(file, at.row), at.cut)
    except Drop as drop:
        terminal.event(
            "dropped",
            f"{origin} is dropped: {drop.reason} {drop.detail}",
            origin=origin,
            reason=drop.reason,
            detail=drop.detail,
        )
        return
    if terminal.mode == "json":
        terminal.event("sample", **_record(origin, encoded, loader))
        return
    _draw(prepared, file, origin, encoded, loader, terminal)


def _record(origin: str, encoded: Encoded, loader: Loader) -> dict[str, Any]:
    return {
        "origin": origin,
        "ids": encoded.ids_L.tolist(),
        "tokens": [loader.tokenizer.decode([i]) for i in encoded.ids_L.tolist()],
        "trained": encoded.trained_L.tolist(),
        "segments": [[s.start, s.length, s.prefix_start, s.prefix_length] for s in encoded.segments],
        "images": [
            {
                "path": b.image.path,
                "frames": list(b.frames),
                "width": b.width,
                "height": b.height,
                "grid": list(b.grid_thw),
                "tokens": b.num_tokens,
            }
            for b in encoded.images
        ],
    }


def _draw(prepared: Prepared, file: int, origin: str, encoded: Encoded, loader: Loader, terminal: Terminal) -> None:
    from rich.text import Text

    text = Text()
    blocks = iter(encoded.images)
    starts = {s.start: s for s in encoded.segments if s.prefix_length}
    at = 0
    while at < encoded.num_tokens:
        if at in starts:
            text.append(f"\n── branch behind {starts[at].prefix_length} shared tokens ──\n", style="dim")
        if encoded.kind_L[at] == IMAGE:
            block = next(blocks)
            _, rows, columns = block.grid_thw
            text.append(
                f"[{block.num_tokens} image tokens: {block.width}x{block.height} px, {columns}x{rows} patches]",
                style="cyan",
            )
            at += block.num_tokens
            continue
        end = _same(encoded, at, starts)
        lines = loader.tokenizer.decode(encoded.ids_L[at:end].tolist()).split("\n")
        piece = "⏎\n".join(terminal_safe(line) for line in lines)
        text.append(piece, style="bold green" if encoded.trained_L[at] else "")
        at = end
    image_tokens = int((encoded.kind_L == IMAGE).sum())
    terminal.console.print(text)
    terminal.event(
        "sample",
        f"{origin}: {encoded.num_tokens} tokens, {encoded.num_supervised} trained (green), {image_tokens} of "
        f"{len({id(b.image) for b in encoded.images})} images, {len(encoded.segments)} segments",
    )
    for block in encoded.images:
        if (grid := _patch_grid(prepared, loader, file, block, origin)) is not None:
            terminal.console.print(grid)


def _same(encoded: Encoded, at: int, starts: dict[int, Any]) -> int:
    """End of the run of tokens from `at` that are alike in kind and trained, within one branch."""
    end = at + 1
    while (
        end < encoded.num_tokens
        and encoded.kind_L[end] == encoded.kind_L[at]
        and encoded.trained_L[end] == encoded.trained_L[at]
        and end not in starts
    ):
        end += 1
    return end


def _patch_grid(prepared: Prepared, loader: Loader, file: int, block: Any, origin: str, widest: int = 48) -> Any:
    """The picture as the tower sees it: one coloured cell per merged patch, from the patches' mean colours."""
    from rich.text import Text

    family = prepared.family
    _, rows, columns = block.grid_thw
    merge = family.pixels.merge
    if columns // merge > widest:
        return None
    try:
        if block.frames:  # the first frame
            decoded = loader.video_patches(file, [block], origin)[0][: rows * columns]
        else:
            decoded = loader.patches(loader.bytes_of(file, block.image, origin), [block])[0][: rows * columns]
    except Drop as drop:
        return Text(f"[this picture does not decode: {drop}]", style="red")
    high, wide = rows // merge, columns // merge
    colours = decoded.reshape(rows * columns, 3, -1).mean(axis=2)
    if family.pixels.grouped:
        colours = colours.reshape(high, wide, merge * merge, 3).mean(axis=2)
    else:  # row by row; what does not fill a cell at the edges is left out
        whole = colours.reshape(rows, columns, 3)[: high * merge, : wide * merge]
        colours = whole.reshape(high, merge, wide, merge, 3).mean(axis=(1, 3))
    colours = colours.astype(np.uint8)
    text = Text()
    for line in colours:
        for r, g, b in line:
            text.append("  ", style=f"on rgb({r},{g},{b})")
        text.append("\n")
    return text
