"""Run the toolkit's own commands, and read what they say while they run."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from glm_peft.errors import UserError

ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "1"}  # told at once, but a bar's steps once a second
_USER_ERROR = 2
_CHUNK = 1 << 16


def command_line(words: Sequence[str]) -> list[str]:
    """Return what starts a command of this package in this Python."""
    return [sys.executable, "-m", "glm_peft", *words]


async def run_command(words: Sequence[str]) -> AsyncIterator[str]:
    """
    Run a command, and yield all that it has printed so far, each time that there is more.

    Closing the iterator ends the command.

    Args:
        words: the command's name and its flags.

    Raises:
        UserError: the command's own, or that it failed.
    """
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*command_line(words), env=os.environ | ENVIRONMENT, **pipes)
    complaints = asyncio.create_task(process.stderr.read())
    said = b""
    try:
        while chunk := await process.stdout.read(_CHUNK):
            said += chunk
            yield said.decode(errors="replace")
        code, complaint = await process.wait(), (await complaints).decode(errors="replace")
    finally:
        complaints.cancel()
        with suppress(ProcessLookupError):
            process.kill()
    if code == _USER_ERROR or "Traceback (most recent call last)" in complaint:
        raise UserError(last_line(complaint) or f"glm-peft {words[0]} ended with the exit code {code}.")


def last_line(log: str) -> str:
    """Return the last line that says something, without the word that marks it as an error."""
    lines = [line for line in log.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1].strip().removeprefix("error: ") if lines else ""
