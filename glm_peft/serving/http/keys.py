"""The key that clients must send."""

import os
import shlex
from pathlib import Path

from glm_peft.errors import UserError

KEY_VARIABLE = "GLM_PEFT_API_KEY"


def read_key(file: str | None) -> tuple[bytes, str] | None:
    """
    Read the key that clients must send, of a file or else of the environment.

    Returns:
        The key, and what a shell puts in its place; `None` where there is none.

    Raises:
        UserError: the file cannot be read, or there is no key or more than one word in it.
    """
    if file is not None:
        try:
            words, where, shown = (
                Path(file).read_bytes().split(),
                f"--api_key_file {file}",
                f"$(cat {shlex.quote(file)})",
            )
        except OSError as error:
            raise UserError(f"--api_key_file {file} cannot be read ({error.strerror}): give another file.") from None
    elif KEY_VARIABLE in os.environ:
        words, where, shown = os.fsencode(os.environ[KEY_VARIABLE]).split(), KEY_VARIABLE, f"${KEY_VARIABLE}"
    else:
        return None
    if len(words) != 1:
        raise UserError(f"{where} has {len(words)} words: a key is one word, such as `openssl rand -hex 32` writes.")
    return words[0], shown
