"""
List the recipes and the files for accelerate that come with this package, or copy some of them into this folder.

    python -m glm_peft.recipes
    python -m glm_peft.recipes adgen_chatglm3 single_gpu
"""

import re
from difflib import get_close_matches
from pathlib import Path

from glm_peft.arguments.recipes import parse_recipes_arguments
from glm_peft.errors import UserError
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.results import print_section

_PACKAGE = Path(__file__).parent
# In a checkout these folders of the package are links to those beside it, which Windows may not make.
_ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
_FOLDERS = ("configs", "accelerate_configs")
# No folder `glm_peft` is made: `python -m glm_peft.train` could take it for the package.
_COPIED_AS = {"glm_peft/assets": "examples/demo/model", "glm_peft/train.py": "--module glm_peft.train"}


@exit_with_user_errors()
def main(argv: list[str] | None = None) -> None:
    """List the recipes, or copy those that the arguments name and print the paths of what was written."""
    names = parse_recipes_arguments(argv).names
    if names:
        print("\n".join(map(str, copy_recipes(names))))
    for folder in _FOLDERS if not names else ():
        files = [path for path in find_recipes() if path.parent.name == folder]
        width = max(len(path.stem) for path in files)
        print_section(folder, "\n".join(f"  {path.stem:<{width}}  {_first_line(path)}" for path in files))


def find_recipes() -> list[Path]:
    """Return the recipes and the files for accelerate that come with this package."""
    return [path for folder in _FOLDERS for path in sorted((_ROOT / folder).glob("*.yaml"))]


def copy_recipes(names: list[str]) -> list[Path]:
    """
    Copy recipes into the working folder, at the paths that they have in the repository.

    Args:
        names: with or without folder and extension.

    Returns:
        The files, with those of the package that the recipes name.

    Raises:
        UserError: there is no such recipe, or another file is in its place; then nothing is written.
    """
    contents = {path: text for name in names for path, text in _read(Path(name).stem).items()}
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise UserError(f"{path} is there already and is another file: move it, or copy into another folder.")
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return list(contents)


def _read(name: str) -> dict[Path, bytes]:
    known = {path.stem: path for path in find_recipes()}
    if name not in known:
        near = "".join(f"the nearest is {found!r}, and " for found in get_close_matches(name, known, n=1))
        raise UserError(f"There is no recipe {name!r}: {near}`glm-peft recipes` lists all.")
    text = known[name].read_text(encoding="utf-8")
    sources = [_ROOT / named for named in re.findall(r"^\w+: (examples/\S+)$", text, re.MULTILINE)]
    copies = {source.relative_to(_ROOT): source.read_bytes() for source in sources}
    if "glm_peft/assets" in text:
        model = Path(_COPIED_AS["glm_peft/assets"])
        copies |= {model / file.name: file.read_bytes() for file in (_PACKAGE / "assets").iterdir()}
    for here, there in _COPIED_AS.items():
        text = text.replace(here, there)
    return {known[name].relative_to(_ROOT): text.encode()} | copies


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").rstrip(":")


if __name__ == "__main__":
    main()
