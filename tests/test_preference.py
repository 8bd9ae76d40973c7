"""Preference training end to end: equal to a plain loop without any sharing, however the rows are packed, wherever the
reference comes from, on any number of ranks, and when it is resumed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import preference_kit
import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

from lensmith.config.yaml_file import Tree
from lensmith.core.encoded import IGNORED
from lensmith.core.errors import ConfigError, DataError, ModelError
from lensmith.core.sample import Sample
from lensmith.data.pipeline import Pipeline
from lensmith.model.root import Root
from lensmith.model.tune import peft_is_quiet
from lensmith.recipe.export import export
from lensmith.recipe.known import Known
from lensmith.recipe.memory import predict
from lensmith.recipe.prepare import prepare
from lensmith.recipe.replay import replay
from lensmith.recipe.run import from_tree
from lensmith.report.terminal import Terminal

LORA: dict[str, Any] = {"kind": "lora", "rank": 4}
TUNES: dict[str, dict[str, Any]] = {"full": {"kind": "full"}, "lora": LORA}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo"},
    "dpo, mixed": {"kind": "dpo", "sft_weight": 0.5, "label_smoothing": 0.1},
    "ipo": {"kind": "dpo", "loss": "ipo"},
    "normalised": {"kind": "dpo", "length_normalised": True, "beta": 2.0},
    "orpo": {"kind": "orpo"},
    "simpo": {"kind": "simpo", "sft_weight": 0.2, "sft_average": "sequences"},
    "kto": {"kind": "kto", "desirable_weight": 0.7, "beta": 0.5},
    "reward": {"kind": "reward", "center": 0.01},
}
STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("preferences")
    return {
        "pairs": preference_kit.make_pairs(folder, 20), "labels": preference_kit.make_labelled(folder, 20),
        "pairs held": preference_kit.make_pairs(folder, 7, seed=3, name="held.jsonl"),
        "labels held": preference_kit.make_labelled(folder, 7, seed=3, name="labels-held.jsonl"),
    }  # fmt: skip


def of(data: dict[str, Path], objective: dict[str, Any], which: str = "") -> Path:
    return data[("labels" if objective["kind"] == "kto" else "pairs") + which]


def run_of(folder: Path, base: Path, rows: dict[str, Path], objective: dict[str, Any], /, **over: Any) -> Any:
    values = {
        "objective": objective, "batch": {"samples": 6, "device_tokens": 1024}, "train": {"max_steps": STEPS},
        "data": {"cache": str(folder.parent / "cache")},
    }  # fmt: skip
    return runs.located(folder, base, of(rows, objective), **runs.merge(values, over))


def trained(folder: Path) -> dict[str, torch.Tensor]:
    (last,) = sorted((folder / "checkpoints").glob("step-*"))[-1:]
    found = load_file(last / "state" / "training.safetensors")
    return {k.removeprefix("param/"): v for k, v in found.items() if k.startswith("param/")}


def records(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def moved_apart(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """|ours - theirs| over how far theirs moved, all tensors together."""
    gap = math.sqrt(sum(float((ours[n] - theirs[n]).square().sum()) for n in theirs))
    return gap / math.sqrt(sum(float((theirs[n] - start[n]).square().sum()) for n in theirs))


# -- a plain loop -----------------------------------------------------------------------------------------------------


class Plain:
    """Stock transformers (and PEFT), one answer at a time behind its own copy of prompt and pictures, a second stock
    model as the reference, torch's AdamW."""

    def __init__(self, run: Any, folder: Path, tune: str):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForImageTextToText
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.prepared = prepare(run, Terminal("quiet"))
        load: Callable[[], Any] = lambda: AutoModelForImageTextToText.from_pretrained(  # noqa: E731
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.reference = load().eval()
        torch.manual_seed(0)
        self.model = load()
        if tune == "lora":
            target = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
            config = LoraConfig(r=4, lora_alpha=8, target_modules=target, task_type="CAUSAL_LM")
            with peft_is_quiet():
                self.model = get_peft_model(self.model, config)
        self.model.train()
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.loader = self.prepared.train.spec.build()
        self.passes = 0

    def sample(self, number: int) -> Sample:
        at = self.prepared.train.ref(number)
        return self.loader.sample(at.file, at.row)

    def logp(self, model: Any, sample: Sample, branch: int) -> tuple[torch.Tensor, int]:
        """(sum of log-probabilities of an answer, its length)."""
        from PIL import Image

        assert isinstance(sample.content, tuple)
        alone = replace(sample, content=(sample.content[branch],), preference=None)
        encoded = self.loader.encode(0, alone)
        ids = torch.from_numpy(encoded.ids_L).long()[None]
        inputs: dict[str, Any] = {"input_ids": ids, "mm_token_type_ids": torch.from_numpy(encoded.kind_L).int()[None]}
        if encoded.images:
            paths = [self.loader.path(0, b.image.path, sample.origin) for b in encoded.images]  # type: ignore[union-attr]
            inputs |= dict(self.processor([Image.open(p).convert("RGB") for p in paths], return_tensors="pt"))
        target = torch.from_numpy(np.where(encoded.trained_L, encoded.ids_L, IGNORED))[1:].long()
        logits = model(**inputs).logits[0, :-1].float()
        self.passes += 1
        nll = torch.nn.functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum")
        return -nll, int((target != IGNORED).sum())

    def both(self, sample: Sample, branch: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        mine, length = self.logp(self.model, sample, branch)
        with torch.no_grad():
            its, _ = self.logp(self.reference, sample, branch)
        return mine, its, length

    def train(self, loss_of: Callable[[Plain, list[Sample]], torch.Tensor]) -> tuple[list[float], dict[str, Any]]:
        named = [(n.removeprefix("base_model.model."), p) for n, p in self.model.named_parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([p for _, p in named], lr=1e-3, weight_decay=0.0)
        losses: list[float] = []
        for step in self.prepared.plan.steps():
            loss = loss_of(self, [self.sample(n) for n in step.members.tolist()])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if len(losses) == STEPS:
                return losses, {n.replace(".default.", "."): p.detach() for n, p in named}
        raise AssertionError("the plan ended early")


def plain_dpo(plain: Plain, batch: list[Sample]) -> torch.Tensor:
    losses = []
    for sample in batch:
        (c, rc, _), (r, rr, _) = plain.both(sample, 0), plain.both(sample, 1)
        losses.append(-torch.nn.functional.logsigmoid(0.1 * ((c - rc) - (r - rr))))
    return torch.stack(losses).mean()


def plain_mixed(plain: Plain, batch: list[Sample]) -> torch.Tensor:
    losses, nll, tokens = [], [], 0
    for sample in batch:
        (c, rc, n), (r, rr, _) = plain.both(sample, 0), plain.both(sample, 1)
        delta = 0.1 * ((c - rc) - (r - rr))
        losses.append(-0.9 * torch.sigmoid(delta).log() - 0.1 * torch.sigmoid(-delta).log())
        nll.append(-c)
        tokens += n
    return torch.stack(losses).mean() + 0.5 * torch.stack(nll).sum() / tokens


def plain_orpo(plain: Plain, batch: list[Sample]) -> torch.Tensor:
    losses, nll, tokens = [], [], 0
    for sample in batch:
        (c, n), (r, m) = plain.logp(plain.model, sample, 0), plain.logp(plain.model, sample, 1)
        p, q = (c / n).double().exp(), (r / m).double().exp()
        losses.append(-0.1 * torch.log(torch.sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q)))))
        nll.append(-c)
        tokens += n
    return torch.stack(losses).mean().float() + torch.stack(nll).sum() / tokens


def plain_kto(plain: Plain, batch: list[Sample]) -> torch.Tensor:
    """The KL from each prompt with the answer of the sample before it in the step."""
    ratios = []
    for n, sample in enumerate(batch):
        (mine,), (its,) = sample.content, batch[n - 1].content  # type: ignore[misc]
        answer = tuple(m for m in its.messages if m.trained)  # type: ignore[union-attr]
        other = replace(mine, messages=(*(m for m in mine.messages if not m.trained), *answer))  # type: ignore[type-var,union-attr]
        with torch.no_grad():
            p, q, _ = plain.both(replace(sample, content=(other,)), 0)
        ratios.append(p - q)
    kl = torch.stack(ratios).mean().clamp(min=0)
    losses = []
    for sample in batch:
        p, q, _ = plain.both(sample, 0)
        good = sample.preference is not None and sample.preference.label
        away = (p - q - kl) if good else (kl - (p - q))
        losses.append((0.7 if good else 1.0) * (1 - torch.sigmoid(0.5 * away)))
    return torch.stack(losses).mean()


PLAIN = {"dpo": plain_dpo, "dpo, mixed": plain_mixed, "orpo": plain_orpo, "kto": plain_kto}


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("name", PLAIN)
def test_equal_to_a_plain_loop(tmp_path: Path, qwen25: Path, data: dict[str, Path], name: str, tune: str) -> None:
    """Losses within 1e-5, and the way that the weights moved within 1e-4."""
    run = run_of(tmp_path / "run", qwen25, data, OBJECTIVES[name], tune=TUNES[tune])
    ours = runs.quiet_train(run).summary["losses"]
    plain = Plain(run, qwen25, tune)
    start = {n.removeprefix("base_model.model.").replace(".default.", "."): p.detach().clone()
             for n, p in plain.model.named_parameters() if p.requires_grad}  # fmt: skip
    losses, weights = plain.train(PLAIN[name])
    assert ours == pytest.approx(losses, abs=1e-5)
    found = {n.replace(".default.", "."): v for n, v in trained(tmp_path / "run").items()}
    assert found.keys() == weights.keys()
    assert moved_apart(found, weights, start) <= 1e-4


# -- what must not matter ---------------------------------------------------------------------------------------------

LAYOUTS = {
    "packed": {"device_tokens": 4096},
    "small rows": {"device_tokens": 1024},
    "one by one": {"packing": False, "device_tokens": 1024},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_layouts_have_one_trajectory(tmp_path: Path, qwen25: Path, data: dict[str, Path], name: str) -> None:
    found = {}
    for layout, batch in LAYOUTS.items():
        run = run_of(tmp_path / layout, qwen25, data, OBJECTIVES[name], batch=batch, tune=TUNES["full"])
        found[layout] = runs.quiet_train(run).summary["losses"], trained(tmp_path / layout)
    losses, weights = found["one by one"]
    start = load_file(qwen25 / "model.safetensors")
    for layout in ("packed", "small rows"):
        assert found[layout][0] == pytest.approx(losses, abs=1e-5), layout
        gap = math.sqrt(sum(float((found[layout][1][n] - w).square().sum()) for n, w in weights.items()))
        assert gap <= 1e-4 * 1e-3 * math.sqrt(STEPS * sum(w.numel() for w in start.values())), (layout, gap)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_may_come_from_anywhere(tmp_path: Path, qwen25: Path, data: dict[str, Path], name: str) -> None:
    """Cached, under a disabled adapter, a frozen copy, and the same model named as another one."""
    kinds = ({"kind": "cached"}, {"kind": "adapter"}, {"kind": "frozen"}, {"kind": "cached", "model": str(qwen25)})
    found = []
    for n, reference in enumerate(kinds):
        over = {
            "tune": {**LORA, "parts": ["language", "vision", "projector"]},
            "data": {"eval": str(of(data, OBJECTIVES[name], " held"))},
        }
        run = run_of(tmp_path / str(n), qwen25, data, OBJECTIVES[name] | {"reference": reference}, **over)
        out = runs.quiet_train(run)
        found.append((out.summary["losses"], out.summary["heldout"]["after"], trained(tmp_path / str(n))))
    losses, held, weights = found[0]
    assert len(set(losses)) > 1
    for other_losses, other_held, other in found[1:]:
        assert other_losses == pytest.approx(losses, abs=1e-6)
        assert other_held == pytest.approx(held, abs=1e-5)
        assert max(float((other[n] - w).abs().max()) for n, w in weights.items()) <= 1e-5


def test_another_model_as_the_reference(tmp_path: Path, qwen25: Path, data: dict[str, Path]) -> None:
    """It is what the answers are measured against: kept apart in the cache, and another loss from the first step on."""
    other = tiny.make_model(tmp_path / "other", seed=7)
    objective = {"kind": "dpo", "reference": {"model": str(other)}}
    run = run_of(tmp_path / "run", qwen25, data, objective, tune=LORA)
    found = runs.quiet_train(run).summary["losses"]
    plain = Plain(run, other, "lora")
    plain.model = Plain(run, qwen25, "lora").model
    assert found == pytest.approx(plain.train(plain_dpo)[0], abs=1e-5)
    itself = runs.quiet_train(run_of(tmp_path / "itself", qwen25, data, {"kind": "dpo"})).summary["losses"]
    assert itself[0] == pytest.approx(math.log(2), abs=1e-6) and abs(found[0] - itself[0]) > 1e-2
    assert len(list((tmp_path / "cache").glob("reference-*.parquet"))) == 2
    with pytest.raises(ModelError, match="REFERENCE"):
        qwen2 = tiny.make_model(tmp_path / "qwen2", "qwen2_vl")
        objective = {"kind": "dpo", "reference": {"model": str(qwen2)}}
        runs.quiet_train(run_of(tmp_path / "no", qwen25, data, objective))


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_is_computed_once(
    tmp_path: Path, qwen25: Path, data: dict[str, Path], name: str, monkeypatch: Any
) -> None:
    """A second run, and a resumed one, take it from the cache; new rows alone are computed."""
    asked: list[int] = []
    forward = Root.forward

    def counting(self: Any, row: Any, *, figures_only: bool = False) -> Any:
        asked.extend(row.members if figures_only and not row.compared.other_B.max() >= 0 else ())
        return forward(self, row, figures_only=figures_only)

    monkeypatch.setattr(Root, "forward", counting)
    over: dict[str, Any] = {"train": {"epochs": 1.0, "max_steps": None}}
    first = runs.quiet_train(run_of(tmp_path / "a", qwen25, data, OBJECTIVES[name], **over)).summary["losses"]
    assert sorted(asked) == list(range(20))
    asked.clear()
    if name == "dpo":
        (file,) = (tmp_path / "cache").glob("reference-*.parquet")
        file.write_bytes(file.read_bytes()[:-20])
        runs.quiet_train(run_of(tmp_path / "cut short", qwen25, data, OBJECTIVES[name], **over))
        assert sorted(asked) == list(range(20))
        asked.clear()
    assert runs.quiet_train(run_of(tmp_path / "b", qwen25, data, OBJECTIVES[name], **over)).summary["losses"] == first
    assert not asked
    longer = tmp_path / "longer.jsonl"
    rows = of(data, OBJECTIVES[name]).read_text()
    shutil.copytree(data["pairs"].parent / "images", tmp_path / "images")
    longer.write_text(rows + rows.splitlines()[0].replace("what", "how").replace("the", "a") + "\n")
    if name == "dpo":
        run = run_of(tmp_path / "c", qwen25, {"pairs": longer, "labels": longer}, OBJECTIVES[name], **over)
        runs.quiet_train(run)
        assert 1 <= len(set(asked)) <= 21  # pictures in another folder: another sample


@pytest.mark.parametrize("name", ["dpo", "kto", "reward"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, qwen25: Path, data: dict[str, Path], name: str) -> None:
    over: dict[str, Any] = {
        "tune": {**LORA, "dropout": 0.1}, "train": {"max_steps": 6}, "save": {"every_steps": 1, "keep_last": 9},
        "data": {"cache": str(tmp_path / "cache")},
    }  # fmt: skip
    whole = runs.quiet_train(run_of(tmp_path / "whole", qwen25, data, OBJECTIVES[name], **over))
    final = Path(whole.summary["checkpoint"]) / "state" / "training.safetensors"
    for step, cached in ((1, True), (4, True), (4, False)):
        folder = tmp_path / f"from-{step}-{cached}"
        later = shutil.ignore_patterns(*(f"step-{n:08}" for n in range(step + 1, 9)))
        shutil.copytree(whole.folder, folder, ignore=later)
        if not cached:  # what the steps before had is not asked for again
            over = runs.merge(over, {"data": {"cache": str(tmp_path / "another cache")}})
        resumed = runs.quiet_train(run_of(folder, qwen25, data, OBJECTIVES[name], **over))
        if cached:
            assert resumed.summary["losses"] == whole.summary["losses"]
            assert (
                Path(resumed.summary["checkpoint"]) / "state/training.safetensors"
            ).read_bytes() == final.read_bytes()
        else:
            assert resumed.summary["losses"] == pytest.approx(whole.summary["losses"], abs=1e-5)


def curriculum(folder: Path, base: Path, data: dict[str, Path], rate: float = 1e-3) -> Any:
    """ORPO, then DPO with the same adapter."""
    stages = [
        {"name": "first", "objective": {"kind": "orpo"}, "optimizer": {"lr": rate}},
        {"name": "second", "objective": {"kind": "dpo"}},
    ]
    values: dict[str, Any] = {
        "model": {"path": str(base)}, "tune": LORA, "precision": {"preset": "fp32"}, "optimizer": {"lr": 1e-3},
        "data": {"train": str(data["pairs"]), "max_tokens": 512, "workers": 0, "cache": str(folder.parent / "cache")},
        "batch": {"samples": 6, "device_tokens": 1024}, "save": {"every_steps": 1, "keep_last": 20},
        "train": {"epochs": None, "max_steps": 3, "device": "cpu", "threads": 1}, "stages": stages,
        "output": str(folder),
    }  # fmt: skip
    return from_tree(Tree(values), None)


def test_the_reference_of_a_stage_is_what_it_began_with(tmp_path: Path, qwen25: Path, data: dict[str, Path]) -> None:
    """Also when it is resumed, with the cache and without, and where another first stage was run in the same folder."""
    whole = runs.quiet_train(curriculum(tmp_path / "whole", qwen25, data)).summary["losses"]
    assert whole[3] == pytest.approx(math.log(2), abs=1e-6) and whole[4] < whole[3]
    for cached in (True, False):
        folder = tmp_path / f"again-{cached}"
        later = shutil.ignore_patterns("step-00000005", "step-00000006")
        shutil.copytree(tmp_path / "whole", folder, ignore=later)
        if not cached:
            shutil.rmtree(tmp_path / "cache")
        again = runs.quiet_train(curriculum(folder, qwen25, data)).summary["losses"]
        assert again == (whole if cached else pytest.approx(whole, abs=1e-6))
    shutil.rmtree(tmp_path / "whole")
    other = runs.quiet_train(curriculum(tmp_path / "whole", qwen25, data, rate=5e-3)).summary["losses"]
    assert other[3] == pytest.approx(math.log(2), abs=1e-6) and other[:3] != whole[:3]


def test_an_adapter_that_goes_on_is_part_of_the_reference(tmp_path: Path, qwen25: Path, data: dict[str, Path]) -> None:
    """Known by its weights, not by its path; a named model is asked as it is."""
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
        first = run_of(tmp_path / "first", qwen25, data, {"kind": "orpo"}, tune=LORA, train={"seed": seed})
        runs.quiet_train(first)
        shutil.copytree(tmp_path / "first/checkpoints/step-00000004/model", tmp_path / "adapter", dirs_exist_ok=True)
        tune = {"kind": "lora", "adapter": str(tmp_path / "adapter")}
        out = runs.quiet_train(run_of(tmp_path / f"dpo-{seed}", qwen25, data, {"kind": "dpo"}, tune=tune))
        assert out.summary["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    named = {"kind": "dpo", "reference": {"model": str(qwen25)}}
    out = runs.quiet_train(run_of(tmp_path / "named", qwen25, data, named, tune=tune))
    assert abs(out.summary["losses"][0] - math.log(2)) > 1e-2


def test_kto_with_a_cache_that_holds_few_pictures(tmp_path: Path, qwen25: Path, data: dict[str, Path]) -> None:
    """The rows of mismatched answers get their pictures one after the other."""
    over: dict[str, Any] = {"tune": {"kind": "freeze", "train": ["language"]}, "batch": {"device_tokens": 512}}
    small = runs.merge(over, {"vision_cache": {"memory_mb": 0}})
    found = [
        runs.quiet_train(run_of(tmp_path / name, qwen25, data, OBJECTIVES["kto"], **values)).summary["losses"]
        for name, values in (("all", over), ("few", small))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_mismatched_answers_fit_the_rows_too(tmp_path: Path, qwen25: Path) -> None:
    """Short and long answers by turns: a row of short ones has the long ones behind its prompts."""
    rows = [
        {"prompt": [{"role": "user", "content": "Say more."}],
         "completion": [{"role": "assistant", "content": "green circle " * (1 + 105 * (n % 2)) + str(n)}],
         "label": n % 3 > 0}
        for n in range(16)
    ]  # fmt: skip
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    over = {"batch": {"samples": 16, "device_tokens": 300}, "data": {"max_tokens": 300}}
    prepared = prepare(run_of(tmp_path / "run", qwen25, {"labels": file}, OBJECTIVES["kto"], **over), Terminal("quiet"))
    steps = Pipeline(prepared.train, prepared.plan, prepared.limits).steps()
    found = [row.compared for row in next(steps).rows if row.compared is not None]
    most = max(of.mismatched.num_tokens for of in found if of.mismatched is not None)
    assert len(found) < 16 and 240 < most <= 300


def test_each_picture_is_encoded_once_and_the_prompt_too(tmp_path: Path, qwen25: Path, data: dict[str, Path]) -> None:
    """A pair has the tokens of its prompt once, and one run of the tower a picture."""
    prepared = prepare(run_of(tmp_path / "run", qwen25, data, {"kind": "dpo"}), Terminal("quiet"))
    loader, saved = prepared.train.spec.build(), 0
    for number in range(len(prepared.train.trainable)):
        at = prepared.train.ref(number)
        sample = loader.sample(at.file, at.row)
        assert isinstance(sample.content, tuple)
        joined = loader.encode(at.file, sample)
        alone = [loader.encode(at.file, replace(sample, content=(c,), preference=None)) for c in sample.content]
        answers = [int(np.flatnonzero(a.trained_L)[0]) for a in alone]
        assert joined.num_patches == alone[0].num_patches == alone[1].num_patches
        assert joined.num_tokens <= sum(a.num_tokens for a in alone) - min(answers) + 1
        assert int(prepared.train.column("chosen")[number]) == alone[0].num_supervised
        saved += sum(a.num_tokens for a in alone) - joined.num_tokens
    assert saved > 500


# -- logs, held-out figures, errors -----------------------------------------------------------------------------------


def test_what_is_logged(tmp_path: Path, qwen25: Path, data: dict[str, Path]) -> None:
    """Rewards, margin, accuracy, distance to the reference and lengths, of all and of each source; held out too."""
    two = [{"path": str(data["pairs"]), "name": "one"}, {"path": str(data["pairs held"]), "name": "two", "weight": 2.0}]
    over = {"data": {"train": two, "eval": str(data["pairs held"])}, "evaluate": {"every_steps": 2, "before": True}}
    runs.quiet_train(run_of(tmp_path / "run", qwen25, data, {"kind": "dpo"}, **over))
    for step in records(tmp_path / "run"):
        all_, each = step["objective"], step["sources"]
        assert set(all_) == {
            "reward_chosen",
            "reward_rejected",
            "margin",
            "accuracy",
            "kl",
            "nll_chosen",
            "length_chosen",
            "length_rejected",
        }
        assert all_["margin"] == pytest.approx(all_["reward_chosen"] - all_["reward_rejected"], abs=1e-9)
        n = sum(s["samples"] for s in each.values())
        for name in ("margin", "accuracy", "length_chosen"):
            assert all_[name] == pytest.approx(sum(s[name] * s["samples"] for s in each.values()) / n, abs=1e-9)
        weight = {"one": 1.0, "two": 2.0}
        total = sum(weight[k] * s["samples"] for k, s in each.items())
        assert step["loss"] == pytest.approx(
            sum(weight[k] * s["samples"] * s["loss"] for k, s in each.items()) / total, abs=1e-6
        )
    first, *_, last = records(tmp_path / "run", "eval")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and last["loss"] < first["loss"]
    assert last["metrics"]["margin"] > 0 and last["metrics"]["accuracy"] > 0.5


def test_an_early_stop_by_preference_accuracy(tmp_path: Path, qwen25: Path, data: dict[str, Path]) -> None:
    over = {"data": {"eval": str(data["pairs held"])}, "evaluate": {"every_steps": 1},
            "save": {"keep_best": "accuracy"},
            "train": {"early_stop": {"metric": "accuracy", "patience": 2}, "max_steps": 30}}  # fmt: skip
    out = runs.quiet_train(run_of(tmp_path / "run", qwen25, data, {"kind": "dpo"}, **over))
    assert len(out.summary["losses"]) < 30


def test_a_reference_that_gives_nothing_is_named(
    tmp_path: Path, qwen25: Path, data: dict[str, Path], monkeypatch: Any
) -> None:
    """The reference gives an answer of one pair a probability of zero: the step is vetoed, the pair is named, and left
    out from then on."""
    tell = Known.tell

    def spoilt(self: Known, row: Any) -> None:
        tell(self, row)
        row.compared.reference_B = np.where(row.compared.sample_B == 3, -np.inf, row.compared.reference_B)

    monkeypatch.setattr(Known, "tell", spoilt)
    run = run_of(tmp_path / "run", qwen25, data, {"kind": "dpo"}, train={"max_steps": 14}, guard={"max_share": 1.0})
    out = runs.quiet_train(run)
    folders = sorted((tmp_path / "run/incidents").glob("step-*"))
    found = [json.loads((folder / "incident.json").read_text()) for folder in folders]
    assert replay(folders[0], Terminal("quiet")) == 0, "the row is kept with what its objective asked"
    assert found and all([s["number"] for s in i["samples"]] == [3] for i in found)
    assert all(math.isfinite(loss) for loss in out.summary["losses"][-3:])
    assert [r["applied"] for r in records(tmp_path / "run")].count(False) == len(found) == 2
    assert all(torch.isfinite(v).all() for v in trained(tmp_path / "run").values())


@pytest.mark.parametrize("tune", TUNES)
def test_a_value_head_goes_along(tmp_path: Path, qwen25: Path, data: dict[str, Path], tune: str) -> None:
    """It is in the checkpoint, in what is exported, and a run that begins there begins with it."""
    runs.quiet_train(run_of(tmp_path / "run", qwen25, data, {"kind": "reward"}, tune=TUNES[tune]))
    head = {n: v for n, v in trained(tmp_path / "run").items() if n.startswith("v_head.")}
    quiet = Terminal("quiet")
    export(tmp_path / "run", tmp_path / "out", base=None, merge=True, dtype=None, shard_gb=5.0, terminal=quiet)
    found = load_file(tmp_path / "out" / "value_head.safetensors")
    assert {n: v.tolist() for n, v in found.items()} == {n: v.tolist() for n, v in head.items()}
    again = run_of(tmp_path / "again", tmp_path / "out", data, {"kind": "reward"}, optimizer={"lr": 0.0})
    runs.quiet_train(again)
    later = trained(tmp_path / "again")
    assert len(head) == 2 and all(torch.equal(later[n], v) for n, v in head.items())


def test_a_frozen_copy_is_in_the_prediction_of_memory(tmp_path: Path, qwen25: Path, data: dict[str, Path]) -> None:
    """The weights once more, in every phase but the loading of the model itself."""
    found = []
    for kind in ("cached", "frozen"):
        run = run_of(tmp_path / kind, qwen25, data, {"kind": "dpo", "reference": {"kind": kind}}, tune=LORA)
        prepared = prepare(run, Terminal("quiet"))
        prediction = predict(prepared, prepared.train, prepared.plan)
        assert prediction is not None
        found.append([phase.kinds["weights"] for phase in prediction.phases])
    size = sum(v.numel() * 4 for v in load_file(qwen25 / "model.safetensors").values())
    assert [b - a for a, b in zip(*found, strict=True)] == [0, size, size, size]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "adapter without one": ({"objective": {"kind": "dpo", "reference": {"kind": "adapter"}}, "tune": {"kind": "full"}},
                            ConfigError, "reference.kind is adapter"),
    "frozen on shards": ({"objective": {"kind": "dpo", "reference": {"kind": "frozen"}},
                          "parallel": {"engine": {"kind": "fsdp2"}}}, ConfigError, "needs parallel.engine local"),
    "one labelled sample": ({"objective": {"kind": "kto"}, "batch": {"samples": 1}}, ConfigError, "batch.samples is 1"),
    "rows too small": ({"objective": {"kind": "dpo"}, "batch": {"device_tokens": 600}}, ConfigError, "twice data.max_"),
    "no labels": ({"objective": {"kind": "kto"}}, DataError, "label"),
    "answers alone": ({"objective": {"kind": "next_token"}}, DataError, "preferences"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be(tmp_path: Path, qwen25: Path, data: dict[str, Path], case: str) -> None:
    over, kind, text = WRONG[case]
    with pytest.raises(kind, match=text):
        runs.quiet_train(
            runs.located(
                tmp_path / "run", qwen25, data["pairs"], **runs.merge({"batch": {"device_tokens": 1024}}, over)
            )
        )
