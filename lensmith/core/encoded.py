"""A sample as the model sees it, and a micro-batch of such samples. NumPy only: no model, no device.

Shape letters: L tokens of one sample, T tokens of one packed row, S supervised positions, P patches, I images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lensmith.core.sample import Image, Preference, Video

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

TEXT, IMAGE = 0, 1
IGNORED = -100
CHOSEN, REJECTED, GOOD, BAD = 0, 1, 2, 3
"""What a sequence is among those that an objective compares."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that attend causally to each other, and to all of `prefix_length` tokens from `prefix_start`.

    Offsets count from the start of the sample (or of the row, once packed).
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0

    def moved(self, by: int) -> Segment:
        return Segment(
            self.start + by, self.length, self.prefix_start + by if self.prefix_length else 0, self.prefix_length
        )


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What the container of a video says, without a picture decoded: size in pixels, pictures, pictures a second."""

    width: int
    height: int
    num_frames: int
    fps: float


@dataclass(frozen=True, slots=True)
class ImageBlock:
    """One placed image, a part of one, or one placed run of video frames: the size it is resized to, its patch grid and
    how many tokens stand for it."""

    image: Image | Video
    width: int
    height: int
    grid_thw: tuple[int, int, int]
    num_tokens: int
    frames: tuple[int, ...] = ()
    """Of a video, the frames that are shown (temporal patch size times grid rows in time); of an image none."""
    seconds_per_grid: float = 0.0
    """Of a video, the seconds from one row of the grid to the next."""
    view: tuple[int, ...] = ()
    """Which part of the picture this is, in the family's own terms, or what else of it the model must know; () for the
    whole picture of a family that shows it once."""

    @property
    def num_patches(self) -> int:
        t, h, w = self.grid_thw
        return t * h * w


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as tokens.

    ids_L: token ids. trained_L: the token is a prediction target. kind_L: TEXT or IMAGE. position_ids_3L: rotary
    positions (time, height, width). target_L: the id that the *next* token has where that one is trained, else
    IGNORED - the only place where labels are shifted. images: in token order; repeats are listed again.
    """

    ids_L: IntArray
    trained_L: BoolArray
    kind_L: npt.NDArray[np.int8]
    position_ids_3L: IntArray
    segments: tuple[Segment, ...]
    images: tuple[ImageBlock, ...]
    num_answers: int = 1
    preference: Preference | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.ids_L)

    @property
    def num_patches(self) -> int:
        return sum(block.num_patches for block in self.images)

    @property
    def branches(self) -> tuple[Segment, ...]:
        """The segment of each branch; what is before them is the common beginning."""
        return self.segments[len(self.segments) - self.num_answers :]

    @property
    def longest(self) -> int:
        """Tokens of the longest branch with what is before it."""
        return max(s.prefix_length + s.length for s in self.branches)

    @property
    def target_L(self) -> IntArray:
        target = np.full(len(self.ids_L), IGNORED, np.int32)
        for s in self.segments:
            a, b = s.start, s.start + s.length
            target[a : b - 1] = np.where(self.trained_L[a + 1 : b], self.ids_L[a + 1 : b], IGNORED)
        return target

    @property
    def supervised_of_branches(self) -> list[int]:
        """Targets of each branch."""
        target = self.target_L != IGNORED
        return [int(target[s.start : s.start + s.length].sum()) for s in self.branches]

    @property
    def num_supervised(self) -> int:
        """Targets, not trained tokens: the first token of a segment has no position that predicts it."""
        return int((self.target_L != IGNORED).sum())


@dataclass(slots=True)
class Compared:
    """The sequences of a row whose likelihoods an objective compares: B of them, the two of a pair behind each other.

    sequence_S: the sequence that each supervised position belongs to. role_B: CHOSEN, REJECTED, GOOD or BAD. length_B:
    supervised positions. margin_B: of a pair, with both of its sequences. last_B: the position in the row of the last
    trained token. reference_B: log-probability under the reference model, once it is known.
    """

    sequence_S: IntArray
    role_B: npt.NDArray[np.int8]
    length_B: IntArray
    last_B: IntArray
    margin_B: npt.NDArray[np.float32]
    sample_B: npt.NDArray[np.int64]
    source_B: IntArray
    weight_B: npt.NDArray[np.float32]
    other_B: npt.NDArray[np.int64]
    """The sample whose answer this is, where it is another one's; else -1."""
    reference_B: npt.NDArray[np.float32] | None = None
    mismatched: PackedRow | None = None
    """The same prompts with the answers of other samples, where an objective asks for them; in the same order."""
    statistic: float = 0.0
    """What the objective asked about the whole step."""


@dataclass(slots=True)
class PackedRow:
    """One micro-batch: samples side by side in one row without padding (T = sum of their tokens).

    distinct images are held once: `pixels_PD` are uint8 patches of those not already in the vision cache
    (`pixel_image` says whose), and `image_of_block` maps every placed image, in token order, to a distinct one.
    """

    ids_T: IntArray
    kind_T: npt.NDArray[np.int8]
    position_ids_3T: IntArray
    segments: tuple[Segment, ...]
    supervised_S: IntArray
    target_S: IntArray
    weight_S: npt.NDArray[np.float32]
    sample_S: npt.NDArray[np.int64]
    source_S: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    image_keys: list[str] = field(default_factory=list[str])
    image_grids_I3: IntArray = field(default_factory=lambda: np.zeros((0, 3), np.int32))
    image_views: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    image_of_block: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    pixel_image: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    pixels_PD: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    members: tuple[int, ...] = ()
    dropped: tuple[tuple[int, str, str], ...] = ()
    compared: Compared | None = None
    meta: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)
