import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd_dar import config
from dmd_dar.data.photos import NAMES
from dmd_dar.diagnostics import command as command
from dmd_dar.diagnostics.figures import clear_gates, weight_map
from dmd_dar.diagnostics.measure import not_finite, rounded
from dmd_dar.diagnostics.summary import clear_share, lines
from dmd_dar.models.saved import ModelCard, save_network
from dmd_dar.models.sit import with_routing
from dmd_dar.routing.layout import RoutingConfig
from tests.models.tiny_pipelines import tiny_dit, tiny_vae
from tests.pictures import noise
from tests.tiny import tiny_sit, tiny_teacher

SMALL = ["samples=6", "batch_size=4", "times=[0.0,0.5,1.0]", "probe_pairs=16", "probe_times=2", "cpu=true"]


def run(*argv):
    config.run_job(command.DiagnosticsConfig, command.diagnose, [*map(str, argv), *SMALL])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A residual teacher and a run folder whose student is its DAR conversion, routers at their start."""
    root = tmp_path_factory.mktemp("networks")
    routed = with_routing(tiny_sit(), RoutingConfig(query="timestep", chunk_size=2))
    save_network(root / "dar" / "student", routed, ModelCard(rungs=(1.0, 0.5), label_names=NAMES))
    return tiny_teacher(root / "teacher"), root / "dar"


@pytest.fixture(scope="module")
def compared(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run(f"run={folders[0]}", f"compare={folders[1]}", f"out={out}")
    return out, json.loads((out / "diagnostics.json").read_text())


def test_both_networks_are_measured_in_one_place(compared):
    out, result = compared
    residual, dar = result["models"]
    assert (residual["kind"], dar["kind"]) == ("residual", "DAR") and result["schema"] == 2
    assert residual["card"]["label_names"] == list(NAMES) and dar["card"]["rungs"] == [1.0, 0.5]
    assert list(not_finite(result)) == []
    for name in ("symptoms", "mixing", "routers"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # routers at their start leave the function, and with it every forward statistic, as it is
    for fact in ("loss", "forward_rms", "block_cosine"):
        assert np.array(dar["symptoms"][fact]) == pytest.approx(np.array(residual["symptoms"][fact]), rel=1e-5)
    effective = [row["effective_sources"] for row in dar["mixing"]["routers"]]
    assert effective == [[2.0] * 3, [2.0] * 3, [3.0] * 3, [4.0] * 3]
    assert len(residual["probe"]["states"]) == 5


def test_terminal_says_what_was_measured_beside_the_paper(compared):
    said, residual = "\n".join(lines(compared[1])), compared[1]["models"][0]["symptoms"]
    assert f"x{residual['inflation'][0]:.3g}" in said and f"x{residual['gradient_decay'][2]:.3g}" in said
    assert "t = 0 (data)" in said and "t = 1 (noise)" in said and "paper, residual SiT-XL/2" in said
    assert "by gate gradients" in said and "by alpha: effective sources 2.75 of 2.75" in said


def test_the_same_seed_gives_the_same_numbers(compared, folders):
    def measured(seed):
        cfg = config.load(command.DiagnosticsConfig, [f"run={folders[0]}", f"seed={seed}", *SMALL])
        return command.diagnose_one(cfg, cfg.run, "run", torch.device("cpu"), lambda: None)

    kept = compared[1]["models"][0]
    assert json.loads(json.dumps(measured(0))) == kept
    assert measured(1)["symptoms"]["loss"] != kept["symptoms"]["loss"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run=out/no_such_run"], "run = 'out/no_such_run'"),
        (["run=tests"], "run = tests: holds no network and no student/ with one"),
        (["run=teachers/photos32", "compare=tests"], "compare = tests: holds no network"),
        ([], "run is empty"),
        (["run=teachers/photos32", "times=[0.5,0.5]"], "times must rise strictly"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(SystemExit) as stopped:
        config.run_job(command.DiagnosticsConfig, command.diagnose, [*argv, f"out={tmp_path / 'out'}"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_diverged_network_is_named(tmp_path, capsys):
    network = tiny_sit()
    network.blocks[1].mlp.fc2.weight.data.fill_(float("nan"))
    save_network(tmp_path / "bad", network, ModelCard(label_names=NAMES))
    with pytest.raises(SystemExit) as stopped:
        run(f"run={tmp_path / 'bad'}", f"out={tmp_path / 'out'}")
    assert stopped.value.code == 2 and "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "diagnostics.json").exists()


def test_numbers_are_looked_through_and_rounded_at_any_depth():
    facts = {"a": [1.0, {"b": float("nan")}], "c": (float("inf"), 3, None)}
    assert list(not_finite(facts)) == ["a.1.b", "c.0"]
    assert rounded({"a": [1.23456789, (2, None)], "b": "x"}) == {"a": [1.23457, [2, None]], "b": "x"}


def test_a_summary_fills_the_columns_that_it_stands_for():
    routers = [
        {"sources": [[0, 0], [1, 1]], "weights": [[0.25, 0.75]]},
        {"sources": [[0, 0], [1, 2]], "weights": [[0.4, 0.6]]},
    ]
    expected = [[0.5, 1.5, np.nan], [0.8, 1.2, 1.2]]
    np.testing.assert_allclose(weight_map(routers, 0), expected)


def test_a_gate_is_clear_of_zero_beyond_two_standard_errors():
    row = {"router": 3, "sources": [[0, 0], [1, 1], [2, 2]], "standard_error": [[1.0, 1.0, 1.0]]}
    routers = [row | {"gate_gradient": [[2.1, -1.9, -2.1]]}]
    assert clear_gates(routers, 0) == ([0, 2], [3, 3]) and clear_share(routers, 0) == pytest.approx(2 / 3)


def test_a_network_of_other_classes_is_refused(tmp_path, capsys):
    """Seven classes of someone's own images are not the photographs' seven."""
    from eval import teacher

    names = ("a", "b", "c", "d", "e", "f", "g")
    save_network(tmp_path / "own", tiny_sit(), ModelCard(label_names=names))
    with pytest.raises(SystemExit) as exit_:
        run(f"run={tmp_path / 'own'}", f"out={tmp_path / 'out'}")
    assert exit_.value.code == 2 and "its classes are a, b, c" in capsys.readouterr().err
    with pytest.raises(config.ConfigError, match="its classes are a, b, c"):
        teacher.judge_teacher(teacher.TeacherReportConfig(path=str(tmp_path / "own"), out=str(tmp_path / "judged")))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_latent_pipeline_is_fed_its_vae_s_latents_of_a_user_s_images(tmp_path, capsys):
    """A DiTPipeline as diffusers saves it: images of a folder go through its VAE, and every number is finite."""
    from diffusers import DDIMScheduler, DiTPipeline

    for i in range(4):
        (tmp_path / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(16, 16, seed=i)).resize((64, 64)).save(tmp_path / "images" / f"class{i % 2}" / f"{i}.png")
    network = tiny_dit(sample_size=32, patch_size=8, num_embeds_ada_norm=2)
    DiTPipeline(network, tiny_vae(sample_size=64), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "dit")
    data = ["data.name=folder", f"data.path={tmp_path / 'images'}", "data.size=64", "data.held_out_share=0"]
    run(f"run={tmp_path / 'dit'}", f"out={tmp_path / 'out'}", *data)
    (model,) = json.loads((tmp_path / "out" / "diagnostics.json").read_text())["models"]
    assert model["kind"] == "residual" and len(model["symptoms"]["forward_rms"][0]) == 2
    assert [row["router"] for row in model["mixing"]["routers"]] == [2, 3, 4, 5] and len(model["probe"]["states"]) == 5
    assert model["model"]["in_channels"] == 4 and model["data"]
    with pytest.raises(SystemExit):
        run(f"run={tmp_path / 'dit'}", f"out={tmp_path / 'again'}")
    assert "4 channels of 32 x 32 and 2 classes, but data.name = photos gives" in capsys.readouterr().err


def test_data_of_the_command_line_count_though_they_are_the_defaults(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {name: textures}\n")
    cfg = command.DiagnosticsConfig(run=str(tmp_path))
    assert command.data_of(cfg).name == "textures"
    assert command.data_of(cfg, on_command_line=True).name == cfg.data.name == "photos"
