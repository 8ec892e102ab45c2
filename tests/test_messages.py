"""Messages of the package reach the screen bare and once; a program that uses it as a library is asked for nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from dmd_dar import messages
from dmd_dar.messages import LOGGER

ROOT = Path(__file__).parents[1]
PROGRAM = """
import logging
logging.basicConfig(format="mine: %(message)s", level=logging.WARNING)
from dmd_dar import messages
messages.LOGGER.info("unwanted")
messages.LOGGER.warning("wanted")
messages.show()
messages.LOGGER.warning("a command's")
"""


def test_a_message_is_written_bare_and_once_to_the_stderr_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    messages.show()
    messages.show()
    LOGGER.info("40 % of {it}\nand the rest")
    assert capsys.readouterr() == ("", "40 % of {it}\nand the rest\n")


def test_a_program_decides_by_logging_until_a_command_runs() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("", "mine: wanted\na command's\n")
