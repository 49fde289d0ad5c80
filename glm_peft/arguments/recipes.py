"""The arguments of `python -m glm_peft.recipes`."""

import argparse


def parse_recipes_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the names of the recipes to copy; none lists them."""
    parser = argparse.ArgumentParser(
        "python -m glm_peft.recipes",
        description="List the recipes and the files for accelerate that come with this package, or copy those that "
        "are named into this folder, with the data and the model that a recipe names where they come with it too.",
    )
    parser.add_argument("names", nargs="*", help="such as adgen_chatglm3 or single_gpu; none: list them all")
    return parser.parse_args(argv)
