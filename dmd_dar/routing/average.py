"""Averages of routed transformers in diffusers' EMAModel, which saves by way of a class and a configuration."""

import os
from typing import Any

from dmd_dar.errors import UserError
from dmd_dar.routing.attach import install, load_routed
from dmd_dar.routing.backbone import BackboneConfig
from dmd_dar.routing.consumers import plan_of


class RoutedModel:
    """What EMAModel is given for the class of a routed transformer, whatever class that is.

    EMAModel(model.parameters(), model_cls=RoutedModel, model_config=model.config) saves the routers' average with the
    backbone's, in the form of `load_routed`; EMAModel.from_pretrained(folder, model_cls=RoutedModel) goes on with it.
    """

    from_pretrained = staticmethod(load_routed)

    @staticmethod
    def from_config(config: BackboneConfig | str | os.PathLike[str], return_unused_kwargs: bool = False) -> Any:
        """A routed model, its routers at their start, from a routed model's `config`; or the one that is in a folder.

        With `return_unused_kwargs`, its configuration is returned behind it, as a dict, with all that was saved in it.
        Raises UserError for the configuration of a model without routers, and what `load_routed` raises.
        """
        if isinstance(config, BackboneConfig):
            model_class, routing, granularity = config.routed_as
            model = model_class.from_config(dict(config))
            install(model, routing, plan_of(model, granularity))
        elif isinstance(config, dict):
            raise UserError("RoutedModel needs model.config of a model with routers: attach before EMAModel is made")
        else:
            model = load_routed(config)
        return (model, dict(model.config)) if return_unused_kwargs else model
