"""The classes that a student's model_index.json names, in diffusers' form; the package answers for them, dmd_dar.NAME.

diffusers looks them up in the imported package and asks that for the classes they are of, `ModelMixin` and so on.
"""

import importlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.models.hub import read_json, resolve, snapshot
from dmd_dar.models.pipeline_folder import NAMED, PACKAGE
from dmd_dar.models.student_scheduler import StudentScheduler
from dmd_dar.routing.attach import load_routed
from dmd_dar.routing.folder import FORM, class_of

LIBRARIES = ("diffusers", "transformers")  # whose classes a named part may be of
PASSED_ON = ("device_map", "max_memory", "quantization_config", "variant")  # to a part that is a network


class BasePart(ModelMixin):
    """Stands in model_index.json for a part of a base on the hub: loading it gives that part, of its own class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, torch_dtype: Any = None, **options: Any) -> Any:
        """The base's own part, from the hub or its cache; of diffusers' options the dtype and PASSED_ON count.

        Raises MissingWeightsError, DamagedFileError or UserError naming the file that names it.
        """
        file = Path(pretrained_model_name_or_path) / NAMED
        named = read_json(file)
        try:
            (library, name), base, part = named["class"], str(named["base"]), str(named["part"])
            if library not in LIBRARIES:
                raise ValueError(f"{library} is none of {', '.join(LIBRARIES)}")
            kind: Any = getattr(importlib.import_module(library), str(name))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFileError(f"{file} names no part of a base: {error!r}") from error
        is_network = issubclass(kind, nn.Module)
        dtype = {"torch_dtype" if library == "diffusers" else "dtype": torch_dtype}
        given = {**(dtype if torch_dtype is not None else {}), **{name: options.get(name) for name in PASSED_ON}}
        given = {name: value for name, value in given.items() if value is not None} if is_network else {}
        try:
            return kind.from_pretrained(base, subfolder=part, revision=named.get("revision") or None, **given)
        except (OSError, ValueError) as error:
            fault = f"{file}: {base} did not give its {part} ({' '.join(str(error).split())[:200]})"
            raise UserError(f"{fault}; fetch it, or pass {part}=... to from_pretrained") from error


@cache
def routed_class(name: str) -> Any:
    """A subclass of diffusers' class of that name, and called like it, whose from_pretrained loads a routed student.

    Blocks, lists and configuration are the class's own. Raises AttributeError where diffusers has no such model.
    """
    root = class_of(name)
    if root is None:
        raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")

    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, subfolder: str = "", torch_dtype: Any = None, **options: Any
    ) -> Any:
        """The routed transformer of a student's folder or hub id, its routers in float32 whatever `torch_dtype` is.

        Raises what `load_routed` does, and UserError for another class, for quantisation and for several devices.
        """
        if options.get("quantization_config") is not None:
            raise UserError("quantization_config: a routed transformer is not quantised as it is loaded; leave it out")
        folder = resolve(str(pretrained_model_name_or_path), str(options.get("revision") or "")) / subfolder
        device = _one_device(options.get("device_map"))
        _fetch_rest(folder)
        model = load_routed(folder)
        if type(model).__name__ != cls.__name__:
            raise UserError(f"{folder} holds a {type(model).__name__}, no {cls.__name__}")
        model.__class__ = cls
        model = model if device is None else model.to(device)
        return model if torch_dtype is None else model.to(torch_dtype)

    body = {"__module__": PACKAGE, "__doc__": f"diffusers' {name} with routers."}
    return type(name, (root,), {**body, "from_pretrained": classmethod(from_pretrained)})


def _one_device(device_map: Any) -> torch.device | None:
    device: Any = device_map.get("") if isinstance(device_map, dict) and len(device_map) == 1 else device_map
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        fault = f"device_map = {device_map}: a routed transformer goes to one device"
        raise UserError(f'{fault}; name it, device_map="cuda", or leave it out') from error


def _fetch_rest(folder: Path) -> None:
    """What diffusers' download of a pipeline leaves out: routed weights, whose name it does not look for."""
    top = folder.absolute().parent
    if (folder / FORM).is_file() or top.parent.name != "snapshots":
        return
    held = top.parents[1]
    repo = held.name.removeprefix("models--").replace("--", "/", 1)
    snapshot(repo, top.name, (f"{folder.name}/*",), held.parent)


def class_named(name: str) -> Any:
    """What `dmd_dar.NAME` is, of all that diffusers asks for. Raises AttributeError for other names."""
    known = {kind.__name__: kind for kind in (ModelMixin, SchedulerMixin, BasePart, StudentScheduler)}
    return known[name] if name in known else routed_class(name)


for _own in (BasePart, StudentScheduler):
    _own.__module__ = PACKAGE  # under which save_pretrained of a pipeline writes them down
