"""Token ids and labels of every row of a data folder: LLaMA-Factory's own, against those of the run lensmith makes of
the same YAML file.

    python benchmarks/llamafactory_compare.py FOLDER --llamafactory PYTHON [--tokenizer tokenizer.json] [--work DIR]

FOLDER holds LLaMA-Factory's demo files. PYTHON is the interpreter of an environment of its own with llamafactory 0.9.5
and torch 2.13.0; what lensmith pins does not fit into it. The models are random and tiny; with `--tokenizer` they get a
published Qwen tokenizer. Prints a table for each setting, and the first rows that differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
INFO: dict[str, Any] = {
    "mllm_demo": {"file_name": "mllm_demo.json", "formatting": "sharegpt",
                  "columns": {"messages": "messages", "images": "images"}, "tags": ROLES},
    "mllm_video_demo": {"file_name": "mllm_video_demo.json", "formatting": "sharegpt",
                        "columns": {"messages": "messages", "videos": "videos"}, "tags": ROLES},
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
    "dpo_en_demo": {"file_name": "dpo_en_demo.json", "ranking": True, "formatting": "sharegpt",
                    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}},
}  # fmt: skip
TEXTS, MEDIA = ["identity", "alpaca_en_demo"], ["mllm_demo", "mllm_video_demo"]
SETTINGS: tuple[tuple[str, str, str, list[str], dict[str, Any]], ...] = (
    ("Qwen2.5-VL, the LoRA example", "qwen2_5_vl", "qwen2_vl", MEDIA + TEXTS,
     {"image_max_pixels": 262144, "video_max_pixels": 16384}),
    ("Qwen2.5-VL, LLaMA-Factory's own limits", "qwen2_5_vl", "qwen2_vl", MEDIA, {}),
    ("Qwen2.5-VL, small pictures", "qwen2_5_vl", "qwen2_vl", ["mllm_demo"], {"image_max_pixels": 20000}),
    ("Qwen2.5-VL, cutoff_len 128", "qwen2_5_vl", "qwen2_vl", TEXTS, {"cutoff_len": 128}),
    ("Qwen2.5-VL, cutoff_len 37", "qwen2_5_vl", "qwen2_vl", TEXTS, {"cutoff_len": 37}),
    ("Qwen2.5-VL, cutoff_len 420", "qwen2_5_vl", "qwen2_vl", ["mllm_demo"], {"cutoff_len": 420}),
    ("Qwen2.5-VL, mask_history", "qwen2_5_vl", "qwen2_vl", ["mllm_demo"], {"mask_history": True}),
    ("Qwen2.5-VL, mask_history, cutoff_len 300", "qwen2_5_vl", "qwen2_vl", ["mllm_demo"],
     {"mask_history": True, "cutoff_len": 300, "image_max_pixels": 20000}),
    ("Qwen2-VL", "qwen2_vl", "qwen2_vl", MEDIA + TEXTS, {"image_max_pixels": 262144, "video_max_pixels": 16384}),
    ("Qwen3-VL, nothink", "qwen3_vl", "qwen3_vl_nothink", MEDIA + TEXTS,
     {"image_max_pixels": 262144, "video_max_pixels": 16384}),
    ("Qwen3-VL, thinking template", "qwen3_vl", "qwen3_vl", ["identity"], {}),
    ("Qwen2.5-VL, stage dpo", "qwen2_5_vl", "qwen2_vl", ["dpo_en_demo"], {"stage": "dpo"}),
    ("Qwen2.5-VL, default_system", "qwen2_5_vl", "qwen2_vl", TEXTS, {"default_system": "Answer in one word."}),
)  # fmt: skip
"""Name, model type, template, data sets, more keys. The one with a system prompt is last: LLaMA-Factory keeps it in its
table of templates for as long as the process lives."""


def dump(settings: Path) -> None:
    """Within LLaMA-Factory's environment: its tokens of every row, as JSON lines beside each setting."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    for setting in json.loads(settings.read_text(encoding="utf-8")):
        for name in setting["datasets"]:
            given = {**setting["keys"], "dataset": name}
            model, data, training, tuning, _ = get_train_args(given)
            module = load_tokenizer(model)
            template = get_template_and_fix_tokenizer(module["tokenizer"], data)
            stage = "rm" if tuning.stage == "dpo" else tuning.stage
            rows = get_dataset(template, model, data, training, stage=stage, **module)["train_dataset"]
            with open(f"{setting['output']}-{name}.jsonl", "w", encoding="utf-8") as out:
                for row in rows:
                    sides = ("chosen_", "rejected_") if stage == "rm" else ("",)
                    found = [{"ids": row[f"{s}input_ids"], "labels": row[f"{s}labels"]} for s in sides]
                    out.write(json.dumps(found) + "\n")


def ours(file: Path, name: str) -> list[list[dict[str, Any]] | str]:
    """Of every row: tokens and labels as lensmith trains it, or why it does not."""
    from lensmith.config.yaml_file import read_tree
    from lensmith.core.errors import DataError, Drop
    from lensmith.migrate.convert import migrate
    from lensmith.recipe.prepare import prepare
    from lensmith.report.terminal import Terminal

    tree = read_tree(file)
    migrated = migrate(tree, [f"dataset={name}"], env={}, devices=lambda: 0, ranks=1)
    prepared = prepare(migrated.located(file), Terminal.silent())
    loader = prepared.train.spec.build()
    found: list[list[dict[str, Any]] | str] = []
    for ref in loader.rows(0).scan():
        try:
            sample = loader.sample(0, ref)
            each = apart(loader.encode(0, sample))
        except (Drop, DataError) as error:
            found.append(str(error))
            continue
        found.append(each)
    return found


def apart(encoded: Any) -> list[dict[str, Any]]:
    """The sequences of a sample: of a pair both answers, each behind the prompt that they share."""
    found: list[dict[str, Any]] = []
    for s in encoded.segments:
        if len(encoded.segments) > 1 and not s.prefix_length:
            continue  # what the answers share
        at = [*range(s.prefix_start, s.prefix_start + s.prefix_length), *range(s.start, s.start + s.length)]
        ids, trained = encoded.ids_L[at].tolist(), encoded.trained_L[at]
        found.append({"ids": ids, "labels": [t if on else -100 for t, on in zip(ids, trained, strict=True)]})
    return found


def compare(theirs: list[Any], mine: list[Any], show: Any) -> Counter[str]:
    """How many rows have equal ids, equal labels; what differs, by kind."""
    counts: Counter[str] = Counter(rows=len(theirs))
    for number, (a, b) in enumerate(zip(theirs, mine, strict=True)):
        if isinstance(b, str):
            counts["left out here"] += 1
            show(number, b)
            continue
        ids = all(x["ids"] == y["ids"] for x, y in zip(a, b, strict=True))
        labels = all(x["labels"] == y["labels"] for x, y in zip(a, b, strict=True))
        counts["equal ids"] += ids
        counts["equal labels"] += ids and labels
        counts["equal counts"] += all(len(x["ids"]) == len(y["ids"]) for x, y in zip(a, b, strict=True))
        if not (ids and labels):
            x, y = next((x, y) for x, y in zip(a, b, strict=True) if x != y)
            pairs = zip(zip(x["ids"], x["labels"], strict=True), zip(y["ids"], y["labels"], strict=True), strict=False)
            at = next((i for i, (p, q) in enumerate(pairs) if p != q), min(len(x["ids"]), len(y["ids"])))
            show(number, f"{len(x['ids'])} and {len(y['ids'])} tokens, the first difference at {at}: "
                 f"{x['ids'][max(0, at - 3) : at + 5]} and {y['ids'][max(0, at - 3) : at + 5]}, labels "
                 f"{x['labels'][at : at + 3]} and {y['labels'][at : at + 3]}")  # fmt: skip
    return counts


def make(work: Path, folder: Path, tokenizer: Path | None) -> list[dict[str, Any]]:
    """Models, dataset_info.json and a YAML file for each setting."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    for item in folder.iterdir():
        if not (data / item.name).exists():
            (data / item.name).symlink_to(item.resolve())
    (data / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    found: list[dict[str, Any]] = []
    for number, (name, kind, template, datasets, more) in enumerate(SETTINGS):
        model = work / kind
        if not model.exists():
            tiny.make_model(model, kind, max_pixels=12_845_056, min_pixels=None if kind == "qwen3_vl" else 3136)
            if tokenizer is not None:
                (model / "tokenizer.json").write_bytes(tokenizer.read_bytes())
            about = {"processor_class": {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen2_vl": "Qwen2VLProcessor",
                                         "qwen3_vl": "Qwen3VLProcessor"}[kind]}  # fmt: skip
            for file in ("preprocessor_config.json", "tokenizer_config.json"):
                (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), **about}))
        keys = {
            "model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "template": template, "dataset": ",".join(datasets), "dataset_dir": str(data), "overwrite_cache": True,
            "output_dir": str(work / f"run-{number}"), "use_cpu": True, "report_to": "none", **more,
        }  # fmt: skip
        file = work / f"{number}.yaml"
        file.write_text(json.dumps(keys), encoding="utf-8")
        found.append(
            {"name": name, "keys": keys, "datasets": datasets, "file": str(file), "output": str(work / str(number))}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llamafactory", help="Python of LLaMA-Factory's environment.")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--show", type=int, default=2, help="Differing rows that are shown of each data set.")
    parser.add_argument("--dump", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dump:
        dump(arguments.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        settings = make(work, arguments.folder, arguments.tokenizer)
        (work / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        if arguments.llamafactory:
            env = {**os.environ, "DISABLE_VERSION_CHECK": "1", "LLAMAFACTORY_VERBOSITY": "ERROR"}
            command = [arguments.llamafactory, str(Path(__file__).resolve()), str(work / "settings.json"), "--dump"]
            subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        os.environ["LENSMITH_CACHE"] = str(work / "cache")
        print("| setting | data set | rows | equal ids | equal labels | equal counts | left out here |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for setting in settings:
            for name in setting["datasets"]:
                lines = Path(f"{setting['output']}-{name}.jsonl").read_text(encoding="utf-8").splitlines()
                theirs = [json.loads(line) for line in lines]
                shown: list[str] = []
                counts = compare(
                    theirs, ours(Path(setting["file"]), name), lambda n, text, to=shown: to.append(f"{n}: {text}")
                )
                cells = [counts[k] for k in ("rows", "equal ids", "equal labels", "equal counts", "left out here")]
                print(f"| {setting['name']} | {name} | " + " | ".join(map(str, cells)) + " |", flush=True)
                for text in shown[: arguments.show]:
                    print(f"    {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
