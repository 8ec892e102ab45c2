"""Which of this repository's modules does a user's command run through? By a tracer, not by reading.

    python runs/modules.py config=configs/photos32/dar.yaml      from distill.py to the first student update
    python runs/modules.py report=RUN                            from a run folder to its report

A module counts where at least one of its functions is called, at import or later, in any thread; bodies of modules
and classes alone do not count.
"""

import runpy
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IS_FUNCTION = 0x1  # CO_OPTIMIZED: bodies of modules and classes lack it


class Reached(BaseException):
    """The traced command has come to where its tracing ends."""


class Tracer:
    """The project's files whose functions are called, until `end` has been called and has returned."""

    def __init__(self, end: tuple[str, str] | None):
        self.end, self.seen, self.files = end, set[CodeType](), set[str]()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call":
            if code not in self.seen:
                self.seen.add(code)
                if code.co_flags & IS_FUNCTION and code.co_filename.startswith(str(ROOT)):
                    self.files.add(code.co_filename)
        elif event == "return" and self.end and code.co_name == self.end[1] and code.co_filename.endswith(self.end[0]):
            self.end = None
            raise Reached

    def run(self, call: Any) -> list[str]:
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            call()
        except (Reached, SystemExit):
            pass
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
        inside = {Path(name).relative_to(ROOT) for name in self.files}
        return sorted(path.as_posix() for path in inside if path.parts[0] in ("dmd_dar", "eval", "distill.py"))


def first_update(keys: list[str]) -> list[str]:
    """From distill.py to the first update of the student, whose end is that of its average."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["distill.py", *keys, f"out_dir={folder}/run", "steps=1", "log.wandb=disabled"]
        tracer = Tracer(("/ema.py", "update"))
        return tracer.run(lambda: runpy.run_path(str(ROOT / "distill.py"), None, "__main__"))


def to_report(keys: list[str]) -> list[str]:
    """From run folders to their report."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["eval.report", *keys, f"out={folder}/report", f"cache={folder}/cache", "n=64", "metrics=[offline]"]
        return Tracer(None).run(lambda: runpy.run_module("eval.report", None, "__main__"))


def main() -> None:
    sys.path.insert(0, str(ROOT))
    keys = sys.argv[1:]
    if not keys:
        raise SystemExit(__doc__)
    report = [key.replace("report=", "runs=[", 1) + "]" for key in keys if key.startswith("report=")]
    found = to_report(report + [key for key in keys if not key.startswith("report=")]) if report else first_update(keys)
    print("\n".join(found))
    print(f"{len(found)} modules")


if __name__ == "__main__":
    main()
