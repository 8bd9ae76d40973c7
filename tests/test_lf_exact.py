"""LLaMA-Factory's arithmetic, derived by hand: how turns are shortened, how pictures are sized first, what trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image as pillow

from lensmith.core.encoded import Encoded, ImageBlock
from lensmith.core.errors import Drop
from lensmith.core.sample import Conversation, Image, Message, Sample, Text
from lensmith.data.encode import Encoder
from lensmith.data.resize import FirstResize
from lensmith.data.tokenizer import TextTokenizer, tokenizer_text
from lensmith.data.turns import blocks_left, kept, mask_of, shortened, turns_of
from lensmith.family.registry import load_family


@pytest.mark.parametrize(
    ("question", "answer", "room", "wanted"),
    [
        (100, 20, 64, (44, 20)),  # 2 * 20 < 64: the answer stays whole, the question gets what is left
        (20, 100, 64, (20, 44)),  # 2 * 20 < 64: the question stays whole
        (100, 100, 64, (32, 32)),  # both above half: 64 * 100 / 200
        (60, 40, 64, (39, 25)),  # int(64 * 40 / 100) = 25
        (40, 60, 64, (26, 38)),  # int(38.4) = 38
        (10, 5, 64, (10, 5)),
        (30, 34, 64, (30, 34)),  # together just the room
        (5, 3, 1, (1, 0)),  # int(1 * 3 / 8) = 0
        (0, 9, 4, (0, 4)),
    ],
)
def test_a_turn_gives_up_its_share(question: int, answer: int, room: int, wanted: tuple[int, int]) -> None:
    assert shortened(question, answer, room) == wanted


def test_turns_take_what_those_before_them_left() -> None:
    turns = [(30, 10), (30, 10), (30, 10)]
    # 40 of 64; then 24: 2 * 10 < 24 keeps the answer, the question gets 14; then nothing
    assert kept(turns, 64) == [(30, 10), (14, 10), (0, 0)]
    assert kept(turns, 64, newest_first=True) == [(0, 0), (14, 10), (30, 10)]
    assert kept(turns, 1000) == turns


def test_turns_are_found_by_the_tokens_of_answers() -> None:
    answers = np.array([0, 0, 0, 1, 1, 0, 1, 1, 1, 0], bool)
    assert turns_of(answers) == [(3, 2), (1, 3)]
    mask = mask_of([(3, 2), (1, 3)], [(2, 1), (0, 2)], 10)
    assert mask.tolist() == [True, True, False, True, False, False, True, True, False, False]


def test_a_picture_is_never_cut_in_two() -> None:
    blocks = [ImageBlock(Image(path=str(n)), 1, 1, (1, 2, 2), n) for n in (2, 3)]
    image = np.array([0, 1, 1, 0, 1, 1, 1, 0], bool)
    assert blocks_left(np.array([1] * 4 + [0] * 4, bool), image, blocks) == (blocks[0],)
    assert blocks_left(np.ones(8, bool), image, blocks) == tuple(blocks)
    with pytest.raises(Drop, match="inside a picture of 3 tokens") as caught:
        blocks_left(np.array([1] * 5 + [0] * 3, bool), image, blocks)
    assert caught.value.reason == "TOO_LONG"


@pytest.mark.parametrize(
    ("size", "rule", "wanted"),
    [
        ((1000, 600), "area", (660, 396)),  # sqrt(262144 / 600000) = 0.66099; both sides rounded down
        ((512, 512), "area", (512, 512)),  # just the limit
        ((10, 10), "area", (32, 32)),  # 1024 / 100 = 3.2 ** 2
        ((100, 10), "sides", (101, 28)),  # enlarged to 101 x 10, then the short side alone
        ((9000, 20), "sides", (5040, 28)),  # 321 : 1 becomes 180 : 1
        ((20, 9000), "sides", (28, 5040)),
        ((1000, 600), "none", (1000, 600)),
    ],
)
def test_the_size_before_the_models_own(size: tuple[int, int], rule: Any, wanted: tuple[int, int]) -> None:
    assert FirstResize(1024, 262144, rule)(*size) == wanted


# --- the encoder ------------------------------------------------------------------------------------------------------


class Talks:
    def __init__(self, folder: Path):
        self.folder = folder
        self.family = load_family(folder)
        self.tokenizer = TextTokenizer(tokenizer_text(folder))

    def encode(self, *messages: Message, length: int = 512, **options: Any) -> Encoded:
        encoder = Encoder(self.family, self.tokenizer, lambda _: (56, 56), length, **options)
        return encoder.encode(Sample("row", (Conversation(messages),)))

    def text(self, encoded: Encoded, trained: bool = False) -> str:
        ids = encoded.ids_L[encoded.trained_L] if trained else encoded.ids_L
        return self.tokenizer.decode(ids.tolist())


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Talks:
    return Talks(tiny.make_model(tmp_path_factory.mktemp("exact") / "m", "qwen2_5_vl"))


def user(text: str) -> Message:
    return Message("user", (Text(text),))


def answer(text: str, train: bool | None = None) -> Message:
    return Message("assistant", (Text(text),), train=train)


TALK = (user("one two three"), answer("yes yes yes"), user("four five six"), answer("no no no"))


def test_the_line_feed_behind_an_answer_is_trained_where_it_is_asked_for(talks: Talks) -> None:
    plain, whole = talks.encode(*TALK), talks.encode(*TALK, train_line_feed=True)
    assert plain.ids_L.tolist() == whole.ids_L.tolist()
    assert talks.text(plain, trained=True) == "yes yes yes<|im_end|>no no no<|im_end|>"
    assert talks.text(whole, trained=True) == "yes yes yes<|im_end|>\nno no no<|im_end|>\n"
    assert whole.num_supervised == plain.num_supervised + 2


def test_an_answer_that_does_not_train_has_no_trained_line_feed(talks: Talks) -> None:
    last = talks.encode(user("a"), answer("b", train=False), user("c"), answer("d"), train_line_feed=True)
    assert talks.text(last, trained=True) == "d<|im_end|>\n"


def _by_hand(talks: Talks, length: int, *, newest_first: bool) -> list[int]:
    """The same talk cut by LLaMA-Factory's rule on the ids of its turns, each tokenised alone."""
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    said = [
        (f"{head}<|im_start|>user\none two three<|im_end|>\n<|im_start|>assistant\n", "yes yes yes<|im_end|>\n"),
        ("<|im_start|>user\nfour five six<|im_end|>\n<|im_start|>assistant\n", "no no no<|im_end|>\n"),
    ]
    ids = [[_ids(talks, text) for text in turn] for turn in said]
    left, found = length, [[], []]
    for n in (1, 0) if newest_first else (0, 1):
        if left > 0:
            q, a = shortened(len(ids[n][0]), len(ids[n][1]), left)
            found[n] = ids[n][0][:q] + ids[n][1][:a]
            left -= q + a
    return found[0] + found[1]


def _ids(talks: Talks, text: str) -> list[int]:
    found: list[int] = []
    for part, control in talks.tokenizer.split_controls(text):
        found += [control] if control is not None else talks.tokenizer.plain(part, "run")[0].tolist()
    return found


@pytest.mark.parametrize("length", [20, 37, 60, 64, 70, 75])
@pytest.mark.parametrize("newest_first", [False, True])
def test_a_talk_is_cut_as_its_turns_are(talks: Talks, length: int, newest_first: bool) -> None:
    talk = list(TALK)
    if newest_first:  # mask_history
        talk[1] = answer("yes yes yes", train=False)
    wanted = _by_hand(talks, length, newest_first=newest_first)
    try:
        found = talks.encode(*talk, length=length, too_long="llamafactory", train_line_feed=True)
    except Drop as drop:
        assert drop.reason == "NO_TARGETS"
        return
    assert found.ids_L.tolist() == wanted
    assert len(wanted) <= length


def test_nearly_every_length_is_reached(talks: Talks) -> None:
    """A turn that just fits may lose a token to rounding, there as here."""
    whole = talks.encode(*TALK).num_tokens
    for length in range(45, whole + 2):
        found = talks.encode(*TALK, length=length, too_long="llamafactory").num_tokens
        assert min(length, whole) - 1 <= found <= length


def test_a_talk_whose_picture_would_be_cut_is_left_out(talks: Talks) -> None:
    shown = (Message("user", (Text("a " * 8), Image(path="1"), Text("b"))), answer("c c c c c c c c"))
    outcomes: set[str] = set()
    for length in range(30, talks.encode(*shown).num_tokens + 1):
        try:
            found = talks.encode(*shown, length=length, too_long="llamafactory")
        except Drop as drop:
            outcomes.add("cut" if "inside a picture of 4 tokens" in drop.detail else drop.reason)
            continue
        outcomes.add(f"{len(found.images)} pictures")
        assert int((found.kind_L == 1).sum()) == 4 * len(found.images)
    assert outcomes == {"cut", "0 pictures", "1 pictures"}


def test_pixels_are_those_of_both_resizes(talks: Talks, tmp_path: Path) -> None:
    """A training run shows the picture that LLaMA-Factory's processor would get."""
    import io

    from lensmith.data.load import LoaderSpec, SourceFile
    from lensmith.data.media import ImageLimits

    rng = np.random.default_rng(0)
    picture = pillow.fromarray(rng.integers(0, 255, (300, 500, 3), np.uint8))
    raw = io.BytesIO()
    picture.save(raw, "PNG")
    (tmp_path / "x.png").write_bytes(raw.getvalue())
    first = FirstResize(1024, 20000, "sides")
    spec = LoaderSpec((SourceFile("s", "x.json", None, str(tmp_path)),), talks.family,
                      tokenizer_text(Path(talks.folder)), (), ImageLimits(), 512, "drop", 1 << 20,
                      first_resize=first)  # fmt: skip
    loader = spec.build()
    sample = Sample("r", (Conversation((Message("user", (Image(path="x.png"),)), answer("a"))),))
    block = loader.encode(0, sample).images[0]
    width, height = first(500, 300)
    assert (width, height) == (182, 109)
    assert (block.width, block.height) == (168, 112)  # 6.5 and 3.9 tokens, rounded to the even number
    (found,) = loader.patches(raw.getvalue(), [block])
    wanted = talks.family.patches(picture.resize((width, height)), block)
    assert np.array_equal(found, wanted)


def pair(talks: Talks, question: str, chosen: str, rejected: str, length: int) -> Encoded:
    from lensmith.core.sample import Preference

    branches = tuple(Conversation((user(question), answer(said))) for said in (chosen, rejected))
    encoder = Encoder(talks.family, talks.tokenizer, lambda _: (56, 56), length, too_long="llamafactory",
                      train_line_feed=True)  # fmt: skip
    return encoder.encode(Sample("row", branches, preference=Preference()))


@pytest.mark.parametrize("length", [20, 40, 55, 70, 500])
def test_answers_that_are_compared_are_cut_alike(talks: Talks, length: int) -> None:
    """One turn each: the prompt, and the longest of the answers decides."""
    said = "one two three four five six", "yes", "no no no no no no no no no no"
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    question = _ids(talks, f"{head}<|im_start|>user\n{said[0]}<|im_end|>\n<|im_start|>assistant\n")
    answers = [_ids(talks, f"{text}<|im_end|>\n") for text in said[1:]]
    some, most = shortened(len(question), max(map(len, answers)), length)
    wanted = [question[:some] + a[:most] for a in answers]
    try:
        found = pair(talks, *said, length)
    except Drop as drop:
        assert drop.reason == "NO_TARGETS"
        return
    ids = found.ids_L.tolist()
    both = [ids[s.prefix_start : s.prefix_start + s.prefix_length] + ids[s.start : s.start + s.length]
            for s in found.segments if s.prefix_length]  # fmt: skip
    assert both == wanted and found.longest <= length


@pytest.mark.parametrize(
    ("seconds", "rate", "frames"),
    [
        (10.0, 30.0, np.linspace(0, 299, 20).astype(int).tolist()),  # 2 a second
        (0.3, 30.0, [0, 0]),  # at least one; an odd number is filled up with the last
        (100.0, 10.0, np.linspace(0, 999, 128).astype(int).tolist()),  # at most video_maxlen
        (3.5, 4.0, [0, 2, 4, 6, 8, 10, 13, 13]),  # 7 of 14, rounded down
    ],
)
def test_frames_are_those_that_it_chooses(talks: Talks, seconds: float, rate: float, frames: list[int]) -> None:
    from lensmith.core.encoded import VideoInfo
    from lensmith.core.sample import Video
    from lensmith.data.encode import Placed
    from lensmith.data.media import VideoLimits

    family = load_family(talks.folder, video=VideoLimits(rule="llamafactory", max_pixels=16384))
    info = VideoInfo(640, 360, round(seconds * rate), rate)
    (block,) = [p.block for p in family.place_video(Video(path="v"), info) if isinstance(p, Placed)]
    assert list(block.frames) == frames
    assert family.video.first is not None
    assert family.video.first(640, 360) == (170, 96)  # sqrt(16384 / 230400) = 0.26667, rounded down
    assert (block.width, block.height) == (168, 84)  # then the model's rule: 6.07 and 3.43 tokens, rounded
