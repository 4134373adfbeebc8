"""Rasterize the icons that Emojiland uses from the npm icon sets into one picture per set.

Run once by a maintainer, after `npm pack @iconify-json/noto …` and unpacking:
    python -m emojiland.vendor_icons FOLDER_WITH_UNPACKED_PACKAGES
Needs resvg-py (the `dev` extra); everybody else uses the pictures this wrote.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from mixofshow.bases.emojiland.sprites import ICON_FOLDER, ICON_SIZE
from mixofshow.bases.emojiland.vocabulary import ICONS_OF_SET


def rasterize(package: dict[str, Any], name: str) -> Image.Image:
    """One icon as an RGBA picture of ICON_SIZE × ICON_SIZE; KeyError when the set lacks it."""
    import resvg_py

    icons, aliases = package["icons"], package.get("aliases", {})
    icon = icons[name if name in icons else aliases[name]["parent"]]
    width = icon.get("width", package.get("width", 16))
    height = icon.get("height", package.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    # Drawn four times too large and shrunk: smoother edges than the rasterizer's own.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * ICON_SIZE, height=4 * ICON_SIZE)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    # Sets differ in the margin they leave; cut it so that "size" means the same for all.
    picture = picture.crop(picture.getchannel("A").getbbox())
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, side - picture.height))
    return square.resize((ICON_SIZE, ICON_SIZE), Image.Resampling.LANCZOS)


def vendor(packages: Path) -> None:
    """Write ICON_FOLDER/SET.png and SET.json for every set, and copy the sets' licence notes."""
    ICON_FOLDER.mkdir(exist_ok=True)
    for set_name, names in ICONS_OF_SET.items():
        (root,) = packages.glob(f"iconify-json-{set_name}-*/package")
        package = json.loads((root / "icons.json").read_text())
        info = json.loads((root / "info.json").read_text())
        atlas = Image.new("RGBA", (ICON_SIZE * len(names), ICON_SIZE))
        for column, name in enumerate(names):
            atlas.paste(rasterize(package, name), (column * ICON_SIZE, 0))
        atlas.save(ICON_FOLDER / f"{set_name}.png", optimize=True)
        description = {
            "source": f"@iconify-json/{set_name} {json.loads((root / 'package.json').read_text())['version']}",
            "author": info["author"],
            "license": info["license"],
            "icons": list(names),
        }
        (ICON_FOLDER / f"{set_name}.json").write_text(json.dumps(description, indent=1) + "\n")
        for note in root.glob("*icense*"):
            shutil.copy(note, ICON_FOLDER / f"{set_name}-{note.name}")


if __name__ == "__main__":
    vendor(Path(sys.argv[1]))
