"""Pictures as data sets hold them, opened and brought to RGB.

Not here: which column holds them, and what the model's processor makes of them (data.py).
"""

import io

from PIL import Image, ImageOps


class Unusable(Exception):
    """What is wrong with a row of the data, to go on after "row 7"; such rows are left out, and counted."""


def listed(images):
    """The images of a cell: of a list, or one; null and "" are none."""
    images = images if isinstance(images, list) else [images]
    nothing = (None, "", {"bytes": None, "path": ""}, {"bytes": None, "path": None})
    return [image for image in images if image not in nothing]


def open_picture(source, folders):
    """An RGB image, decoded to its end and turned as its EXIF data says. Raises Unusable.

    `source`: an image, the bytes of a file, a path relative to the first of the `folders` that has it, or a dict of
    bytes and path, as the datasets library has them.
    """
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if not isinstance(source, Image.Image | bytes | str):
        raise Unusable(f"has an image that is no file and no path ({str(source)[:40]})")
    try:
        image = source
        if isinstance(source, bytes):
            image = Image.open(io.BytesIO(source))
        elif isinstance(source, str):
            places = [folder / source for folder in folders]
            image = Image.open(next((place for place in places if place.exists()), places[0]))
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except Unusable:
        raise
    except Exception as error:  # whatever Pillow says of a broken file, or of one that would fill the memory
        raise Unusable(f"has an image that cannot be read ({str(error)[:120]})") from None


def to_rgb(image):
    """Any mode to RGB; what is transparent becomes white, as on the page the diagram was made for. Raises Unusable."""
    if image.mode == "F" or image.mode.startswith("I"):
        return to_8_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_8_bits(image):
    """Grey values of 16 bits, or floats, which `convert` would cut off at 255, by their range: [0, 65535], [0, 1].

    Integers and floats up to 255 that are not declared as 16 bits are taken for what they are.
    """
    low, high = image.getextrema()
    if image.mode.startswith("I;16") or (image.mode == "I" and high > 255):
        white = 65535
    else:
        white = 1 if image.mode == "F" and high <= 1 else 255
    if not (low >= 0 and high <= white):
        raise Unusable(f"has an image with values from {low:g} to {high:g}: save it with 8 bits")
    return image.convert("F").point(lambda value: value * (255 / white) + 0.5).convert("L")
