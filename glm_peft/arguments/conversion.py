"""The arguments of `python -m glm_peft.convert`."""

import argparse

_DIRECTIONS = (
    "import: a published checkpoint becomes a PEFT adapter; export: the reverse; merge: a LoRA or (IA)3 adapter is "
    "added to the weights of its base"
)


def parse_convert_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the direction, the source, the base and the output folder of a conversion."""
    parser = argparse.ArgumentParser(
        "python -m glm_peft.convert",
        description="Convert P-Tuning v2 checkpoints to PEFT adapters and back, or merge.",
    )
    parser.add_argument("direction", choices=["import", "export", "merge"], help=_DIRECTIONS)
    parser.add_argument(
        "source", help="published checkpoint folder (import), or adapter folder or Hub id (export, merge)"
    )
    parser.add_argument("--base", required=True, help="base model: a folder in a published layout or a Hub id")
    parser.add_argument("--output_dir", required=True, help="folder for the result")
    parser.add_argument(
        "--chat_format",
        choices=["chatglm", "chatglm2", "chatglm3", "glm4"],
        help="generation of the base, where its files do not say it; import: also the prompts of the adapter",
    )
    parser.add_argument(
        "--verify", action="store_true", help="import and export: compare the logits of both on the base"
    )
    return parser.parse_args(argv)
