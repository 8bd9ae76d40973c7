"""Adapters and checkpoints of other tools go on here, and export: folders by stock PEFT in those tools' layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from method_kit import EXACT, QUIET, RATE, as_published, gap, live, located, merged_state, stock, stock_state, trained

from lensmith.model.lora import peft_is_quiet
from lensmith.recipe.export import export


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    tiny.make_model(folder / "untied", "qwen2_5_vl", tie=False)
    return folder


@pytest.fixture(scope="module")
def data(here: Path) -> Path:
    return tiny.make_chat(here / "data", 12, pictures=3)


def of_peft(folder: Path, base: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What LLaMA-Factory and ms-swift save: a stock PEFT folder, with values; the weights that it amounts to."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, **{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    )
    torch.manual_seed(3)
    with peft_is_quiet():
        peft = get_peft_model(stock(base), config)
    with torch.no_grad():
        for p in peft.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    peft.save_pretrained(folder)
    with peft_is_quiet():
        return {n: t.detach().clone() for n, t in peft.merge_and_unload().state_dict().items()}  # type: ignore[operator]


LAYOUTS: dict[str, dict[str, Any]] = {
    "llamafactory": {"target_modules": r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*"},
    "ms-swift": {"target_modules": r"^(model.language_model(?=\.).*\.(k_proj|q_proj|v_proj|o_proj))$"},
    "list of names": {},
    "dora": {"use_dora": True},
    "additional_target": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": r".*language.*up_proj"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_of_others_go_on_and_export(tmp_path: Path, here: Path, data: Path, layout: str) -> None:
    base, folder = here / "untied", tmp_path / "theirs"
    wanted = of_peft(folder, base, **LAYOUTS[layout])
    options = {"kind": "lora", "adapter": str(folder)}
    start = merged_state(live(located(tmp_path, base, data, tune=options)))
    assert gap(start, wanted) < EXACT
    out = export(folder, tmp_path / "out", base=str(base), merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    assert gap(stock_state(out), wanted) < EXACT
    as_published(tmp_path / "run", base, data, tune=options, optimizer=RATE)


def test_names_of_older_transformers(tmp_path: Path, here: Path, data: Path) -> None:
    """Before 4.52 Qwen2.5-VL's layers were `model.layers` and `visual.blocks`; LLaMA-Factory saved many such."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "old"
    wanted = of_peft(folder, here / "untied", target_modules=["q_proj", "qkv"], modules_to_save=["merger"])
    tensors = load_file(folder / "adapter_model.safetensors")
    old = {n.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual."): t
           for n, t in tensors.items()}  # fmt: skip
    assert old.keys() != tensors.keys()
    save_file(old, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    built = live(located(tmp_path, here / "untied", data, tune={"kind": "lora", "adapter": str(folder)}))
    assert gap(merged_state(built), wanted) < EXACT


def test_full_checkpoints_of_others(tmp_path: Path, here: Path, data: Path) -> None:
    """A folder by stock save_pretrained goes on, and exports again, in the type it has."""
    theirs = stock(here / "untied")
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(1.01)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    for file in (here / "untied").iterdir():
        if not (tmp_path / "theirs" / file.name).exists():
            (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    run, checkpoint = trained(tmp_path / "run", tmp_path / "theirs", data, tune="full")
    assert gap(stock_state(checkpoint / "model"), stock_state(tmp_path / "theirs")) > 1e-3
    start = dict(live(run).root.model.state_dict())
    assert gap(start, stock_state(tmp_path / "theirs")) == 0
    out = export(tmp_path / "theirs", tmp_path / "out", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    assert gap(stock_state(out), stock_state(tmp_path / "theirs")) == 0


def test_tables_that_another_tool_made_longer(tmp_path: Path, here: Path, data: Path) -> None:
    """resize_vocab of LLaMA-Factory with additional_target: embed_tokens and lm_head with more rows."""
    from safetensors.torch import load_file, save_file

    folder, base = tmp_path / "theirs", here / "untied"
    of_peft(folder, base, **LAYOUTS["additional_target"])
    tensors = load_file(folder / "adapter_model.safetensors")
    tables = [n for n in tensors if n.endswith(("embed_tokens.weight", "lm_head.weight"))]
    longer = {n: torch.cat([tensors[n], torch.randn(5, tensors[n].shape[1])]) for n in tables}
    save_file(tensors | longer, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    built = live(located(tmp_path, base, data, tune={"kind": "lora", "adapter": str(folder)}))
    found = merged_state(built)
    assert len(tables) == 2 and all(torch.equal(found[n.removeprefix("base_model.model.")], longer[n]) for n in tables)
    out = export(folder, tmp_path / "out", base=str(base), merge=True, dtype=None, shard_gb=5.0, terminal=QUIET)
    assert gap(stock_state(out), found) < EXACT
