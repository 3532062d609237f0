"""From an image file to a square of pixels."""
from __future__ import annotations

import importlib.util
import os
import warnings

import numpy as np

# A file with more pixels is refused as a decompression bomb. Pillow warns at the same number.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
MAX_SIDE = 65_535  # JPEG's; a longer picture is a line of which the square in the middle shows nothing
# What Pillow may take a file for: the formats of `folder.EXTENSIONS`. Others start programs (EPS) or fetch files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")


def need_pillow() -> None:
    """Raise ImportError where Pillow is not installed. It is not imported."""
    if importlib.util.find_spec("PIL") is None:
        raise ImportError("data: image files are decoded by Pillow, which is not installed: "
                          "pip install 'ensadv-fast[images]'")


def decode(path: str | os.PathLike, side: int) -> np.ndarray:
    """The square in the middle of an image, resized to `side`: uint8 [side, side, 3], RGB.

    The square is resized bilinearly with antialiasing, with the result of resizing the whole image and then cutting. A
    JPEG of at least twice the size is decoded at 1/2, 1/4 or 1/8 (libjpeg's scaled inverse DCT). The orientation tag is
    not followed, as is the custom for ImageNet. The result depends on the file alone. Raises whatever a broken file
    makes Pillow raise, and ValueError for too many pixels and for what is no regular file, which is not opened.
    """
    from PIL import Image

    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it must be a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"a picture must have at most {MAX_PIXELS} pixels, got {picture.width} x "
                                 f"{picture.height}")
            if max(picture.size) > MAX_SIDE:
                raise ValueError(f"a picture must have sides of at most {MAX_SIDE} pixels, got {picture.width} x "
                                 f"{picture.height}")
            picture.draft("RGB", (side, side))
            short = min(picture.size)
            left, top = (picture.width - short) // 2, (picture.height - short) // 2
            square = picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR,
                                                   (left, top, left + short, top + short))
            return np.asarray(square)


def try_decode(path: str, side: int) -> np.ndarray | str:
    """What :func:`decode` gives, or in a line why the file cannot be decoded."""
    try:
        return decode(path, side)
    except (MemoryError, ImportError):  # of this machine, not of the file
        raise
    except Exception as e:  # noqa: BLE001 - broken files make decoders raise almost anything
        return f"{type(e).__name__}: {e}".replace(path, os.path.basename(path))
