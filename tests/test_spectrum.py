"""Spectra of known truth: every tolerance here is the definition's own."""

import math

import kornia
import pytest
import torch

from dmd_dar import spectrum
from dmd_dar.spectrum import band_energies, hfer, modes, power_spectrum, radial_frequencies, radial_psd, slope


def grey(plane: torch.Tensor) -> torch.Tensor:
    """(N, H, W) -> (N, 3, H, W), whose luma is the plane."""
    return plane[:, None].expand(-1, 3, -1, -1)


def noise(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def filtered(images: torch.Tensor, transfer: torch.Tensor) -> torch.Tensor:
    """Multiplies the transform by `transfer` (H, K)."""
    return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=images.shape[-2:])


def decibel(ratio: torch.Tensor) -> torch.Tensor:
    return 10 * torch.log10(ratio)


def test_white_noise_is_flat_at_its_variance():
    images = grey(0.3 * noise(1000, 64, 64, dtype=torch.float32))
    _, power = radial_psd(images)
    assert power[1:].sub(0.09).abs().max() < 0.05 * 0.09
    _, bare = radial_psd(images, window=None)
    assert bare.sub(0.09).abs().max() < 0.05 * 0.09


def test_planes_of_16_cells_are_flat_for_white_noise_and_keep_the_bands_from_b2_on():
    _, power = radial_psd(0.3 * noise(2000, 16, 16, dtype=torch.float32)[:, None], channel="all")
    assert len(power) == 7 and power.sub(0.09).abs().max() < 0.05 * 0.09
    assert [int((modes(16, 16).band == b).sum()) for b in range(5)] == [0, 0, 20, 34, 46]


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_planes_of_16_cells_show_a_blur_as_larger_ones_do(exponent):
    """Crops of a 1/f^a field and of its blur: the gains of B2 to B4 are those of the whole fields within 0.6 dB."""
    grid = modes(128, 128)
    amplitude = torch.where(grid.radius > 0, grid.radius, torch.inf) ** (-exponent / 2)
    fields = filtered(noise(96, 128, 128, seed=exponent), amplitude)
    blurred = filtered(fields, torch.exp(-2 * math.pi**2 * 0.25 * grid.radius.square()))
    crops = [one.unfold(1, 16, 32).unfold(2, 16, 32).reshape(-1, 1, 16, 16) for one in (fields, blurred)]

    def gains(plain, spoiled, window):
        energies = [band_energies(one, window=window, channel="all").mean(0)[2:] for one in (plain, spoiled)]
        return 10 * torch.log10(energies[1] / energies[0])

    expected = gains(fields[:, None], blurred[:, None], None)
    assert (gains(*crops, "hann") - expected).abs().max() < 0.6 and expected[0] < -1 and expected[2] < -7.5


@pytest.mark.parametrize("shape", [(96, 64), (33, 48), (40, 35)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_parseval(shape, dtype, tolerance):
    plane = noise(3, *shape, dtype=dtype) + 0.5
    grid = modes(*shape)
    pixels = math.prod(shape)
    total = (power_spectrum(grey(plane), window=None) * grid.multiplicity).sum((-2, -1)) / pixels
    centred = plane.double() - plane.double().mean((-2, -1), keepdim=True)
    assert torch.allclose(total, centred.square().mean((-2, -1)), rtol=tolerance, atol=0)

    w = torch.hann_window(shape[0], dtype=dtype)[:, None] * torch.hann_window(shape[1], dtype=dtype)
    weighted = (plane - (plane * w).sum((-2, -1), keepdim=True) / w.sum()) * w
    total = (power_spectrum(grey(plane)) * grid.multiplicity).sum((-2, -1)) / pixels
    expected = weighted.double().square().sum((-2, -1)) / w.double().square().sum()
    assert torch.allclose(total, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("window", ["hann", None])
def test_sinusoid_keeps_its_energy_and_its_place(window):
    column = torch.arange(96, dtype=torch.float64)
    plane = 0.2 * torch.sin(2 * math.pi * 12 / 96 * column).expand(1, 64, 96)  # f = 1/8 along the longer side
    frequencies, power = radial_psd(grey(plane), window=window)
    assert frequencies[power.argmax()] == 0.125
    grid = modes(64, 96)
    near = (grid.radius - 0.125).abs() <= 2 / 64
    energy = (power_spectrum(grey(plane), window=window)[0] * grid.multiplicity)[near].sum() / (64 * 96)
    assert energy.item() == pytest.approx(0.2**2 / 2, rel=1e-6)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3])
def test_slope_of_a_power_law_cropped_from_a_larger_field(exponent):
    grid = modes(256, 256)
    amplitude = torch.where(grid.radius > 0, grid.radius, torch.inf) ** (-exponent / 2)
    fields = filtered(noise(96, 256, 256, seed=exponent), amplitude)
    crops = fields.unfold(1, 64, 128).unfold(2, 64, 128).reshape(-1, 64, 64)  # every other tile
    frequencies, counts = radial_frequencies(64, 64)
    measured = -slope(frequencies, radial_psd(grey(crops))[1], counts).item()
    assert measured == pytest.approx(exponent, abs=0.06)
    if exponent == 3:
        frequencies, counts = radial_frequencies(64, 64, window=None)
        assert -slope(frequencies, radial_psd(grey(crops), window=None)[1], counts).item() < 2.9


def _blur(size: int, sigma: float) -> torch.Tensor:
    return torch.exp(-2 * math.pi**2 * sigma**2 * modes(size, size).radius.square())


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0])
def test_gaussian_blur_reads_its_transfer_function(sigma):
    plane = noise(2, 64, 64)
    grid, transfer = modes(64, 64), _blur(64, sigma)
    weight = power_spectrum(grey(plane), window=None).mean(0) * grid.multiplicity
    before, after = (radial_psd(grey(x), window=None) for x in (plane, filtered(plane, transfer)))
    for frequency, gain in zip(before[0], decibel(after[1] / before[1]), strict=True):
        members = grid.radial_bin == round(frequency.item() * 64)
        expected = (weight * transfer.square())[members].sum() / weight[members].sum()
        assert gain.item() == pytest.approx(decibel(expected).item(), abs=1e-9)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_gaussian_blur_under_hann(sigma):
    plane = noise(24, 256, 256)
    grid, transfer = modes(256, 256), _blur(256, sigma)
    (_, before), (_, after) = (radial_psd(grey(x)) for x in (plane, filtered(plane, transfer)))
    sums = torch.zeros(130, dtype=torch.float64)
    sums.index_add_(0, grid.radial_bin.flatten(), (grid.multiplicity * transfer.square()).flatten())
    _, counts = radial_frequencies(256, 256)
    assert (decibel(after / before) - decibel(sums[2:129] / counts)).abs().max() < 0.06


def test_ideal_low_pass():
    plane = noise(2, 64, 64)
    cut = filtered(plane, (modes(64, 64).radial_bin <= 16).double())
    for window, guard in ((None, 0), ("hann", 2)):  # Hann mixes each mode with its eight neighbours
        frequencies, before = radial_psd(grey(plane), window=window)
        gain = decibel(radial_psd(grey(cut), window=window)[1] / before)
        bins = (frequencies * 64).round()
        assert gain[bins > 16 + guard].max() < -100
        assert gain[bins <= 16 - guard].abs().max() < 1e-9


def test_scaling_shifts_every_band_alike():
    images = torch.rand(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    gain = decibel(band_energies(0.37 * images).mean(0) / band_energies(images).mean(0))
    assert gain.sub(20 * math.log10(0.37)).abs().max() < 1e-5


def test_phase_randomisation_keeps_the_spectrum():
    plane = noise(3, 64, 64).cumsum(-1)
    phase = torch.fft.rfft2(noise(3, 64, 64, seed=1))
    random = torch.fft.irfft2(torch.fft.rfft2(plane).abs() * phase / phase.abs(), s=(64, 64))
    (_, before), (_, after) = (radial_psd(grey(x), window=None) for x in (plane, random))
    assert torch.allclose(before, after, rtol=1e-10, atol=0)


def test_symmetries():
    plane = noise(2, 64, 96).cumsum(-1)
    same = [plane.flip(-1), plane.flip(-2), plane.transpose(-1, -2), plane.roll((5, 11), (-2, -1))]
    _, power = radial_psd(grey(plane), window=None)
    for moved in same:
        assert torch.allclose(radial_psd(grey(moved), window=None)[1], power, rtol=1e-12, atol=1e-12)
    _, power = radial_psd(grey(plane))
    assert torch.allclose(radial_psd(grey(plane.transpose(-1, -2)))[1], power, rtol=1e-12, atol=1e-12)


def test_bins_of_an_oblong_image():
    frequencies, counts = radial_frequencies(96, 64)
    assert torch.equal(frequencies, torch.arange(2, 33, dtype=torch.float64) / 64)
    grid = modes(96, 64)
    inside = (grid.radius <= 0.5) & (grid.radius * 64 >= 1.5)
    assert counts.sum() == grid.multiplicity[inside].sum()


@pytest.mark.parametrize(("period", "band"), [((8, 0), 2), ((0, 4), 3), ((2, 0), 4), ((16, 0), 1), ((32, 0), 0)])
def test_a_wave_on_a_band_edge_belongs_to_the_upper_band(period, band):
    axis = torch.arange(64, dtype=torch.float64)
    rows, columns = (torch.cos(2 * math.pi * axis / p) if p else torch.ones(64) for p in period)
    energies = band_energies(grey((rows[:, None] * columns)[None]), window=None)[0]
    assert energies.argmax() == band
    assert energies[band] / energies.sum() > 1 - 1e-12


def test_corner_wave_is_in_the_total_and_in_no_band():
    checker = (-1.0) ** (torch.arange(32)[:, None] + torch.arange(32))
    images = grey(checker.double()[None])
    assert band_energies(images, window=None).sum() < 1e-20
    assert hfer(images, window=None)[0] == 1


def test_hfer_is_a_share_and_0_for_a_constant():
    axis = torch.arange(64, dtype=torch.float64)
    low, high = (torch.cos(2 * math.pi * axis * waves / 64).expand(64, 64) for waves in (4, 26))
    images = grey(torch.stack([low + 0.5 * high, torch.full_like(low, 0.3)]))
    pooled, each = hfer(images, window=None)
    assert pooled.item() == pytest.approx(0.2)
    assert each.tolist() == pytest.approx([0.2, 0.0])
    edge = torch.stack([torch.cos(2 * math.pi * axis * waves / 64).expand(64, 64) for waves in (16, 17)])
    assert hfer(grey(edge), window=None)[1].tolist() == pytest.approx([0.0, 1.0])


def test_log_spectrum_is_differentiable():
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for place in range(3):
        _, log_power = spectrum.log_radial_psd(scale * images, floor=0.0)
        (slope_of_one,) = torch.autograd.grad(log_power[place], scale)
        assert slope_of_one.item() == pytest.approx(2.0)  # log (c^2 R)
    with torch.inference_mode():
        spectrum.log_radial_psd(images[..., :32, :31].float().repeat(1, 1, 1, 2))
    again = images[..., :32, :31].float().repeat(1, 1, 1, 2).requires_grad_()
    spectrum.log_radial_psd(again)[1].sum().backward()
    assert torch.isfinite(again.grad).all() and again.grad.abs().max() > 0
    flat = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    spectrum.log_radial_psd(flat)[1].sum().backward()
    assert torch.isfinite(flat.grad).all()


def test_log_spectral_distance_of_a_constant_gain_and_of_a_step():
    frequencies = torch.arange(2, 65, dtype=torch.float64) / 128
    reference = frequencies**-2
    distance, signed = spectrum.log_spectral_distance(frequencies, 0.5 * reference, reference)
    assert distance.item() == pytest.approx(-10 * math.log10(0.5))
    assert signed.item() == pytest.approx(10 * math.log10(0.5))
    octave = (frequencies > 15.5 / 128) & (frequencies < 30.5 / 128)
    lifted = torch.where(octave, 10 * reference, reference)
    share = math.log(30.5 / 15.5) / math.log(57.5 / 2.5)  # bins 3 .. 57 are averaged
    assert spectrum.log_spectral_distance(frequencies, lifted, reference)[1].item() == pytest.approx(10 * share)


def test_channels_are_those_of_kornia():
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = kornia.color.rgb_to_ycbcr(images)
    for index, (channel, centre) in enumerate((("y", 0.0), ("cb", 0.5), ("cr", 0.5))):
        assert torch.allclose(spectrum.to_channel(images, channel), expected[:, index] - centre, atol=1e-12)


def test_chunks_do_not_change_the_result(monkeypatch):
    images = torch.rand(7, 3, 32, 40)
    whole = band_energies(images)
    monkeypatch.setattr(spectrum, "PIXELS_PER_CHUNK", 2 * 32 * 40)
    assert torch.equal(band_energies(images), whole)


@pytest.mark.parametrize("shape", [(64, 64), (96, 64)])
def test_a_stream_reads_as_the_whole_set_for_any_split_and_order(shape):
    images = torch.rand(23, 3, *shape, generator=torch.Generator().manual_seed(0)) ** 3
    images[5:9] *= 0.01
    _, two_pass = radial_psd(images.double())
    whole = spectrum.power_sum(images)
    assert torch.allclose(whole.power, two_pass, rtol=1e-5, atol=0)  # the transform itself is single precision
    assert torch.allclose(spectrum.image_psd(images)[1].mean(0), whole.power, rtol=1e-9, atol=0)
    for cuts in ([1, 22], [5, 4, 14], [11, 12], [1] * 23):
        batches = images.split(cuts)
        ranks = [sum(map(spectrum.power_sum, batches[r::2][1:]), spectrum.power_sum(batches[r])) for r in range(2)]
        merged = ranks[1] + ranks[0]
        assert merged.images == 23
        assert torch.allclose(merged.power, whole.power, rtol=1e-9, atol=0)
        assert torch.allclose(radial_psd(reversed(batches))[1], whole.power, rtol=1e-9, atol=0)


def test_channels_of_latents_are_read_one_by_one_or_together():
    spread = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    latents = noise(400, 4, 32, 32) * spread[:, None, None]
    for index in range(4):
        _, power = radial_psd(latents, channel=index)
        assert torch.allclose(power, radial_psd(grey(latents[:, index]))[1], rtol=1e-12, atol=0)
        assert power.mean().item() == pytest.approx(spread[index].item() ** 2, rel=0.03)
    _, together = radial_psd(latents, channel="all")
    each = [radial_psd(latents, channel=index)[1] for index in range(4)]
    assert torch.allclose(together, torch.stack(each).mean(0), rtol=1e-12, atol=0)
    bands = torch.stack([band_energies(latents, channel=index) for index in range(4)]).mean(0)
    assert torch.allclose(band_energies(latents, channel="all"), bands, rtol=1e-12, atol=0)


def test_chroma_is_blind_to_grey_and_luma_to_equal_luma_colours():
    wave = grey(0.1 * noise(2, 32, 32))
    assert radial_psd(wave, channel="cb")[1].max() < 1e-20 < radial_psd(wave)[1].min()
    luma_free = wave * torch.tensor([0.587, -0.299, 0.0], dtype=torch.float64)[:, None, None]
    assert radial_psd(luma_free)[1].max() < 1e-20
    ratio = radial_psd(luma_free, channel="cr")[1] / radial_psd(wave)[1]
    assert torch.allclose(ratio, torch.full_like(ratio, (0.713 * 0.587) ** 2), rtol=1e-10)


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least 16 px or latent cells a side, got 15x64"):
        radial_psd(torch.zeros(1, 4, 15, 64), channel="all")
    with pytest.raises(ValueError, match="31x64"):
        radial_psd(torch.rand(1, 3, 31, 64))
    with pytest.raises(TypeError, match="uint8"):
        radial_psd(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\)"):
        radial_psd(torch.rand(1, 1, 32, 32))
    with pytest.raises(ValueError, match="hamming"):
        radial_psd(torch.rand(1, 3, 32, 32), window="hamming")
    with pytest.raises(ValueError, match="channel"):
        radial_psd(torch.rand(1, 3, 32, 32), channel="r")
    with pytest.raises(ValueError, match="below the 4 .* got 4"):
        radial_psd(torch.rand(1, 4, 32, 32), channel=4)
    with pytest.raises(ValueError, match="64 and 32 px"):
        radial_psd([torch.rand(1, 3, 64, 64), torch.rand(1, 3, 32, 64)])
    with pytest.raises(ValueError, match="at least one image"):
        radial_psd(torch.rand(0, 3, 32, 32))
    with pytest.raises(ValueError, match="at least one batch"):
        radial_psd([])
