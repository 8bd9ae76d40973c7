"""Two ranks and a step that is not finite: both leave it out, and the cause is named as on one rank (F53)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faults
import pytest
from faults import FAMILIES
from ranks_kit import on_ranks
from runs import quiet_train

ENGINES: dict[str, Any] = {
    "local": "local",
    "fsdp2": {"kind": "fsdp2"},
    "zero2": {"kind": "deepspeed", "zero": 2},
    "zero3": {"kind": "deepspeed", "zero": 3},
}
PLANTS = {"F50": {"at_build": faults.nan_pixel}, "F51": {"at_build": faults.bad_backward}}
FAMILY = "qwen2_5_vl"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every plant with every engine, in one pair of processes."""
    folder = tmp_path_factory.mktemp("guard")
    base, data = faults.make_base(folder / "base", FAMILY), faults.make_data(folder)

    def work(rank: int) -> None:
        for engine, how in ENGINES.items():
            for name, plant in PLANTS.items():
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("LENSMITH_CACHE", str(folder / "cache"))
                    faults.plant(patch, FAMILY, data, **plant)
                    run = faults.run_of(folder / f"{engine}-{name}", base, data, parallel={"engine": how})
                    quiet_train(run)

    on_ranks(2, folder / "pair", work)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.faults("F53", "NaN on one rank only")
def test_a_picture_on_one_rank(found: Path, engine: str) -> None:
    incidents = faults.incidents(found / f"{engine}-F50")
    assert [i["action"] for i in incidents] == ["skip", "skip"]
    for i in incidents:
        assert (i["cause"], i["module"], i["part"]) == ("bad_input", FAMILIES[FAMILY].patches, "vision")
        assert [s["number"] for s in i["samples"]] == [faults.WHITE] and not i["every_sample"]
    steps = faults.records(found / f"{engine}-F50")
    assert [r["step"] for r in steps] == list(range(1, 9)) and [r["applied"] for r in steps].count(False) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_derivative_on_both_ranks(found: Path, engine: str) -> None:
    (incident,) = faults.incidents(found / f"{engine}-F51")
    assert (incident["cause"], incident["module"]) == ("backward_only", FAMILIES[FAMILY].mlp)
    assert incident["every_sample"] and incident["action"] == "skip"
