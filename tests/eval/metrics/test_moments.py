"""Moments gathered in pieces are those of the whole; references are read back, and refused with a reason."""

import pickle

import numpy as np
import pytest
import torch

from eval.metrics.moments import Gaussian, Moments, load_reference, merged, save_reference
from eval.samples.images import UnfitError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [1, 64, 3, 32], [50, 50]])
@pytest.mark.parametrize("backwards", [False, True])
def test_streaming_is_two_pass_for_any_split_and_order(sizes, backwards):
    """A mean far from zero: sums of squares would lose ten digits."""
    features = draw(100, 7) * torch.logspace(-2, 2, 7, dtype=torch.float64) + 1e5
    parts = [Moments.of(part) for part in features.split(sizes)]
    whole = merged(parts[::-1] if backwards else parts).gaussian()
    assert whole.count == 100
    assert torch.allclose(whole.mean, features.mean(0), rtol=1e-14, atol=0)
    expected = torch.from_numpy(np.cov(features.numpy().T))
    scale = expected.diagonal().sqrt()
    assert ((whole.covariance - expected) / torch.outer(scale, scale)).abs().max() < 1e-9


def test_processes_may_be_joined_in_any_tree():
    a, b, c, d = (Moments.of(part) for part in draw(40, 5).split([4, 1, 30, 5]))
    left = a.merge(b).merge(c).merge(d).gaussian()
    tree = d.merge(b).merge(a.merge(c)).gaussian()
    assert torch.allclose(left.covariance, tree.covariance, rtol=0, atol=1e-12)
    assert torch.allclose(left.mean, tree.mean, rtol=0, atol=1e-12)


def test_a_batch_that_is_not_finite_is_named():
    broken = draw(8, 4)
    broken[2, 1] = torch.inf
    with pytest.raises(UnfitError, match="fid of student, images 64 to 71: 1 of 32 features are not finite"):
        Moments.of(broken, "fid of student, images 64 to 71")


def test_too_little_is_an_error():
    with pytest.raises(UnfitError, match="at least 2"):
        Moments.of(draw(1, 4)).gaussian()
    with pytest.raises(UnfitError, match="no batches"):
        merged([])


def test_a_reference_comes_back(tmp_path):
    gaussian = Moments.of(draw(30, 6)).gaussian()
    save_reference(tmp_path / "real.npz", gaussian)
    back = load_reference(tmp_path / "real.npz")
    assert (
        back.count == 30 and torch.equal(back.mean, gaussian.mean) and torch.equal(back.covariance, gaussian.covariance)
    )
    np.savez(tmp_path / "other.npz", mu=np.zeros(3, np.float32), sigma=np.eye(3), label="lsun")
    other = load_reference(tmp_path / "other.npz")
    assert other.count is None and other.mean.dtype == torch.float64
    assert isinstance(other, Gaussian)


GOOD = {"mu": np.zeros(2), "sigma": np.eye(2)}


@pytest.mark.parametrize("dtype", [">f4", ">f8", "longdouble", "<f2", ">i4", "<u1"])
def test_numbers_of_any_byte_order_and_length_are_read(tmp_path, dtype):
    mean, covariance = np.array([3, 5]).astype(dtype), np.array([[4, 1], [1, 2]]).astype(dtype)
    np.savez(tmp_path / "other.npz", mu=mean, sigma=covariance, count=np.array([9]).astype(dtype))
    told = load_reference(tmp_path / "other.npz")
    assert told.mean.tolist() == [3, 5] and told.covariance.tolist() == [[4, 1], [1, 2]] and told.count == 9
    assert told.mean.dtype == told.covariance.dtype == torch.float64


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_covariance_of_fewer_images_than_features_is_one_whatever_it_was_rounded_to(tmp_path, dtype):
    features = draw(20, 200) @ draw(200, 200, seed=1).abs()
    covariance = torch.cov(features.T) / 1e4
    np.savez(tmp_path / "few.npz", mu=np.zeros(200), sigma=covariance.numpy().astype(dtype))
    assert load_reference(tmp_path / "few.npz").covariance.shape == (200, 200)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mu": np.zeros(3)}, "no field sigma, only mu"),
        ({"arr_0": np.zeros(3)}, "no field mu and sigma, only arr_0"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \(3,\) and sigma \(4, 4\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3) * np.nan}, "sigma .*finite"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "mu .*real and finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "not symmetric"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "pickles are refused"),
        ({"mu": np.zeros(2, "V2"), "sigma": np.eye(2)}, "mu .*V2.*real and finite; save float64"),
        ({"mu": np.zeros(2), "sigma": np.eye(2, dtype=complex)}, "sigma .*c16.*real and finite"),
        ({"mu": np.zeros((1, 2)), "sigma": np.eye(2)}, r"mu \(1, 2\) and sigma"),
        ({"mu": np.float64(0), "sigma": np.eye(1)}, r"mu \(\) and sigma"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu \(0,\) and sigma"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "sigma has eigenvalues from -1 to -1, so it is no covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [2, 1]])}, "sigma has eigenvalues from -1 to 3"),
        ({"mu": np.zeros(2), "sigma": np.array([[2, 3], [3, 2]], np.uint8)}, "sigma has eigenvalues from -1 to 5"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 255], [1, 1]], np.uint8)}, "not symmetric"),
        ({**GOOD, "count": np.array([4, 5])}, r"count of shape \(2,\); it is the number of images, 2 at least"),
        ({**GOOD, "count": np.nan}, "count nan; it is the number"),
        ({**GOOD, "count": np.inf}, "count inf; it is the number"),
        ({**GOOD, "count": 7.5}, "count 7.5; it is the number"),
        ({**GOOD, "count": -7}, "count -7; it is the number"),
        ({**GOOD, "count": "many"}, "count many; it is the number"),
    ],
)
def test_a_reference_that_is_none_is_refused(tmp_path, fields, said):
    path = tmp_path / "bad.npz"
    np.savez(path, **fields)
    with pytest.raises(UnfitError, match=said) as error:
        load_reference(path)
    assert str(path) in str(error.value)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("content", [pickle.dumps(Trap()), b"", b"PK\x03\x04garbage", b"\x93NUMPY\x01\x00"])
def test_pickles_and_other_files_are_refused_unrun(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(UnfitError, match="no npz of plain arrays"):
        load_reference(path)
    np.savez_compressed(path, mu=np.arange(500.0), sigma=np.eye(500))
    whole = bytearray(path.read_bytes())
    whole[200:220] = bytes(20)  # in the compressed numbers
    path.write_bytes(whole)
    with pytest.raises(UnfitError, match="no npz of plain arrays"):
        load_reference(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UnfitError, match="no npz"):
        load_reference(tmp_path / "array.npy")
    with pytest.raises(UnfitError, match="no npz"):
        load_reference(tmp_path / "absent.npz")
