"""The machine that measured something and the versions of what computed it, for reports and benchmarks alike."""

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

NOT_INSTALLED = "not installed"
PROCESSORS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """Name of the GPU or processor, torch's threads, CPU cores and memory."""

    device: str
    threads: int
    cores: int
    memory_gib: int

    @staticmethod
    def of(device: torch.device) -> "Machine":
        """The machine as it is now, computing on `device`."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            threads=torch.get_num_threads(),
            cores=os.cpu_count() or 1,
            memory_gib=round(memory / 2**30),
        )


def processor() -> str:
    """The processor's name as Linux knows it, elsewhere its architecture."""
    for line in PROCESSORS.read_text().splitlines() if PROCESSORS.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The version of each package, or that it is not installed."""
    installed = {}
    for name in packages:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = NOT_INSTALLED
    return installed
