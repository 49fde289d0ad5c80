"""
Draws which room of `glm_peft` imports from which, in the order of the contract in setup.cfg.

    python scripts/draw_rooms.py

Writes docs/images/rooms.svg; a test tells when imports or contract have changed since.
"""

import configparser
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
COMMANDS = "commands"
_CELL, _LEFT, _TOP = 26, 130, 110  # pixels


def read_rooms() -> list[list[str]]:
    """The layers of the contract from the top, each with the names of its rooms."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    layers = parser["importlinter:contract:rooms"]["layers"].split("\n")
    return [[name.strip() for name in layer.split("|")] for layer in layers if layer]


def read_imports(layers: list[list[str]]) -> set[tuple[str, str]]:
    """The pairs of importing and imported room; the commands, which stand beside each other, count as one."""
    room_of = {name: COMMANDS if "train" in layer else name for layer in layers for name in layer}
    graph = grimp.build_graph("glm_peft", cache_dir=None)
    pairs = set()
    for module in graph.modules - {"glm_peft"}:
        for imported in graph.find_modules_directly_imported_by(module) - {"glm_peft"}:
            pairs.add((room_of[module.split(".")[1]], room_of[imported.split(".")[1]]))
    return {(importing, imported) for importing, imported in pairs if importing != imported}


def draw(layers: list[list[str]], imports: set[tuple[str, str]]) -> str:
    """An SVG: a row and a column for each room, and a dot where that of the row imports that of the column."""
    names = [name for layer in layers for name in ([COMMANDS] if "train" in layer else layer)]
    width, height = _LEFT + _CELL * len(names) + 60, _TOP + _CELL * len(names) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for row, name in enumerate(names):
        start, y = _LEFT + row * _CELL, _TOP + row * _CELL
        lines += [
            f'<rect x="{start}" y="{y}" width="{_CELL}" height="{_CELL}" fill="#ccc"/>',
            f'<path d="M{_LEFT} {y}H{width - 60}M{start} {_TOP}V{height - 10}" stroke="#eee"/>',
            f'<text x="{_LEFT - 8}" y="{y + 18}" text-anchor="end">{name}</text>',
            f'<text transform="translate({start + 17} {_TOP - 8}) rotate(-50)">{name}</text>',
        ]
        lines += [
            f'<circle cx="{_LEFT + column * _CELL + _CELL // 2}" cy="{y + _CELL // 2}" r="6" fill="#3b82f6">'
            f"<title>{name} imports {other}</title></circle>"
            for column, other in enumerate(names)
            if (name, other) in imports
        ]
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    layers = read_rooms()
    PICTURE.write_text(draw(layers, read_imports(layers)), encoding="utf-8")


if __name__ == "__main__":
    main()
