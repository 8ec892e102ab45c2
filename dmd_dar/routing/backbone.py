"""The configuration of a routed transformer: its backbone's, which tells nothing of the routers."""

from collections import OrderedDict
from functools import partial
from typing import Any

from dmd_dar.errors import UserError
from dmd_dar.routing.layout import RoutingConfig


class BackboneConfig(OrderedDict):
    """`model.config` of a routed diffusers transformer; keys are attributes too, as in diffusers' own.

    diffusers' `from_config` would make a plain model of it in silence, as EMAModel does to save an average. It raises
    UserError instead; `dict(model.config)` is an ordinary configuration. `routed_as`: the model's class, routing and
    granularity.
    """

    routed_as: tuple[Any, RoutingConfig, str]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def get(self, key: Any, default: Any = None) -> Any:
        if key == "_use_default_values":  # from_config asks for it first, and nothing else does
            raise UserError(
                "from_config would make a plain model of a routed model's configuration, without its routers: give"
                " EMAModel model_cls=dmd_dar.routing.RoutedModel; for a plain model, give dict(model.config)"
            )
        return super().get(key, default)


def guard_config(model: Any, routing: RoutingConfig, granularity: str) -> None:
    """Make the configuration of a diffusers model a BackboneConfig, and keep it one when entries are registered."""
    if isinstance(config := vars(model).get("_internal_dict"), dict):
        model._internal_dict = BackboneConfig(config)
        model._internal_dict.routed_as = (type(model), routing, granularity)
        model.register_to_config = partial(_register, model)


def release_config(model: Any) -> None:
    """diffusers' own form of the configuration again."""
    if isinstance(vars(model).get("_internal_dict"), BackboneConfig):
        del model.register_to_config
        model.register_to_config()


def _register(model: Any, **entries: Any) -> None:
    _, routing, granularity = model.config.routed_as
    type(model).register_to_config(model, **entries)
    guard_config(model, routing, granularity)
