"""diffusers' step caches on a routed model.

Most replace single attentions: the stream stays what the blocks add to it, and routing needs to know nothing of them.
FirstBlockCache, MagCache and SeaCache skip blocks and add, in their place, what these had added in the last pass that
ran them all. Routing then knows no outputs of the skipped sublayers. So it does as they do: what it had made of the
stream for the head in that pass, h - x, is added again.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

SKIPPING = {  # names of the hooks that decide, on the first of the blocks, and that skip, on the others
    "fbc_leader_block_hook",
    "fbc_block_hook",
    "mag_cache_leader_block_hook",
    "mag_cache_block_hook",
    "sea_cache_leader_block",
    "sea_cache_block",
}
TAYLOR = "taylorseer_cache"


class BlockCache:
    """The cache that skips blocks of one model, all of those in `lists`.

    `states` is diffusers' StateManager, which has a state for each cache context; None in TaylorSeer's lite mode, which
    passes all blocks over and predicts the network's output, whatever the head is given.
    """

    def __init__(self, states: Any, lists: tuple[str, ...]):
        self.states, self.lists, self.tail = states, lists, lists[-1] if lists else None

    def _state(self) -> Any:
        try:
            return self.states.get_state()
        except ValueError:  # outside of a cache context, where SeaCache skips nothing and others cannot run
            return None

    def skips(self, ran: bool) -> bool:
        """Whether this pass skips blocks; ran: whether any consumer has read the stream. Ask behind the first block."""
        if self.states is None:
            return not ran
        state = self._state()
        return not getattr(state, "should_compute", True) or getattr(state, "skip_remaining", False)

    def keep(self, x: Tensor, h: Tensor) -> None:
        """Note what routing makes of the stream x for the head in a pass that runs all blocks, both (B, T, d)."""
        if self.states is not None and (state := self._state()) is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            state.dar_change = (h.to(wide) - x.to(wide)).detach()  # the state's own end is its end too

    def again(self, x: Tensor) -> Tensor:
        """x (B, T, d), the stream as the cache made it, with the change that was kept.

        Raises ValueError where routers were attached after the pass that the cache remembers.
        """
        if self.states is None:
            return x
        change = getattr(self._state(), "dar_change", None)
        if change is None:
            raise ValueError("the cache remembers a pass without routers: disable_cache() and enable it again")
        return (x.to(change.dtype) + change).to(x.dtype)


def block_cache(model: nn.Module, blocks: Iterable[str]) -> BlockCache | None:
    """The cache that skips some of `blocks`, paths in the order in which they run; None if there is none.

    Raises ValueError for TaylorSeer on whole blocks outside of its lite mode: it predicts their outputs, in which those
    of their sublayers cannot be told apart.
    """
    states, lists, lite = None, {}, False
    for name in dict.fromkeys(path.rpartition(".")[0] for path in blocks):
        for block in model.get_submodule(name).children():
            for key, hook in _hooks(block).items():
                if key in SKIPPING:
                    states = states or hook.state_manager
                    lists[name] = True
                elif key == TAYLOR:
                    lite = hook.state_manager._init_kwargs["is_inactive"]
                    if not lite:
                        raise ValueError(
                            "TaylorSeerCache predicts whole blocks here, in which routing cannot tell the sublayers"
                            " apart: disable_cache(), then let cache_identifiers name attentions, or use_lite_mode"
                        )
    return BlockCache(states, tuple(lists)) if lists or lite else None


def cached(model: nn.Module) -> bool:
    """Whether a cache of diffusers is enabled: a call would change its state."""
    return bool(getattr(model, "is_cache_enabled", False)) or any(
        key in SKIPPING or key == TAYLOR for module in model.modules() for key in _hooks(module)
    )


def _hooks(module: nn.Module) -> dict[str, Any]:
    registry = vars(module).get("_diffusers_hook")
    return {} if registry is None else registry.hooks
