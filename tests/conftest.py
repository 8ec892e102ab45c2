"""One thread for each test process: two of them share the machine, and results do not depend on a thread count."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

torch.set_num_threads(1)
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

from dmd_dar import messages  # noqa: E402
from tests.stages import Recorder, marked  # noqa: E402

messages.show()  # as a command does, so that tests read on stderr what its user reads


def pytest_configure(config) -> None:
    file = os.environ.get("RECORD_STAGES")
    if file and not hasattr(config, "workerinput"):  # one process of several writes
        config.pluginmanager.register(Recorder(Path(file).resolve()))


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if cells := marked(item):
            item.user_properties.append(("stages", cells))
