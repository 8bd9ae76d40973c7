"""The PyPI package easy-vqa (MIT, Victor Zhou 2019) as lensmith data files: questions for SFT, captions for a base."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lensmith.core.errors import ConfigError

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


@dataclass
class Picture:
    """One picture with its questions and answers."""

    path: Path
    questions: list[tuple[str, str]] = field(default_factory=list)


def pictures(split: str) -> list[Picture]:
    """`train` (4,000 pictures, 38,575 questions) or `test` (1,000 others, 9,673 questions)."""
    try:
        import easy_vqa
    except ImportError:
        raise ConfigError("MISSING_PACKAGE", "the quickstart's pictures are in the package easy-vqa",
                          remedy="pip install easy-vqa==1.0") from None  # fmt: skip
    folder = Path(easy_vqa.__file__).parent / "data" / split
    found: dict[int, Picture] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        picture = found.setdefault(int(number), Picture(folder / "images" / f"{number}.png"))
        picture.questions.append((question, answer))
    return [found[n] for n in sorted(found)]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")  # an interrupted run leaves no half file for the next one
    with open(temporary, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")
    return temporary.replace(path)


def question_rows(split: str) -> Iterable[dict[str, Any]]:
    """A row per picture; each question is a branch of its own behind the shared picture."""
    for picture in pictures(split):
        yield {
            "images": [str(picture.path)],
            "branches": [
                [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
                for question, answer in picture.questions
            ],
        }


@dataclass
class Facts:
    """What the questions of a picture say about it."""

    colour: str | None = None
    shape: str | None = None
    not_colours: set[str] = field(default_factory=set)
    not_shapes: set[str] = field(default_factory=set)


def facts(picture: Picture) -> Facts:
    """Read off the answers; a question with `not` or `no` turns yes and no round."""
    known = Facts()
    for question, answer in picture.questions:
        words = question.rstrip("?").split()
        if answer in COLOURS:
            known.colour = answer
        elif answer in SHAPES:
            known.shape = answer
        for word in words:
            if word not in COLOURS and word not in SHAPES:
                continue
            said = answer not in ("yes", "no") or (answer == "yes") != ("not" in words or "no" in words)
            if word in COLOURS:
                known.colour = word if said else known.colour
                known.not_colours |= set() if said else {word}
            else:
                known.shape = word if said else known.shape
                known.not_shapes |= set() if said else {word}
    return known


def caption(known: Facts, rng: random.Random) -> str:
    """One declarative sentence that is true of the picture: what it shows, or what it does not."""
    c, s = known.colour, known.shape
    if (c or s) and rng.random() < 0.30:
        choices = (
            [f"a {c} {s}", f"the {c} shape is a {s}", f"the {s} is {c}", f"the color of the {s} is {c}"]
            if c and s
            else []
        )
        choices += [f"a {c} shape", f"the shape is {c}", f"the color of the shape is {c}"] if c else []
        choices += [f"the shape in the image is a {s}"] if s else []
        return rng.choice(choices) + "."
    there = ([f"{c} shape"] if c else []) + ([s] if s else [])
    colours = [f"{x} shape" for x in (COLOURS if c else sorted(known.not_colours)) if x != c]
    shapes = [x for x in (SHAPES if s else sorted(known.not_shapes)) if x != s]
    present = bool(there) and rng.random() < 0.5
    if present or not (colours or shapes):
        present, thing = True, rng.choice(there)
    else:
        thing = rng.choice(colours if colours and (not shapes or rng.random() < 0.7) else shapes)
    return _sentence(thing, present, rng)


def _sentence(thing: str, present: bool, rng: random.Random) -> str:
    if rng.random() < 0.7:
        verdict = "is present" if present else "is not present"
        return rng.choice([f"a {thing} {verdict}.", f"in the image a {thing} {verdict}."])
    if present:
        return rng.choice(
            [f"there is a {thing}.", f"there is a {thing} in the image.", f"the image does contain a {thing}."]
        )
    return rng.choice([
        f"there is not a {thing}.", f"there is not a {thing} in the image.", f"there is no {thing} in the image.",
        f"the image does not contain a {thing}.", f"no {thing} is present.",
    ])  # fmt: skip


def name_rows(split: str, rounds: int, mirrored: Path) -> Iterable[dict[str, Any]]:
    """Pictures whose colour and shape are both known, as "a red circle."; every other round mirrored."""
    for number in range(rounds):
        for picture in pictures(split):
            known = facts(picture)
            if known.colour and known.shape:
                path = picture.path if number % 2 == 0 else _mirror(picture.path, mirrored)
                yield {"images": [str(path)], "text": f"<image>a {known.colour} {known.shape}."}


def caption_rows(split: str, per_row: int, rounds: int, seed: int, mirrored: Path) -> Iterable[dict[str, Any]]:
    """`rounds` rows per picture with `per_row` captions each; every other round shows the mirrored picture."""
    rng = random.Random(seed)
    for number in range(rounds):
        for picture in pictures(split):
            known = facts(picture)
            if not (known.colour or known.shape):
                continue
            path = picture.path if number % 2 == 0 else _mirror(picture.path, mirrored)
            yield {"images": [str(path)], "text": [f"<image>{caption(known, rng)}" for _ in range(per_row)]}


def _mirror(path: Path, folder: Path) -> Path:
    target = folder / path.name
    if not target.is_file():
        from PIL import Image, ImageOps

        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as picture:
            ImageOps.mirror(picture.convert("RGB")).save(target)
    return target
