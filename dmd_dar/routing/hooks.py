"""The routers of a diffusers transformer, held as `model.dar`; its bound methods are the hooks that route the stream.

Bound methods, because copy.deepcopy then gives the copy hooks that use the copy's own routers.
"""

import copy
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from dmd_dar.routing.caches import BlockCache, block_cache, cached
from dmd_dar.routing.checkpointing import Checkpointed
from dmd_dar.routing.consumers import Plan, stream_argument, time_embedder
from dmd_dar.routing.history import History
from dmd_dar.routing.layout import RoutingConfig, reads
from dmd_dar.routing.router import RouterBank

StreamObserver = Callable[[str, int, Tensor], None]  # (stream, router l, alpha (n, B, T))


class Pass:
    """What the hooks know of one forward pass through `routers`; they leave one that is not `routed` alone."""

    def __init__(self, routers: "DarBank", observe: StreamObserver | None, routed: bool = True) -> None:
        self.routers, self.observe, self.routed = routers, observe, routed
        self.cache: BlockCache | None = None  # of diffusers, where it skips blocks of this pass
        self.with_grad = torch.is_grad_enabled()
        self.graph: dict[str, bool] = {}  # whether each stream's latest consumer ran with gradients
        self.histories: dict[str, History] = {}
        self.last: dict[str, Tensor] = {}  # x_l of each stream, as its latest consumer saw it
        self.handed: dict[str, Tensor] = {}  # h_l that the latest block was given in place of x_l
        self.outputs: dict[str, tuple] = {}  # of the latest block, where it returns several
        self.place: dict[str, int] = {}  # which of them the next block took for the stream
        self.t_embedding: Tensor | None = None
        self.dtype: torch.dtype | None = None

    def snapshot(self) -> "Pass":
        """An independent copy, for recomputing a part of the pass; tensors are shared."""
        twin = copy.copy(self)
        twin.histories = {name: history.snapshot() for name, history in self.histories.items()}
        for name in ("graph", "last", "handed", "outputs", "place"):
            setattr(twin, name, dict(getattr(self, name)))
        return twin


class DarBank(nn.Module):
    """One `RouterBank` per token stream, and the hooks. Its own call projects the timestep embedding.

    `t_projection` (d, d_t) exists where the network's timestep embedding is not d wide and the query needs it; it
    starts as copies of the identity, the routers' gates at zero. `observe`, if set, sees every router's weights once a
    forward. The parameters are float32 or wider, also when the model is cast to less. Each thread has its own pass.

    The hooks of a model stay those of the bank that was installed (`owner`), but route with what `model.dar` holds at
    the time of the call: PEFT's `modules_to_save` puts copies in its place, which train and are saved.
    """

    def __init__(self, model: nn.Module, plan: Plan, config: RoutingConfig):
        super().__init__()
        config = config.resolved(plan.sublayers)
        reads(plan.sublayers, config.chunk_size)  # raises where the longest stream is shorter than a chunk
        self.config, self.plan = config, plan
        self.streams = nn.ModuleDict()
        for name, stream in plan.streams.items():
            own = replace(config, chunk_size=min(int(config.chunk_size), stream.sublayers))
            self.streams[name] = RouterBank(own, stream.sublayers, plan.width, stream.routers)
        self.time = None
        if config.query == "timestep":
            self.time = time_embedder(model)
            if self.time is None:
                raise ValueError(f"{type(model).__name__} has no timestep embedding: use query static or dynamic")
            t_width = _out_features(model.get_submodule(self.time))
            if t_width != plan.width:
                self.t_projection = nn.Parameter(_tiled_identity(plan.width, t_width))
        self.observe: StreamObserver | None = None
        self.proof: Callable[[nn.Module, tuple, dict], None] | None = None  # runs once, at the next forward
        self._warned = False
        self._thread = threading.local()

    @property
    def current(self) -> Pass | None:
        """The pass that runs in this thread; None outside of one."""
        return getattr(self._thread, "now", None)

    @current.setter
    def current(self, now: Pass | None) -> None:
        self._thread.now = now

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._thread = threading.local()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def wide(x: Tensor) -> Tensor:
            y = fn(x)
            return x.to(y.device, torch.float32) if y.dtype.itemsize < 4 else y

        return super()._apply(wide, recurse)

    @property
    def in_use(self) -> Self:
        """Itself; PEFT's wrapper passes the question on to its active copy, or to the original where none is."""
        return self

    def bank(self, stream: str) -> RouterBank:
        bank = self.streams[stream]
        assert isinstance(bank, RouterBank)
        return bank

    @property
    def at_start(self) -> bool:
        """Whether all queries are zero, so that the sources weigh the same."""
        return all(self.bank(stream).at_start for stream in self.streams)

    @property
    def was_reset(self) -> bool:
        """Whether queries, gains and t_projection can be what `reset` makes them, not memory that nothing filled."""
        gains = all(bool((self.bank(stream)()["gain"] == 1).all()) for stream in self.streams)
        if not hasattr(self, "t_projection"):
            return self.at_start and gains
        probe = torch.ones(1, self.t_projection.shape[1])
        return self.at_start and gains and bool(self(probe).any())

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start: zero queries, unit gains; the network then adds plainly, as it did before routing.

        Raises ValueError where an offloader keeps the parameters and what is written to them here would be lost.
        """
        for stream in self.streams:
            self.bank(stream).reset()
        if hasattr(self, "t_projection"):
            self.t_projection.copy_(_tiled_identity(*self.t_projection.shape))
        if any("forward" in vars(module) for module in self.modules()) and not self.was_reset:
            raise ValueError("the routers are offloaded, to reset them changes nothing: end the offloading first")

    def install(self, model: nn.Module) -> None:
        """Register every hook on `model` and its modules; all or, where that fails, none."""
        try:
            self._register(model)
        except BaseException:
            self.remove(model)
            raise

    def _register(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end, always_call=True)
        if self.time is not None:
            model.get_submodule(self.time).register_forward_hook(self._embed_t)
        if self.plan.first_block is not None:
            model.get_submodule(self.plan.first_block).register_forward_pre_hook(self._note_dtype)
        for tap in self.plan.taps:
            module = model.get_submodule(tap.path)
            if tap.output:
                module.register_forward_hook(partial(self._last_block, tap.stream, tap.router))
                continue
            hook = partial(self._route, tap.stream, tap.router, stream_argument(module))
            module.register_forward_pre_hook(hook, with_kwargs=True)
            if self.plan.granularity == "block":
                module.register_forward_hook(partial(self._note_outputs, tap.stream))

    def remove(self, model: nn.Module) -> None:
        """Take every hook off again.

        By looking for them: handles would be copied with the bank, and a copy's handles hold nothing.
        """
        for module in model.modules():
            stores = [
                store
                for name, store in vars(module).items()
                if name.startswith(("_forward_hooks", "_forward_pre_hooks"))
            ]
            hooks = {**module._forward_pre_hooks, **module._forward_hooks}
            for key in [key for key, hook in hooks.items() if _bank_of(hook) is self]:
                for store in stores:
                    store.pop(key, None)
        if isinstance(func := getattr(model, "_gradient_checkpointing_func", None), Checkpointed):
            model._gradient_checkpointing_func = func.inner  # type: ignore[assignment]

    def run(self, model: Any, args: tuple, kwargs: dict, *, routed: bool) -> Any:
        """The model's forward, routed or plain, past the hooks of its call: for use before or within one."""
        self.current = _started(model, routed)
        try:
            return model.forward(*args, **kwargs)
        finally:
            self.current = None

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        func = getattr(model, "_gradient_checkpointing_func", None)
        if func is not None and not isinstance(func, Checkpointed):
            model._gradient_checkpointing_func = Checkpointed(self, func)  # type: ignore[assignment]
        if self.proof is not None and not cached(model):
            proof, self.proof = self.proof, None
            proof(model, args, kwargs)
        if torch.is_grad_enabled() and not self._warned and not torch.compiler.is_compiling():
            self._warn_if_frozen(model)
        now = _started(model)
        now.cache = block_cache(model, self.plan.blocks)
        self.current = now

    def _warn_if_frozen(self, model: Any) -> None:
        if any(x.requires_grad for x in model.dar.parameters()) or not any(x.requires_grad for x in model.parameters()):
            return
        self._warned = True
        warnings.warn(
            f"{type(model).__name__} trains, but its routers are frozen, as PEFT leaves them: to train them too, give"
            " the adapter's configuration modules_to_save=['dar'], or call model.dar.requires_grad_(True) and save"
            " model.dar.state_dict() beside the adapter, whose file does not hold it",
            stacklevel=2,
        )

    def _end(self, model: nn.Module, args: tuple, output: Any) -> None:
        self.current = None

    def _embed_t(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.current is not None and self.current.t_embedding is None:
            self.current.t_embedding = output.squeeze(1) if output.ndim == 3 else output  # Krea 2's is (B, 1, d)

    def _note_dtype(self, module: nn.Module, args: tuple) -> None:
        if self.current is not None:
            self.current.dtype = args[0].dtype

    def _route(self, stream: str, router: int, name: str, module: nn.Module, args: tuple, kwargs: dict):
        """Forward pre-hook of a consumer or block: h_l in place of the stream that it was to read."""
        now, enabled = self._running(), torch.is_grad_enabled()
        if not now.routed:
            return None
        with torch.set_grad_enabled(enabled or now.with_grad):  # a block under no_grad reads what has a graph
            x = self._read(now, stream, router, args[0] if args else kwargs[name])
        now.graph[stream] = enabled
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})

    def _read(self, now: Pass, stream: str, router: int, x: Tensor) -> Tensor:
        """What a consumer or block is given in place of x (B, T, d)."""
        if self.plan.granularity == "block":
            for place, y in enumerate(now.outputs.pop(stream, ())):
                if y is x:
                    now.place[stream] = place
            if router > 1 and _skipped(now, stream):
                return x
            now.handed[stream] = self._state(now, stream, router, _undo(now, stream, x))
            return now.handed[stream]
        if router <= self.bank(stream).num_sublayers:
            h = self._state(now, stream, router, x.to(now.dtype or x.dtype))
            return x if router == 1 else h.to(x.dtype)
        return self._head(now, x, lambda: self._state(now, stream, router, x.to(now.dtype or x.dtype)).to(x.dtype))

    def _head(self, now: Pass, x: Tensor, state: Callable[[], Tensor]) -> Tensor:
        """What the head is given in place of x: state(), or what a cache that skips blocks has kept of it."""
        if now.cache is None:
            return state()
        if now.cache.skips(bool(now.last)):
            return now.cache.again(x)
        h = state()
        now.cache.keep(x, h)
        return h

    def _note_outputs(self, stream: str, module: nn.Module, args: tuple, output: Any) -> None:
        if self.current is not None and self.current.routed and isinstance(output, tuple):
            self.current.outputs[stream] = output

    def _last_block(self, stream: str, router: int, module: nn.Module, args: tuple, output: Any):
        """Forward hook of the last block, block granularity: the head's state in place of the stream it returns."""
        now = self._running()
        if not now.routed:
            return None
        tail = now.cache is not None and stream == now.cache.tail
        if not tail and _skipped(now, stream):
            return None
        outputs = [output] if isinstance(output, Tensor) else list(output)
        place = now.place.get(stream)
        if place is None:  # something was added on the way from block to block, or there is one output only
            like = now.last[stream].shape
            places = [i for i, x in enumerate(outputs) if isinstance(x, Tensor) and x.shape == like]
            if len(places) != 1:
                raise ValueError(f"cannot tell which of {len(outputs)} outputs of the last of {stream} is the stream")
            place = places[0]
        with torch.set_grad_enabled(now.with_grad or torch.is_grad_enabled()):
            x = outputs[place]
            state = lambda: self._state(now, stream, router, _undo(now, stream, x))  # noqa: E731
            outputs[place] = self._head(now, x, state) if tail else state()
        return outputs[0] if isinstance(output, Tensor) else type(output)(outputs)

    def _running(self) -> Pass:
        if self.current is None:
            raise RuntimeError(
                "a block of a routed transformer ran outside of the model's call, without its history: call the model"
                " itself, and checkpoint through enable_gradient_checkpointing"
            )
        return self.current

    def _state(self, now: Pass, stream: str, router: int, x: Tensor) -> Tensor:
        """h_l (B, T, d) of `stream` from the stream x_l that its consumer was to read."""
        if router == 1:
            now.last[stream] = x
            return x
        history = now.histories.get(stream) or self._new_history(now, stream)
        last, tokens, raw = now.last[stream], x.shape[1], x
        with torch.set_grad_enabled(now.graph[stream]):  # what a block makes under no_grad is a constant
            v = _difference(x, last[:, -tokens:])
        if tokens < last.shape[1]:  # the head behind a joint stream reads the image tokens, which come last
            rest = last.shape[1] - tokens
            v, x = nn.functional.pad(v, (0, 0, rest, 0)), torch.cat([last[:, :rest], x], dim=1)
        if history.count >= router - 1:
            raise RuntimeError(f"router {router} of stream {stream} was reached twice in one forward pass")
        history.append(v, x)
        while history.count < router - 1:  # blocks that this pass skips add nothing
            history.append(torch.zeros_like(v), x)
        now.last[stream] = x
        return _laid_out(history.state()[:, -tokens:], raw)

    def _new_history(self, now: Pass, stream: str) -> History:
        bank = now.routers.bank(stream)
        t_embedding = self._t_embedding(now)
        observe = None if now.observe is None else partial(now.observe, stream)
        if stream in now.last:
            joinable = "joint" in self.plan.streams
            history = History(bank, now.last[stream], t_embedding, observe, joinable)
        else:
            now.last[stream] = torch.cat([now.last.pop("text"), now.last.pop("image")], dim=1)
            now.graph[stream] = now.graph["image"]
            text, image = now.histories.pop("text"), now.histories.pop("image")
            history = History.joined(text, image, bank, t_embedding)
            history.observe = observe
        now.histories[stream] = history
        return history

    def _t_embedding(self, now: Pass) -> Tensor | None:
        """e(t) (B, d) of this pass, None where no query asks for it."""
        if self.time is None:
            return None
        e, batch = now.t_embedding, next(iter(now.last.values())).shape[0]
        if e is None or e.ndim != 2 or (len(e) > 1 and len(e) % batch):
            raise ValueError("query timestep needs one timestep per sample: use query static or dynamic")
        e = e[:batch].expand(batch, -1)  # Qwen-Image's clean tokens have their timesteps behind the samples'
        return now.routers(e) if hasattr(now.routers, "t_projection") else e

    def forward(self, e: Tensor) -> Tensor:
        """t_projection e(t), (B, d) from (B, d_t); by a call, so that an offloader brings the parameter."""
        return nn.functional.linear(e, self.t_projection.to(e.device, e.dtype))


def owner(model: nn.Module) -> DarBank | None:
    """The bank whose hooks route `model`, None for a plain one."""
    return next(filter(None, map(_bank_of, model._forward_pre_hooks.values())), None)


def _bank_of(hook: Callable) -> DarBank | None:
    """The bank that a hook is a method of."""
    bank = getattr(hook.func if isinstance(hook, partial) else hook, "__self__", None)
    return bank if isinstance(bank, DarBank) else None


def _started(model: Any, routed: bool = True) -> Pass:
    return Pass(model.dar.in_use, model.dar.observe, routed)


def _laid_out(h: Tensor, x: Tensor) -> Tensor:
    """h with the strides of x: kernels may round otherwise in another layout."""
    return h if h.stride() == x.stride() else torch.empty_like(x).copy_(h)


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """x - y in promote_types(dtype, float32), cast once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - y.to(wide)).to(x.dtype)


def _skipped(now: Pass, stream: str) -> bool:
    """Whether a cache skips this pass's blocks of `stream`, block granularity; known behind the first of them."""
    return now.cache is not None and stream in now.cache.lists and now.cache.skips(ran=True)


def _undo(now: Pass, stream: str, y: Tensor) -> Tensor:
    """x_{k+1} = y + (x_k - h_k) from a block's output y = h_k + v_k; y itself, bit for bit, where h_k is x_k."""
    if stream not in now.handed:
        return y
    wide = torch.promote_types(y.dtype, torch.float32)
    with torch.set_grad_enabled(now.graph[stream]):
        return (y.to(wide) + (now.last[stream].to(wide) - now.handed[stream].to(wide))).to(y.dtype)


def _out_features(module: nn.Module) -> int:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1].out_features


def _tiled_identity(width: int, t_width: int) -> Tensor:
    """(width, t_width): row i reads channel i mod t_width."""
    return torch.eye(t_width)[torch.arange(width) % t_width]
