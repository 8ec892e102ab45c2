"""Rows of prompts: stored without padding, padded where they are used, read once and ahead."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dmd_dar import config
from dmd_dar.data.batches import Batches
from dmd_dar.data.manifest import LENGTH, Form, Layout, read_manifest
from dmd_dar.data.shards import ShardFolder, Shards, fill
from dmd_dar.draws import Draws, sample_range
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.errors import DamagedFileError, UserError
from dmd_dar.methods.turns import PHASE, Turns
from dmd_dar.models import prompts as prompts_module
from dmd_dar.models.prompts import Prompts, ReadRows, lengths_of
from dmd_dar.models.teachers import TeacherConfig, load_teacher
from dmd_dar.models.text import load_text_encoder
from tests.models.tiny_pipelines import tiny_pixart, tiny_sana, tiny_sd3

TEXTS = ["a red cat", "dogs on the grass", "two", "a", "the cat and the hat"]
MAKERS = {"pixart": tiny_pixart, "sana": tiny_sana, "sd3": lambda folder: tiny_sd3(folder, third=False)}


def encoded(root: Path, name: str, out: str, *more: str) -> Path:
    given = [f"prompts={root / 'prompts.txt'}", f"pipeline={root / name}", f"out={root / out}", "cpu=true"]
    encode(config.load(EncodeConfig, [*given, "shard_size=4", *more]))
    return root / out


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    (root / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    for name, make in MAKERS.items():
        make(root / name)
        encoded(root, name, f"{name}_prompts", "dtype=float32")
    return root


def whole_rows(root: Path, name: str) -> dict[str, Tensor]:
    """What the pipeline's own encoder makes, with all its padding; the empty prompt last."""
    encoder = load_text_encoder(str(root / name))
    parts = [encoder.encode([text], negatives=int(not text)) for text in [*TEXTS, ""]]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@pytest.mark.parametrize("name", MAKERS)
def test_no_padding_is_stored_and_all_of_it_is_there_at_use(root, name):
    table, expected = Prompts(str(root / f"{name}_prompts")), whole_rows(root, name)
    lengths = lengths_of(expected)
    assert table.lengths.tolist() == lengths.tolist() and len(set(lengths.tolist())) > (2 if name != "sd3" else 0)
    held = load_file(root / f"{name}_prompts" / "shard_000000.safetensors")
    assert held["embedding"].shape == (lengths[:4].sum(), 16) and held["length"].tolist() == lengths[:4].tolist()
    full = expected["embedding"].shape[1]
    assert lengths.max() < full
    cond = torch.tensor([2, 0, 5, 1])
    rows = table.rows(cond)
    longest = lengths[cond].max() if "mask" in expected else full  # without a mask padding is read
    assert rows["embedding"].shape == (4, longest, 16)
    for key, value in rows.items():
        wanted = expected[key][cond]
        if key == "mask" or "mask" not in expected:
            torch.testing.assert_close(value, wanted[:, :longest] if key != "pooled" else wanted, rtol=0, atol=1e-6)
        else:
            kept = rows["mask"].bool()
            torch.testing.assert_close(value[kept], wanted[:, :longest][kept], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_padded_to_the_batch_s_longest_is_padded_whole(root, name):
    network = load_teacher(TeacherConfig(str(root / name), prompts=str(root / f"{name}_prompts"))).network
    table, cond = network.prompts, torch.tensor([2, 0, 3])
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0, 500.0, 990.0])
    short, shape = network(x, t, cond), table.rows(cond)["embedding"].shape
    with table.padded_whole():
        whole = network(x, t, cond)
        assert table.rows(cond)["embedding"].shape[1] > shape[1]
    assert (short - whole).abs().max() <= 2e-6 and whole.std() > 0.1
    assert (network(x, t, torch.tensor([2, 0, 1])) - short)[2].abs().max() > 1e-4


def test_bfloat16_is_what_is_stored_unless_it_is_said(root, tmp_path):
    out = encoded(root, "pixart", str(tmp_path / "half"))
    assert read_manifest(out)[0].tensors["embedding"].dtype == "BF16"
    half, whole = Prompts(str(out)), Prompts(str(root / "pixart_prompts"))
    cond = torch.arange(6)
    torch.testing.assert_close(
        half.rows(cond)["embedding"].float(), whole.rows(cond)["embedding"], rtol=0.05, atol=0.05
    )
    with pytest.raises(UserError, match="device = nowhere: it is none of this machine"):
        encode(EncodeConfig(out=str(tmp_path / "x"), prompts=str(root / "prompts.txt"), pipeline=str(root / "pixart"),
                            device="nowhere"))  # fmt: skip


def test_folders_of_one_length_are_read_as_before(root, tmp_path):
    rows, new = whole_rows(root, "pixart"), Prompts(str(root / "pixart_prompts"))
    content = dict(new.shards.layout.content)
    tensors = {"embedding": Form("F32", tuple(rows["embedding"].shape[1:])), "mask": Form("I64", (120,))}
    layout = Layout(content, 6, 4, tensors)
    assert "ragged" not in str(layout.described()) and "filled" not in layout.described()
    with ShardFolder(tmp_path, layout) as folder:
        fill(folder, Batches(lambda a, b: {key: value[a:b] for key, value in rows.items()}, 4), stopped=lambda: False)
    old, cond = Prompts(str(tmp_path)), torch.tensor([4, 0, 5])
    assert old.rows(cond)["embedding"].shape == (3, 120, 16)
    for key, value in old.rows(cond).items():
        assert torch.equal(value, rows[key][cond])
    network = load_teacher(TeacherConfig(str(root / "pixart"), prompts=str(tmp_path))).network
    again = load_teacher(TeacherConfig(str(root / "pixart"), prompts=new.folder)).network
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([10.0, 500.0, 990.0])
    torch.testing.assert_close(network(x, t, cond), again(x, t, cond), rtol=0, atol=2e-6)


def test_rows_of_a_large_folder_are_read_once_and_ahead(root, monkeypatch):
    cond = torch.tensor([3, 0, 3])
    expected = Prompts(str(root / "pixart_prompts")).rows(cond)
    monkeypatch.setattr(prompts_module, "IN_MEMORY", 0)
    table, read, own = Prompts(str(root / "pixart_prompts")), [], ReadRows._read
    monkeypatch.setattr(ReadRows, "_read", lambda self, index: (read.append(index), own(self, index))[1])
    table.ahead(cond)
    for future in list(table.read.coming.values()):
        future.result()
    assert sorted(read) == [0, 3]
    for _ in range(3):
        for key, value in table.rows(cond).items():
            assert torch.equal(value, expected[key])
        table.rows(torch.tensor([3, 0]))
    assert sorted(read) == [0, 3]
    with pytest.raises(IndexError):
        table.rows(torch.tensor([6]))


def test_a_turn_says_which_prompts_the_next_one_reads():
    heard: list[Tensor] = []
    turns = Turns({"student": 1}, lambda x, t, cond: x, (1.0,), 50, (1, 2, 2), ahead=heard.append)
    seen = [turns.state(0, Draws(3, "student", step, sample_range(0, 8)))[1] for step in range(3)]
    assert torch.equal(heard[0], seen[1]) and torch.equal(heard[1], seen[2]) and not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], Draws(3, PHASE, 1, sample_range(0, 8)).integers("label", 50))


def test_what_all_prompts_take_is_known_before_they_are_encoded(root):
    for name in ("pixart", "sana"):
        encoder, rows = load_text_encoder(str(root / name)), whole_rows(root, name)
        lengths, full = lengths_of(rows)[:-1], rows["embedding"].shape[1]
        share = encoder.filled(TEXTS, {key: value[-1:] for key, value in rows.items()}, "")
        assert lengths.sum() / (full * 5) <= share <= (lengths + 3).sum() / (full * 5)


def test_a_shard_whose_lengths_do_not_fit_is_damaged(root, tmp_path):
    import hashlib
    import json

    from safetensors.torch import save

    shutil.copytree(root / "pixart_prompts", tmp_path / "p")
    file = tmp_path / "p" / "shard_000000.safetensors"
    tensors = load_file(file)
    tensors[LENGTH][0] += 1
    content = save(tensors)
    file.write_bytes(content)
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "p" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedFileError, match="does not hold the tensors that manifest.json describes"):
        Shards(tmp_path / "p").row("embedding", 0)
    del manifest["tensors"][LENGTH]
    (tmp_path / "p" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedFileError, match="tensors of different length need length"):
        Prompts(str(tmp_path / "p"))
