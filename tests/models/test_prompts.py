"""Prompts as conditions: encoded once as diffusers encodes them, then rows of a table that jobs look up by index."""

import copy
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_dar import config
from dmd_dar.data.shards import MANIFEST, read_manifest
from dmd_dar.distillation import job as distill
from dmd_dar.encode import EncodeConfig, encode
from dmd_dar.errors import DamagedFileError, MissingWeightsError, UserError
from dmd_dar.models import prompts as prompts_module
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.models.guided import guided_velocity
from dmd_dar.models.prompts import Prompts
from dmd_dar.models.teachers import Teacher, TeacherConfig, load_teacher
from dmd_dar.models.text import load_text_encoder
from dmd_dar.pairs import PairsConfig, make_pairs
from dmd_dar.sample import SampleConfig, sample
from tests.models.tiny_pipelines import tiny_pipeline, tiny_pixart, tiny_sd3, tiny_t5, tiny_vae

ROOT = Path(__file__).parents[2]
TEXTS = ["a red cat", "dogs on the grass", "two"]
MAKERS = {"pixart": tiny_pixart, "sd3": tiny_sd3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Both pipelines, each beside its encoded prompts."""
    root = tmp_path_factory.mktemp("prompts")
    (root / "prompts.txt").write_text("\n".join([f" {TEXTS[0]} ", *TEXTS[1:], ""]))
    for name, make in MAKERS.items():
        make(root / name)
        encoded(root / "prompts.txt", root / name, root / f"{name}_prompts")
    return {"root": root} | {name: root / name for name in MAKERS}


def encoded(texts: Path, pipeline: Path, out: Path, *more: str) -> Path:
    given = [
        f"prompts={texts}",
        f"pipeline={pipeline}",
        f"out={out}",
        "shard_size=3",
        "batch_size=2",
        "cpu=true",
        "dtype=float32",
    ]
    encode(config.load(EncodeConfig, [*given, *more]))
    return out


def load(folder: Path, prompts: Path | None = None) -> Teacher:
    return load_teacher(TeacherConfig(str(folder), prompts=str(prompts or f"{folder}_prompts")))


def their_embeddings(pipeline, texts: list[str]) -> dict[str, Tensor]:
    """What diffusers' own pipeline hands to its transformer."""
    if hasattr(pipeline, "text_encoder_3"):
        embedding, _, pooled, _ = pipeline.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embedding, "pooled_projections": pooled}
    embedding, mask, _, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
    added = {"resolution": None, "aspect_ratio": None}
    return {"encoder_hidden_states": embedding, "encoder_attention_mask": mask, "added_cond_kwargs": added}


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 250.0, 500.0, 999.0])


FRESH = """
import sys
import torch
from safetensors.torch import load_file, save_file
from dmd_dar.models.denoiser import velocity_of
from dmd_dar.models.teachers import TeacherConfig, load_teacher
given, made = load_file(sys.argv[1]), {}
for folder in sys.argv[3:]:
    teacher = load_teacher(TeacherConfig(folder, prompts=folder + "_prompts"))
    with torch.no_grad():
        made[folder] = teacher.network(given["x"], given["time"], given["cond"])
        velocity = velocity_of(teacher.network, teacher.prediction)
        made[folder + " v"] = velocity(given["x"], given["time"] / 1000, given["cond"])
save_file(made, sys.argv[2])
assert "transformers.models.t5.modeling_t5" not in sys.modules
"""


@torch.no_grad()
@pytest.mark.stages("teacher", "encode", family=("pixart", "sd3"))
def test_pipelines_in_a_fresh_process_are_diffusers_own_at_every_prompt(folders, tmp_path):
    import diffusers

    (x, time), cond = inputs(), torch.tensor([0, 2, 1, 3])  # 3 is the empty prompt
    save_file({"x": x, "time": time, "cond": cond}, tmp_path / "given.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("given", "made")]
    command = [sys.executable, "-c", FRESH, *files, *(str(folders[name]) for name in MAKERS)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=150)
    made = load_file(files[1])
    for name in MAKERS:
        theirs = diffusers.DiffusionPipeline.from_pretrained(folders[name])
        given = their_embeddings(theirs, [TEXTS[0], TEXTS[2], TEXTS[1], ""])
        expected = theirs.transformer(x, timestep=time, **given, return_dict=False)[0]
        out = made[str(folders[name])]
        assert (out - expected).abs().max() <= 1e-6 and expected.abs().mean() > 0.1
        other = theirs.transformer(x, timestep=time, **their_embeddings(theirs, [*TEXTS, ""]), return_dict=False)[0]
        assert (out - other)[1:3].abs().max() > 1e-4  # it is the prompt that decides
        if name == "sd3":
            torch.testing.assert_close(made[f"{folders[name]} v"], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.stages("guidance", family="sd3")
def test_guidance_is_away_from_the_empty_prompt(folders):
    import diffusers

    theirs, teacher = diffusers.DiffusionPipeline.from_pretrained(folders["sd3"]), load(folders["sd3"])
    x, time = inputs()
    velocity = guided_velocity(teacher.network, teacher.prediction, 4.0)
    texts = [TEXTS[0]] * 4
    plain, empty = (
        theirs.transformer(x, timestep=time, **their_embeddings(theirs, t), return_dict=False)[0]
        for t in (texts, [""] * 4)
    )
    v = velocity(x, time / 1000, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(v, empty + 4 * (plain - empty), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_size_conditions_are_the_pixels_of_a_square_image(tmp_path, folders):
    tiny_pixart(tmp_path / "p", use_additional_conditions=True, cross_attention_dim=24, attention_head_dim=12)
    network = load(tmp_path / "p", Path(f"{folders['pixart']}_prompts")).network
    x, time = inputs()
    rows = network.prompts.rows(torch.zeros(4, dtype=torch.int64))
    added = {"resolution": torch.full((4, 2), 64.0), "aspect_ratio": torch.ones(4, 1)}
    given = dict(encoder_hidden_states=rows["embedding"], encoder_attention_mask=rows["mask"])
    expected = network.transformer(x, timestep=time, **given, added_cond_kwargs=added, return_dict=False)[0]
    assert torch.equal(network(x, time, torch.zeros(4, dtype=torch.int64)), expected)


def test_the_table_is_shared_and_no_part_of_the_network_s_state(folders, monkeypatch):
    network = load(folders["pixart"]).network
    assert copy.deepcopy(network).prompts is network.prompts and not network.requires_grad_().transformer.training
    assert {name.split(".")[0] for name in network.state_dict()} == {"transformer"}
    assert network.config.num_classes == 3 and network.prompts is not None and network.config.learn_sigma
    cond = torch.tensor([3, 0, 0, 2])
    held = network.prompts.rows(cond)
    monkeypatch.setattr(prompts_module, "IN_MEMORY", 0)
    read = Prompts(f"{folders['pixart']}_prompts")
    assert not read.small and network.prompts.small
    assert all(torch.equal(read.rows(cond)[name], held[name]) for name in ("embedding", "mask"))
    assert held["mask"].sum(1).tolist() == [1, *[held["mask"][1].sum()] * 2, held["mask"][3].sum()]
    with pytest.raises(IndexError):
        read.rows(torch.tensor([4]))


SMALL = "steps=2 batch_size=4 rungs=[1.0,0.5] fake_score.updates=1 student.routing.chunk_size=2"
SMALL += " regression.weight=1 regression.solver_steps=3 log.every=1 log.wandb=disabled launch.cpu=true"
SMALL += " preflight=false log.health_samples=4"


def distilled(pipeline: Path, out: Path, *more: str) -> Path:
    prompts = [f"teacher.prompts={pipeline}_prompts", f"regression.cache={out}/pairs", "regression.count=4"]
    distill.main([f"teacher.path={pipeline}", f"out_dir={out}", *prompts, *SMALL.split(), *more])
    return out / "student"


@pytest.mark.parametrize(("name", "query"), [("pixart", "timestep"), ("sd3", "timestep"), ("pixart", "residual")])
@pytest.mark.stages("distil", by="name")
def test_a_prompted_pipeline_becomes_a_few_step_student(folders, name, query, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folders[name], pipeline)
    shutil.copytree(f"{folders[name]}_prompts", f"{pipeline}_prompts")
    for part in [*pipeline.glob("text_encoder*"), *pipeline.glob("tokenizer*")]:
        shutil.rmtree(part)  # training needs none of them
    student = distilled(pipeline, tmp_path / "run", f"student.routing.query={query}", "guidance_scale=2.0")
    back, origin = (
        load_teacher(TeacherConfig(str(student))),
        json.loads((student / "denoiser.json").read_text())["origin"],
    )
    assert isinstance(back.network, DiffusersDenoiser) and back.network.config.routing.query == query
    assert back.network.config.num_classes == 3 and origin["prompts"] == f"{pipeline}_prompts"
    sample(SampleConfig(student=str(student), out=str(tmp_path / "images"), n=3, cpu=True))
    images = [Image.open(tmp_path / "images" / f"{i:06d}.png") for i in range(3)]
    assert {image.size for image in images} == {(16, 16)} and len({image.tobytes() for image in images}) == 3
    start = load(pipeline).network.state_dict()
    assert any(not torch.equal(back.network.state_dict()[key], value) for key, value in start.items())


def test_a_student_draws_other_prompts_of_the_same_encoder_only(folders, tmp_path, capsys):
    student = distilled(folders["pixart"], tmp_path / "run", "regression.weight=0", "steps=1")
    (tmp_path / "new.txt").write_text("a blue bird\n")
    new = encoded(tmp_path / "new.txt", folders["pixart"], tmp_path / "new")
    sample(SampleConfig(student=str(student), prompts=str(new), out=str(tmp_path / "images"), n=2, cpu=True))
    assert json.loads((tmp_path / "images" / "samples.json").read_text())["labels"] == [0, 0]
    trained, other = (load_teacher(TeacherConfig(str(student), prompts=p)) for p in ("", str(new)))
    assert trained.digest != other.digest and other.network.config.num_classes == 1
    guided_velocity(other.network, other.prediction, 2.0)  # of one prompt there is something to guide towards

    shutil.copytree(folders["pixart"], tmp_path / "changed")
    tiny_t5(seed=7)[1].save_pretrained(tmp_path / "changed" / "text_encoder")
    alien = encoded(tmp_path / "new.txt", tmp_path / "changed", tmp_path / "alien")
    with pytest.raises(UserError, match="another text encoder than the network was trained with"):
        load_teacher(TeacherConfig(str(student), prompts=str(alien)))
    shutil.copytree(student, tmp_path / "student")
    card = json.loads((tmp_path / "student" / "denoiser.json").read_text())
    card["origin"]["prompts"] = str(new)
    (tmp_path / "student" / "denoiser.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="other prompts than when the network was trained"):
        load_teacher(TeacherConfig(str(tmp_path / "student")))


def test_real_data_has_no_prompts(folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        distilled(folders["sd3"], tmp_path / "run", "gan.weight=0.1")
    assert stop.value.code == 2 and "its classes are no prompts" in capsys.readouterr().err
    with pytest.raises(UserError, match="reads class labels"):
        load_teacher(TeacherConfig(str(ROOT / "teachers" / "photos32"), prompts_are_classes=True))


def test_pairs_of_a_prompted_teacher(folders, tmp_path):
    given = [f"teacher.path={folders['sd3']}", f"teacher.prompts={folders['sd3']}_prompts", f"out={tmp_path}", "n=5"]
    small = ["rungs=[1.0,0.5]", "solver_steps=2", "guidance_scale=3.0", "cpu=true"]
    make_pairs(config.load(PairsConfig, [*given, *small]))
    content = json.loads((tmp_path / MANIFEST).read_text())["content"]
    assert content["num_classes"] == 3 and content["shape"] == [4, 8, 8]


def test_what_does_not_fit_is_said_with_the_remedy(folders, tmp_path):
    with pytest.raises(UserError, match="reads prompts: encode some .*teacher.prompts=FOLDER"):
        load_teacher(TeacherConfig(str(folders["sd3"])))
    with pytest.raises(UserError, match="prompts of another pipeline .embedding, mask.*needs embedding, pooled"):
        load(folders["sd3"], Path(f"{folders['pixart']}_prompts"))
    for teacher in (ROOT / "teachers" / "photos32", tiny_pipeline(tmp_path / "dit")):
        with pytest.raises(UserError, match="reads class labels: leave prompts out"):
            load(teacher, Path(f"{folders['pixart']}_prompts"))
    shutil.copytree(f"{folders['pixart']}_prompts", tmp_path / "p")
    manifest = json.loads((tmp_path / "p" / MANIFEST).read_text())
    for content, kind in (({"kind": "latents"}, UserError), ({"kind": "prompts", "encoder": 3}, DamagedFileError)):
        (tmp_path / "p" / MANIFEST).write_text(json.dumps({**manifest, "content": content}))
        with pytest.raises(kind, match="prompts"):
            Prompts(str(tmp_path / "p"))


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (
            lambda index: index.update(_class_name="Lumina2Pipeline"),
            UserError,
            "Lumina2Pipeline: prompts can be encoded for",
        ),
        (lambda index: index.update(_class_name=["own_code", "Pipeline"]), UserError, "own_code"),
        (lambda index: index.update(text_encoder=["own_code", "T5EncoderModel"]), UserError, "own_code"),
        (lambda index: index.update(tokenizer=["transformers", "AutoTokenizer"]), UserError, "AutoTokenizer"),
    ],
)
def test_no_class_of_the_folders_own_is_loaded(folders, tmp_path, change, kind, said):
    shutil.copytree(folders["pixart"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "own_code.py").write_text("raise SystemExit('ran')")
    index = json.loads((tmp_path / "model_index.json").read_text())
    change(index)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(kind, match=said):
        load_text_encoder(str(tmp_path))


def test_pickled_and_damaged_text_encoders_are_refused(folders, tmp_path):
    shutil.copytree(folders["pixart"], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    torch.save(weights, tmp_path / "text_encoder" / "pytorch_model.bin")
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    with pytest.raises(DamagedFileError, match="transformers cannot load it"):
        load_text_encoder(str(tmp_path))
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(DamagedFileError, match="do not fit config.json.*block.1.layer.0.SelfAttention.q"):
        load_text_encoder(str(tmp_path))
    file.unlink()
    with pytest.raises(MissingWeightsError, match="no safetensors"):
        load_text_encoder(str(tmp_path))


def test_a_text_encoder_of_the_hub_brings_its_tokenizer_and_no_transformer(folders, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **given: (asked.update(given), str(folders["pixart"]))[1]
    )
    assert load_text_encoder("owner/name", "v2").tokens == 120 and asked["revision"] == "v2"
    assert "tokenizer*/*.model" in asked["allow_patterns"] and not any(
        "transformer" in p for p in asked["allow_patterns"]
    )
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in asked["allow_patterns"])


def test_a_file_of_json_lines_is_encoded_as_its_prompts(folders, tmp_path):
    whole, entries = Path(f"{folders['pixart']}_prompts"), [{"id": i, "prompt": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, entries)))
    made = encoded(tmp_path / "prompts.jsonl", folders["pixart"], tmp_path / "again")
    assert {file.name: file.read_bytes() for file in made.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }
    assert Prompts(str(made)).texts() == tuple(TEXTS)
    (made / "prompts.txt").write_text("other\n")
    assert Prompts(str(made)).texts() == ()


def test_the_columns_of_a_table_are_encoded_and_what_they_take_is_said(folders, tmp_path, capsys):
    plain = encoded(folders["root"] / "prompts.txt", folders["pixart"], tmp_path / "plain", "negative=dark")
    capsys.readouterr()
    with open(tmp_path / "p.csv", "w", newline="") as file:
        rows = [{"de": text, "negative": "dark", "seed": i, "prompt": "no"} for i, text in enumerate(TEXTS)]
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    given = ["column=de", "shard_size=3", "batch_size=2", "cpu=true", "dtype=float32", f"out={tmp_path / 'made'}"]
    config.run_job(EncodeConfig, encode, [f"prompts={tmp_path / 'p.csv'}", f"pipeline={folders['pixart']}", *given])
    held = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    copy = [json.loads(line) for line in held.pop("prompts.jsonl").decode().splitlines()]
    assert copy == [{"prompt": text, "seed": i} for i, text in enumerate(TEXTS)]
    assert held == {file.name: file.read_bytes() for file in plain.iterdir() if file.name != "prompts.txt"}
    assert Prompts(str(tmp_path / "made")).texts() == tuple(TEXTS)
    most = read_manifest(tmp_path / "made")[0].all_bytes()
    on_disk = sum(len(content) for name, content in held.items() if name.startswith("shard"))
    tokens = int(Prompts(str(tmp_path / "made")).lengths.sum())
    assert on_disk >= tokens * (16 * 4 + 8) > 0 and 4 * 120 * 16 * 4 < most > 4 * on_disk  # no padding is stored
    said = [line for line in capsys.readouterr().err.splitlines() if "prompts " in line]
    assert (
        said[0] == f"4 prompts take up to 0.0 MB in {tmp_path / 'made'}" and most > 30000
    )  # which would be said as 0.1
    assert [line.split("  ")[0] for line in said[1:]] == ["2/4 prompts", "4/4 prompts"]
    assert all(re.search(r"prompts/s  ETA \d\d:\d\d$", line) for line in said[1:])
    with pytest.raises(UserError, match="p.csv: line 2 holds 'de', .* and no 'fr'"):
        encoded(tmp_path / "p.csv", folders["pixart"], tmp_path / "none", "column=fr")
    assert not (tmp_path / "none").exists()


def test_the_folder_says_what_it_holds_and_is_continued_byte_for_byte(folders, tmp_path, capsys):
    whole = Path(f"{folders['pixart']}_prompts")
    assert (whole / "prompts.txt").read_text().splitlines() == TEXTS
    content = json.loads((whole / MANIFEST).read_text())["content"]
    assert content["pipeline"] == "PixArtAlphaPipeline" and content["tokens"] == 120
    shutil.copytree(whole, tmp_path / "again")
    (tmp_path / "again" / "shard_000001.safetensors").unlink()
    encoded(folders["root"] / "prompts.txt", folders["pixart"], tmp_path / "again")
    for file in whole.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="tokens: 120 -> 20"):
        encoded(folders["root"] / "prompts.txt", folders["pixart"], tmp_path / "again", "tokens=20")
    half = encoded(folders["root"] / "prompts.txt", folders["pixart"], tmp_path / "half", "dtype=bfloat16", "tokens=20")
    rows = Prompts(str(half)).rows(torch.tensor([1]))
    assert rows["embedding"].dtype == torch.bfloat16 and rows["mask"].shape == (1, rows["mask"].sum())
    full = Prompts(str(whole)).rows(torch.tensor([1]))["embedding"]
    kept = rows["mask"][0].bool()
    torch.testing.assert_close(rows["embedding"].float()[0, kept], full[0, kept], rtol=0.05, atol=0.05)


def test_guidance_leads_away_from_the_negative_prompt(folders, tmp_path, capsys):
    whole = Prompts(f"{folders['pixart']}_prompts")
    made = encoded(folders["root"] / "prompts.txt", folders["pixart"], tmp_path / "out", f"negative={TEXTS[2]}")
    rows, plain = (one.rows(torch.arange(4)) for one in (Prompts(str(made)), whole))
    for name, values in rows.items():
        torch.testing.assert_close(values[[3, 0, 1]], plain[name][[2, 0, 1]], rtol=0, atol=1e-6)
    contents = [json.loads((folder / MANIFEST).read_text())["content"] for folder in (made, Path(whole.folder))]
    assert contents[0]["negative"] == TEXTS[2] and "negative" not in contents[1]
    with pytest.raises(UserError, match='negative: "two" -> "dogs"'):
        encoded(folders["root"] / "prompts.txt", folders["pixart"], made, "negative=dogs")
    with pytest.raises(SystemExit):
        config.run_job(EncodeConfig, encode, ["codec=x", f"out={tmp_path}", "negative=dogs"])
    assert "negative is a prompt, and images have none" in capsys.readouterr().err


def test_a_sentencepiece_model_alone_is_a_tokenizer(folders, tmp_path):
    """The public PixArt folders hold spiece.model and no tokenizer.json."""
    import sentencepiece

    (tmp_path / "text.txt").write_text("\n".join(f"a red cat {i} dogs on the grass" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=30,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folders["pixart"], pipeline)
    (pipeline / "tokenizer" / "tokenizer.json").unlink()
    shutil.copy(tmp_path / "spiece.model", pipeline / "tokenizer" / "spiece.model")
    encoder = load_text_encoder(str(pipeline))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ids = encoder.pipeline.tokenizer("a red cat").input_ids
    assert ids == [*model.encode("a red cat"), 1] and encoder.encode(["a red cat"])["mask"].sum() == len(ids)


def test_a_vae_is_no_pipeline(tmp_path, capsys):
    tiny_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "prompts.txt").write_text("a\n")
    with pytest.raises(SystemExit) as stop:
        given = [f"prompts={tmp_path / 'prompts.txt'}", f"pipeline={tmp_path / 'vae'}", f"out={tmp_path / 'out'}"]
        config.run_job(EncodeConfig, encode, given)
    assert stop.value.code == 2 and "model_index.json is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        config.run_job(EncodeConfig, encode, [*given, "codec=x"])
    assert "prompts needs pipeline" in capsys.readouterr().err
