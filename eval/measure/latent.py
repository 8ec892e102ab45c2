"""Spectra of a latent model's latents, channel by channel as they are: what its decoder may hide or add.

Legend: N images of a set, C channels of h x w latent cells. Frequencies are in cycles per cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from dmd_dar.spectrum import LEAST_CELLS, band_edges

from ..metrics.intervals import Interval
from ..metrics.spectrum import BAND_NAMES, Channel, Spectrum, band_gains, gain_curve, labelled_pair, spectrum_of
from ..samples.facts import SetFacts
from ..samples.images import share_of
from ..samples.parallel import Processes, Rows, grouped, ungrouped
from ..samples.sets import ImageSet
from .ledger import Ledger
from .nulls import lsd_beside_null
from .one_set import by_prompt
from .results import Against, Bands, LatentComparison, LatentResult, LatentRow, Reference

BATCH = 256


@dataclass(frozen=True)
class LatentSpectra:
    """The spectra of one set's latents: `whole` is the mean over channels."""

    source: ImageSet
    whole: Spectrum
    channels: list[Spectrum]

    @staticmethod
    def of(one: ImageSet, size: tuple[int, int], rows: Rows) -> "LatentSpectra":
        """From the `rows_of` its latents (h, w)."""
        whole, *channels = (Spectrum.of(size, part) for part in ungrouped(rows).values())
        return LatentSpectra(one, whole, channels)


def read_latents(sets: Sequence[ImageSet], processes: Processes | None = None) -> dict[str, Rows]:
    """The rows of the latents of every set that has large enough ones, shared out among the processes."""
    processes, rows = processes or Processes(), {}
    for one in sets:
        if one.latents is not None and min(one.latents.shape[-2:]) >= LEAST_CELLS:
            rows[one.name] = processes.joined(one.count, partial(rows_of, one.latents))
    return rows


def rows_of(latents: Tensor, rank: int = 0, world: int = 1) -> Rows:
    """The mean over channels and every channel of latents (N, C, h, w): the share of process `rank` of `world`."""
    start, stop = share_of(len(latents), rank, world)
    batches = latents[start:stop].split(BATCH)
    channels: tuple[Channel, ...] = ("all", *range(latents.shape[1]))
    return grouped({str(c): spectrum_of(batches, channel=c, first=start).rows for c in channels})


def latent_spectra(
    sets: Sequence[ImageSet],
    reference: ImageSet,
    real: ImageSet | None,
    seed: int,
    ledger: Ledger,
    read: dict[str, Rows] | None = None,
) -> LatentResult | None:
    """Every set that has latents against those of `reference` ("teacher") and of `real`; None for models of pixels.

    read: of `read_latents`, where they were read before. Latents of fewer than 16 cells a
    side have no spectrum, which `ledger` then tells.
    """
    if reference.latents is None:
        return None
    height, width = reference.latents.shape[-2:]
    if min(height, width) < LEAST_CELLS:
        fault = f"latents of {height} x {width} cells; a spectrum needs {LEAST_CELLS} a side"
        ledger.add("latent spectrum", "", fault, requested=False)
        return None
    read = read_latents(sets) if read is None else read
    measured = [LatentSpectra.of(one, (height, width), read[one.name]) for one in sets if one.latents is not None]
    targets: dict[Reference, str | None] = {"teacher": reference.name}
    targets["real"] = real.name if real is not None and real.latents is not None else None
    by_name = {one.source.name: one for one in measured}
    null = next((one for one in measured if one.source.role == "null"), None)

    def compared(one: LatentSpectra, key: Reference) -> LatentComparison | None:
        other = by_name.get(targets[key] or "")
        if other is None or other is one:
            return None
        return against(one, other, null if key == "real" and one is not null else None, seed)

    return LatentResult(
        channels=reference.latents.shape[1],
        size=(height, width),
        bands=Bands(BAND_NAMES, tuple(band_edges(height, width))),
        teacher=reference.name,
        real=targets["real"],
        sets=[described(one, Against(compared(one, "teacher"), compared(one, "real"))) for one in measured],
    )


def described(one: LatentSpectra, compared: Against[LatentComparison]) -> LatentRow:
    """What is measured on a set alone, with its comparisons."""
    slope, slope_hf = one.whole.slopes
    return LatentRow(
        name=one.source.name,
        role=one.source.role,
        images=one.source.count,
        facts=SetFacts(seed=one.source.facts.seed),
        frequencies=one.whole.frequencies.tolist(),
        power=one.whole.power.tolist(),
        power_by_channel=[channel.power.tolist() for channel in one.channels],
        hfer=one.whole.hfer,
        slope=slope,
        slope_hf=slope_hf,
        against=compared,
    )


def against(one: LatentSpectra, other: LatentSpectra, second: LatentSpectra | None, seed: int) -> LatentComparison:
    """Band gains of all channels pooled, the HF gain of each, and the curve and distance of their mean spectra.

    second: another set of the other's source, for the distance's null; without it, halves of the other.
    """
    paired, rng = one.source.paired and other.source.paired, np.random.default_rng(seed)
    sets = one.source, other.source

    def gains(ours: Spectrum, theirs: Spectrum) -> dict[str, Interval]:
        pair = labelled_pair((ours.energies, theirs.energies), [each.classes for each in sets], paired)
        return band_gains(*(by_prompt(*each) for each in zip(pair, sets, strict=True)), paired=paired, rng=rng)

    curve, *_ = gain_curve(one.whole, other.whole)
    return LatentComparison(
        paired=paired,
        gain_db=gains(one.whole, other.whole),
        hf_gain_db_by_channel=[gains(*pair)["HF"] for pair in zip(one.channels, other.channels, strict=True)],
        gain_curve_db=curve.tolist(),
        **vars(lsd_beside_null(one.whole, other.whole, None if second is None else second.whole, seed)),
    )
