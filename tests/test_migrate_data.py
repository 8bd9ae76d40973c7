"""dataset_info.json in full: where data is, how rows read, what is switched off, what is counted and mixed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import lf_kit
import numpy as np
import pytest
import tiny

from lensmith.core.errors import ConfigError, DataError
from lensmith.data.formats import Alpaca, DocumentFormat, Messages, ShareGPT
from lensmith.migrate.convert import Migrated
from lensmith.migrate.entries import COLUMNS, TAGS, Entries
from lensmith.migrate.given import read_given
from lensmith.migrate.roots import counts_from, roots_of
from lensmith.recipe.prepare import Prepared, prepare
from lensmith.report.terminal import Terminal


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("data") / "model", "qwen2_5_vl")


@pytest.fixture
def place(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lf_kit.workspace(tmp_path)
    (tmp_path / "model").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(place: Path, found: Migrated) -> Prepared:
    return prepare(found.located(place / "x.yaml"), Terminal.silent())


def sources(found: Migrated) -> list[dict[str, Any]]:
    return found.tree.values["data"]["train"]


def texts(prepared: Prepared) -> list[str]:
    """Each trained sample as its ids read."""
    loader = prepared.train.spec.build()
    found: list[str] = []
    for number in range(len(prepared.train.spec.files)):
        for ref in loader.rows(number).scan():
            try:
                encoded = loader.encode(number, loader.sample(number, ref))
            except DataError:
                continue
            found.append(loader.tokenizer.decode(encoded.ids_L.tolist()))
    return found


# --- entries ----------------------------------------------------------------------------------------------------------


def entry(place: Path, value: dict[str, Any]) -> Any:
    lf_kit.write_rows(place, "own.jsonl", [{"instruction": "a", "output": "b"}])
    lf_kit.info(place, own=value)
    return Entries(read_given(lf_kit.tree_of("stage: sft"), env={}, folder=place)).entry("own")


def test_what_is_left_out_has_its_default(place: Path) -> None:
    found = entry(place, {"file_name": "own.jsonl"})
    assert found.columns == COLUMNS and found.tags == TAGS
    assert (found.formatting, found.ranking, found.split, found.local) == ("alpaca", False, "train", True)
    assert found.path == str(place / "data" / "own.jsonl")


def test_listing_some_columns_switches_off_the_others(place: Path) -> None:
    found = entry(place, {"file_name": "own.jsonl", "columns": {"prompt": "text"}})
    assert found.columns["prompt"] == "text"
    assert [v for k, v in found.columns.items() if k != "prompt"] == [None] * (len(COLUMNS) - 1)
    tags = entry(place, {"file_name": "own.jsonl", "formatting": "sharegpt", "tags": lf_kit.ROLES}).tags
    assert tags == {**lf_kit.ROLES, "observation_tag": None, "function_tag": None, "system_tag": None}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"hf_hub_url": "a/b", "file_name": "x.json", "script_url": "y"}, "hf://a/b"),  # the Hub wins over the rest
        ({"cloud_file_name": "s3://bucket/x.jsonl", "file_name": "own.jsonl"}, "s3://bucket/x.jsonl"),
        ({"hf_hub_url": "a/b", "ms_hub_url": "c/d"}, "hf://a/b"),
    ],
)
def test_where_the_data_is_by_precedence(place: Path, value: dict[str, Any], path: str) -> None:
    found = entry(place, value)
    assert (found.path, found.local) == (path, False)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"script_url": "x"}, "never run"),
        ({"ms_hub_url": "x/y"}, "ms_hub_url"),
        ({"om_hub_url": "x/y"}, "om_hub_url"),
        ({"hf_hub_url": "x/y", "folder": "z"}, "a folder inside a Hub repository"),
        ({"file_name": "nowhere.json"}, "there is no file"),
        ({}, "names no file"),
        ({"file_name": "own.jsonl", "formatting": "chatml"}, "formatting is 'chatml'"),
        ({"file_name": "own.jsonl", "num_samples": 0}, "num_samples is 0"),
        ({"file_name": "own.jsonl", "columns": ["a"]}, "not a mapping"),
        ("own.jsonl", "is not a mapping"),
    ],
)
def test_entries_that_cannot_be_read(place: Path, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        entry(place, value)
    assert caught.value.code == "DATASET_INFO" and "own" in caught.value.where and caught.value.remedy


def test_folders_have_one_type(place: Path) -> None:
    folder = place / "data" / "many"
    folder.mkdir()
    (folder / "a.jsonl").write_text("{}\n")
    assert entry(place, {"file_name": "many"}).path == str(folder)
    (folder / "b.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"several types: \.json, \.jsonl"):
        entry(place, {"file_name": "many"})
    (folder / "a.jsonl").unlink()
    (folder / "b.json").rename(folder / "b.xml")
    with pytest.raises(ConfigError, match=r"of type '\.xml', which is not read"):
        entry(place, {"file_name": "many"})


def test_names_that_are_not_there(place: Path) -> None:
    with pytest.raises(ConfigError, match="'identty' is not in") as caught:
        lf_kit.made(place, dataset="identty")
    assert caught.value.remedy == "did you mean 'identity'?"
    with pytest.raises(ConfigError, match=r"there is no dataset_info\.json"):
        lf_kit.made(place, dataset_dir="elsewhere")


def test_online_names_are_of_the_hub(place: Path) -> None:
    found = lf_kit.made(place, dataset_dir="ONLINE", dataset="org/one,org/two", media_dir="data")
    assert [s["path"] for s in sources(found)] == ["hf://org/one", "hf://org/two"]
    assert sources(found)[0]["format"]["instruction_column"] == "instruction"


def test_remote_entries_are_fetched(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (place / "fetched.json").write_text(json.dumps({"own": {"hf_hub_url": "a/b", "subset": "s", "split": "test"}}))
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda *a, **k: asked.append((a, k)) or str(place / "fetched.json"))  # fmt: skip
    found = lf_kit.made(place, dataset_dir="REMOTE:org/sets", dataset="own", media_dir="data")
    assert asked == [(("org/sets", "dataset_info.json"), {"repo_type": "dataset"})]
    (source,) = sources(found)
    assert (source["path"], source["subset"], source["split"]) == ("hf://a/b", "s", "test")


def test_columns_that_are_switched_off_and_filled_are_said(place: Path) -> None:
    lf_kit.write_rows(place, "own.jsonl", [{"text": "a", "input": "b", "output": "c", "system": "s"}])
    lf_kit.info(place, own={"file_name": "own.jsonl", "columns": {"prompt": "text", "response": "output"}})
    said = [w for w in lf_kit.made(place, dataset="own").warnings if "is not read" in w]
    assert len(said) == 2 and any("'input'" in w for w in said) and any("'system'" in w for w in said)


def test_what_it_would_pass_over_is_said(place: Path) -> None:
    lf_kit.info(place, own={"file_name": "identity.json", "colums": {}, "columns": {
        "prompt": "instruction", "response": "output", "sytem": "s"}})  # fmt: skip
    said = lf_kit.made(place, dataset="own").warnings
    assert any("colums is no key" in w for w in said) and any("columns.sytem is no key" in w for w in said)


def test_types_of_files(place: Path) -> None:
    """The same two rows in every type that it reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"instruction": "what, or\nwho?", "output": 'a "b"'}, {"instruction": "12", "output": "007"}]
    table, data = pa.Table.from_pylist(rows), place / "data"
    lf_kit.write_rows(place, "a.json", rows)
    lf_kit.write_rows(place, "a.jsonl", rows)
    pq.write_table(table, data / "a.parquet")
    (data / "a.csv").write_text('instruction,output\n"what, or\nwho?","a ""b"""\n12,007\n')
    for name, write in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        with pa.OSFile(str(data / name), "wb") as file, write(file, table.schema) as out:
            out.write_table(table)
    (data / "folder").mkdir()
    for n in range(2):
        (data / "folder" / f"{n}.csv").write_text((data / "a.csv").read_text())
    names = ["a.json", "a.jsonl", "a.parquet", "a.csv", "a.arrow", "b.arrow"]
    lf_kit.info(place, **{name: {"file_name": name} for name in [*names, "folder"]})
    found = {name: texts(read(place, lf_kit.made(place, dataset=name))) for name in names}
    assert len(found["a.json"]) == 2 and "what, or\nwho?" in found["a.json"][0] and "007" in found["a.json"][1]
    assert all(rest == found["a.json"] for rest in found.values())
    assert len(texts(read(place, lf_kit.made(place, dataset="folder")))) == 4
    limited = read(place, lf_kit.made(place, dataset="folder", max_samples=3))
    assert limited.read.counts()["read"] == 3
    (data / "a.txt").write_text("one line\nanother\n")
    lf_kit.info(place, txt={"file_name": "a.txt", "columns": {"prompt": "text"}})
    prepared = read(place, lf_kit.made(place, dataset="txt", stage="pt", cutoff_len=64))
    assert prepared.read.counts()["train"] == 2
    (data / "a.csv").write_bytes(b"instruction,output\n\xff\xfe,x\n")
    with pytest.raises(DataError):
        read(place, lf_kit.made(place, dataset="a.csv", overrides=("data.wrong_rows=stop",)))


# --- formats ----------------------------------------------------------------------------------------------------------


def test_alpaca_reads_only_what_is_listed(place: Path) -> None:
    rows = [{"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["d", "e"]],
             "images": ["x.png"]}]  # fmt: skip
    lf_kit.write_rows(place, "own.jsonl", rows)
    lf_kit.info(place, plain={"file_name": "own.jsonl"}, whole={"file_name": "own.jsonl", "columns": {
        "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}},
        narrow={"file_name": "own.jsonl", "columns": {"prompt": "instruction", "response": "output"}})  # fmt: skip

    def said(name: str) -> str:
        (found,) = texts(read(place, lf_kit.made(place, dataset=name)))
        return found.replace("<|im_start|>", "|").replace("<|im_end|>\n", "")

    helpful = "|system\nYou are a helpful assistant."
    assert said("plain") == f"{helpful}|user\na\nb|assistant\nc"
    assert said("whole") == "|system\ns|user\nd|assistant\ne|user\na\nb|assistant\nc"
    assert said("narrow") == f"{helpful}|user\na|assistant\nc"


def test_rows_that_it_would_drop_are_dropped_with_a_reason(place: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": turns},
        {"messages": [{"role": "system", "content": "s"}, *turns]},  # system_tag is not listed: no such role
        {"messages": [turns[0], turns[0], turns[1]]},
        {"messages": [{"role": "nobody", "content": "x"}, turns[1]]},
        {"messages": [*turns, turns[0], {"role": "tool", "content": "t"}]},
        {"messages": [*turns, turns[0]]},  # an odd number of messages
    ]
    lf_kit.write_rows(place, "own.jsonl", rows)
    lf_kit.info(place, own={"file_name": "own.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"},
                            "tags": lf_kit.ROLES})  # fmt: skip
    found = lf_kit.made(place, dataset="own", overrides=("data.max_dropped=1.0",))
    prepared = read(place, found)
    counts = prepared.read.counts()
    assert (counts["read"], counts["train"], counts["by_reason"]) == (6, 1, {"ROLE_ORDER": 5})
    assert any("rows with such turns are dropped, as there" in w for w in found.warnings)
    lf_kit.info(place, own={"file_name": "own.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"},
                            "tags": {**lf_kit.ROLES, "system_tag": "system"}})  # fmt: skip
    found = lf_kit.made(place, dataset="own", overrides=("data.max_dropped=1.0",))
    assert read(place, found).read.counts()["train"] == 2
    stops = lf_kit.made(place, dataset="own", overrides=("data.wrong_rows=stop",))
    with pytest.raises(DataError, match="4 of 6 rows are wrong"):
        read(place, stops)


def test_rows_that_reach_outside_are_never_dropped(place: Path) -> None:
    rows = [{"messages": lf_kit.CHAT["messages"], "images": ["../secret.png"]}] * 2
    lf_kit.write_rows(place, "own.jsonl", rows)
    lf_kit.info(place, own={"file_name": "own.jsonl", "formatting": "sharegpt", "tags": lf_kit.ROLES,
                            "columns": {"messages": "messages", "images": "images"}})  # fmt: skip
    with pytest.raises(DataError, match="PATH_ESCAPE"):
        read(place, lf_kit.made(place, dataset="own", overrides=("data.max_dropped=1.0",)))


@pytest.mark.parametrize(
    ("value", "stage", "kind"),
    [
        ({"formatting": "sharegpt"}, "sft", ShareGPT),
        ({"formatting": "openai", "tags": {**lf_kit.ROLES, "system_tag": "system"}}, "sft", Messages),
        ({}, "sft", Alpaca),
        ({"columns": {"prompt": "text"}}, "pt", DocumentFormat),
    ],
)
def test_formats(place: Path, value: dict[str, Any], stage: str, kind: type) -> None:
    lf_kit.info(place, own={"file_name": "identity.json", **value})
    run = lf_kit.made(place, dataset="own", stage=stage, template="qwen2_vl").located(place / "x.yaml").run
    assert isinstance(run.data.train[0].format, kind)


def test_openai_rows_have_no_word_on_thinking_put_in(place: Path) -> None:
    lf_kit.write_rows(place, "own.jsonl", [{"messages": [{"role": "user", "content": "a"},
                                                         {"role": "assistant", "content": "b"}]}])  # fmt: skip
    tags = {**lf_kit.ROLES, "system_tag": "system"}
    lf_kit.info(place, own={"file_name": "own.jsonl", "formatting": "openai", "tags": tags,
                            "columns": {"messages": "messages"}})  # fmt: skip
    found = lf_kit.made(place, dataset="own")
    assert "detailed thinking off" not in texts(read(place, found))[0]
    assert any("'detailed thinking off'" in w for w in found.warnings)


@pytest.mark.parametrize(
    ("value", "keys", "said"),
    [
        ({"ranking": True}, {}, "is ranked, and stage is sft"),
        ({}, {"stage": "dpo"}, "is not ranked, and stage is dpo"),
        ({}, {"stage": "kto"}, "columns.kto_tag is not set"),
        ({"columns": {"prompt": "instruction"}}, {}, "switches it off"),
        ({"columns": {"response": "output"}}, {}, "switches it off"),
        ({"formatting": "sharegpt", "columns": {"images": "images"}}, {}, "columns.messages is switched off"),
        ({"formatting": "sharegpt", "tags": {"role_tag": "role"}}, {}, "tags.content_tag is switched off"),
        ({"formatting": "sharegpt"}, {"stage": "pt"}, "trains only the first message"),
        ({"formatting": "openai"}, {}, "tags.role_tag is 'from'"),
        ({"columns": {"prompt": "instruction", "response": "output", "audios": "a"}}, {}, "sound cannot be trained"),
        ({"columns": {"prompt": "instruction", "response": "output", "tools": "t"}}, {}, "columns.tools"),
    ],
)
def test_data_that_does_not_fit_the_stage(place: Path, value: dict[str, Any], keys: dict[str, Any], said: str) -> None:
    lf_kit.info(place, own={"file_name": "identity.json", **value})
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        lf_kit.made(place, dataset="own", **keys)
    assert caught.value.code == "DATASET_INFO"


def test_default_system_prompts(place: Path) -> None:
    found = lf_kit.made(place, default_system="Be brief.")
    assert all("<|im_start|>system\nBe brief.<|im_end|>" in t for t in texts(read(place, found)))
    assert "default_system" not in sources(lf_kit.made(place))[0]["format"]  # the model's own is the template's


def test_which_turns_train(place: Path) -> None:
    assert sources(lf_kit.made(place, mask_history=True))[0]["format"]["train"] == "last"
    found = lf_kit.made(place, train_on_prompt=True)
    assert sources(found)[0]["format"]["train"] == "all"
    assert lf_kit.decision(found, "train_on_prompt").verdict == "taken with a difference"


# --- how many ---------------------------------------------------------------------------------------------------------


def test_max_samples_takes_the_first_of_all_files_of_a_folder(place: Path) -> None:
    folder = place / "data" / "many"
    folder.mkdir()
    for n in range(3):
        rows = [{"instruction": f"{n}.{m}", "output": "x"} for m in range(4)]
        (folder / f"{n}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lf_kit.info(place, own={"file_name": "many"})
    found = lf_kit.made(place, dataset="own", max_samples=6)
    assert [(s["name"], s["max_samples"]) for s in sources(found)] == [("own-0", 4), ("own-1", 2)]
    said = [re.search(r"user\n([\d.]+)", t)[1] for t in texts(read(place, found))]  # type: ignore[index]
    assert said[:6] == ["0.0", "0.1", "0.2", "0.3", "1.0", "1.1"]
    assert read(place, found).read.counts()["read"] == 6


def test_num_samples_are_those_of_numpy_and_max_samples_the_first_of_them(place: Path) -> None:
    rows = [{"instruction": f"number {n}", "output": "x"} for n in range(50)]
    lf_kit.write_rows(place, "own.jsonl", rows)
    lf_kit.info(place, own={"file_name": "own.jsonl", "num_samples": 20})
    np.random.seed(42)
    wanted = np.random.permutation(50)[:20]
    prepared = read(place, lf_kit.made(place, dataset="own"))
    assert sorted(prepared.read.column("row").tolist()) == sorted(wanted.tolist())
    prepared = read(place, lf_kit.made(place, dataset="own", max_samples=7))
    assert sorted(prepared.read.column("row").tolist()) == sorted(wanted[:7].tolist())
    np.random.seed(7)
    other = np.random.permutation(50)[:20]
    prepared = read(place, lf_kit.made(place, dataset="own", seed=7))
    assert sorted(prepared.read.column("row").tolist()) == sorted(other.tolist())


def test_a_set_with_fewer_rows_than_num_samples_is_read_whole(place: Path) -> None:
    lf_kit.info(place, own={"file_name": "identity.json", "num_samples": 100})
    found = lf_kit.made(place, dataset="own")
    assert read(place, found).read.counts()["read"] == 6
    assert any("none is repeated" in w for w in found.warnings)


# --- media ------------------------------------------------------------------------------------------------------------


def chats(place: Path, paths: list[str], **entry_keys: Any) -> None:
    rows = [{"messages": lf_kit.CHAT["messages"], "images": [p]} for p in paths]
    lf_kit.write_rows(place, "own.jsonl", rows)
    lf_kit.info(place, own={"file_name": "own.jsonl", "formatting": "sharegpt", "tags": lf_kit.ROLES,
                            "columns": {"messages": "messages", "images": "images"}, **entry_keys})  # fmt: skip


def test_pictures_by_relative_and_absolute_paths(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("disk") / "set" / "images"
    far = [str(elsewhere.parent / name) for name in tiny.make_pictures(elsewhere.parent, 2)]
    near = "pictures/images/0.png"
    chats(place, [near, str(place / "data" / near), *far])
    found = lf_kit.made(place, dataset="own")
    assert found.tree.values["data"]["media_roots"] == [str(place / "data"), str(elsewhere)]
    assert read(place, found).read.counts()["train"] == 4
    assert any(str(elsewhere) in w for w in found.warnings)


def test_relative_paths_count_from_media_dir_then_from_the_folder_of_the_command(place: Path) -> None:
    tiny.make_pictures(place / "media", 1)
    name = "images/0.png"
    chats(place, [name])
    found = lf_kit.made(place, dataset="own", media_dir="media")
    assert sources(found)[0]["media_dir"] == str(place / "media")
    assert read(place, found).read.counts()["train"] == 1
    chats(place, [f"media/{name}"])
    found = lf_kit.made(place, dataset="own")
    assert sources(found)[0]["media_dir"] == str(place)
    assert read(place, found).read.counts()["train"] == 1


def test_pictures_behind_links_keep_working(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("disk") / "images"
    tiny.make_pictures(elsewhere.parent, 1)
    os.symlink(elsewhere, place / "data" / "linked")
    chats(place, ["linked/0.png"])
    found = lf_kit.made(place, dataset="own")
    assert str(elsewhere) in found.tree.values["data"]["media_roots"]
    assert read(place, found).read.counts()["train"] == 1


def test_system_folders_are_never_a_root(tmp_path: Path) -> None:
    assert roots_of(["/etc/hostname", "/etc/passwd"], tmp_path) == []
    assert counts_from(["nowhere.png"], tmp_path / "a", tmp_path) == tmp_path / "a"


# --- sizes, held-out data, mixture ------------------------------------------------------------------------------------


def test_sizes_and_their_defaults(place: Path) -> None:
    data = lf_kit.made(place).located(place / "x.yaml").run.data
    assert (data.min_pixels, data.max_pixels, data.resize) == (1024, 589824, "llamafactory")
    video = data.video
    assert (video.min_pixels, video.max_pixels, video.fps, video.max_frames, video.rule) == (
        256, 65536, 2.0, 128, "llamafactory")  # fmt: skip
    data = lf_kit.made(place, image_max_pixels=262144, video_maxlen=16).located(place / "x.yaml").run.data
    assert (data.max_pixels, data.video.max_frames) == (262144, 16)


def test_lengths(place: Path) -> None:
    data = lf_kit.made(place, cutoff_len=100).located(place / "x.yaml").run.data
    assert (data.max_tokens, data.too_long, data.train_line_feed) == (100, "llamafactory", True)
    packed = lf_kit.made(place, cutoff_len=100, packing=True, per_device_train_batch_size=2, ranks=3)
    run = packed.located(place / "x.yaml").run
    assert (run.data.max_tokens, run.batch.tokens, run.batch.samples) == (99, 6 * 99, None)


@pytest.mark.parametrize("size", [0.25, 3])
def test_held_out_by_share_and_by_count(place: Path, size: float) -> None:
    rows = [{"instruction": f"number {n}", "output": "x"} for n in range(200)]
    lf_kit.write_rows(place, "own.jsonl", rows)
    lf_kit.info(place, own={"file_name": "own.jsonl"})
    found = lf_kit.made(place, dataset="own", val_size=size if size < 1 else 50)
    prepared = read(place, found)
    assert prepared.held is not None
    assert 30 <= len(prepared.held.trainable) <= 70
    assert len(prepared.held.trainable) + len(prepared.train.trainable) == 200


def test_eval_data_is_a_source_of_its_own(place: Path) -> None:
    run = lf_kit.made(place, dataset="identity", eval_dataset="alpaca_en_demo", eval_strategy="steps",
                      eval_steps=5).located(place / "x.yaml").run  # fmt: skip
    assert [s.name for s in run.data.eval] == ["alpaca_en_demo"] and run.evaluate.every_steps == 5


def test_mixtures(place: Path) -> None:
    keys: dict[str, Any] = {"dataset": "identity,alpaca_en_demo", "interleave_probs": "0.7,0.3"}
    run = lf_kit.made(place, mix_strategy="interleave_over", **keys).located(place / "x.yaml").run
    assert [s.share for s in run.data.train] == [0.7, 0.3]
    assert run.data.mixture.model_dump() == {"kind": "shares", "by": "samples", "exhausted": "repeat"}
    run = lf_kit.made(place, mix_strategy="interleave_once", **keys).located(place / "x.yaml").run
    assert run.data.mixture.exhausted == "leave_out"  # type: ignore[union-attr]
    run = lf_kit.made(place, mix_strategy="interleave_under", max_steps=4, **keys).located(place / "x.yaml").run
    assert run.data.mixture.exhausted == "repeat" and run.train.max_steps == 4  # type: ignore[union-attr]
    for more in ({"mix_strategy": "interleave_under"}, {"mix_strategy": "interleave_over", "interleave_probs": "1"}):
        with pytest.raises(ConfigError):
            lf_kit.made(place, **{**keys, **more})


def test_streams(place: Path) -> None:
    found = lf_kit.made(place, streaming=True, max_steps=3, buffer_size=64)
    run = found.located(place / "x.yaml").run
    assert run.data.stream is not None and (run.data.stream.window, run.data.stream.wrong) == (64, "drop")
    assert run.batch.partial == "carry" and run.train.epochs is None


def test_the_demo_run_has_llamafactorys_steps(tmp_path: Path, base: Path) -> None:
    """Rows as many as LLaMA-Factory's demo data has: 6 with pictures, 91, and 1,000 of which one has no answer. 69
    steps of 16 an epoch, the last of 8."""
    data = tmp_path / "data"
    rows = [json.loads(line) for line in tiny.make_chat(data, 6, text_only=0.0).read_text().splitlines()]
    (data / "mllm_demo.json").write_text(json.dumps(rows))
    for name, count, empty in (("identity", 91, -1), ("alpaca_en_demo", 1000, 17)):
        answers = [{"instruction": f"What is {n}?", "input": "", "output": "" if n == empty else "A number."}
                   for n in range(count)]  # fmt: skip
        (data / f"{name}.json").write_text(json.dumps(answers))
    (tmp_path / "model").symlink_to(base)
    entries = {"mllm_demo": {"file_name": "mllm_demo.json", "formatting": "sharegpt", "tags": lf_kit.ROLES,
                             "columns": {"messages": "messages", "images": "images"}},
               "identity": {"file_name": "identity.json"},
               "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"}}  # fmt: skip
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries))
    text = lf_kit.EXAMPLES["qwen2_5vl_lora_sft"]
    for ranks, steps in ((2, 207), (1, 411)):
        found = lf_kit.made(tmp_path, text, ranks=ranks)
        prepared = read(tmp_path, found)
        assert prepared.read.counts()["train"] == 1096
        assert prepared.plan.num_steps() == steps
