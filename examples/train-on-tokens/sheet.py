"""A contact sheet of decoded samples: each column is one sample, each row a modality.

python examples/train-on-tokens/sheet.py runs/earth/pictures/rgb runs/earth/pictures/depth sheet.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, low: float, high: float) -> Image.Image:
    """A file as a picture; of an array grey between these values."""
    if path.suffix != ".npy":
        return Image.open(path).convert("RGB")
    grey = (np.load(path).squeeze() - low) / (high - low) * 255
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


def main(argv: list[str]) -> None:
    """Paste the files of each folder into a row."""
    *folders, sheet = map(Path, argv)
    rows = []
    for folder in folders:
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".npy"))
        arrays = [np.load(path) for path in paths if path.suffix == ".npy"]
        ends = (min(map(np.min, arrays)), max(map(np.max, arrays))) if arrays else (0, 1)
        rows.append([picture(path, *ends) for path in paths])
    side = 2 * rows[0][0].width
    made = Image.new("RGB", (len(rows[0]) * (side + 4), len(rows) * (side + 4)), "white")
    for y, row in enumerate(rows):
        for x, one in enumerate(row):
            made.paste(one.resize((side, side), Image.Resampling.NEAREST), (x * (side + 4), y * (side + 4)))
    made.save(sheet)


if __name__ == "__main__":
    main(sys.argv[1:])
