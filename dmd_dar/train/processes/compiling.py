"""Whether a run's networks are compiled: `launch.compile`, decided here and nowhere else."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dmd_dar.errors import UserError
from dmd_dar.messages import LOGGER
from dmd_dar.models.compiled import compile_network
from dmd_dar.models.shared_lora import LoraDenoiser, Plain
from dmd_dar.models.sit import SiT
from dmd_dar.train.disk.folder import RunFolder
from dmd_dar.train.processes.runtime import LaunchConfig, Runtime

LONG = 2000  # steps from which `auto` compiles a SiT on a CPU; docs/scaling.md says what it gains
LATER = 3  # turns after the first that are timed
Networks = Mapping[str, Plain | LoraDenoiser]


@dataclass
class FirstTurn:
    """Times the turns of a run whose networks are compiled, and says once what the compiling took."""

    networks: tuple[str, ...]
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around a turn."""
        began = time.monotonic()
        yield
        if len(self.seconds) > LATER:
            return
        self.seconds.append(time.monotonic() - began)
        if len(self.seconds) > LATER:
            first, *later = self.seconds
            LOGGER.info(
                f"compiled: {', '.join(self.networks)}; the first turn took {first:.1f} s, a later one"
                f" {min(later):.2f} s"
            )


def compile_run(cfg: Any, runtime: Runtime, folder: RunFolder | None, networks: Networks) -> FirstTurn | None:
    """Compile a run's networks, in place, where `launch.compile` says so; None where they stay as they are.

    What is decided for `auto` stands in the folder's configuration, and a run that is continued keeps to it: it would
    otherwise not go on bit for bit once `steps` has grown. Raises UserError where `on` cannot be done. Call it in every
    process, before the folder's `begin`.
    """
    launch, before = cfg.launch, runtime.of_main(held(folder))
    wanted = decided(launch, before, cfg.steps, runtime.device, networks)
    reason = refusal(launch, runtime) if wanted else ""
    if runtime.any(bool(reason)):
        reason = reason or "another process cannot"
        if launch.compile == "on":
            raise UserError(f"launch.compile = on: {reason}; set it to off")
        LOGGER.info(f"launch.compile = auto: the networks are not compiled: {reason}")
        wanted = False
    if folder is not None:
        folder.cfg["launch"]["compile"] = "on" if wanted else "off"
    if not wanted:
        return None
    for network in networks.values():
        compile_network(network)
    return FirstTurn(tuple(networks))


UNKNOWN, EAGER, COMPILED = 0, 1, 2  # numbers, which processes can exchange


def held(folder: RunFolder | None) -> int:
    """How the run in the folder has computed so far; one from before there was a choice did not compile."""
    if folder is None or not folder.resumed:
        return UNKNOWN
    return COMPILED if folder.before.get("launch", {}).get("compile") == "on" else EAGER


def decided(launch: LaunchConfig, before: int, steps: int, device: torch.device, networks: Networks) -> bool:
    """Whether to compile, if it can be done. `auto` is a function of the configuration: never of measured times."""
    if launch.compile != "auto":
        return launch.compile == "on"
    if before != UNKNOWN:
        return before == COMPILED
    plain = [network.network if isinstance(network, LoraDenoiser) else network for network in networks.values()]
    return device.type == "cpu" and steps >= LONG and all(isinstance(network, SiT) for network in plain)


def refusal(launch: LaunchConfig, runtime: Runtime) -> str:
    """Why the networks cannot be compiled here; empty where they can."""
    if runtime.sharded:
        return "with launch.sharding = fsdp2 the first step of a compiled network does not come to its end"
    try:
        torch.compile(torch.sin, dynamic=False)(torch.zeros(8, device=runtime.device))
    except Exception as error:  # of the compiler, of what it calls, or of an installation without either
        on_cpu = runtime.device.type == "cpu"
        compiler = "a C++ compiler such as g++ (CXX)" if on_cpu else "Triton and a C compiler (CC)"
        kept = "a folder of its own that can be read (TORCHINDUCTOR_CACHE_DIR)"
        return f"torch.compile does not work here ({first_line(error)}): it needs {compiler}, and {kept}"
    return ""


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
