"""How fast samples are indexed, against `datasets.Dataset.map` with the family's own processor counting tokens.

    python benchmarks/index_throughput.py [--rows 3000] [--texts 20000] [--map-rows 3000]

Both measure the same rows in one process with one thread: chat rows with JPEG pictures of photograph size, then text
alone. The token counts of both are compared row by row. CPU seconds; the ratio is the figure, the rest depends on the
machine. The processor has no way to count without decoding and resizing each picture; the index reads headers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import datasets
import numpy as np
import PIL.Image
import tiny
import torch
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from lensmith.data.index_build import build_index
from lensmith.data.load import LoaderSpec, SourceFile
from lensmith.data.media import ImageLimits
from lensmith.family.registry import load_family

MAX_PIXELS = 12_845_056  # as published for Qwen2.5-VL


class Processor(Qwen2_5_VLProcessor):
    """The family's processor without its video part, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_rows(folder: Path, rows: int, texts: int) -> tuple[Path, Path]:
    """Conversations with no, one or two of `rows` / 3 pictures, and conversations of about 300 words without."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    names = []
    for number in range(max(1, rows // 3)):
        width, height = (int(s) for s in rng.integers(320, 1025, 2))
        small = PIL.Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        names.append(f"images/{number}.jpg")
        small.resize((width, height), PIL.Image.Resampling.BICUBIC).save(folder / names[-1], quality=85)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(tiny.WORDS, rng.integers(low, high)))

    def write(name: str, count: int, pictures: tuple[int, int], length: int) -> Path:
        path = folder / name
        with path.open("w", encoding="utf-8") as file:
            for _ in range(count):
                shown = list(rng.choice(names, rng.integers(*pictures)))
                asked = {"role": "user", "content": "<image>" * len(shown) + words(length // 2, length)}
                turns = [asked, {"role": "assistant", "content": words(length, 3 * length)}]
                print(json.dumps({"messages": turns, "images": shown}, ensure_ascii=False), file=file)
        return path

    return write("pictures.jsonl", rows, (0, 3), 20), write("texts.jsonl", texts, (0, 1), 120)


def counter_of(model: Path, base: Path) -> Callable[[dict[str, list[Any]]], dict[str, list[int]]]:
    """For `map`: the tokens of each of a batch of rows, by chat template and processor."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    processor = Processor(Qwen2VLImageProcessorPil.from_pretrained(model), tokenizer, template)

    def parts(content: str) -> list[dict[str, str]]:
        pieces = content.split("<image>")
        return [{"type": "image"}] * (len(pieces) - 1) + [{"type": "text", "text": pieces[-1]}]

    def count(batch: dict[str, list[Any]]) -> dict[str, list[int]]:
        chats = [[{"role": m["role"], "content": parts(m["content"])} for m in ms] for ms in batch["messages"]]
        said = [processor.apply_chat_template(chat, tokenize=False) for chat in chats]
        shown = [[PIL.Image.open(base / name) for name in names] for names in batch["images"]]
        return {"tokens": list(map(len, processor(text=said, images=shown if any(shown) else None)["input_ids"]))}

    return count


def cpu_seconds(what: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = what()
    return time.process_time() - begin, result


def compare(spec: LoaderSpec, model: Path, map_rows: int, batch: int, scratch: Path) -> dict[str, float]:
    path = Path(spec.files[0].path)
    seconds, index = cpu_seconds(lambda: build_index(spec, scratch / "cache"))
    again, _ = cpu_seconds(lambda: build_index(spec, scratch / "cache"))
    rows = len(index.trainable)
    assert rows == index.num_rows, index.counts()
    lines = path.read_text(encoding="utf-8").splitlines()[:map_rows]
    data = datasets.Dataset.from_list([json.loads(line) for line in lines])
    count = counter_of(model, path.parent)
    mapping: dict[str, Any] = {"batched": True, "batch_size": batch, "remove_columns": data.column_names}
    map_seconds, counted = cpu_seconds(
        lambda: data.map(count, keep_in_memory=True, load_from_cache_file=False, **mapping)
    )
    assert list(counted["tokens"]) == index.column("tokens")[: len(lines)].tolist(), "other counts"
    shown = {h for n in range(rows) for h in index.handles(n)}
    mb = (path.stat().st_size + sum(Path(h).stat().st_size for h in shown)) / 1e6
    ours, theirs = rows / seconds, len(lines) / map_seconds
    return {
        "rows": rows, "MB": mb, "tokens a row": float(index.column("tokens").mean()), "index samples/s": ours,
        "index MB/s": mb / seconds, "from the cache, samples/s": rows / again, "map samples/s": theirs,
        "map MB/s": theirs * mb / rows, "ratio": ours / theirs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--map-rows", type=int, default=3000, help="rows of each file that `map` counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = tiny.make_model(scratch / "model", max_pixels=MAX_PIXELS)
        files = make_rows(scratch, arguments.rows, arguments.texts)
        found = []
        for path, batch in zip(files, (16, 1000), strict=True):
            spec = LoaderSpec(
                files=(SourceFile(path.stem, str(path), None, str(scratch)),), family=load_family(model),
                tokenizer_json=(model / "tokenizer.json").read_text(encoding="utf-8"), roots=(), limits=ImageLimits(),
                max_tokens=32_768, too_long="drop", max_row_bytes=1 << 20,
            )  # fmt: skip
            found.append(compare(spec, model, arguments.map_rows, batch, scratch))
    print(f"{'':<28}{'pictures':>14}{'text alone':>14}")
    for name in found[0]:
        print(f"{name:<28}" + "".join(f"{f[name]:>14,.1f}" for f in found))


if __name__ == "__main__":
    main()
