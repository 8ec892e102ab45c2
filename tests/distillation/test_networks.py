"""The three networks of a distillation, with weights of their own and over one frozen base."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dmd_dar.distillation.networks import Memory, Networks, build_networks
from dmd_dar.errors import UserError
from dmd_dar.models.diffusers_denoiser import DiffusersDenoiser
from dmd_dar.models.frozen import Kept, block_layers, release, store
from dmd_dar.models.shared_lora import Lora, LoraConfig, merged
from dmd_dar.models.sit import build_sit, with_routing
from dmd_dar.routing.layout import RoutingConfig
from tests.models.tiny_pipelines import tiny_dit
from tests.tiny import TINY, tiny_sit

ROUTED = RoutingConfig("timestep", 2)
SHARED = Memory("shared_lora", LoraConfig(rank=4, alpha=8.0))


def teacher_of(kind: str) -> nn.Module:
    network = tiny_sit(replace(TINY, depth=3)) if kind == "sit" else DiffusersDenoiser(tiny_dit())
    return network.eval().requires_grad_(False)


def inputs_of(network) -> tuple[Tensor, Tensor, Tensor]:
    generator, size = torch.Generator().manual_seed(3), network.config.input_size
    x = torch.randn(3, network.config.in_channels, size, size, generator=generator)
    return x, torch.rand(3, generator=generator), torch.tensor([0, 3, 6])


def train(networks: Networks, steps: int, lr: float = 0.05) -> None:
    """Steps of both trained networks toward a target, one after the other."""
    x, t, labels = inputs_of(networks.teacher)
    pair = [networks.student, networks.fake_score]
    optimisers = [torch.optim.AdamW(network.parameters(), lr=lr) for network in pair]
    for _ in range(steps):
        for network, optimiser in zip(pair, optimisers, strict=True):
            (network(x, t, labels) - 1).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()


def stored_bytes(*networks: nn.Module) -> int:
    tensors = [
        t for network in networks for m in network.modules() for t in (*m._parameters.values(),) if t is not None
    ]
    tensors += [buffer for network in networks for buffer in network.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_all_three_networks_over_one_base_take_little_more_than_the_base():
    teacher = build_sit("S/2").requires_grad_(False)
    networks = build_networks(teacher, RoutingConfig("timestep", 4), memory=Memory("shared_lora"), rungs=4)
    every = (networks.teacher, networks.student, networks.fake_score)
    assert {p.dtype for network in every for p in network.parameters()} == {torch.float32}
    assert 1.0 < stored_bytes(*every) / stored_bytes(teacher) <= 1.35
    assert 1.0 < stored_bytes(*every, copy.deepcopy(networks.student)) / stored_bytes(teacher) <= 1.35
    full = build_networks(teacher, RoutingConfig("timestep", 4))
    assert stored_bytes(full.teacher, full.student, full.fake_score) > 2.99 * stored_bytes(teacher)


@pytest.mark.parametrize("kind", ["sit", "dit"])
@torch.no_grad()
def test_student_and_fake_score_start_as_the_teacher_bit_for_bit(kind):
    networks = build_networks(teacher_of(kind), ROUTED, memory=SHARED)
    given = inputs_of(networks.teacher)
    before = networks.teacher(*given)
    assert torch.equal(networks.student(*given), before) and torch.equal(networks.fake_score(*given), before)
    assert networks.student.config.routing.query == "timestep"
    assert networks.teacher.config.routing.query == networks.fake_score.config.routing.query == "residual"
    assert networks.student.router_parameters() and not networks.fake_score.router_parameters()


@pytest.mark.parametrize("kind", ["sit", "dit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_teacher_is_bit_equal_after_twenty_steps_of_the_others(kind, checkpointing):
    networks = build_networks(teacher_of(kind), ROUTED, memory=replace(SHARED, checkpointing=checkpointing))
    given = inputs_of(networks.teacher)
    with torch.no_grad():
        before = networks.teacher(*given)
    train(networks, 20)
    with torch.no_grad():
        after, student, fake = (n(*given) for n in (networks.teacher, networks.student, networks.fake_score))
    assert torch.equal(before, after)
    for other in (student, fake):
        assert (other - before).abs().max() > 0.01
    assert (student - fake).abs().max() > 0.001
    assert any(router.abs().max() > 0 for router in networks.student.router_parameters()[1:])


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_gradients_reach_what_the_network_owns_and_nothing_else(kind):
    networks = build_networks(teacher_of(kind), ROUTED, memory=SHARED)
    train(networks, 1)  # away from B = 0, where A gets no gradient
    x, t, labels = inputs_of(networks.teacher)
    networks.student(x, t, labels).square().sum().backward()
    own = networks.student.backbone_parameters() + networks.student.router_parameters()
    assert {id(p) for p in own} == {id(p) for p in networks.student.parameters()}
    assert all(p.grad is not None for p in own)
    others = [*networks.teacher.parameters(), *networks.fake_score.parameters()]
    assert all(p.grad is None for p in others)
    assert not {id(p) for p in own} & {id(p) for p in others}


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_backward_passes_that_compute_again_keep_to_their_own_network(kind):
    """The graphs of student and fake score are open at once, and go backward in the other order."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        networks = build_networks(teacher_of(kind), ROUTED, memory=replace(SHARED, checkpointing=checkpointing))
        train(networks, 2)
        x, t, labels = inputs_of(networks.teacher)
        student, fake = networks.student(x, t, labels), networks.fake_score(x, t, labels)
        with torch.no_grad():
            networks.teacher(x, t, labels)
        student.square().mean().backward()
        fake.square().mean().backward()
        both = [*networks.student.parameters(), *networks.fake_score.parameters()]
        gradients.append([p.grad for p in both])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


def test_an_update_is_alpha_over_rank_b_a():
    torch.manual_seed(0)
    networks = build_networks(
        teacher_of("sit"), RoutingConfig(), memory=replace(SHARED, lora=LoraConfig(4, 8.0, ("fc1",)))
    )
    layer, base = (n.blocks[0].mlp.fc1 for n in (networks.student.network, networks.teacher))
    nn.init.normal_(layer.lora.B)
    x = torch.randn(5, 16)
    expected = base(x) + 2.0 * (x @ layer.lora.A.T) @ layer.lora.B.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert sorted(networks.student.state_dict()) == sorted(
        f"network.blocks.{i}.mlp.fc1.lora.{name}" for i in range(3) for name in "AB"
    )


def starts(ambient: int, seed: int = 0, **changes) -> dict[str, Tensor]:
    """Every A of student and fake score, by name; `ambient` is what torch's own generator holds."""
    teacher = teacher_of("sit")
    torch.manual_seed(ambient)
    networks = build_networks(teacher, ROUTED, memory=replace(SHARED, **changes), seed=seed)
    pair = {"student": networks.student, "fake_score": networks.fake_score}
    named = {f"{role}.{name}": p for role, network in pair.items() for name, p in network.named_parameters()}
    return {name: p.detach() for name, p in named.items() if name.endswith(".lora.A")}


def test_adapters_start_by_seed_network_and_layer_whatever_was_drawn_before():
    first, again, other = starts(0), starts(1), starts(0, seed=1)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert len({tuple(value.flatten()[:4].tolist()) for held in (first, other) for value in held.values()}) == (
        2 * len(first)
    )
    few = starts(0, lora=LoraConfig(rank=4, targets=("attn.qkv",)))  # fewer adapters change none of the others
    assert 0 < len(few) < len(first) and all(torch.equal(first[name], value) for name, value in few.items())
    wide = starts(0, lora=LoraConfig(rank=2))
    assert all(torch.equal(first[name][:2], value) for name, value in wide.items())


def test_adapters_start_uniform_within_the_inverse_root_of_the_width():
    scaled = torch.cat(
        [value.flatten() * value.shape[1] ** 0.5 for value in starts(0, lora=LoraConfig(rank=64)).values()]
    )
    assert scaled.abs().max() < 1 and scaled.mean().abs() < 4 * (3 * len(scaled)) ** -0.5
    assert scaled.square().mean() == pytest.approx(1 / 3, rel=0.02) and (scaled > 0.5).float().mean() == pytest.approx(
        0.25, abs=0.01
    )


def test_building_networks_draws_nothing_from_torchs_generator():
    teacher = teacher_of("dit")
    before = torch.random.get_rng_state()
    build_networks(teacher, ROUTED, memory=SHARED, rungs=3)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_state_is_what_the_network_owns_and_restores_it(kind):
    networks = build_networks(teacher_of(kind), ROUTED, memory=SHARED)
    train(networks, 3)
    state = {name: value.clone() for name, value in networks.student.state_dict().items()}
    assert all(".lora." in name or "dar." in name for name in state) and any("dar." in name for name in state)
    fresh = build_networks(teacher_of(kind), ROUTED, memory=SHARED)
    fresh.student.load_state_dict(state)
    given = inputs_of(fresh.teacher)
    with torch.no_grad():
        assert torch.equal(fresh.student(*given), networks.student(*given))
        assert torch.equal(fresh.fake_score(*given), fresh.teacher(*given))
    with pytest.raises(RuntimeError, match="other adapters"):
        fresh.fake_score.load_state_dict(state)


@pytest.mark.parametrize("kind", ["sit", "dit"])
@torch.no_grad()
def test_a_deep_copy_has_its_own_adapters_over_the_same_base(kind):
    networks = build_networks(teacher_of(kind), ROUTED, memory=SHARED)
    given, student = inputs_of(networks.teacher), networks.student
    twin = copy.deepcopy(student)
    base = networks.teacher.state_dict(keep_vars=True)
    frozen = {id(t) for t in base.values()}
    theirs = {id(p) for m in twin.modules() for p in m._parameters.values() if p is not None}
    assert frozen <= theirs and not theirs & {id(p) for p in student.parameters()}
    for parameter in twin.parameters():
        parameter.add_(0.1)
    moved = twin(*given)
    assert torch.equal(student(*given), networks.teacher(*given)) and (moved - student(*given)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_merged_is_a_plain_network_of_the_same_function(kind):
    networks = build_networks(teacher_of(kind), ROUTED, memory=SHARED)
    train(networks, 3)
    plain, given = merged(networks.student), inputs_of(networks.teacher)
    expected = DiffusersDenoiser if kind == "dit" else type(networks.teacher)
    assert type(plain) is expected and not any("lora" in name for name in plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(*given), networks.student(*given), rtol=1e-4, atol=1e-5)
        for parameter in plain.parameters():
            parameter.zero_()
        assert networks.teacher(*given).abs().max() > 0
    assert merged(networks.teacher) is networks.teacher


def test_routers_of_a_dar_teacher_are_copied_for_each_network():
    teacher = with_routing(tiny_sit(), ROUTED).eval().requires_grad_(False)
    nn.init.normal_(teacher.dar.query)
    networks = build_networks(teacher, ROUTED, memory=SHARED)
    given = inputs_of(teacher)
    with torch.no_grad():
        before = teacher(*given)
        assert torch.equal(networks.fake_score(*given), before) and torch.equal(networks.student(*given), before)
    train(networks, 2)
    with torch.no_grad():
        assert torch.equal(teacher(*given), before)


def test_targets_that_name_no_layer_are_refused():
    with pytest.raises(UserError, match=r"lora.targets = \['to_q'\].*qkv"):
        build_networks(teacher_of("sit"), ROUTED, memory=replace(SHARED, lora=LoraConfig(targets=("to_q",))))


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_a_base_in_bfloat16_computes_in_the_types_asked_for_and_trains_adapters_in_float32(kind):
    memory = replace(SHARED, kept=Kept(torch.bfloat16), checkpointing=True)
    exact = teacher_of(kind)
    networks = build_networks(copy.deepcopy(exact), ROUTED, memory=memory)
    given = inputs_of(exact)
    assert {m.weight.dtype for m in block_layers(networks.teacher)} == {torch.bfloat16}
    assert {p.dtype for p in networks.student.parameters()} == {torch.float32}
    rounded = copy.deepcopy(exact)
    for layer in block_layers(rounded):
        layer.to(torch.bfloat16).float()
    with torch.no_grad():
        assert torch.equal(networks.teacher(*given), rounded(*given))
        assert torch.equal(networks.student(*given), rounded(*given))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(networks.teacher(*given), rounded(*given))
    with torch.autocast("cpu", torch.bfloat16):
        loss = networks.student(*given).float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in networks.student.parameters() if p.grad is not None)
    assert {p.dtype for p in merged(networks.student).parameters()} == {torch.float32}


def test_full_networks_train_in_float32_though_the_teacher_is_kept_in_bfloat16():
    exact = teacher_of("sit")
    networks = build_networks(copy.deepcopy(exact), ROUTED, memory=Memory(kept=Kept(torch.bfloat16)))
    assert networks.teacher.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert torch.equal(networks.student.blocks[0].attn.qkv.weight, exact.blocks[0].attn.qkv.weight)
    assert not hasattr(networks.student.blocks[0].attn.qkv, "storage")


def test_offloaded_weights_lie_on_the_cpu_and_follow_the_input():
    """The meta device stands for the accelerator: a layer whose weights did not come would fail there."""
    network = teacher_of("sit")
    held = dict(network.named_parameters())
    store(network, offload=True)
    linear = {id(p) for layer in block_layers(network) for p in layer.parameters()}
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in linear:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    x, t, labels = (given.to("meta") for given in inputs_of(network))
    assert network(x, t, labels).shape == x.shape
    assert all(layer.weight.device.type == "cpu" for layer in block_layers(network))
    assert all(p is held[name] for name, p in network.named_parameters() if id(p) in linear)
    release(network)
    with pytest.raises((RuntimeError, NotImplementedError)):
        network(x, t, labels)


def test_offload_changes_neither_outputs_nor_gradients_and_lets_go_after_each_layer(monkeypatch):
    results, alive = [], []
    for offload in (False, True):
        torch.manual_seed(0)
        networks = build_networks(
            teacher_of("sit"), ROUTED, memory=replace(SHARED, kept=Kept(offload=offload), checkpointing=True)
        )
        train(networks, 2)
        given = inputs_of(networks.teacher)
        loss = networks.student(*given).square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in networks.student.parameters())])
        alive.append([layer.weight for layer in block_layers(networks.teacher)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert all(isinstance(weight, nn.Parameter) for weight in alive[1])


def test_a_layer_that_fails_has_its_own_weights_back():
    network = teacher_of("sit")
    store(network, torch.bfloat16)
    layer = network.blocks[0].mlp.fc1
    stored = layer.weight
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 3))
    assert layer.weight is stored and layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_what_is_trained_lies_where_the_networks_compute_not_where_weights_are_stored(kind, monkeypatch):
    def keep_on_the_cpu(network: nn.Module, dtype: torch.dtype | None, offload: bool) -> None:
        for layer in dict.fromkeys(block_layers(network)):
            for name, value in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(torch.zeros(value.shape), requires_grad=False))

    monkeypatch.setattr("dmd_dar.distillation.networks.store", keep_on_the_cpu)
    memory = replace(SHARED, kept=Kept(offload=True))
    networks = build_networks(teacher_of(kind).to("meta"), ROUTED, memory=memory, rungs=4)  # meta for a GPU
    assert {layer.weight.device.type for layer in block_layers(networks.teacher)} == {"cpu"}
    for network in (networks.student, networks.fake_score):
        assert {p.device.type for p in network.parameters()} == {"meta"}


def test_an_update_is_merged_where_the_weight_lies():
    linear = nn.Linear(3, 2, bias=False, device="meta")
    linear.lora = Lora(linear, LoraConfig(rank=1), torch.device("cpu"))
    assert linear.lora.A.device.type == linear.lora.B.device.type == "cpu"
    linear.lora.merge(linear)
    assert linear.weight.device.type == "meta" and not hasattr(linear, "lora")
