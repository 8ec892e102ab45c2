"""The command `dmd-dar`: everything that the package does, under one name. The top floor, which alone imports eval."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from dmd_dar import messages
from dmd_dar.extras import MissingPackageError
from dmd_dar.messages import LOGGER

COMMANDS = {
    "distill": ("dmd_dar.distillation.job", "distil a few-step student from a teacher"),
    "pretrain": ("dmd_dar.pretrain", "train a many-step diffusion transformer"),
    "sample": ("dmd_dar.sample", "make images with a trained student"),
    "push": ("dmd_dar.push", "upload a student to the Hugging Face hub"),
    "pairs": ("dmd_dar.pairs", "make teacher trajectories ahead of training"),
    "encode": ("dmd_dar.encode", "encode images into latents, or prompts into embeddings, ahead of training"),
    "rungs": ("dmd_dar.rungs", "choose the student's times by the teacher's spectrum"),
    "plan": ("dmd_dar.plan", "say what a distillation needs in memory, without any weights"),
    "diagnostics": ("dmd_dar.diagnostics.command", "look into a network: magnitudes, gradients, routing over t"),
    "layout": ("dmd_dar.routing.layout.command", "show which sources each router reads, and the traffic"),
    "report": ("dmd_dar.eval.report", "measure whether students kept their teacher's fine detail"),
    "compare": ("dmd_dar.eval.compare", "compare two arms over several training seeds"),
    "teacher": ("dmd_dar.eval.teacher", "judge whether a teacher is good enough to distil"),
    "sensitivity": ("dmd_dar.eval.sensitivity", "show what each metric can see"),
    "statistics": ("dmd_dar.eval.statistics", "write the FID statistics of a folder of images"),
    "weights": ("dmd_dar.eval.weights", "list the pretrained weights that metrics need"),
}


def listing() -> str:
    """What `dmd-dar --help` prints: one line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    keys = "dmd-dar COMMAND --help lists the keys of a command, with their units and defaults"
    return "\n".join(["usage: dmd-dar COMMAND [key=value ...]", "", *lines, "", keys])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names, with the words after it.

    Exit code 2 for a word that names none, and for a command whose optional packages are not installed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "help"):
        print(listing())
        return
    messages.show()
    name, *rest = words
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.0)[0]
        LOGGER.error(f"error: {name}: no such command; nearest: {nearest}. dmd-dar --help lists all")
        raise SystemExit(2)
    try:
        command = importlib.import_module(COMMANDS[name][0])
    except MissingPackageError as error:
        LOGGER.error(f"error: {error}")
        raise SystemExit(2) from error
    command.main(rest)
