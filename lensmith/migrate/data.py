"""The data of a run: sources, their formats, sizes of pictures and videos, lengths, mixture, held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lensmith.core.errors import ConfigError, DataError
from lensmith.data.readers import EXTENSIONS, open_rows
from lensmith.data.readers.table_rows import TABLES
from lensmith.migrate.draft import Draft
from lensmith.migrate.entries import COLUMNS, Entries, Entry
from lensmith.migrate.keys import DIFFERS, TAKEN
from lensmith.migrate.roots import counts_from, first_row, paths_in, roots_of
from lensmith.migrate.templates import Template

COMPARED = ("dpo", "rm")
"""Stages whose data is ranked."""
NAMES = {name: name for name in ("history", "system", "tools", "images", "videos")}
"""Columns without a default, by the name that rows use."""
ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def add(draft: Draft, template: Template | None) -> None:
    """Raises `ConfigError` DATASET_INFO and MIGRATE."""
    given = draft.given
    if not given.has("dataset"):
        given.refuse("dataset", "there is nothing to train on", "name the data sets of dataset_info.json")
    entries = Entries(given)
    sources(draft, entries, "dataset", "data.train")
    if given.has("eval_dataset"):
        sources(draft, entries, "eval_dataset", "data.eval")
    media(draft, entries)
    lengths(draft, template)
    pixels(draft)
    held_out(draft)
    mixture(draft)
    streaming(draft)
    draft.put("data.wrong_rows", "drop", "dataset")
    if given.has("tokenized_path") and given.path(given.get("tokenized_path")).exists():
        given.refuse("tokenized_path", "LLaMA-Factory has tokenised this folder, and only its tokens are in it",
                     "take it out: rows are measured in seconds and kept in the index cache")  # fmt: skip


# --- sources ----------------------------------------------------------------------------------------------------------


def sources(draft: Draft, entries: Entries, key: str, to: str) -> None:
    given = draft.given
    found: list[dict[str, Any]] = []
    for name in given.get(key):
        entry = entries.entry(name)
        _applicable(draft, entry)
        found += source(draft, entry, entries)
    draft.put(to, found, key)


def _applicable(draft: Draft, entry: Entry) -> None:
    stage = draft.given.get("stage")
    if (stage in COMPARED) != entry.ranking:
        problem = "is ranked" if entry.ranking else "is not ranked"
        raise ConfigError("DATASET_INFO", f"the data set {problem}, and stage is {stage}", where=entry.where,
                          remedy="stages dpo and rm train data sets with `ranking: true`, the others those without "
                          "it")  # fmt: skip
    if stage == "kto" and not entry.is_labelled:
        raise ConfigError("DATASET_INFO", "columns.kto_tag is not set, and stage is kto", where=entry.where,
                          remedy="name the column of true and false as kto_tag")  # fmt: skip
    for unknown in entry.unknown:
        draft.warn(f"{entry.where}: {unknown} is no key of LLaMA-Factory's, which passes over it as is done here")
    if entry.formatting == "openai":
        draft.warn(f"{entry.where}: with formatting: openai LLaMA-Factory writes 'detailed thinking off' into system "
                   "prompts; that is not copied here")  # fmt: skip
    off = [t for t in ("system_tag", "observation_tag", "function_tag") if entry.tags[t] is None]
    if off and entry.formatting == "sharegpt":
        draft.warn(f"{entry.where}: tags lists some and not {', '.join(off)}, so rows with such turns are dropped, as "
                   "there; name them to train these rows")  # fmt: skip


def source(draft: Draft, entry: Entry, entries: Entries) -> list[dict[str, Any]]:
    """An entry as one source; as one for each of its files where `max_samples` counts over several."""
    given = draft.given
    made: dict[str, Any] = {"path": entry.path, "name": entry.name, "format": row_format(draft, entry)}
    if entry.local:
        columns = [c for c in (entry.columns["images"], entry.columns["videos"]) if c]
        paths = paths_in(entry.path, columns) if columns else []
        _switched_off(draft, entry)
        made["media_dir"] = str(counts_from(paths, media_folder(draft, entries), given.folder))
        draft.roots += roots_of(paths, Path(made["media_dir"]))
    else:
        made |= {"subset": entry.subset} if entry.subset else {}
        made |= {"split": entry.split} if entry.split != "train" else {}
    most = given.get("max_samples")
    files = _files(entry)
    if most is None and any(file.suffix.lower() in TABLES for file in files):
        return [{**made, "path": str(file), "name": f"{entry.name}-{n}"} for n, file in enumerate(files)]
    if entry.num_samples is not None and not given.get("streaming"):
        if len(files) > 1:
            raise ConfigError("DATASET_INFO", "num_samples of a folder of several files is not supported",
                              where=entry.where, remedy="join the files, or use max_samples")  # fmt: skip
        made["num_samples"] = entry.num_samples
        draft.warn(f"{entry.where}: num_samples takes the same rows as LLaMA-Factory for the first such data set; of a "
                   "set with fewer rows none is repeated")  # fmt: skip
    if most is None:
        return [made]
    if len(files) < 2:
        return [{**made, "max_samples": most}]
    return [
        {**made, "path": str(file), "name": f"{entry.name}-{n}", "max_samples": count}
        for n, (file, count) in enumerate(_spread(files, most))
    ]


def _switched_off(draft: Draft, entry: Entry) -> None:
    """Say which columns the first row fills and the entry does not list."""
    row = first_row(entry.path)
    for name, usual in {**COLUMNS, **NAMES}.items():
        if entry.columns[name] is None and usual not in entry.columns.values() and row.get(str(usual)):
            draft.warn(f"{entry.where}: rows have {usual!r}, which is not read, as there: columns does not list "
                       f"{name!r}")  # fmt: skip


def _files(entry: Entry) -> list[Path]:
    path = Path(entry.path)
    if not entry.local or not path.is_dir():
        return []
    known = (*EXTENSIONS, *TABLES)
    return sorted(p for p in path.iterdir() if p.suffix.lower() in known and not p.name.startswith("."))


def _spread(files: Sequence[Path], most: int) -> list[tuple[Path, int]]:
    """The first `most` rows over several files: how many of each."""
    found: list[tuple[Path, int]] = []
    for file in files:
        if most <= 0:
            break
        try:
            count = sum(1 for _ in islice(open_rows(file).scan(), most))
        except DataError:  # told, with its row, when the data is read
            count = most
        found.append((file, count))
        most -= count
    return found


def row_format(draft: Draft, entry: Entry) -> dict[str, Any]:
    given, columns = draft.given, entry.columns
    if given.get("stage") == "pt":
        return _document(draft, entry)
    common: dict[str, Any] = {
        "system_column": columns["system"] or "",
        "images_column": columns["images"] or "",
        "videos_column": columns["videos"] or "",
        "id_column": "",
        "unanswered": "error",
        "objects_column": "",
    }
    if columns["audios"]:
        raise ConfigError("DATASET_INFO", f"columns.audios is {columns['audios']!r}: sound cannot be trained",
                          where=entry.where, remedy="use data sets without sound")  # fmt: skip
    common |= (
        {"chosen_column": columns["chosen"] or "chosen", "rejected_column": columns["rejected"] or "rejected"}
        if (entry.ranking)
        else {}
    )
    common |= {"label_column": columns["kto_tag"]} if entry.is_labelled else {}
    common |= {"default_system": draft.system} if draft.system else {}
    common |= (
        {"train": "last"} if given.get("mask_history") else {"train": "all"} if given.get("train_on_prompt") else {}
    )
    return {"alpaca": _alpaca, "sharegpt": _sharegpt, "openai": _openai}[entry.formatting](entry, common)


def _document(draft: Draft, entry: Entry) -> dict[str, Any]:
    """Pre-training reads the prompt column as a text."""
    if entry.formatting != "alpaca":
        raise ConfigError("DATASET_INFO", f"formatting is {entry.formatting}, and stage is pt: LLaMA-Factory trains "
                          "only the first message of such rows", where=entry.where,
                          remedy="write documents ({text: ...}), or train them with stage sft")  # fmt: skip
    if entry.columns["images"] or entry.columns["videos"]:
        draft.warn(f"{entry.where}: LLaMA-Factory leaves the pictures of stage pt out and trains the word <image>; "
                   "here they are shown and trained around")  # fmt: skip
    made = {"kind": "document", "text_column": entry.columns["prompt"] or "text", "id_column": ""}
    made |= {"images_column": entry.columns["images"] or "", "videos_column": entry.columns["videos"] or ""}
    return made


def _alpaca(entry: Entry, common: dict[str, Any]) -> dict[str, Any]:
    columns = entry.columns
    if columns["tools"]:
        raise ConfigError("DATASET_INFO", "columns.tools of formatting alpaca is not supported", where=entry.where,
                          remedy="write these rows in the sharegpt form")  # fmt: skip
    needed = [] if entry.ranking else ["response"]
    for name in ["prompt", *needed]:
        if columns[name] is None:
            raise ConfigError("DATASET_INFO", f"columns lists others and not {name}, which switches it off: LLaMA-"
                              "Factory would drop every row", where=entry.where,
                              remedy=f"add {name!r} to columns")  # fmt: skip
    return {
        "kind": "alpaca",
        "instruction_column": columns["prompt"],
        "input_column": columns["query"] or "",
        "output_column": columns["response"] or "output",
        "history_column": columns["history"] or "",
        **common,
    }


def _sharegpt(entry: Entry, common: dict[str, Any]) -> dict[str, Any]:
    _needed(entry)
    made = {"kind": "sharegpt", "messages_column": entry.columns["messages"], **common}
    made["tools_column"] = entry.columns["tools"] or ""
    return made | {tag: name or "" for tag, name in entry.tags.items()}


def _openai(entry: Entry, common: dict[str, Any]) -> dict[str, Any]:
    _needed(entry)
    for tag, name in ROLES.items():
        if entry.tags[tag] != name:
            raise ConfigError("DATASET_INFO", f"tags.{tag} is {entry.tags[tag]!r} with formatting: openai",
                              where=entry.where, remedy=f"set it to {name!r}, or use formatting: sharegpt")  # fmt: skip
    made = {"kind": "messages", "messages_column": entry.columns["messages"], **common}
    return made | {"tools_column": entry.columns["tools"] or ""}


def _needed(entry: Entry) -> None:
    missing = ["columns.messages"] if entry.columns["messages"] is None else []
    missing += [f"tags.{t}" for t in ROLES if entry.tags[t] is None]
    if missing:
        raise ConfigError("DATASET_INFO", f"{missing[0]} is switched off, for others are listed and it is not",
                          where=entry.where, remedy="add it")  # fmt: skip


# --- media ------------------------------------------------------------------------------------------------------------


def media_folder(draft: Draft, entries: Entries) -> Path:
    given = draft.given
    if given.has("media_dir"):
        return given.path(given.get("media_dir"))
    return entries.folder or given.folder


def media(draft: Draft, entries: Entries) -> None:
    """Paths count from the media folder, then from the folder of the command; absolute ones must lie inside a root."""
    folder = media_folder(draft, entries)
    if not folder.is_dir():
        draft.given.refuse("media_dir", f"there is no folder {folder}", "correct it")
    roots = list(dict.fromkeys([str(folder), *draft.roots]))
    draft.put("data.media_roots", roots, "media_dir")
    draft.put("data.image", {"max_images": 1024, "max_aspect": 100000.0}, "image_max_pixels")
    draft.warn(f"absolute paths of pictures and videos must lie inside {' or '.join(roots)} (data.media_roots); "
               "LLaMA-Factory opens any file that data names")  # fmt: skip


# --- lengths and sizes ------------------------------------------------------------------------------------------------


def lengths(draft: Draft, template: Template | None) -> None:
    given, stage = draft.given, draft.given.get("stage")
    longest, packed = given.get("cutoff_len"), packs(draft)
    draft.put("data.max_tokens", longest - 1 if packed and stage != "pt" else longest, "cutoff_len")
    if stage == "pt":
        draft.decide("cutoff_len", DIFFERS, "a longer document is cut into pieces that are all trained; LLaMA-Factory "
                     "joins documents end to end and throws the rest of each 1,000 away")  # fmt: skip
        return
    draft.put("data.too_long", "llamafactory", "cutoff_len")
    if template is None or template.line_feed:
        draft.put("data.train_line_feed", True, "template")


def packs(draft: Draft) -> bool:
    given = draft.given
    asked = given.get("packing")
    return bool(given.get("stage") == "pt" if asked is None else asked) or given.get("neat_packing")


def pixels(draft: Draft) -> None:
    given = draft.given
    draft.put("data.resize", "llamafactory", "image_max_pixels")
    draft.put("data.min_pixels", given.get("image_min_pixels"), "image_min_pixels")
    draft.put("data.max_pixels", given.get("image_max_pixels"), "image_max_pixels")
    video = {"fps": "video_fps", "max_frames": "video_maxlen", "min_pixels": "video_min_pixels",
             "max_pixels": "video_max_pixels"}  # fmt: skip
    for option, key in video.items():
        draft.put(f"data.video.{option}", given.get(key), key)
    draft.put("data.video.rule", "llamafactory", "video_max_pixels")


# --- held-out data, mixture, streams ----------------------------------------------------------------------------------


def held_out(draft: Draft) -> None:
    given = draft.given
    share = given.get("val_size")
    if share and given.has("eval_dataset"):
        given.refuse("val_size", "eval_dataset is set too", "keep one of the two")
    if share < 0:
        given.refuse("val_size", "below 0", "write a share below 1, or a number of samples")
    if share:
        draft.put("data.holdout", share, "val_size")


def mixture(draft: Draft) -> None:
    given, strategy = draft.given, draft.given.get("mix_strategy")
    known = ("concat", "interleave_under", "interleave_over", "interleave_once")
    if strategy not in known:
        given.refuse("mix_strategy", "there is no such strategy", f"known: {', '.join(known)}")
    if strategy == "concat":
        if given.has("interleave_probs"):
            given.refuse(
                "interleave_probs", "mix_strategy is concat", "set mix_strategy: interleave_over, or take it out"
            )
        return
    found = draft.at("data.train")
    shares = given.get("interleave_probs") or ["1"] * len(given.get("dataset"))
    if len(shares) != len(found):
        given.refuse("interleave_probs", f"there are {len(found)} sources", "name a probability for every data set")
    endless = (given.get("max_steps") or -1) > 0
    if strategy == "interleave_under" and not endless:
        given.refuse("mix_strategy", "a run that ends with its first source that is used up is not supported",
                     "set max_steps, or use interleave_once or interleave_over")  # fmt: skip
    for source, share in zip(found, shares, strict=True):
        try:
            source["share"] = float(share)
        except ValueError:
            given.refuse("interleave_probs", f"{share!r} is no number", "write numbers with commas between")
    leaves_out = strategy == "interleave_once"
    draft.put("data.mixture", {"kind": "shares", "exhausted": "leave_out" if leaves_out else "repeat"}, "mix_strategy")
    if not endless and not leaves_out:
        draft.decide("mix_strategy", DIFFERS, "an epoch is as many draws as there are samples; there it lasts until "
                     "every source was used up once")  # fmt: skip


def streaming(draft: Draft) -> None:
    given = draft.given
    if not given.get("streaming"):
        return
    if (given.get("max_steps") or -1) <= 0:
        given.refuse("streaming", "max_steps is not set", "set max_steps")
    if given.has("max_samples"):
        given.refuse("max_samples", "not with streaming", "take it out")
    if given.get("val_size"):
        given.refuse("val_size", "not with streaming here", "name an eval_dataset")
    draft.put("data.stream", {"window": min(given.get("buffer_size"), 1 << 20), "wrong": "drop"}, "streaming")
    draft.decide("buffer_size", TAKEN, "rows that are shuffled among themselves")
