"""What families share that show a picture as squares of one size and count tokens with plain 1-D positions.

Shape letters: t tiles, P patches, D values of a patch, N tokens of images, H hidden, B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.family.base import PixelSettings

if TYPE_CHECKING:
    import PIL.Image
    import torch


def tile_patches(tiles: np.ndarray, patch: int) -> np.ndarray:
    """uint8 [t, height, width, 3] -> uint8 [P, 3 * patch * patch]: patches by row, in a patch channel, row, column."""
    t, height, width, _ = tiles.shape
    a = tiles.reshape(t, height // patch, patch, width // patch, patch, 3)
    return np.ascontiguousarray(a.transpose(0, 1, 3, 5, 2, 4)).reshape(-1, 3 * patch * patch)


def tile_values(pixels_PD: torch.Tensor, rows: int, columns: int, settings: PixelSettings) -> torch.Tensor:
    """Patches of tiles of `rows` x `columns` patches -> float32 [t, 3, height, width], rescaled and normalised."""
    import torch

    p = settings.patch
    x = pixels_PD.reshape(-1, rows, columns, 3, p, p).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(-1, 3, rows * p, columns * p).to(torch.float32) * (1 / 255)
    mean = torch.tensor(settings.mean, device=x.device).view(3, 1, 1)
    std = torch.tensor(settings.std, device=x.device).view(3, 1, 1)
    return (x - mean) / std


def straight_positions(num_tokens: int) -> np.ndarray:
    """int32 [3, num_tokens]: 1-D positions, in every row."""
    return np.tile(np.arange(num_tokens, dtype=np.int32), (3, 1))


def decode(
    language: Any,
    ids_BT: torch.Tensor,
    features_NH: torch.Tensor | None,
    image_mask_BT: torch.Tensor,
    position_ids_3BT: torch.Tensor,
    **kwargs: Any,
) -> Any:
    """The output of a transformers decoder with image features in their places."""
    import torch

    embeds = language.embed_tokens(ids_BT)
    if features_NH is not None:
        embeds = embeds.masked_scatter(image_mask_BT[..., None], features_NH.to(embeds.dtype))
    if "attention_plans" in kwargs:
        # transformers reads positions that begin anew as packing, and without a mask it would build one of [T, T]. A
        # mask of four dimensions is handed on as it is, and attention with a plan does not look at it.
        kwargs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=embeds.device)
    return language(inputs_embeds=embeds, position_ids=position_ids_3BT[0], **kwargs)


class Held:
    """What was made of the picture seen last: the blocks of a picture are asked for one after the other."""

    def __init__(self) -> None:
        self._picture: Any = None
        self._made: Any = None

    def __reduce__(self) -> tuple[type[Held], tuple[()]]:
        """A worker process begins with nothing."""
        return Held, ()

    def of(self, picture: PIL.Image.Image, make: Callable[[PIL.Image.Image], np.ndarray]) -> np.ndarray:
        if self._picture is not picture:
            self._picture, self._made = picture, make(picture)
        return self._made
