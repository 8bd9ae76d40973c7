"""The modules of MiniCPM-V-2: published names and sizes, and their numbers against `reference_minicpm.py`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference_minicpm as reference
import tiny_minicpm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface

from lensmith.checkpoint.export import SavedTypes, write_model
from lensmith.core.errors import ModelError
from lensmith.model.attention import AttentionPlan
from lensmith.model.load import Loading, load_model, skeleton
from lensmith.model.minicpm_v import MiniCPMV, MiniCPMVConfig
from lensmith.model.minicpm_v_vision import places, resampling
from lensmith.model.options import Lora
from lensmith.model.tune import apply

GAP = 1e-5
LOADING = Loading(native="lensmith.model.minicpm_v:MiniCPMV")
SIZES = [(4, 4), (5, 5), (3, 6), (4, 4), (1, 9), (5, 5), (3, 6)]
PUBLISHED = {
    "architectures": ["MiniCPMV"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig", "AutoModel": "modeling_minicpmv.MiniCPMV"},
    "dim_model_base": 256, "drop_vision_last_layer": True, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 2304, "image_size": 448, "initializer_range": 0.1, "intermediate_size": 5760,
    "max_position_embeddings": 4096, "max_slice_nums": 9, "mm_use_im_start_end": True, "model_type": "minicpmv",
    "num_attention_heads": 36, "num_hidden_layers": 40, "num_key_value_heads": 36, "patch_size": 14,
    "pretraining_tp": 1, "query_num": 64, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "scale_depth": 1.4, "scale_emb": 12, "scale_resolution": 448, "slice_mode": True, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
    "vocab_size": 122753,
}  # fmt: skip


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The 694 tensors of the published checkpoint."""
    h, c, inner = 2304, 1152, 4304
    both = {"weight": (c,), "bias": (c,)}
    out: dict[str, tuple[int, ...]] = {f"llm.{n}.weight": (122753, h) for n in ("model.embed_tokens", "lm_head")}
    out["llm.model.norm.weight"] = (h,)
    for i in range(40):
        at = f"llm.model.layers.{i}."
        out |= {f"{at}self_attn.{n}_proj.weight": (h, h) for n in "qkvo"}
        out |= {f"{at}mlp.{n}_proj.weight": (5760, h) for n in ("gate", "up")} | {
            f"{at}mlp.down_proj.weight": (h, 5760)
        }
        out |= {f"{at}{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    out |= {"vpm.patch_embed.proj.weight": (c, 3, 14, 14), "vpm.patch_embed.proj.bias": (c,)}
    out |= {"vpm.pos_embed": (1, 729, c), **{f"vpm.norm.{p}": s for p, s in both.items()}}
    for i in range(26):
        at = f"vpm.blocks.{i}."
        out |= {f"{at}norm{n}.{p}": s for n in (1, 2) for p, s in both.items()}
        for name, (rows, columns) in {"attn.qkv": (3 * c, c), "attn.proj": (c, c), "mlp.fc1": (inner, c),
                                      "mlp.fc2": (c, inner)}.items():  # fmt: skip
            out |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (rows,)}
    at = "resampler."
    out |= {f"{at}query": (64, h), f"{at}pos_embed": (64, h), f"{at}proj": (h, h), f"{at}kv_proj.weight": (h, c)}
    out |= {f"{at}attn.in_proj_weight": (3 * h, h), f"{at}attn.in_proj_bias": (3 * h,)}
    out |= {f"{at}attn.out_proj.weight": (h, h), f"{at}attn.out_proj.bias": (h,)}
    return out | {f"{at}ln_{n}.{p}": (h,) for n in ("q", "kv", "post") for p in ("weight", "bias")}


@pytest.fixture
def published(tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    with torch.device("meta"):
        return MiniCPMV._from_config(MiniCPMVConfig.from_pretrained(tmp_path), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_minicpm.make_model(tmp_path_factory.mktemp("minicpm"))


@pytest.fixture(scope="module")
def stock(folder: Path) -> reference.Model:
    return reference.Model(folder, tiny_minicpm.config_of())


@pytest.fixture
def model(folder: Path) -> Any:
    return load_model(folder, torch.float32, torch.device("cpu"), LOADING).eval()


def pictures(sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, rows * 14, columns * 14) for rows, columns in sizes]


def patches(slices: list[torch.Tensor]) -> torch.Tensor:
    """[P, 588]: channel, row, column within a patch."""
    return torch.cat([F.unfold(s[None], 14, stride=14)[0].T for s in slices])


# -- names, sizes, config -----------------------------------------------------------------------------------------


def test_the_published_tensors(published: Any) -> None:
    state = {n: tuple(t.shape) for n, t in published.state_dict().items()}
    assert state == published_shapes() and len(state) == 694
    assert sum(math.prod(s) for s in state.values()) == 3_434_965_792
    parts = {p: sum(math.prod(s) for n, s in state.items() if n.startswith(p)) for p in ("llm.", "vpm.", "resampler.")}
    assert parts == {"llm.": 3_007_703_808, "vpm.": 397_747_744, "resampler.": 29_514_240}
    assert set(state) - {n for n, _ in published.named_parameters()} == {"resampler.pos_embed"}


def test_default_adapters_of_the_published_size(published: Any) -> None:
    from lensmith.family.minicpm_v import from_config

    tuned = apply(published, Lora(kind="lora", rank=8), from_config(PUBLISHED, {}, None))
    assert sum(p.numel() for _, p in tuned.trainable()) == 13_639_680


def test_the_config_keeps_the_published_form(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = MiniCPMVConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    kept = {k: v for k, v in PUBLISHED.items() if k != "torch_dtype"}
    assert {k: saved[k] for k in kept} == kept and saved["dtype"] == "bfloat16"
    assert set(saved) - set(kept) == {"dtype", "head_dim", "mlp_bias", "transformers_version"}
    assert MiniCPMVConfig.from_pretrained(tmp_path / "again").to_dict() == config.to_dict()


def test_another_base_of_the_angles_is_kept(tmp_path: Path) -> None:
    stretched = {"rope_type": "linear", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, "rope_theta": 5e5, "rope_scaling": stretched}))
    MiniCPMVConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["rope_theta"] == 5e5 and saved["rope_scaling"] == stretched


def test_skeleton_and_missing_tensors(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    bones = skeleton(folder, LOADING)
    state = load_file(folder / "model.safetensors")
    assert {n: t.shape for n, t in bones.state_dict().items()} == {n: t.shape for n, t in state.items()}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({n: t for n, t in state.items() if n != "resampler.pos_embed"}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"WEIGHTS.*resampler\.pos_embed"):
        load_model(tmp_path, torch.float32, torch.device("cpu"), LOADING)


# -- tower --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", [5, 3, 8])
def test_tower_equals_siglip(model: Any, stock: reference.Model, side: int) -> None:
    """Its own size and two others, whose positions torch resamples along both axes at once."""
    slices = pictures([(side, side)] * 2)
    tower, weights = reference.siglip(stock.config, stock.state, side)
    tower.load_state_dict(weights)
    theirs = tower(torch.stack(slices)).last_hidden_state
    ours = model.vpm(patches(slices), [(side, side)] * 2).reshape(theirs.shape)
    assert (ours - theirs).abs().max() < GAP


def test_resampled_positions(model: Any) -> None:
    sizes = [(5, 5), (32, 32), (16, 64), (3, 7), (1, 20), (16, 64)]
    ours = model.vpm.positions(sizes).split([r * c for r, c in sizes])
    for size, found in zip(sizes, ours, strict=True):
        assert (found - reference.tower_positions(model.vpm.pos_embed, size)).abs().max() < 1e-6, size
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = model.vpm.positions(sizes)
    assert again.dtype == torch.float32 and torch.equal(again, torch.cat(ours))
    assert resampling(5, 32) is resampling(5, 32)


def test_gradients_reach_the_learnt_positions(model: Any) -> None:
    model.vpm.positions([(4, 6)]).pow(2).sum().backward()
    ours, model.vpm.pos_embed.grad = model.vpm.pos_embed.grad, None
    reference.tower_positions(model.vpm.pos_embed, (4, 6)).pow(2).sum().backward()
    assert (ours - model.vpm.pos_embed.grad).abs().max() < GAP


@torch.no_grad()
def test_slices_together_equal_slices_alone(model: Any, stock: reference.Model) -> None:
    """Different sizes in one pass, equal sizes apart from each other."""
    slices = pictures(SIZES)
    together = model.image_features(patches(slices), SIZES)
    alone = torch.cat([model.image_features(patches([s]), [size]) for s, size in zip(slices, SIZES, strict=True)])
    assert together.shape == (len(SIZES) * 4, 32)
    assert (together - alone).abs().max() < GAP
    assert (together - stock.features(slices)).abs().max() < GAP


# -- resampler ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_resampler_equals_the_formulas(model: Any, stock: reference.Model) -> None:
    torch.manual_seed(2)
    counts = [r * c for r, c in SIZES]
    features = torch.randn(sum(counts), 24)
    ours = model.resampler(features, SIZES)
    for own, part, (rows, columns) in zip(ours, features.split(counts), SIZES, strict=True):
        theirs = reference.resampler(stock.config, stock.state, part, rows, columns)
        assert (own - theirs).abs().max() < GAP


def test_places_equal_the_formulas() -> None:
    sizes = [(32, 32), (3, 50), (1, 1)]
    wanted = torch.cat([torch.from_numpy(reference.table(*size, 48)) for size in sizes])
    assert (places(sizes, 48) - wanted).abs().max() < 2e-6  # float32 angles of up to 50


def test_the_query_table_never_trains(folder: Path) -> None:
    from lensmith.family.registry import load_family
    from lensmith.model.options import Freeze, Full

    family = load_family(folder)
    for tune in (Full(kind="full"), Freeze(kind="freeze", train=("projector",)), Lora(kind="lora", rank=2)):
        model: Any = load_model(folder, torch.float32, torch.device("cpu"), LOADING)
        apply(model, tune, family)
        assert not model.resampler.pos_embed.requires_grad
        assert model.resampler.query.requires_grad == (not isinstance(tune, Lora))


class OldResampler(nn.Module):
    """What users of the published code run into: a table made in float32 is added to queries of the model's type."""

    def __init__(self, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.from_numpy(reference.table(2, 2, width)).float(), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(4, width, dtype=torch.bfloat16))
        self.attn = nn.MultiheadAttention(width, 2, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(self.query + self.table, x, x)[0]


def test_mat1_and_mat2_must_have_the_same_dtype(folder: Path) -> None:
    """The old error, and that none of ours has it: in every type, in mixed types, whatever type the table has."""
    with pytest.raises(RuntimeError, match="mat1 and mat2 must have the same dtype, but got Float and BFloat16"):
        OldResampler(32)(torch.zeros(9, 32, dtype=torch.bfloat16))
    values, size = patches(pictures([(3, 3)])), [(3, 3)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model: Any = load_model(folder, dtype, torch.device("cpu"), LOADING)
        assert {t.dtype for t in model.state_dict().values()} == {dtype}
        for table in (torch.float32, torch.bfloat16):
            model.resampler.pos_embed = model.resampler.pos_embed.to(table)
            model.vpm.pos_embed.data = model.vpm.pos_embed.data.to(table)
            assert model.image_features(values, size).dtype == dtype
    mixed: Any = load_model(folder, torch.bfloat16, torch.device("cpu"), LOADING)
    for tower, projector in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        mixed.vpm.to(tower)
        mixed.resampler.to(projector)
        assert mixed.image_features(values, size).dtype == projector
        assert mixed.llm.model.embed(torch.zeros(1, 4, dtype=torch.long), mixed.image_features(values, size),
                                     torch.ones(1, 4, dtype=torch.bool)).dtype == torch.bfloat16  # fmt: skip


# -- language model -----------------------------------------------------------------------------------------------


def ids_of(count: int) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(9, len(tiny_minicpm.pieces()), (1, count))


@torch.no_grad()
def test_language_model_equals_a_scaled_llama(model: Any, stock: reference.Model) -> None:
    ids = ids_of(40)
    theirs = stock.hidden(ids[0].tolist(), [])
    assert (model(ids).logits[0] - stock.logits(ids[0].tolist())).abs().max() < GAP
    assert (model.llm.model(model.llm.model.embed(ids)).last_hidden_state[0] - theirs).abs().max() < GAP
    assert torch.equal(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


@torch.no_grad()
def test_pictures_are_not_scaled(model: Any, stock: reference.Model) -> None:
    slices = pictures([(4, 4), (3, 6)])
    ids = [9, 10, 4, *[0] * 8, 5, 11, 12]
    features = model.image_features(patches(slices), [(4, 4), (3, 6)])
    mask = torch.tensor([ids]) == 0
    ours = model(torch.tensor([ids]), features=features, image_mask=mask).logits[0]
    assert (ours - stock.logits(ids, slices)).abs().max() < GAP


@torch.no_grad()
def test_a_packed_row_equals_each_alone(model: Any, stock: reference.Model) -> None:
    rows = [ids_of(30)[:, :9], ids_of(30)[:, 4:], ids_of(30)[:, 7:19]]
    lengths = [r.shape[1] for r in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    plan = AttentionPlan.from_lengths(lengths, causal=True)
    embeds = model.llm.model.embed(torch.cat(rows, dim=1))
    out = model.llm.model(embeds, positions, attention_plans={None: plan}).last_hidden_state[0].split(lengths)
    for own, row in zip(out, rows, strict=True):
        assert (own - stock.hidden(row[0].tolist(), [])).abs().max() < GAP


@torch.no_grad()
def test_cached_decoding_and_generation(model: Any, stock: reference.Model) -> None:
    from transformers import DynamicCache

    ids = ids_of(12)
    cache = DynamicCache(config=model.config.get_text_config())
    first = model(ids[:, :7], past_key_values=cache).logits
    rest = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(7, 12)]
    assert (torch.cat([first, *rest], dim=1) - model(ids).logits).abs().max() < GAP
    for padded in (False, True):
        width = 12 if padded else 7
        start = torch.cat([ids[:, : width - 7] * 0, ids[:, :7]], dim=1)
        mask = (torch.arange(width) >= width - 7)[None].long()
        ours = model.generate(input_ids=start, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=2)
        wanted = ids[0, :7].tolist()
        while len(wanted) < 13 and wanted[-1] != 2:
            wanted.append(int(stock.logits(wanted)[-1].argmax()))
        assert ours[0, width - 7 :].tolist() == wanted


@pytest.fixture
def seen() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Queries and values that attention was called with."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
        found.append((q, v))
        return v.transpose(1, 2), None

    AttentionInterface.register("keep_queries", attend)
    yield found


@torch.no_grad()
def test_queries_turn_in_float32(folder: Path, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Angles of position 4,000 have no meaning in bfloat16, nor has the product."""
    model: Any = load_model(folder, torch.bfloat16, torch.device("cpu"), LOADING)
    model.config._attn_implementation = "keep_queries"
    embeds = model.llm.model.embed(ids_of(5))
    positions = torch.arange(4000, 4005)[None]
    model.llm.model(embeds, positions)
    q, v = seen[0]
    layer = model.llm.model.layers[0]
    plain = layer.self_attn.q_proj(layer.input_layernorm(embeds)).unflatten(-1, (4, 8)).transpose(1, 2).double()
    angles = positions[0, :, None].double() / 10000 ** (torch.arange(4).double() / 4)
    cos, sin = angles.cos(), angles.sin()
    left, right = plain[..., :4], plain[..., 4:]
    wanted = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
    assert q.dtype == v.dtype == torch.bfloat16
    assert (q.double() - wanted).abs().max() <= wanted.abs().max() * 2**-8  # one rounding to bfloat16


def test_recomputation_changes_nothing(model: Any) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        features = model.image_features(patches(pictures([(4, 4)])), [(4, 4)])
        mask = torch.zeros(1, 12, dtype=torch.bool)
        mask[0, 3:7] = True
        model(ids_of(12), features=features, image_mask=mask).logits.logsumexp(-1).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys() and len(plain) == len(list(model.parameters()))
    assert all(torch.equal(plain[n], again[n]) for n in plain)


# -- saving -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_under_the_published_names(folder: Path, model: Any, tmp_path: Path) -> None:
    write_model(tmp_path, model, folder, SavedTypes.all(torch.float32))
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    again, info = MiniCPMV.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again.eval()(ids_of(20)).logits, model(ids_of(20)).logits)
    config, own = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    config.pop("use_cache")
    assert {k: own[k] for k in config if k != "torch_dtype"} == {k: v for k, v in config.items() if k != "torch_dtype"}
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_the_vendors_code_goes_along_unread(folder: Path, model: Any, tmp_path: Path) -> None:
    """The config names it for loaders without a class of their own."""
    base = shutil.copytree(folder, tmp_path / "base")
    code = "raise RuntimeError('run')\n"
    names = ["configuration_minicpm.py", "modeling_minicpmv.py", "resampler.py"]
    for name in names:
        (base / name).write_text(code)
    write_model(tmp_path / "out", model, base, SavedTypes.all(torch.float32))
    assert sorted(f.name for f in (tmp_path / "out").glob("*.py")) == names
    named = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert all((tmp_path / "out" / f"{value.split('.')[0]}.py").read_text() == code for value in named.values())


def test_merged_adapters_equal_adapters(folder: Path) -> None:
    """On every part, the resampler too."""
    from lensmith.family.registry import load_family

    model: Any = load_model(folder, torch.float32, torch.device("cpu"), LOADING)
    tuned = apply(model, Lora(kind="lora", rank=4, parts=("vision", "projector", "language")), load_family(folder))
    hit = {n.split(".lora_")[0] for n, _ in tuned.trainable()}
    assert {n for n in hit if n.startswith("resampler.")} == {"resampler.kv_proj", "resampler.attn.out_proj"}
    assert sum(n.startswith("vpm.") for n in hit) == 2 * 4 and sum(n.startswith("llm.") for n in hit) == 2 * 7
    torch.manual_seed(4)
    for name, p in tuned.trainable():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    slices, mask = patches(pictures([(4, 4)])), torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 3:7] = True

    def logits(m: Any) -> torch.Tensor:
        with torch.no_grad():
            return m(ids_of(12), features=m.image_features(slices, [(4, 4)]), image_mask=mask).logits

    plain: Any = load_model(folder, torch.float32, torch.device("cpu"), LOADING)
    with_adapters = logits(model)
    merged = logits(tuned.peft.merge_and_unload())
    assert (with_adapters - logits(plain)).abs().max() > 1e-2
    assert (with_adapters - merged).abs().max() < GAP
