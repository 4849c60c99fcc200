"""Decoding, splitting and the order of parallel work, each alone."""

from __future__ import annotations

import io
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from preprocess_samples import encoded, png

from airloom.contract.pictures import PictureFault, PictureRejectedError, decode_picture, encode_png
from preprocessing.parallel import map_in_order
from preprocessing.params import Fractions
from preprocessing.source import label_of
from preprocessing.split import split_of


def test_canonical_pixels_come_back_unchanged() -> None:
    pixels = decode_picture(png(1), size=28)
    assert np.array_equal(decode_picture(encode_png(pixels), size=28), pixels)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(28, 28), (97, 40), (8, 300)])
def test_every_mode_and_size_becomes_canonical(mode: str, size: tuple[int, int]) -> None:
    pixels = decode_picture(png(1, size, mode), size=28)
    assert (pixels.shape, pixels.dtype) == ((28, 28), np.uint8)


def test_colour_keeps_the_order_red_green_blue() -> None:
    red = encoded(Image.new("RGB", (9, 9), (200, 10, 30)))
    assert decode_picture(red, size=4, mode="RGB")[0, 0].tolist() == [200, 10, 30]


def test_sixteen_bits_are_reduced_and_not_clipped() -> None:
    deep = np.full((8, 8), 0x8040, dtype=np.uint16)
    assert set(decode_picture(encoded(Image.fromarray(deep)), size=8).reshape(-1)) == {0x80}


def test_transparent_parts_are_black() -> None:
    clear = encoded(Image.new("RGBA", (8, 8), (255, 255, 255, 0)))
    assert decode_picture(clear, size=8).max() == 0


def test_a_picture_is_turned_as_its_exif_tag_says() -> None:
    picture = Image.fromarray(np.repeat(np.array([[0], [255]], dtype=np.uint8), 8, axis=0).repeat(16, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = decode_picture(encoded(picture, exif=exif), size=16)
    assert turned[0, 0] == 255
    assert turned[-1, 0] == 0


def test_a_small_file_that_unpacks_to_too_many_pixels_is_refused() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(PictureRejectedError) as caught:
        decode_picture(bomb, size=28)
    assert caught.value.fault is PictureFault.TOO_LARGE


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_every_kind_cut_off_is_refused_and_never_crashes(kind: str, kept: float) -> None:
    whole = encoded(Image.open(io.BytesIO(png(3, (64, 64)))), kind)
    with pytest.raises(PictureRejectedError):
        decode_picture(whole[: int(len(whole) * kept)], size=28)


@pytest.mark.parametrize(
    ("key", "label"),
    [("raw/7/x.png", "7"), ("raw/x.png", None), ("raw/7/old/x.png", None), ("raw/7/", None)],
)
def test_the_label_is_the_one_folder_under_the_prefix(key: str, label: str | None) -> None:
    assert label_of(key, "raw/") == label


def test_splits_get_their_fractions() -> None:
    fractions = Fractions(train=0.6, validation=0.3, test=0.1)
    counted = Counter(split_of(f"{number:064x}", fractions=fractions, seed=1) for number in range(20_000))
    assert {name: round(count / 20_000, 2) for name, count in counted.items()} == pytest.approx(
        {"train": 0.6, "validation": 0.3, "test": 0.1}, abs=0.011
    )


def test_parallel_results_keep_their_order_and_few_are_held() -> None:
    taken = 0

    def items() -> object:
        nonlocal taken
        for number in range(500):
            taken += 1
            yield number

    def slow_when_even(number: int) -> int:
        time.sleep(0.002 * (number % 2 == 0))
        return number

    results = map_in_order(slow_when_even, items(), workers=4)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert taken <= 10 + 8 * 4
    assert list(results) == list(range(10, 500))


def test_the_first_error_ends_parallel_work() -> None:
    def fail(number: int) -> int:
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        list(map_in_order(fail, range(1000), workers=4))
