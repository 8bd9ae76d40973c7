"""What a folder says against what it holds: folders as other tools leave them, their repair, and kills in between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file, save_file

from lensmith.checkpoint import headers, repair
from lensmith.checkpoint.findings import Finding
from lensmith.checkpoint.inspect import Inspection, inspect
from lensmith.cli import main
from lensmith.core.errors import ConfigError, ModelError, RunError
from lensmith.recipe.check import check
from lensmith.recipe.export import export
from lensmith.recipe.inspect import inspect_folder, parts_of
from lensmith.report.terminal import Terminal

QUIET = Terminal("quiet")
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
BF16, F32 = torch.bfloat16, torch.float32
look = partial(inspect_folder, values=False, repair=False, dtype=None, terminal=QUIET)
mend = partial(inspect_folder, values=False, repair=True, dtype=None, terminal=QUIET)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bfloat16 model folder of each family."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: tiny.make_model(folder / kind, kind, dtype=BF16) for kind in FAMILIES}


@pytest.fixture
def base(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(bases["qwen2_5_vl"], tmp_path / "model"))


def seen(folder: Path, **more: Any) -> Inspection:
    return inspect(folder, parts_of(folder), **more)


def codes(found: Inspection, severity: str = "error") -> set[str]:
    return {f.code for f in found.findings if f.severity == severity}


def finding(found: Inspection, code: str) -> Finding:
    return next(f for f in found.findings if f.code == code)


def stock(folder: Path, dtype: Any = "auto") -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def edit(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        at = config
        *above, last = key.split("__")
        for name in above:
            at = at[name]
        at.pop(last) if value is None else at.update({last: value})
    path.write_text(json.dumps(config), encoding="utf-8")


# -- folders as others leave them -------------------------------------------------------------------------------------


def upcast(model: Any, names: Callable[[str], bool]) -> None:
    """As LLaMA-Factory does with what trains."""
    for name, p in model.named_parameters():
        if names(name):
            p.data = p.data.float()


def frozen_tower(base: Path, out: Path) -> None:
    """LLaMA-Factory, full, vision and projector frozen."""
    model = stock(base)
    upcast(model, lambda n: "visual" not in n)
    model.save_pretrained(out)


def all_trained(base: Path, out: Path) -> None:
    """LLaMA-Factory, full, nothing frozen."""
    model = stock(base)
    upcast(model, lambda n: True)
    model.save_pretrained(out)


def last_layer(base: Path, out: Path) -> None:
    """LLaMA-Factory, freeze: the last layer trains."""
    model = stock(base)
    upcast(model, lambda n: "layers.1." in n)
    model.save_pretrained(out)


def cast_at_the_end(base: Path, out: Path) -> None:
    """Loaded in float32, trained, cast, saved: the sub-configs stay float32."""
    stock(base, F32).to(BF16).save_pretrained(out)


def half_state_dict(base: Path, out: Path) -> None:
    """A float32 model saved with a bfloat16 state dict, as with ZeRO-3."""
    model = stock(base, F32)
    model.save_pretrained(out, state_dict={k: v.to(BF16) for k, v in model.state_dict().items()})


def float_tower(base: Path, out: Path) -> None:
    """A float32 tower on a bfloat16 model."""
    model = stock(base)
    upcast(model, lambda n: "visual" in n)
    model.save_pretrained(out)


ROWS: list[tuple[Any, tuple[str, str, str], tuple[int, int], set[str], torch.dtype]] = [
    # who made it, what root, text and vision say, whether there is float32 and bfloat16, the errors, what is meant
    (frozen_tower, ("bfloat16",) * 3, (1, 1), {"CONFIG_DTYPE", "MIXED_PARTS", "FLASH_ATTENTION"}, BF16),
    (all_trained, ("float32", "bfloat16", "bfloat16"), (1, 0), {"CONFIG_DTYPE"}, F32),
    (last_layer, ("bfloat16",) * 3, (1, 1), {"CONFIG_DTYPE", "MIXED_DTYPES", "FLASH_ATTENTION"}, BF16),
    (cast_at_the_end, ("bfloat16", "float32", "float32"), (0, 1), {"CONFIG_DTYPE"}, BF16),
    (half_state_dict, ("float32",) * 3, (0, 1), {"CONFIG_DTYPE", "VLLM_DTYPE"}, BF16),
    (float_tower, ("float32", *["bfloat16"] * 2), (1, 1), {"CONFIG_DTYPE", "MIXED_PARTS", "FLASH_ATTENTION"}, BF16),
]  # fmt: skip


def made(row: Any, base: Path, out: Path) -> Path:
    shutil.copytree(base, out, ignore=lambda *_: ["model.safetensors", "config.json"])
    row(base, out)
    return out


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].__name__)
def test_what_others_leave_is_named_and_repaired(row: Any, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    make, said, (wide, narrow), errors, meant = row
    folder = made(make, bases[kind], tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]) == said
    before = tensors(folder)
    assert (F32 in {t.dtype for t in before.values()}, BF16 in {t.dtype for t in before.values()}) == (wide, narrow)
    found = seen(folder)
    assert codes(found) == errors and found.natural_dtype == meant
    assert look(folder) == 1

    assert mend(folder) == 0
    assert codes(seen(folder)) == set()
    after = tensors(folder)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].view(torch.uint8), t.to(meant).view(torch.uint8)) for n, t in before.items())
    fixed = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = headers.name_of(meant)
    assert (fixed["dtype"], fixed["text_config"]["dtype"], fixed["vision_config"]["dtype"]) == (text,) * 3
    model = stock(folder)
    assert {p.dtype for p in model.parameters()} == {meant}
    assert model.config.dtype == model.config.text_config.dtype == model.config.vision_config.dtype == meant
    assert tensors(tmp_path / "saved.before-repair").keys() == before.keys()
    assert sorted(p.name for p in tmp_path.iterdir() if "saved" in p.name) == ["saved", "saved.before-repair"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].__name__)
def test_export_makes_one_type_of_them(row: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = made(row[0], bases["qwen2_5_vl"], tmp_path / "saved")
    for dtype, wanted in ((None, row[4]), ("bfloat16", BF16), ("float16", torch.float16)):
        out = tmp_path / f"out-{dtype}"
        export(folder, out, base=None, merge=True, dtype=dtype, shard_gb=5.0, terminal=QUIET)
        found = seen(out)
        assert codes(found) == set() and set(found.dtypes) == {wanted}
        after = tensors(out)
        before = tensors(folder)
        assert before.keys() - after.keys() <= {"lm_head.weight"}  # tied
        assert all(torch.equal(t, before[n].to(wanted)) for n, t in after.items())
        assert stock(out).config.vision_config.dtype == wanted


def test_repair_to_a_given_type(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = made(all_trained, bases["qwen3_vl"], tmp_path / "saved")
    before = tensors(folder)
    assert mend(folder, dtype="bfloat16") == 0
    assert all(torch.equal(tensors(folder)[n], t.to(BF16)) for n, t in before.items())
    assert set(seen(folder).dtypes) == {BF16}
    with pytest.raises(ModelError, match=r"REPAIR.*before-repair is there already"):
        mend(folder, dtype="float16")
    assert set(seen(folder).dtypes) == {BF16}


def test_a_folder_that_agrees_has_no_findings(bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in bases.values():
        found = seen(folder)
        assert found.findings == () and set(found.parts) == {"vision", "projector", "language", "embeddings"}
        assert found.read_by_vllm == ("bfloat16", "dtype")
        assert (
            sum(h.num_values for held in found.parts.values() for h in held.values()) == stock(folder).num_parameters()
        )
        assert mend(folder) == 0
        assert not folder.with_name(f"{folder.name}.before-repair").exists()


def test_all_float32_agrees_and_flash_attention_is_a_warning(qwen25: Path) -> None:
    found = seen(qwen25)
    assert codes(found) == set() and codes(found, "warning") == {"FLASH_ATTENTION"}
    assert look(qwen25) == 0


def test_types_by_part_that_the_configs_name_are_meant(bases: dict[str, Path], tmp_path: Path) -> None:
    """As lensmith saves them where precision.parts asks for it."""
    folder = made(float_tower, bases["qwen3_vl"], tmp_path / "saved")
    edit(folder / "config.json", dtype="bfloat16", vision_config__dtype="float32")
    found = seen(folder)
    assert codes(found) == set() and codes(found, "warning") == {"MIXED_PARTS", "FLASH_ATTENTION"}
    assert mend(folder) == 0 and set(seen(folder).dtypes) == {BF16, F32}
    assert mend(folder, dtype="bfloat16") == 0 and set(seen(folder).dtypes) == {BF16}
    edit(folder / "config.json", dtype="float16")
    assert codes(seen(folder)) == {"CONFIG_DTYPE", "VLLM_DTYPE"}


def test_old_flat_configs(bases: dict[str, Path], tmp_path: Path) -> None:
    """As on the Hub: everything at the root, `torch_dtype` there alone."""
    folder = Path(shutil.copytree(bases["qwen2_vl"], tmp_path / "old"))
    new = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    flat = tiny.config_of("qwen2_vl", new["text_config"]["vocab_size"])
    (folder / "config.json").write_text(json.dumps({**flat, "torch_dtype": "bfloat16", "tie_word_embeddings": True}))
    found = seen(folder)
    assert found.findings == () and found.said == {"torch_dtype": "bfloat16"}
    edit(folder / "config.json", torch_dtype="float32")
    assert codes(seen(folder)) == {"CONFIG_DTYPE", "VLLM_DTYPE"}
    assert mend(folder) == 0
    fixed = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert fixed["torch_dtype"] == "bfloat16" and "dtype" not in fixed
    assert stock(folder).config.vision_config.dtype == BF16


def test_what_vllm_reads(base: Path) -> None:
    edit(base / "config.json", dtype=None)
    found = seen(base)
    assert found.read_by_vllm == ("bfloat16", "text_config.dtype") and found.findings == ()
    edit(base / "config.json", text_config__dtype="float16")
    found = seen(base)
    assert found.read_by_vllm == ("float16", "text_config.dtype") and codes(found) == {"CONFIG_DTYPE", "VLLM_DTYPE"}
    edit(base / "config.json", text_config__dtype=None, vision_config__dtype=None)
    found = seen(base)
    assert found.read_by_vllm == ("bfloat16", "the headers")
    assert codes(found, "warning") == {"DTYPE_MISSING"} and look(base) == 0
    assert mend(base) == 0 and seen(base).said == {"dtype": "bfloat16"}


# -- files, layers, heads ---------------------------------------------------------------------------------------------


def sharded(base: Path) -> Path:
    out = base.with_name("shards")
    shutil.copytree(base, out, ignore=lambda *_: ["model.safetensors"])
    stock(base).save_pretrained(out, max_shard_size="40KB")
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 2)


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def second_layer_gone(folder: Path) -> None:
    rewrite(folder, lambda s: [s.pop(n) for n in list(s) if "model.layers.1." in n])


def one_tensor_gone(folder: Path) -> None:
    rewrite(folder, lambda s: s.pop("model.layers.1.mlp.up_proj.weight"))


def vision_block_gone(folder: Path) -> None:
    rewrite(folder, lambda s: [s.pop(n) for n in list(s) if "visual.blocks.0." in n])


def embedding_gone(folder: Path) -> None:
    rewrite(folder, lambda s: s.pop("model.embed_tokens.weight"))


def fewer_layers_said(folder: Path) -> None:
    edit(folder / "config.json", text_config__num_hidden_layers=1)


def not_tied(folder: Path) -> None:
    edit(folder / "config.json", tie_word_embeddings=False, text_config__tie_word_embeddings=False)


def other_vocabulary(folder: Path) -> None:
    edit(folder / "config.json", text_config__vocab_size=7)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


DAMAGES: list[tuple[Any, set[str], str]] = [
    (cut, {"HEADER", "TENSORS_MISSING"}, "model.safetensors"),
    (no_header, {"HEADER"}, "header does not fit"),
    (only_a_pickle, {"WEIGHTS", "PICKLED"}, "pytorch_model.bin"),
    (second_layer_gone, {"LAYERS"}, "model.layers: of the 2 layers of the config 1 are missing"),
    (one_tensor_gone, {"TENSORS_MISSING"}, "model.layers.1.mlp.up_proj.weight"),
    (vision_block_gone, {"LAYERS"}, "visual.blocks: of the 2 layers of the config 0 are missing"),
    (embedding_gone, {"TENSORS_MISSING"}, "no embedding"),
    (fewer_layers_said, {"LAYERS"}, "beside the 1 layers of the config there are 1"),
    (not_tied, {"HEAD"}, "no head"),
    (other_vocabulary, {"SHAPE"}, "the config says [7, 32]"),
    (no_config, {"CONFIG"}, "config.json is missing"),
    (broken_config, {"CONFIG"}, "cannot be read"),
    (no_tokenizer, {"TOKENIZER"}, "tokenizer.json"),
    (no_processor, {"PROCESSOR"}, "preprocessor_config.json"),
]


@pytest.mark.parametrize(("damage", "expected", "named"), DAMAGES, ids=lambda d: getattr(d, "__name__", ""))
def test_damages(damage: Any, expected: set[str], named: str, base: Path) -> None:
    damage(base)
    found = seen(base)
    assert codes(found) == expected - ({"TENSORS_MISSING"} if damage is cut else set())
    assert any(named in f.what for f in found.errors)
    assert look(base) == 1


def test_what_is_not_whole_is_not_repaired(base: Path) -> None:
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    for damage in (cut, no_header, no_config):
        damage(base)
        with pytest.raises(ModelError, match=r"REPAIR.*cannot be repaired"):
            mend(base, dtype="float16")
        for name, data in before.items():
            (base / name).write_bytes(data)
    assert [p.name for p in base.parent.iterdir() if "repair" in p.name] == []


def test_shards(base: Path) -> None:
    folder = sharded(base)
    found = seen(folder)
    assert found.findings == () and len(found.contents.files) > 3
    index = json.loads((folder / headers.INDEX).read_text())
    lost = found.contents.files[1]
    (folder / lost).rename(folder.parent / "aside")
    assert codes(seen(folder)) >= {"SHARD_MISSING"} and lost in finding(seen(folder), "SHARD_MISSING").what
    (folder.parent / "aside").rename(folder / lost)

    name = "model.norm.weight"
    moved = {**index["weight_map"], name: next(f for f in found.contents.files if f != index["weight_map"][name])}
    (folder / headers.INDEX).write_text(json.dumps({**index, "weight_map": moved}))
    assert name in finding(seen(folder), "INDEX").what
    (folder / headers.INDEX).write_text(json.dumps({**index, "weight_map": {**moved, name: "../x.safetensors"}}))
    assert "no weight_map" in finding(seen(folder), "INDEX").what
    (folder / headers.INDEX).write_text(
        json.dumps({**index, "weight_map": {k: v for k, v in moved.items() if k != name}})
    )
    assert "does not name" in finding(seen(folder), "INDEX").what
    (folder / headers.INDEX).unlink()
    assert "no model.safetensors.index.json" in finding(seen(folder), "INDEX").what
    (folder / headers.INDEX).write_text(json.dumps(index))
    shutil.copy(base / "model.safetensors", folder)
    assert codes(seen(folder)) == {"TWO_WEIGHTS"}
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert codes(seen(folder)) == set() and codes(seen(folder), "warning") == {"BESIDE"}


def test_shards_are_repaired_file_by_file(base: Path) -> None:
    folder = sharded(base)
    before = tensors(folder)
    place = {t.name: (t.file, t.shape) for t in seen(folder).contents.tensors}
    (folder / "deeper").mkdir()
    (folder / "deeper" / "optimizer.pt").write_bytes(b"not opened")
    assert mend(folder, dtype="float32") == 0
    found = seen(folder)
    assert {t.name: (t.file, t.shape) for t in found.contents.tensors} == place
    index = json.loads((folder / headers.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.num_bytes for t in found.contents.tensors)
    assert all(torch.equal(tensors(folder)[n], t.float()) for n, t in before.items())
    assert (folder / "deeper" / "optimizer.pt").read_bytes() == b"not opened"
    assert stock(folder).dtype == F32


def test_odd_values_in_config_and_index(base: Path) -> None:
    folder = sharded(base)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": [1]}))
    edit(folder / "config.json", vision_config__dtype="float32")
    assert mend(folder) == 0 and json.loads(index.read_text())["metadata"]["total_size"] > 0
    edit(folder / "config.json", model_type=["qwen2_5_vl"])
    assert parts_of(folder) is None and look(folder) == 0


def shard_gone(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def index_of_another_kind(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def shard_cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 2)


@pytest.mark.parametrize(
    ("damage", "named"),
    [(shard_gone, "model-00002-of"), (index_of_another_kind, "weight_map"), (shard_cut, "header and bytes disagree")],
)
def test_weights_that_are_not_whole_stop_a_check_and_an_export(
    base: Path, tmp_path: Path, damage: Any, named: str
) -> None:
    """Before time is spent, not out of transformers."""
    folder, data = sharded(base), tiny.make_chat(tmp_path, 8, pictures=2)
    check(runs.located(tmp_path / "run", folder, data), QUIET)
    damage(folder)
    with pytest.raises(ModelError, match=rf"WEIGHTS.*{named}"):
        check(runs.located(tmp_path / "run", folder, data), QUIET)
    with pytest.raises(ModelError, match=rf"WEIGHTS.*{named}"):
        export(folder, tmp_path / "out", base=None, merge=True, dtype="bfloat16", shard_gb=5.0, terminal=QUIET)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_pickles_beside_the_weights_are_a_warning(base: Path) -> None:
    (base / "training_args.bin").write_bytes(b"x")
    assert "training_args.bin" in finding(seen(base), "PICKLED").what
    assert look(base) == 0


def test_a_head_that_is_stored_twice(base: Path) -> None:
    rewrite(base, lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    assert codes(seen(base), "warning") == {"TIED_TWICE"} and codes(seen(base, values=True)) == set()
    rewrite(base, lambda s: s["lm_head.weight"].view(-1)[7:8].add_(1))
    assert codes(seen(base)) == set()
    assert codes(seen(base, values=True)) == {"TIED_DIFFERS"}


def test_values_that_are_not_finite(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "CHUNK_BYTES", 64)  # several pieces a tensor
    rewrite(base, lambda s: s["model.layers.0.mlp.up_proj.weight"].view(-1)[[3, 700]].fill_(1))
    assert codes(seen(base, values=True)) == set()

    def spoil(state: dict[str, torch.Tensor]) -> None:
        flat = state["model.layers.0.mlp.up_proj.weight"].view(-1)
        flat[3], flat[700] = float("nan"), float("-inf")

    rewrite(base, spoil)
    assert codes(seen(base)) == set()
    assert "model.layers.0.mlp.up_proj.weight (2)" in finding(seen(base, values=True), "NOT_FINITE").what
    assert look(base, values=True) == 1


def test_a_model_that_no_family_knows(base: Path) -> None:
    edit(base / "config.json", model_type="something_else")
    rewrite(base, lambda s: [s.update({n: s[n].float()}) for n in list(s) if n.startswith("visual")])
    found = seen(base)
    assert set(found.parts) == {"visual", "model.layers", "model.embed_tokens", "model.norm"}
    assert codes(found) == {"MIXED_PARTS", "CONFIG_DTYPE", "FLASH_ATTENTION"}
    assert mend(base) == 0 and set(seen(base).dtypes) == {BF16}


def test_a_quantised_model_is_not_compared(base: Path) -> None:
    rewrite(base, lambda s: s.update({"model.norm.weight": s["model.norm.weight"].float()}))
    edit(base / "config.json", quantization_config={"quant_method": "fp8"})
    assert codes(seen(base)) == set() and codes(seen(base), "warning") == {"QUANTISED"}
    with pytest.raises(ModelError, match="QUANTISED"):
        mend(base)


# -- conversion -------------------------------------------------------------------------------------------------------


def test_conversion_is_that_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bit patterns of 16-bit types, random 32-bit ones, integers, empty and scalar tensors, small chunks."""
    monkeypatch.setattr(headers, "CHUNK_BYTES", 96)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    gen = torch.Generator().manual_seed(0)
    state = {
        "bf16": bits.view(BF16).reshape(256, 256),
        "f32": torch.randn(33, 7, generator=gen) * 10.0 ** torch.randint(-30, 30, (33, 7), generator=gen),
        "f64": torch.randn(5, dtype=torch.float64, generator=gen),
        "scalar": torch.tensor(1.2345),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(7, dtype=torch.int32),
        "long": torch.arange(3),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt", "x": "ü"})
    for dtype in (BF16, F32):
        size = repair.convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype)
        out = load_file(tmp_path / "b.safetensors")
        wanted = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
        assert size == sum(t.nbytes for t in wanted.values())
        for name, t in wanted.items():
            assert out[name].dtype == t.dtype and out[name].shape == t.shape
            assert torch.equal(out[name].isnan(), t.isnan()) and torch.equal(out[name].nan_to_num(), t.nan_to_num())
        from safetensors import safe_open

        with safe_open(tmp_path / "b.safetensors", "pt") as opened:
            assert opened.metadata() == {"format": "pt", "x": "ü"}


def test_what_a_type_does_not_hold_is_refused(base: Path) -> None:
    rewrite(base, lambda s: s["model.norm.weight"][:1].fill_(1e6))
    with pytest.raises(ModelError, match=r"OVERFLOW.*model\.norm\.weight.*float16"):
        mend(base, dtype="float16")
    assert codes(seen(base)) == set() and set(seen(base).dtypes) == {BF16}
    assert [p.name for p in base.parent.iterdir() if p.name != "model"] == ["lensmith-cache"] * (
        base.parent / "lensmith-cache"
    ).exists()


def test_a_copy_that_does_not_verify_is_not_swapped_in(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tensors(base)

    def lossy(source: Path, target: Path, dtype: torch.dtype, tick: Any) -> int:
        state = load_file(source)
        state.pop("model.norm.weight")
        save_file({n: t.to(dtype) for n, t in state.items()}, target)
        return 0

    monkeypatch.setattr(repair, "convert_file", lossy)
    with pytest.raises(RunError, match=r"REPAIR.*does not verify"):
        mend(base, dtype="float16")
    assert all(torch.equal(tensors(base)[n], t) for n, t in before.items())
    assert not [p for p in base.parent.iterdir() if "repair" in p.name]


# -- kills ------------------------------------------------------------------------------------------------------------


def faults(tmp_path: Path, which: str) -> dict[str, Any]:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.fail("this test compiles a small C file (tests/data/crash_shim.c): install gcc")
    here = Path(__file__).parent
    library = tmp_path / "kp.so"
    source = str(here / "data" / "crash_shim.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True)
    env = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "repair_driver.py"), str(tmp_path / "work"), which]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_faults_at_some_calls_of_a_repair(tmp_path: Path) -> None:
    """Killed before a call that changes the disk, in the middle of a write, or out of space from a call on."""
    found = faults(tmp_path, "sample")
    assert found["wrong"] == {}
    assert found["calls"] >= 60 and found["cases"] >= 22


@pytest.mark.slow
def test_faults_at_every_call_of_a_repair(tmp_path: Path) -> None:
    found = faults(tmp_path, "all")
    assert found["wrong"] == {}
    assert found["calls"] >= 60 and found["cases"] == 3 * found["calls"]


def test_an_interrupt_between_the_renames(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, or an error, after the old folder is put aside: it is put back."""
    before = tensors(base)
    for error in (KeyboardInterrupt(), OSError(5, "Input/output error")):
        with monkeypatch.context() as patch:

            def refuse(folder: Path, error: BaseException = error) -> None:
                if folder == base.parent:
                    raise error

            patch.setattr(repair, "sync_folder", refuse)
            with pytest.raises((KeyboardInterrupt, RunError)):
                mend(base, dtype="float32")
        assert all(torch.equal(tensors(base)[n], t) for n, t in before.items())
        assert not [p for p in base.parent.iterdir() if "repair" in p.name]


def test_an_interrupted_repair_is_named(base: Path) -> None:
    names = repair.names_of(base)
    base.rename(names.backup)
    with pytest.raises(ModelError, match=r"interrupted.*\n.*--repair"):
        look(base)
    with pytest.raises(ModelError, match="rename it back"):
        mend(base)
    assert names.backup.is_dir()
    with pytest.raises(ModelError, match="CHECKPOINT"):
        mend(base.with_name("never"))
    with pytest.raises(ModelError, match="CHECKPOINT"):
        mend(base / "a" / "b")


# -- adapters, checkpoints, the command line --------------------------------------------------------------------------


def adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    values = {"peft_type": "LORA", "base_model_name_or_path": "some/model", "r": 4, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    name = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_{}.weight"
    state = {name.format("A"): torch.zeros(4, 32), name.format("B"): torch.zeros(48, 4)}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_adapters(tmp_path: Path) -> None:
    good = seen(adapter(tmp_path / "good"))
    assert good.findings == () and good.parts == {"adapter": {F32: good.parts["adapter"][F32]}}
    assert codes(seen(adapter(tmp_path / "rank", r=8))) == {"RANK"}
    lost = seen(adapter(tmp_path / "lost", modules_to_save=["lm_head"]))
    assert codes(lost) == {"MODULES_TO_SAVE"} and codes(lost, "warning") == {"VLLM_ADAPTER"}
    dora = seen(adapter(tmp_path / "dora", use_dora=True, base_model_name_or_path=str(tmp_path / "gone")))
    assert codes(dora) == set() and codes(dora, "warning") == {"VLLM_ADAPTER", "BASE"}
    file = tmp_path / "good" / "adapter_model.safetensors"
    state = load_file(file)
    save_file({n: t.to(BF16) if "lora_A" in n else t for n, t in state.items()}, file)
    assert codes(seen(tmp_path / "good")) == {"MIXED_DTYPES"}
    assert mend(tmp_path / "good", dtype="float32") == 0
    assert set(seen(tmp_path / "good").dtypes) == {F32}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": [4]}, {"RANK"}),
        ({"r": "4", "rank_pattern": {"up_proj": [4]}}, {"RANK"}),
        ({"modules_to_save": "lm_head"}, {"MODULES_TO_SAVE"}),
        ({"modules_to_save": 5}, set()),
    ],
)
def test_odd_values_in_the_config_of_an_adapter(tmp_path: Path, config: dict[str, Any], said: set[str]) -> None:
    folder = adapter(tmp_path / "odd", **config)
    assert codes(seen(folder)) == said and look(folder) == int(bool(said))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_runs_and_checkpoints(qwen25: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    data = tiny.make_chat(tmp_path, 8, pictures=2)
    run = runs.located(tmp_path / "run", qwen25, data, tune={"kind": "lora", "rank": 2}, train={"max_steps": 1})
    out = runs.quiet_train(run)
    checkpoint = Path(out.summary["checkpoint"])
    for path in (out.folder, checkpoint, checkpoint / "model"):
        code, text, err = cli("inspect", path, "--json")
        record = json.loads(text)
        assert (code, err) == (0, "") and record["kind"] == "adapter" and record["adapter"]["r"] == 2
        with pytest.raises(ModelError, match="sealed"):
            mend(path)
    (checkpoint / "model" / "tokenizer.json").write_text("{}")
    code, _, err = cli("inspect", checkpoint)
    assert code == 66 and "[CHECKPOINT]" in err and "tokenizer.json" in err


def test_the_command(bases: dict[str, Path], tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    folder = made(frozen_tower, bases["qwen2_5_vl"], tmp_path / "saved")
    code, out, err = cli("inspect", folder)
    assert (code, err) == (1, "")
    assert "error MIXED_PARTS" in out and "vLLM reads" in out and "3 errors" not in out
    code, out, _ = cli("inspect", folder, "--json")
    record = json.loads(out)
    assert code == 1 and record["agrees"] is False and record["parts"]["vision"].keys() == {"bfloat16"}
    assert {f["code"] for f in record["findings"]} == {"CONFIG_DTYPE", "MIXED_PARTS", "FLASH_ATTENTION"}
    code, out, err = cli("inspect", folder, "-q")
    assert (code, out) == (1, "") and "warning: MIXED_PARTS" in err
    code, _, err = cli("inspect", folder, "--dtype", "bfloat16")
    assert code == 64 and "[DTYPE]" in err
    with pytest.raises(ConfigError, match="float8"):
        mend(folder, dtype="float8")
    code, out, _ = cli("inspect", folder, "--repair", "--values", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and events[0]["repaired"] is True and events[-1]["findings"] == []
    code, out, _ = cli("inspect", folder, "--repair")
    assert code == 0 and "nothing to repair" in out and "config and tensors agree" in out
    code, _, err = cli("inspect", tmp_path / "none")
    assert code == 66 and "[CHECKPOINT]" in err
