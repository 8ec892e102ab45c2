"""A quantity has one definition: every command that tells it tells the same number of the same images."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dmd_dar import spectrum
from dmd_dar.data.images import to_model_range
from dmd_dar.train.watch.health import samples_of, signals
from eval import sensitivity, teacher
from eval.measure.latent import latent_spectra
from eval.measure.ledger import Ledger
from eval.measure.pair import Compared, jsonable, measure
from eval.metrics import features, structure
from eval.metrics.colour import colour_values, colour_values_of, colour_verdict, groups_of
from eval.metrics.power_map import sector_means, whole_plane
from eval.metrics.spectrum import band_gain_db
from eval.samples.sets import ImageSet
from eval.study import endpoint as seeds
from eval.study import forest
from eval.study.differences import compare_arms
from eval.study.sampled import SampledNetwork, SampledSet, Study, Yardstick, against_teacher
from tests.eval.study.rows import network_row

EACH = 6  # images of each class


def eight_bit(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def white(levels: float, images: Tensor, seed: int = 0) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return eight_bit(images / 255 + levels / 255 * noise)


SPOILED = {
    "blurred": lambda x: eight_bit(torch.nn.functional.avg_pool2d(x / 255, 3, 1, 1)),
    "without detail": lambda x: torch.full_like(x, 128),
    "one image a class, with noise": lambda x: white(40, x[: x.shape[0] // EACH].repeat_interleave(EACH, 0)),
    "grey noise": lambda x: white(30, torch.full_like(x, 128)),
}


@pytest.fixture(scope="module")
def photographs(crops) -> dict[int, tuple[Tensor, Tensor]]:
    return {size: crops(size, EACH, 3) for size in (32, 64)}


def as_set(name: str, images: Tensor, labels: Tensor) -> ImageSet:
    return ImageSet(name, images, labels, "teacher" if name == "teacher" else "student", paired=True)


def reported(sets: dict[str, Tensor], theirs: Tensor, labels: Tensor) -> dict[str, dict]:
    """What a report says of sets of images against the teacher's."""
    students = [as_set(name, images, labels) for name, images in sets.items()]
    result = jsonable(measure(Compared(students, as_set("teacher", theirs, labels))))
    return {row["name"]: row["against"]["teacher"] for row in result["sets"]}


@pytest.fixture(scope="module")
def reports(photographs) -> dict[int, dict[str, dict]]:
    return {
        size: reported({name: spoil(theirs) for name, spoil in SPOILED.items()}, theirs, labels)
        for size, (theirs, labels) in photographs.items()
    }


def compared(images: Tensor, theirs: Tensor, labels: Tensor) -> dict:
    """What the comparison of runs says of them."""
    ours, teacher = (SampledSet.of(as_set("x", one, labels)) for one in (images, theirs))
    return jsonable(against_teacher(ours, Yardstick(teacher, 0.0), "student"))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", SPOILED)
def test_a_report_and_a_comparison_of_runs_agree(photographs, reports, size, name):
    theirs, labels = photographs[size]
    report, runs = reports[size][name], compared(SPOILED[name](theirs), theirs, labels)
    assert runs["gain_db"] == pytest.approx({band: gain["value"] for band, gain in report["gain_db"].items()}, abs=1e-9)
    assert (runs["gain_db"]["B0"] is None) == (size == 32)
    assert [runs["lsd"], runs["lsd_signed"]] == pytest.approx([report["lsd"], report["lsd_signed"]], abs=1e-9)
    assert runs["hf_kurtosis_ratio"] == pytest.approx(report["hf_kurtosis_ratio"]["value"], abs=1e-9)
    assert runs["flat_noise_db"] == pytest.approx(report["flat_noise_db"]["value"], abs=1e-9)
    assert runs["diversity_ratio"] == pytest.approx(report["diversity_ratio"]["pixels"]["least"], abs=1e-9)
    assert runs["fd_wavelet"]["value"] == pytest.approx(report["fd_wavelet"]["value"], rel=1e-6)


@pytest.mark.parametrize("size", [32, 64])
def test_noise_upon_one_image_is_no_diversity(photographs, size):
    """Ten times the same image of a class: what white noise of 40 levels makes of it stays near the pooled noise."""
    theirs, labels = photographs[size]
    found = compared(SPOILED["one image a class, with noise"](theirs), theirs, labels)["diversity_ratio"]
    pooled = 32 / size  # averaging over (size / 32)^2 pixels leaves this share of the noise
    spread = min(SampledSet.of(as_set("x", theirs, labels)).diversity.values())
    assert found < 1.3 * pooled * 40 / 255 * math.sqrt(2 * 3 * 32 * 32) / spread


def test_the_floor_is_that_of_each_band_and_HF_their_sum(photographs, reports):
    flat = SPOILED["without detail"](photographs[64][0])
    bands = spectrum.compared_powers(flat / 255).bands
    assert bands[0].tolist() == pytest.approx([1e-9] * 5 + [2e-9], rel=1e-6)
    assert spectrum.compared_powers(flat[:, :, :32, :32] / 255).bands[0, 0].isnan()
    hf = reports[64]["without detail"]["gain_db"]["HF"]["value"]
    energy = spectrum.band_energies(photographs[64][0] / 255).mean(0)[3:].sum().item()
    assert hf == pytest.approx(10 * math.log10(2e-9 / energy), abs=1e-4)


@pytest.mark.parametrize("name", ["blurred", "without detail", "grey noise"])
def test_the_health_of_a_run_reads_the_reports_gain_and_distance(photographs, reports, name):
    theirs, labels = photographs[32]
    images = SPOILED[name](theirs)
    off_grid = 0.3 / 127.5 * torch.rand(theirs.shape, generator=torch.Generator().manual_seed(1))  # rounded away
    ours, teachers = (samples_of(x, labels, x) for x in (to_model_range(one) + off_grid for one in (images, theirs)))
    found, report = signals(ours, teachers), reports[32][name]
    assert found["hf_gain"] == pytest.approx(report["gain_db"]["HF"]["value"], abs=1e-6)
    assert found["log_spectral_distance"] == pytest.approx(report["lsd"], abs=1e-6)


@pytest.mark.parametrize("reference", ["photographs", "without heavy tails"])
def test_the_sensitivity_of_metrics_is_that_of_a_reports_metrics(photographs, reports, reference):
    theirs, labels = photographs[64]
    images, report = SPOILED["blurred"](theirs), reports[64]["blurred"]
    if reference != "photographs":
        theirs = white(20, torch.full_like(theirs, 128), seed=5)
        report = reported({"student": images}, theirs, labels)["student"]
    wavelet = [features.wavelet()]
    found = sensitivity.metrics(*(sensitivity.measure(one, wavelet) for one in (images, theirs)))
    pairs = {
        "gain HF, dB": report["gain_db"]["HF"]["value"],
        "lsd, dB": report["lsd"],
        "hfer difference": report["hfer_difference"]["value"],
        "hf_kurtosis ratio": report["hf_kurtosis_ratio"]["value"],
        "gradient kurtosis ratio": report["gradient_kurtosis_ratio"]["value"],
        "parent-child difference": report["parent_child_difference"]["value"],
        "flat noise, dB": report["flat_noise_db"]["value"],
        "fd_wavelet": report["fd_wavelet"]["value"],
    }
    for metric, value in pairs.items():
        assert found.get(metric) == (None if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)), metric
    assert ("hf_kurtosis ratio" in found) == (reference == "photographs")


def test_a_verdict_from_images_has_the_intervals_of_a_report(photographs):
    """Classes are known of one set only: both commands draw from all images, or of pairs from the same classes."""
    theirs, labels = photographs[32]
    images = SPOILED["blurred"](theirs)
    sets = [dataclasses.replace(as_set("student", images, labels), paired=False)]
    result = jsonable(measure(Compared(sets, ImageSet("teacher", theirs, None, "teacher", False))))
    row = next(row for row in result["sets"] if row["name"] == "student")["against"]["teacher"]
    gain = band_gain_db(images, theirs, labels=labels)["HF"]
    assert dataclasses.astuple(gain) == pytest.approx(
        [row["gain_db"]["HF"][end] for end in ("value", "low", "high")], abs=1e-9
    )
    word = structure.verdict(images, theirs, labels=labels)
    assert dataclasses.asdict(word) == row["verdict"]
    found = colour_values(colour_values_of(images), colour_values_of(theirs), groups_of(labels, None, None))
    assert {name: one["value"] for name, one in row["colour"]["measures"].items()} == pytest.approx(found, abs=1e-6)
    assert list(colour_verdict(images, theirs, labels=labels).faults) == row["colour"]["verdict"]["faults"]
    both = {"labels": labels, "reference_labels": labels, "paired": True}
    assert band_gain_db(images, theirs, labels=labels, paired=True)["HF"] == band_gain_db(images, theirs, **both)["HF"]


def test_a_report_over_seeds_and_the_comparison_of_runs_agree(photographs, monkeypatch):
    methods = ("two-level bootstrap", "Student-t", "inverted sign-flip")
    monkeypatch.setattr(seeds, "coverage_of", lambda *_: dict.fromkeys(methods, 0.95))  # slow, and of no use here
    theirs, labels = photographs[32]
    arms = {
        "residual": [SPOILED["without detail"](theirs), white(9, theirs)],
        "dar": [SPOILED["blurred"](theirs), white(3, theirs)],
    }
    sets = {role: [as_set("x", one, labels) for one in images] for role, images in arms.items()}
    reference = as_set("teacher", theirs, labels)
    pairs = [forest.Pair(seed, *pair) for seed, pair in enumerate(zip(*sets.values(), strict=True))]
    (other,) = forest.from_runs(pairs, reference, 0).comparisons
    networks = {
        role: [SampledNetwork(network_row(seed), SampledSet.of(one)) for seed, one in enumerate(made)]
        for role, made in sets.items()
    }
    ours = compare_arms(Study(SampledSet.of(reference), networks), "residual", 0)
    for one, two in zip(ours.per_seed, other.per_seed, strict=True):
        assert one.gain_db == pytest.approx(two.gain_db, abs=1e-9)
    assert vars(ours.difference_db) == pytest.approx(vars(other.difference_db), abs=1e-9)


@pytest.mark.parametrize("size", [(32, 32), (140, 140), (196, 196), (64, 96)])
def test_a_map_and_the_spectrum_divide_the_plane_into_the_same_bands(size):
    """Modes that lie on an edge, (28, 21) of 140 for one, belong to the same band in both."""
    grid = spectrum.modes(*size)
    for band in range(5):
        inside = whole_plane((grid.band == band).double(), size[1])
        for name, means in sector_means(inside).items():
            shares = [share for share in vars(means).values() if share is not None]
            assert shares == [float(name == f"B{band}")] * len(shares), (name, band)


def test_medians_are_the_mean_of_the_two_in_the_middle(monkeypatch):
    """As everywhere in eval; torch's own median is the lower of the two."""
    distances = torch.tensor([4.0, 1.0, 2.0, 9.0])
    monkeypatch.setattr(teacher, "nearest_distance", lambda *_: distances)
    one = ImageSet("set", torch.zeros(7, 3, 32, 32, dtype=torch.uint8), torch.arange(7), "student", False)
    found = teacher.memorisation({"set": one}, teacher.Photos(32), 4, 0)["set"]
    assert {row.median for row in found.values()} == {3.0} and {row.least for row in found.values()} == {1.0}


def test_a_latent_distance_has_the_null_of_the_second_real_set():
    generator = torch.Generator().manual_seed(0)

    def latents(scale: float, count: int = 24) -> Tensor:
        return scale * torch.randn(count, 2, 16, 16, generator=generator)

    pixels = torch.zeros(24, 3, 32, 32, dtype=torch.uint8)

    def one(name: str, role: str, scale: float) -> ImageSet:
        return ImageSet(name, pixels, None, role, False, latents=latents(scale))  # type: ignore[arg-type]

    real, null, reference = one("real", "real", 1.0), one("again", "null", 2.0), one("teacher", "teacher", 1.0)
    found = jsonable(latent_spectra([real, null, reference], reference, real, 0, Ledger()))
    rows = {row["name"]: row["against"]["real"] for row in found["sets"]}
    assert rows["teacher"]["lsd_null"] == pytest.approx(rows["again"]["lsd"])  # about 6 dB: what the second set reads
    assert rows["teacher"]["lsd_null"] == pytest.approx(20 * math.log10(2), abs=1.5) and rows["again"]["lsd_null"] < 3
