"""Images are upright wherever they are measured or decoded, and wherever their bytes lie."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from PIL import ExifTags, Image, ImageChops, ImageOps, features

from regate_ds.data.llava.formats.sources import Sources
from regate_ds.data.llava.images import as_shown, image_fault, image_size, load_all, load_rgb
from regate_ds.data.llava.media import InlineImage

FORMATS = ["jpeg", "png", "webp", "tiff"] + ["avif"] * features.check("avif")


def lying(orientation: int, format: str) -> bytes:
    """A file of 40 x 16 pixels, red at the left, that is to be turned as its EXIF says."""
    image = Image.new("RGB", (40, 16), "blue")
    image.paste("red", (0, 0, 20, 16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = BytesIO()
    image.save(buffer, format=format, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_where_it_is_measured_and_decoded(
    tmp_path: Path, format: str, orientation: int
):
    content = lying(orientation, format)
    (tmp_path / "a").write_bytes(content)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    size = (40, 16) if orientation <= 4 else (16, 40)
    for source in (tmp_path / "a", InlineImage(content, "a")):
        assert image_fault(source) is None
        assert image_size(source) == load_rgb(source).size == upright.size == size
        assert not ImageChops.difference(load_rgb(source), upright.convert("RGB")).getbbox()


def test_orientation_6_has_the_stored_left_on_top(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(lying(6, "jpeg"))
    image = load_rgb(tmp_path / "a.jpg")
    assert image.size == (16, 40)
    (red, _, top), (bottom, _, blue) = image.getpixel((8, 2)), image.getpixel((8, 37))  # type: ignore[misc]
    assert min(red, blue) > 200
    assert max(top, bottom) < 50


def _palette() -> Image.Image:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((0, 0), 1)
    return image


TRANSPARENT = {
    "RGBA": (Image.new("RGBA", (4, 2), (0, 0, 0, 0)), "PNG", {}),
    "RGBA in WebP": (Image.new("RGBA", (4, 2), (9, 0, 0, 0)), "WEBP", {"exact": True}),
    "LA": (Image.new("LA", (4, 2), (0, 0)), "PNG", {}),
    "palette": (_palette(), "PNG", {"transparency": 0}),
    "GIF": (_palette(), "GIF", {"transparency": 0}),
    "a colour of RGB": (Image.new("RGB", (4, 2), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}),
    "a grey": (Image.new("L", (4, 2), 7), "PNG", {"transparency": 7}),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_a_transparent_image_is_on_white(name: str):
    image, format, options = TRANSPARENT[name]
    buffer = BytesIO()
    image.save(buffer, format=format, **options)
    source = InlineImage(buffer.getvalue(), "a")
    assert image_fault(source) is None
    assert load_rgb(source).getpixel((3, 1)) == (255, 255, 255)
    table = Sources(Path()).image("image", Image.open(buffer), 0)
    assert isinstance(table, InlineImage)
    assert not ImageChops.difference(load_rgb(table), load_rgb(source)).getbbox()


def test_half_transparent_red_is_pink_and_what_is_opaque_is_as_it_was():
    half = Image.new("RGBA", (4, 2), (255, 0, 0, 128))
    half.putpixel((0, 0), (10, 20, 30, 255))
    assert as_shown(half).getpixel((3, 1)) == (255, 127, 127)
    assert as_shown(half).getpixel((0, 0)) == (10, 20, 30)
    noise = Image.effect_noise((9, 5), 80).convert("RGB")
    opaque = noise.convert("RGBA")
    assert as_shown(opaque).tobytes() == noise.tobytes()


def test_an_orientation_after_a_pngs_pixels_is_read_nowhere(tmp_path: Path):
    content = lying(6, "png")
    start = content.index(b"eXIf") - 4
    length = 12 + int.from_bytes(content[start : start + 4], "big")
    chunk, rest = content[start : start + length], content[:start] + content[start + length :]
    end = rest.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(rest[:end] + chunk + rest[end:])
    assert image_size(tmp_path / "a.png") == load_rgb(tmp_path / "a.png").size == (40, 16)


def test_images_are_decoded_in_their_order_even_one_twice(tmp_path: Path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (2, 2), colour).save(tmp_path / name)
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    found = [image.getpixel((0, 0)) for image in load_all([a, b, b, a])]
    red, blue = (255, 0, 0), (0, 0, 255)
    assert found == [red, blue, blue, red]
