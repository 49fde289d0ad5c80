"""
Writes the demo data: made-up products in ADGEN's shape, one JSON object a line with `content` and `summary`.

    python scripts/make_demo_data.py --output_dir examples/demo

Every summary is in one manner. The demo model was trained on texts in all manners of `demo_manners.py` about other
products: those for which `is_held_out` is false. The same seed gives the same lines.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from demo_manners import GARMENTS, MANNERS, MOODS, OCCASIONS, PATTERNS, QUALITIES, SIMILES, WANTED_MANNER

SPLITS = {"train": 200, "validation": 40, "test": 40}
HELD_OUT_SHARE = 5  # one in so many combinations of material, colour and style

MATERIALS, COLORS, STYLES = tuple(QUALITIES), tuple(SIMILES), tuple(OCCASIONS)
# The names of the attributes in a prompt; those of the cut and its detail depend on the garment.
NAMES = {"材质": "material", "颜色": "color", "风格": "style", "图案": "pattern"}

Product = dict[str, str]


def draw_product(chooser: random.Random) -> Product:
    """A made-up product: `garment`, `material`, `color`, `style`, `pattern`, `cut` and `detail`."""
    garment = chooser.choice(sorted(GARMENTS))
    (_, cuts), (_, details) = GARMENTS[garment]
    return {
        "garment": garment,
        "material": chooser.choice(MATERIALS),
        "color": chooser.choice(COLORS),
        "style": chooser.choice(STYLES),
        "pattern": chooser.choice(PATTERNS),
        "cut": chooser.choice(cuts),
        "detail": chooser.choice(details),
    }


def is_held_out(product: Product) -> bool:
    """Whether the product's material, colour and style go together in the demo data only, and never in the base's."""
    places = MATERIALS.index(product["material"]), COLORS.index(product["color"]), STYLES.index(product["style"])
    return sum(places) % HELD_OUT_SHARE == 0


def write_content(product: Product) -> str:
    """The prompt: the attributes in ADGEN's form, `类型#裤*材质#棉麻*…`."""
    (cut_name, _), (detail_name, _) = GARMENTS[product["garment"]]
    names = {"类型": "garment", **NAMES, cut_name: "cut", detail_name: "detail"}
    return "*".join(f"{name}#{product[key]}" for name, key in names.items())


def read_content(content: str) -> Product:
    """The product of a prompt that `write_content` wrote."""
    keys = ("garment", *NAMES.values(), "cut", "detail")
    return dict(zip(keys, (pair.split("#")[1] for pair in content.split("*")), strict=True))


def all_words(product: Product) -> dict[str, str]:
    """The product's attributes, and what belongs to them in the manners' wordings."""
    return product | {
        "quality": QUALITIES[product["material"]],
        "simile": SIMILES[product["color"]],
        "occasion": OCCASIONS[product["style"]],
        "mood": MOODS[product["style"]],
    }


def write_summary(product: Product, manner: str, chooser: random.Random) -> str:
    """A text in the manner that states every attribute of the product but its garment, which the cut implies."""
    return "".join(chooser.choice(part) for part in MANNERS[manner]).format(**all_words(product))


def draw_products(chooser: random.Random, is_wanted: Callable[[Product], bool]) -> Iterator[Product]:
    """Made-up products without end, of those that are wanted."""
    while True:
        product = draw_product(chooser)
        if is_wanted(product):
            yield product


def product_rows(count: int, seed: int) -> list[dict[str, str]]:
    """
    `count` different held-out products in the wanted manner; the same `seed` gives the same rows.

    Rows are different in `content`, so that no line of one split can be met in another that is cut from the same list.
    """
    chooser = random.Random(seed)
    products = draw_products(chooser, is_held_out)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        product = next(products)
        content = write_content(product)
        rows.setdefault(content, {"content": content, "summary": write_summary(product, WANTED_MANNER, chooser)})
    return list(rows.values())


def write_demo_data(output_dir: Path, seed: int = 0) -> list[Path]:
    """Writes `train.json`, `validation.json` and `test.json` (JSON lines, UTF-8) and returns their paths."""
    rows = iter(product_rows(sum(SPLITS.values()), seed))
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, count in SPLITS.items():
        lines = [json.dumps(next(rows), ensure_ascii=False) for _ in range(count)]
        paths.append(output_dir / f"{split}.json")
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Write made-up product lines in ADGEN's shape.")
    parser.add_argument("--output_dir", type=Path, default=Path("examples/demo"), help="Folder to write the files to.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choices; the same seed gives the same lines.")
    arguments = parser.parse_args()
    for path in write_demo_data(arguments.output_dir, arguments.seed):
        print(path)


if __name__ == "__main__":
    main()
