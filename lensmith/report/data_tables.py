"""The tables of `lensmith data`, from the records of data.json: for the terminal, in 80 columns, and for the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lensmith.report.tables import Table, number, percent

Record = Mapping[str, Any]
Column = tuple[str, Callable[[Any], str]]


def of_stage(stage: Record) -> list[tuple[str, Table]]:
    """(name, table) of all that a stage has anything to say about."""
    where = f"Stage {stage['name']}: " if stage["name"] else ""
    sources, held = stage.get("sources") or [], stage.get("held_out") or []
    found = [
        ("data", data_that_trains(sources)), ("lengths", lengths(sources)), ("pictures", pictures(sources)),
        ("sizes", sizes(sources)), ("mixture", mixture(sources)), ("dropped", dropped([*sources, *held])),
        ("held_out", held_out(held)), ("notes", notes(stage.get("notes") or {})),
        *of_duplicates(stage.get("duplicates")),
    ]  # fmt: skip
    return [
        (name, Table(where + table.title, table.columns, table.rows, table.right, table.footer))
        for name, table in found
        if table.rows
    ]


def data_that_trains(sources: Sequence[Record]) -> Table:
    columns: list[Column] = [
        ("Rows", _of("rows")), ("Samples", _of("samples")), ("Held out", _of("held_out")), ("Dropped", _of("dropped")),
        ("Tokens", lambda s: number(s["tokens"]["sum"])), ("Trained", lambda s: _share(s["trained_share"])),
    ]  # fmt: skip
    optional = {"Held out": "held_out", "Dropped": "dropped"}
    total = _total(sources)
    columns = [(n, cell) for n, cell in columns if n not in optional or total[optional[n]]]
    return _by_source("Data that trains", sources, columns, total)


def _total(sources: Sequence[Record]) -> dict[str, Any]:
    sums = {key: sum(s.get(key, 0) for s in sources) for key in ("rows", "samples", "held_out", "dropped")}
    tokens, supervised = sum(s["tokens"]["sum"] for s in sources), sum(s["supervised"] for s in sources)
    return {
        "name": "Total",
        **sums,
        "tokens": {"sum": tokens},
        "trained_share": supervised / tokens if tokens else None,
    }


def lengths(sources: Sequence[Record]) -> Table:
    columns: list[Column] = [
        ("Mean", lambda s: _number(s["tokens"]["mean"])), ("Median", lambda s: number(s["tokens"]["median"])),
        ("95 %", lambda s: number(s["tokens"]["p95"])), ("Longest", lambda s: number(s["tokens"]["max"])),
    ]  # fmt: skip
    if any(s["documents_cut"] for s in sources):
        columns += [("Cut", _of("documents_cut")), ("Pieces", _of("pieces"))]
    return _by_source("Tokens per sample", sources, columns)


def pictures(sources: Sequence[Record]) -> Table:
    shown = [s for s in sources if s["images"] or s["videos"]]
    columns: list[Column] = [("Pictures", _of("images"))]
    if any(s["videos"] for s in shown):
        columns.append(("Videos", _of("videos")))
    columns += [
        ("Their tokens", _of("media_tokens")), ("Enlarged", lambda s: _picture(s, "enlarged_share", _share)),
        ("Reduced", lambda s: _picture(s, "reduced_share", _share)),
    ]  # fmt: skip
    return _by_source("Pictures", shown, columns)


def sizes(sources: Sequence[Record], *, commonest: bool = True) -> Table:
    columns: list[Column] = [
        ("Sizes", lambda s: _picture(s, "distinct_sizes", number)),
        ("Width", lambda s: _picture(s, "width", _spread)), ("Height", lambda s: _picture(s, "height", _spread)),
        ("Mean pixels", lambda s: _picture(s, "mean_pixels", _number)),
    ]  # fmt: skip
    if commonest:
        columns.append(("Commonest", lambda s: _picture(s, "sizes", lambda sizes: f"{sizes[0][0]}x{sizes[0][1]}")))
    return _by_source("Sizes of pictures: smallest – median – largest", [s for s in sources if s["pictures"]], columns)


def common_sizes(sources: Sequence[Record], count: int = 10) -> Table:
    """The commonest sizes of each source, on the page only."""
    rows = [
        (s["name"], f"{wide} x {high}", number(many), percent(many / s["pictures"]["count"]))
        for s in sources
        if s["pictures"]
        for wide, high, many in s["pictures"]["sizes"][:count]
    ]
    return Table("Commonest sizes", ("Source", "Size", "Pictures", "Share"), rows, frozenset({"Pictures", "Share"}))


def mixture(sources: Sequence[Record]) -> Table:
    """What the run draws; nothing is mixed of one source."""
    columns: list[Column] = [
        ("Share", lambda s: percent(s["planned"]["share"])), ("Drawn", lambda s: number(s["planned"]["samples"])),
        ("Passes", lambda s: f"{s['planned']['passes']:,.2f}"), ("Tokens", lambda s: number(s["planned"]["tokens"])),
        ("Of all tokens", lambda s: percent(s["planned"]["token_share"])),
    ]  # fmt: skip
    if any(s["planned"]["loss_weight"] != 1 for s in sources):
        columns.append(("Weight", lambda s: number(float(s["planned"]["loss_weight"]))))
    return _by_source("What the run draws", sources if len(sources) > 1 else [], columns)


def dropped(sources: Sequence[Record], *, details: bool = False) -> Table:
    rows = [
        (s["name"], reason, number(found["samples"]), found["first"], *([found["detail"]] if details else []))
        for s in sources
        for reason, found in s["by_reason"].items()
    ]
    columns = ("Source", "Reason", "Samples", "First", *(["Detail of the first"] if details else []))
    return Table("Dropped", columns, rows, frozenset({"Samples"}))


def held_out(sources: Sequence[Record]) -> Table:
    columns: list[Column] = [
        ("Rows", _of("rows")), ("Samples", _of("samples")), ("Tokens", lambda s: number(s["tokens"]["sum"])),
        ("Trained", lambda s: _share(s["trained_share"])), ("Longest", lambda s: number(s["tokens"]["max"])),
        ("Pictures", _of("images")),
    ]  # fmt: skip
    return _by_source("Held-out data", sources, columns)


def notes(found: Mapping[str, Record]) -> Table:
    rows = [(note, number(n["samples"]), n["first"]) for note, n in found.items()]
    return Table("Accepted with a note (docs/data.md)", ("Note", "Samples", "First"), rows, frozenset({"Samples"}))


# --- with --hash ------------------------------------------------------------------------------------------------------


def of_duplicates(found: Record | None) -> list[tuple[str, Table]]:
    return [] if found is None else [("duplicates", duplicates(found)), ("first_duplicates", first_duplicates(found))]


def duplicates(found: Record) -> Table:
    """Counts on each side of the split."""
    sides = [found["train"], *([found["held_out"]] if found["held_out"] else [])]
    reasons = list(dict.fromkeys(reason for side in sides for reason in side["undecodable"]))
    lines: list[tuple[str, list[int]]] = [
        ("Pictures", [s["pictures"]["files"] for s in sides]),
        ("- the bytes of another one", [s["pictures"]["copies"] for s in sides]),
        ("- in more than one source", [s["pictures"]["across_sources"] for s in sides]),
        ("- of one colour", [s["one_colour"]["pictures"] for s in sides]),
        *((f"- without pixels: {r}", [s["undecodable"].get(r, {}).get("pictures", 0) for s in sides]) for r in reasons),
    ]
    if not any(lines[0][1]):
        lines = []
    lines += [
        ("Rows", [s["samples"]["rows"] for s in sides]),
        ("- the text of an earlier one", [s["texts"]["repeats"] for s in sides]),
        ("- text and pictures of an earlier one", [s["samples"]["repeats"] for s in sides]),
        ("- the same in more than one source", [s["samples"]["across_sources"] for s in sides]),
    ]
    both = found["both"] or {}
    rows = [(what, *map(number, counts), *([_crossing(what, both)] if both else [])) for what, counts in lines]
    columns = ("Found", "Training", *(["Held out", "On both sides"] if found["held_out"] else []))
    return Table("What stands twice", columns, rows, frozenset(columns[1:]))


def _crossing(what: str, both: Record) -> str:
    key = {"Pictures": "pictures", "- text and pictures of an earlier one": "samples"}.get(what)
    return number(both[key]) if key else ""


def first_duplicates(found: Record, *, files: bool = False) -> Table:
    """Where the first ones are. `files`: more of them, with the files of pictures."""
    rows: list[tuple[str, ...]] = []
    for side, what in (("train", ""), ("held_out", "held out: ")):
        one = found[side]
        if one is None:
            continue
        for group in one["pictures"]["first"]:
            where = [
                f"{origin} ({file})" if files and file else origin
                for origin, file in zip(group["origins"], group["files"], strict=True)
            ]
            rows.append((f"{what}same picture", number(group["count"]), _some(where, group["count"])))
        for kind, key in (("same text and pictures", "samples"), ("same text", "texts")):
            rows += [
                (what + kind, number(g["count"]), _some(g["origins"], g["count"]))
                for g in one[key]["first"]
                if key == "samples" or g not in one["samples"]["first"]
            ]
        flagged = {"one colour": one["one_colour"], **{f"no pixels: {r}": f for r, f in one["undecodable"].items()}}
        rows += [
            (what + kind, number(f["pictures"]), _some(f["first"][:3], f["pictures"]))
            for kind, f in flagged.items()
            if f["pictures"]
        ]
    both = found["both"] or {}
    for kind, key in (("picture", "first_pictures"), ("sample", "first_samples")):
        pairs = both.get(key, ())[: None if files else 3]
        rows += [(f"{kind} on both sides", "", f"{pair['held_out']} = {pair['train']}") for pair in pairs]
    return Table("Where they are", ("What", "Times", "First"), rows, frozenset({"Times"}))


def _some(origins: Sequence[str], count: int) -> str:
    return ", ".join(origins) + (", ..." if count > len(origins) else "")


# --- cells ------------------------------------------------------------------------------------------------------------


def _by_source(title: str, sources: Sequence[Record], columns: Sequence[Column], total: Record | None = None) -> Table:
    rows = [(s["name"], *(cell(s) for _, cell in columns)) for s in sources]
    names = tuple(name for name, _ in columns)
    footer = (total["name"], *(cell(total) for _, cell in columns)) if total is not None and len(rows) > 1 else ()
    return Table(title, ("Source", *names), rows, frozenset(names), footer)


def _of(key: str) -> Callable[[Record], str]:
    return lambda source: number(source[key])


def _picture(source: Record, key: str, shown: Callable[[Any], str]) -> str:
    return shown(source["pictures"][key]) if source["pictures"] else ""


def _share(value: float | None) -> str:
    return number(value) if value is None else percent(value)


def _number(value: float | None) -> str:
    return number(value) if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"


def _spread(value: Record) -> str:
    return f"{value['min']:,} – {value['median']:,} – {value['max']:,}"
