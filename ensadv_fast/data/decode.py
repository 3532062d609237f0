"""From an image file to a square of pixels."""
from __future__ import annotations

import importlib.util
import os
import warnings

import numpy as np

# Above it a file is taken for a decompression bomb; Pillow's own bound, which it warns at.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3


def need_pillow() -> None:
    """ImportError where Pillow is not installed; it is not imported."""
    if importlib.util.find_spec("PIL") is None:
        raise ImportError("data: image files are decoded by Pillow, which is not installed: "
                          "pip install 'ensadv-fast[images]'")


def decode(path: str | os.PathLike, side: int) -> np.ndarray:
    """The square in the middle of an image, resized to `side`: uint8 [side, side, 3], RGB.

    Resized bilinearly with antialiasing, as if the whole image were and the square cut out then. A JPEG of at least
    twice the size is decoded at 1/2, 1/4 or 1/8 (libjpeg's scaled inverse DCT). The orientation tag is not followed, as
    is the custom for ImageNet. A function of the file alone. Raises whatever a broken file makes Pillow raise.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many, want at most {MAX_PIXELS}")
            picture.draft("RGB", (side, side))
            short = min(picture.size)
            left, top = (picture.width - short) // 2, (picture.height - short) // 2
            square = picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR,
                                                   (left, top, left + short, top + short))
            return np.asarray(square)


def try_decode(path: str, side: int) -> np.ndarray | str:
    """:func:`decode`, or why it cannot be decoded."""
    try:
        return decode(path, side)
    except (MemoryError, ImportError):  # of this machine, not of the file
        raise
    except Exception as e:  # noqa: BLE001 - broken files make decoders raise almost anything
        return f"{type(e).__name__}: {e}".replace(path, os.path.basename(path))
