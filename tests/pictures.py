"""A made-up data set in ImageNet's layout that a network can learn. Nothing here uses ensadv_fast."""
import colorsys
from pathlib import Path

import numpy as np


def write_pictures(root: Path, train: int, val: int, size: int, classes: int, seed: int = 0) -> Path:
    """`train` and `val` JPEGs in root/{train,val}/CLASS/, about size x size pixels and never square, taking turns among
    the classes: stripes of the class's hue, at a random angle and place, under noise."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for part, n in (("train", train), ("val", val)):
        for i in range(n):
            label = i % classes
            height, width = size + int(rng.integers(0, size // 8)), size + size // 8
            angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
            y, x = np.mgrid[:height, :width] / size
            wave = 0.5 + 0.5 * np.sin(20 * (np.cos(angle) * x + np.sin(angle) * y) + phase)
            colour = np.array(colorsys.hsv_to_rgb(label / classes, 0.8, 1.0))
            pixels = 255 * (0.2 + 0.6 * wave)[..., None] * colour + rng.normal(0, 12, (height, width, 1))
            path = root / part / f"class{label:03d}" / f"{part}_{i:05d}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return root
