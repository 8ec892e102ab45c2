"""The README.md of an exported network, in the form of the hub's model cards: of what the run folder says, no more."""

import html
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, hf_hub_url, metadata_load, try_to_load_from_cache

from dmd_dar.keys import key
from dmd_dar.models.hub import HUB_ID
from dmd_dar.models.pipeline_folder import base_of
from dmd_dar.models.saved import Denoiser, ModelCard
from dmd_dar.models.shared_lora import parameter_count
from dmd_dar.models.sit import SiT
from dmd_dar.train.disk import log

LEFT_OUT = ("log.", "launch.", "checkpoint.", "card.", "out_dir", "resume")  # how it was run, not what
NAMES_SHOWN = 20
FRONT = ["library_name", "license", "license_name", "license_link", "tags", "base_model"]  # in this order
UNKNOWN = "unknown"
UNCONVERGED = ", unconverged reference"  # behind a verdict against samples that are not those of the teacher's ODE
CHAPTERS = """# {name}

{what}

## Use

```python
import dmd_dar
pipe = dmd_dar.load_pipeline({use}
images = pipe(n=8, seed=0, output="pil")
```
{in_diffusers}
{facts}

## Measured

{measured}

## Configuration

{configuration}
"""

IN_DIFFUSERS = """
In diffusers, as the pipeline of its base:

```python
import dmd_dar  # first: it knows the scheduler, and the routers if there are any
from diffusers import DiffusionPipeline
{loading}
images = pipe({asked}, num_inference_steps={steps}, {off}).images
```

`{off}` leaves the pipeline's own guidance off: the student has learned its teacher's. Other numbers of steps are
refused, and so is guidance. {hub}
"""
USE = (
    '"FOLDER")  # this folder, or the hub id that it was uploaded to',
    '"FOLDER/adapter", base="TEACHER")  # of this folder',
)
LOADING = (
    'pipe = DiffusionPipeline.from_pretrained("FOLDER")',
    'pipe = dmd_dar.load_student(DiffusionPipeline.from_pretrained("TEACHER"), "FOLDER/adapter")',
)
HUB = "Of one repo on the hub diffusers wants `trust_remote_code=True` beside the id."


@dataclass(frozen=True)
class CardConfig:
    """What student/README.md says that the run does not know."""

    license: str = key(UNKNOWN, "of the weights, a licence id of the hub, such as apache-2.0; unknown: the teacher's")
    base_model: str = key("", "hub id of the teacher where teacher.path is a folder; empty: teacher.path, if it is one")

    def __post_init__(self) -> None:
        if self.base_model and not HUB_ID.fullmatch(self.base_model):
            raise ValueError("base_model must be a hub id, OWNER/NAME")


def readme(run: Path, network: Denoiser, card: ModelCard, digest: str, factor: int = 1, alone: bool = False) -> str:
    """The text for the network of `run`, a run folder, whose config.yaml and log.jsonl it quotes.

    factor: pixels for each of the network's cells along one side. alone: the network's adapter is there alone.
    """
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text()) if file.is_file() else {}
    used = {"use": USE[alone], "in_diffusers": _in_diffusers(network, card, factor, alone)}
    front = _front(config, network, card).to_yaml(original_order=FRONT)
    return f"---\n{front}\n---\n\n{_body(run, config, network, card, digest, used)}"


def _front(config: dict[str, Any], network: Denoiser, card: ModelCard) -> ModelCardData:
    routed = network.routing.query != "residual"
    tags = ["diffusion", *(["few-step", "distillation"] if card.rungs else []), *(["dar"] if routed else [])]
    told = _licence(config)
    return ModelCardData(
        library_name="dmd_dar",
        license=told["license"],
        license_name=told.get("license_name"),
        license_link=told.get("license_link"),
        tags=tags,
        base_model=_base(config) or None,
    )


def _base(config: dict[str, Any]) -> str:
    """The teacher's hub id; empty where none is known."""
    path = _teacher(config)
    public = HUB_ID.fullmatch(path) and not Path(path).exists()  # a local path means nothing on the hub
    return str((config.get("card") or {}).get("base_model") or (path if public else ""))


def _licence(config: dict[str, Any]) -> dict[str, str]:
    """The licence's entries of the front matter: the run's own word, else what the teacher's README.md says."""
    told = str((config.get("card") or {}).get("license", UNKNOWN))
    if told != UNKNOWN:
        return {"license": told}
    theirs = _teachers_front(config)
    names = ("license", "license_name", "license_link")
    held = {"license": UNKNOWN} | {name: theirs[name] for name in names if isinstance(theirs.get(name), str)}
    if (link := held.get("license_link", "")) and "://" not in link:
        del held["license_link"]
        if base := _base(config):
            held["license_link"] = hf_hub_url(base, link)
    return held


def _teachers_front(config: dict[str, Any]) -> dict[str, Any]:
    """The front matter of the README.md in the teacher's folder or in the hub's cache; nothing where there is none."""
    path, revision = _teacher(config), (config.get("teacher") or {}).get("revision")
    file: Any = Path(path, "README.md")
    if Path(path).name == "transformer" and not file.is_file():
        file = Path(path).parent / "README.md"
    if path and not Path(path).exists() and HUB_ID.fullmatch(path):
        file = try_to_load_from_cache(path, "README.md", revision=revision or None)
    try:
        return (metadata_load(file) or {}) if path and isinstance(file, str | Path) else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _teacher(config: dict[str, Any]) -> str:
    return str((config.get("teacher") or {}).get("path", ""))


def _public(value: Any) -> Any:
    """Of a path of this machine, absolute or to what is there, the last part; anything else, hub ids too, as it is."""
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    local = isinstance(value, str) and "/" in value and (os.path.isabs(value) or os.path.exists(value))
    return os.path.basename(os.path.abspath(value)) if local else value


def _guidance(origin: dict[str, Any]) -> str | None:
    if "guidance_scale" not in origin:
        return None
    rule = origin.get("guidance", {})  # of guidance.Rule.facts
    parts = [f"{origin['guidance_scale']:g}", "rescaled to the norm of cond" if rule.get("form") == "rescaled" else ""]
    parts += ["at t from {:g} to {:g}".format(*rule["interval"])] if "interval" in rule else []
    return ", ".join([*filter(None, parts), "of the teacher; none at sampling"])


def _sizes(sizes: list[list[int]] | None) -> str | None:
    """Of the images that it was trained at, where the run names them."""
    named = ", ".join(f"{height} x {width}" for height, width in sizes or ())
    return f"{named} pixels (height x width)" if named else None


def _body(
    run: Path, config: dict[str, Any], network: Denoiser, card: ModelCard, digest: str, used: dict[str, str]
) -> str:
    routing, steps = network.routing, len(card.rungs)
    kind = "plain residual additions" if routing.query == "residual" else f"routed, query {routing.query}"
    what = f"A few-step diffusion transformer, {steps} network calls an image" if steps else "A diffusion transformer"
    shape = " x ".join(map(str, network.shape))
    origin, licence = card.origin, _licence(config)
    named = licence.get("license_name", licence["license"])
    note = " (that of the teacher applies)" if named == UNKNOWN and steps else ""
    facts = {
        "Teacher": _plain(_public(_teacher(config))) + f", SHA-256 `{origin['teacher']}`"
        if "teacher" in origin
        else None,
        "Network": f"{shape}, {parameter_count(network)} parameters, {kind}; SHA-256 `{digest}`",
        "Sizes": _sizes(origin.get("sizes")),
        "Rungs": ", ".join(f"{t:g}" for t in card.rungs) + f" (1 is noise), sampler {card.sampler}" if steps else None,
        "Guidance": _guidance(origin),
        "Steps of training": origin.get("steps"),
        "Labels": _names(card.label_names) or f"{network.num_conditions}, without names",
        "License": _plain(named) + note,
    }
    return CHAPTERS.format(
        name=_plain(run.resolve().name),
        what=f"{what}, made by dmd_dar.",
        **used,
        facts="\n".join(f"- **{name}**: {fact}" for name, fact in facts.items() if fact is not None),
        measured=_measured(run, digest, origin.get("steps")),
        configuration=_table(("key", "value"), _flat(config)) or "No configuration is recorded.",
    )


def _in_diffusers(network: Denoiser, card: ModelCard, factor: int, alone: bool) -> str:
    """How the pipeline of its base is called for what it was trained at; nothing of a student that has none."""
    base = base_of(card.origin)
    if not card.rungs or isinstance(network, SiT) or base is None:
        return ""
    if alone and not hasattr(network.transformer, "load_lora_adapter"):
        return ""
    unguided = network.family.unguided(network.transformer.config, network.fixed)
    asked, off = "[0]", f"{unguided.argument}={unguided.value:g}"
    if network.prompts is not None:
        sizes = card.origin.get("sizes") or [[factor * cells for cells in network.shape[1:]]]
        asked = '"a prompt", height={}, width={}'.format(*sizes[0])
        known, tokens = network.family.pipelines.get(base.index.get("_class_name", "")), network.prompts.tokens
        if known is not None and tokens not in (0, known.tokens):
            asked += f", max_sequence_length={tokens}"
    hub = "" if alone else HUB
    return IN_DIFFUSERS.format(loading=LOADING[alone], asked=asked, steps=len(card.rungs), off=off, hub=hub)


def _plain(text: Any) -> str:
    """One line that means itself in Markdown and in HTML."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = re.sub(r"([\\`*_{}\[\]()#!|~$])", r"\\\1", html.escape(line, quote=False))
    return line.replace("://", "&#58;//")


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(_plain, names[:NAMES_SHOWN]))
    return shown + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of all that decided the result; of local paths the last part, as others will read it."""
    rows = []
    for name, value in values.items():
        path = f"{prefix}{name}"
        if path.startswith(LEFT_OUT) or f"{path}." in LEFT_OUT:
            continue
        rows += _flat(value, f"{path}.") if isinstance(value, dict) else [(path, _public(value))]
    return rows


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [f"| {_plain(name)} | {_plain(value)} |" for name, value in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _measured(run: Path, digest: str, steps: int | None) -> str:
    """The log's record of the network's step, and what a report beside the run says of this very network."""
    parts = []
    if records := [r for r in log.read(run / "log.jsonl") if steps is None or r.get("step", 0) <= steps]:
        last = {name: value for name, value in records[-1].items() if name != "steps_per_second"}
        rows = [(name, f"{value:.6g}" if isinstance(value, float) else value) for name, value in last.items()]
        parts += ["The training log at this step, or the last before it:", _table(("name", "value"), rows)]
    for file in (run / "report.json", run / "report" / "report.json", run.parent / "report" / "report.json"):
        if rows := _report(file, digest):
            parts += [f"Against the teacher, from `{_plain(file.name)}`:", _table(("name", "value"), rows)]
            break
    else:
        parts += ["No report of its images was at hand when this was written; `python -m eval.report` makes one."]
    return "\n\n".join(parts)


def _report(file: Path, digest: str) -> list[tuple[str, Any]]:
    """What the report says of the images that this network made; nothing where it has none."""
    try:
        report = json.loads(file.read_text())
        for row in report["sets"]:
            if row.get("facts", {}).get("network") == digest:
                against = row["against"]["teacher"]
                rows = [("images", row["images"]), ("verdict", verdict_on_detail(against, has_converged(report)))]
                if colour := against.get("colour"):
                    rows += [("verdict on colour", colour["verdict"]["word"])]
                value, low, high = (against["gain_db"]["HF"][name] for name in ("value", "low", "high"))
                return [*rows, ("HF gain, dB, 95 % over images", f"{value:+.2f} from {low:+.2f} to {high:+.2f}")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return []


def has_converged(report: dict[str, Any]) -> bool:
    """Whether the teacher's samples in a report.json are those of its ODE; True where it does not tell."""
    return (report.get("discretisation") or {}).get("converged") is not False


def verdict_on_detail(against: dict[str, Any], converged: bool) -> str:
    """The word of a comparison with the teacher in a report.json, and whether its samples are not those of its ODE."""
    return against["verdict"]["word"] + ("" if converged else UNCONVERGED)
