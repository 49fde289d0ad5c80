"""The arguments of `python -m glm_peft.web`: the base, its adapters, and who may see the page."""

import os
from dataclasses import dataclass
from pathlib import Path

from glm_peft.arguments.address import refuse_unsafe_host
from glm_peft.arguments.fields import option, require
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.prediction import for_prediction, parse_for_answering
from glm_peft.errors import UserError

WEB_WORDS = {
    "usage": "python -m glm_peft.web [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "A page in the browser: compare the base and its adapters, examine data, train, look at adapters. "
    "Others than this machine are let in with a password only: --password_file, or the variable GLM_PEFT_PASSWORD.",
}
_VARIABLE = "GLM_PEFT_PASSWORD"


@dataclass
class WebArguments:
    """
    The flags of the page.

    Raises:
        UserError: others could reach the page without a password, or the file of the password cannot be read.
    """

    _argument_group_name = "page"

    adapters: list[str] | None = option(
        None, "Adapters as name=PATH, a folder or a Hub id each; each has a column of its own."
    )
    host: str = option("127.0.0.1", "Address to listen on; another one than this machine's own needs a password.")
    port: int = option(7860, "Port to listen on.")
    password_file: str | None = option(
        None, f"File with the password, which goes with any user name. None: the variable {_VARIABLE}, or none."
    )
    output_dir: str = option("output/web", "Folder for what the page writes: uploads, conversations, preferences.")

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "--port must be 0 to 65535", self.port)
        self.password = _read_password(self.password_file)
        refuse_unsafe_host(self.host, self.password, "password", "--password_file", _VARIABLE)


WEB_TYPES = (for_prediction(ModelArguments), WebArguments)
"""The dataclasses of `python -m glm_peft.web`."""


def parse_web_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, WebArguments]:
    """
    Parse the arguments of `python -m glm_peft.web [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    return parse_for_answering(argv, WEB_TYPES, WEB_WORDS)


def _read_password(file: str | None) -> str | None:
    """Return the password in a file, or else in the environment; `None` where there is neither."""
    if file is None:
        return os.environ.get(_VARIABLE) or None
    try:
        password = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"--password_file {file} cannot be read ({error}): give another file.") from None
    if not password:
        raise UserError(f"--password_file {file} is empty: write the password into it.")
    return password
