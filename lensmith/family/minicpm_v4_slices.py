"""MiniCPM-V 4.6 and 4.7: how a picture is cut into slices, their pixels, and the places of tokens on the canvas.

A picture above one slice's area is shown twice: whole, and as rows x columns of slices. Vendor sources: transformers'
`image_processing_pil_minicpmv4_6` and `modeling_minicpmv4_7` (`get_rope_index`).

The view of a block is () for the whole picture and (row, column, rows, columns) for a slice.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lensmith.core.encoded import IMAGE, ImageBlock
from lensmith.core.sample import Image

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True, slots=True)
class Slicing:
    """`resolution` is the side of a square of one slice's area; `unit` patches a side make one token."""

    patch: int = 14
    unit: int = 4
    resolution: int = 448
    max_slices: int = 9

    @property
    def multiple(self) -> int:
        """Pixels that sides are multiples of."""
        return self.patch * self.unit

    def grid(self, width: int, height: int) -> tuple[int, int] | None:
        """(rows, columns) of slices; None for a picture that is shown whole only."""
        most = min(math.ceil(width * height / self.resolution**2), self.max_slices)
        if most <= 1:
            return None
        ratio = math.log(width / height)
        best, error = (1, 1), math.inf
        for number in (most - 1, most, most + 1):
            if number == 1 or number > self.max_slices:
                continue
            for rows in (r for r in range(1, number + 1) if number % r == 0):
                off = abs(ratio - math.log(number // rows / rows))
                if off < error or (off == error and rows > best[0]):
                    best, error = (rows, number // rows), off
        return best

    def fitted(self, width: float, height: float, *, enlarge: bool) -> tuple[int, int]:
        """Width and height, in the ratio of these, of about one slice's area; smaller ones only if `enlarge`."""
        if width * height > self.resolution**2 or enlarge:
            ratio = width / height
            height = int(self.resolution / math.sqrt(ratio))
            width = int(height * ratio)
        return nearest(width, self.multiple), nearest(height, self.multiple)

    def blocks(self, image: Image, width: int, height: int) -> list[ImageBlock]:
        """The picture as a whole, then its slices row by row."""
        grid = self.grid(width, height)
        whole = self._block(image, self.fitted(width, height, enlarge=grid is None), ())
        if grid is None:
            return [whole]
        rows, columns = grid
        size = self.fitted(nearest(width, columns) / columns, nearest(height, rows) / rows, enlarge=True)
        places = [(row, column, rows, columns) for row in range(rows) for column in range(columns)]
        return [whole, *(self._block(image, size, place) for place in places)]

    def _block(self, image: Image, size: tuple[int, int], view: tuple[int, ...]) -> ImageBlock:
        wide, high = size[0] // self.patch, size[1] // self.patch
        return ImageBlock(image, *size, (1, high, wide), wide * high // self.unit**2, view=view)

    def patches(self, picture: PIL.Image.Image, block: ImageBlock) -> np.ndarray:
        """uint8 [P, 3 * patch * patch] of a block, row by row; channel, row, column within a patch."""
        row, column, rows, columns = block.view or (0, 0, 1, 1)
        whole = resized(picture, (block.width * columns, block.height * rows))
        top, left = row * block.height, column * block.width
        a = whole[top : top + block.height, left : left + block.width]
        a = a.reshape(block.grid_thw[1], self.patch, block.grid_thw[2], self.patch, 3)
        return np.ascontiguousarray(a.transpose(0, 2, 4, 1, 3)).reshape(block.num_patches, -1)


def nearest(length: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `length`, at least one."""
    return max(round(length / divisor) * divisor, divisor)


class _Resize:
    """Resizes a picture and remembers the last result: all slices of a picture are cut from one."""

    def __init__(self) -> None:
        self._of: weakref.ref[PIL.Image.Image] | None = None
        self._pixels = np.zeros((0, 0, 3), np.uint8)

    def __call__(self, picture: PIL.Image.Image, size: tuple[int, int]) -> np.ndarray:
        """uint8 [height, width, 3]."""
        from PIL import Image as pillow

        if self._of is None or self._of() is not picture or self._pixels.shape[1::-1] != size:
            self._pixels = np.asarray(picture.resize(size, pillow.Resampling.BICUBIC))
            self._of = weakref.ref(picture)
        return self._pixels


resized = _Resize()


# -- canvas -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Marks:
    """Ids of the tokens around blocks, as config.json of MiniCPM-V 4.7 names them."""

    image_start: int
    image_end: int
    slice_start: int
    slice_end: int
    newline: int

    @property
    def ids(self) -> tuple[int, ...]:
        return (self.image_start, self.image_end, self.slice_start, self.slice_end, self.newline)


Crop = tuple[int, int, ImageBlock]


def canvas_positions(
    ids_L: np.ndarray, kind_L: np.ndarray, blocks: Sequence[ImageBlock], marks: Marks, unit: int
) -> np.ndarray:
    """Positions int32 [3, L] of MiniCPM-V 4.7: time, row, column.

    A picture stands still in time; its slices lie side by side on a canvas of rows and columns, the whole picture is
    stretched over the same canvas, and the marks around them stand at corners. Text counts up in all three, and goes on
    behind the longer side of the canvas. A mark or single newline right behind a picture stands at its origin.
    """
    out = np.tile(np.arange(len(ids_L), dtype=np.int32), (3, 1))
    at = here = 0
    for frame in _frames(kind_L, blocks):
        first, end = frame[0][0] - 1, frame[-1][1]
        while end < len(ids_L) and ids_L[end] in marks.ids:
            end += 1
        if first > at:
            out[:, at:first] = np.arange(here, here + first - at)
            here += first - at
        out[:, first:end] = here
        out[1:, first] = max(here - 1, 0)
        here += max(_paint(out, here, frame, end, unit)) + 1
        at = end
    out[:, at:] = np.arange(here, here + len(ids_L) - at)
    return out


def _frames(kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> list[list[Crop]]:
    """Pictures in order, each as (begin, end, block) of its whole view and its slices."""
    frames: list[list[Crop]] = []
    at = 0
    for block in blocks:
        begin = at + int(np.argmax(kind_L[at:] == IMAGE))
        at = begin + block.num_tokens
        if block.view:
            frames[-1].append((begin, at, block))
        else:
            frames.append([(begin, at, block)])
    return frames


def _paint(out: np.ndarray, origin: int, frame: list[Crop], end: int, unit: int) -> tuple[int, int]:
    """Write the places of one picture's tokens and marks into `out`; height and width of its canvas."""
    (begin, stop, whole), slices = frame[0], frame[1:]
    high, wide = (n // unit for n in (slices[0][2] if slices else whole).grid_thw[1:])
    rows, columns = slices[0][2].view[2:] if slices else (1, 1)
    height, width = rows * high, columns * wide
    if stop < end:
        out[1:, stop] = origin + height, origin + width
    out[1:, begin:stop] = origin + _spread(whole, (height, width), unit)
    for begin, stop, block in slices:
        row, column = block.view[:2]
        top, left = origin + row * high, origin + column * wide
        out[1:, begin - 1] = top, left
        if stop < end:
            out[1:, stop] = top + high - 1, left + wide - 1
        out[1:, begin:stop] = _spread(block, (high, wide), unit) + np.array([[top], [left]])
        if column == columns - 1 and row < rows - 1:
            out[1:, stop + 1] = top + high - 1, origin + width
    return height, width


def _spread(block: ImageBlock, canvas: tuple[int, int], unit: int) -> np.ndarray:
    """Row and column [2, N] of a block's tokens when its grid is stretched over `canvas`."""
    rows, columns = (steps(n // unit, side) for n, side in zip(block.grid_thw[1:], canvas, strict=True))
    return np.stack(np.meshgrid(rows, columns, indexing="ij")).reshape(2, -1)


def steps(count: int, side: int) -> list[int]:
    """`count` places from 0 to side - 1, the nearest whole ones; halves go to the even place."""
    return [round(i * (side - 1) / max(count - 1, 1)) for i in range(count)]
