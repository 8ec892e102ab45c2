"""The command `dmd-dar`: what it lists, what it starts and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from dmd_dar import commands

ROOT = Path(__file__).parents[1]


def test_the_listing_has_one_line_for_each_command(capsys):
    commands.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(commands.COMMANDS) and all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("argv", [[], ["-h"], ["help"]])
def test_other_ways_to_ask_for_the_listing(argv, capsys):
    commands.main(argv)
    assert capsys.readouterr().out == commands.listing() + "\n"


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_says_what_it_takes(name, capsys):
    commands.main([name, "--help"])
    text = capsys.readouterr().out
    assert f"python {'distill.py' if name == 'distill' else '-m '}" in text and "default" in text


@pytest.mark.parametrize(("word", "nearest"), [("reprot", "report"), ("destill", "distill"), ("sampel", "sample")])
def test_a_word_that_names_no_command_is_refused(word, nearest, capsys):
    with pytest.raises(SystemExit, match="2"):
        commands.main([word, "out=out"])
    assert capsys.readouterr().err == f"error: {word}: no such command; nearest: {nearest}. dmd-dar --help lists all\n"


def test_a_command_refuses_as_its_module_does(capsys):
    with pytest.raises(SystemExit, match="2"):
        commands.main(["sample", "studnt=out"])
    assert "unknown key; nearest valid key: student" in capsys.readouterr().err


def test_the_package_is_the_command():
    """In a fresh process, which for a listing loads nothing heavy."""
    code = "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('dmd_dar', run_name='__main__');"
    code += "heavy = {'torch', 'numpy', 'diffusers', 'yaml'} & sys.modules.keys(); assert not heavy, heavy"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout == commands.listing() + "\n", run.stderr
    word = [sys.executable, "-m", "dmd_dar", "smaple"]
    run = subprocess.run(word, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "nearest: sample" in run.stderr
