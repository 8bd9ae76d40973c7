"""One small question about one small picture, as the family shows it: for the check of types before the first step."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch

from lensmith.core.encoded import PackedRow
from lensmith.core.sample import Conversation, Image, Message, Sample, Text
from lensmith.data.collate import Member, load_row
from lensmith.data.load import SampleRef, SourceFile
from lensmith.data.media import ImageLimits
from lensmith.data.readers import RowRef
from lensmith.model import borders
from lensmith.model.precision import PrecisionPlan
from lensmith.recipe.prepare import Prepared

SIDE = 64


def probe_row(prepared: Prepared) -> PackedRow:
    """A row of one sample that names no file of the data."""
    spec = prepared.train.spec
    source = SourceFile(source="probe", path="probe", format=None, base=".")
    loader = replace(spec, files=(source,), max_tokens=1 << 30, limits=ImageLimits()).build()
    turns = Message("user", (_picture(), Text("What is this?"))), Message("assistant", (Text("A probe."),))
    sample = Sample("probe", (Conversation(turns),))
    encoded = loader.encode(0, sample)
    member = Member(0, SampleRef(0, RowRef(0, 1, -1, -1)), tokens=encoded.num_tokens)
    return load_row(loader, [member], {}, lambda _: ("probe", encoded))


def _picture() -> Image:
    ramp = np.indices((SIDE, SIDE)).sum(0).astype(np.uint8)
    data = io.BytesIO()
    PIL.Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], axis=-1)).save(data, "png")
    return Image(data=data.getvalue())


def check_borders(prepared: Prepared, root: Any, plan: PrecisionPlan) -> None:
    """Raises `ModelError` DTYPE. Random state, gradients and caches are afterwards what they were."""
    devices = [root.device.index or 0] if root.device.type == "cuda" else []
    located = prepared.located
    with torch.random.fork_rng(devices):
        borders.check(
            root, probe_row(prepared), plan, lambda part, role: located.where("precision", "parts", part, role)
        )
