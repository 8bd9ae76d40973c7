"""The options of objectives, apart from their computation so that reading a run file does not load torch."""

from __future__ import annotations

from typing import Annotated, Literal

from lensmith.config.part import Part, choice


class NextToken(Part):
    """Cross entropy of the next token over supervised positions: continued pretraining and SFT."""

    kind: Literal["next_token"] = "next_token"


Objective = Annotated[NextToken, choice("next_token")]
