"""The sizes of a model that decide what a step costs, read from its modules.

A module on the "meta" device has them as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from regate_ds.families.text_decoders import branch_of


@dataclass(frozen=True)
class Products:
    """Weights that each row is multiplied with, and how many of them are trained."""

    weights: float
    trained: float

    def __add__(self, other: Products) -> Products:
        return Products(self.weights + other.weights, self.trained + other.trained)

    def __mul__(self, share: float) -> Products:
        return Products(self.weights * share, self.trained * share)


NOTHING = Products(0.0, 0.0)


@dataclass(frozen=True)
class LayerShape:
    """One layer of a decoder or a tower."""

    mixer: Products
    """Outside of the MLP branch."""

    mlp: Products
    """In the MLP branch; of experts, those that a token enters."""

    attention: int
    """Width of all heads; 0 for a layer without attention over pairs of positions."""


@dataclass(frozen=True)
class TowerShape:
    """The vision tower, and the projector behind it."""

    layers: tuple[LayerShape, ...]
    patch: Products
    """What makes a patch's first embedding."""

    projector: Products
    """Behind the tower, per image token."""

    patches_per_token: int
    """Patches of the tower that become one image token."""


@dataclass(frozen=True)
class ModelShape:
    """A causal language model, with a vision tower or without."""

    layers: tuple[LayerShape, ...]
    head: Products
    hidden: int
    vocabulary: int
    tower: TowerShape | None = None

    @property
    def depth(self) -> int:
        return len(self.layers)


def shape_of(host: Any, tower: nn.Module | None = None) -> ModelShape:
    """Return the shape of a transformers model with a head.

    tower: its vision tower, if it has one; every module of the base model that is in neither the
        tower nor the decoder counts as the projector.
    """
    decoder = host.get_decoder()
    config = decoder.config
    head = host.get_output_embeddings()
    return ModelShape(
        layers=tuple(_decoder_layer(layer, config, n) for n, layer in enumerate(decoder.layers)),
        head=products_of([head]),
        hidden=config.hidden_size,
        vocabulary=head.weight.shape[0],
        tower=None if tower is None else _tower(host, tower),
    )


def products_of(modules: Iterable[nn.Module], experts: float = 1.0) -> Products:
    """Return the weights of matrices and convolutions among these modules.

    experts: the share of the experts' weights, which have three dimensions, that a row meets.
    """
    found: dict[int, tuple[float, bool]] = {}
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                continue
            for parameter in part.parameters(recurse=False):
                is_matrix = parameter.dim() == 2 or hasattr(part, "kernel_size")
                if parameter.dim() < 2:
                    continue
                share = 1.0 if is_matrix else experts
                found[id(parameter)] = (parameter.numel() * share, parameter.requires_grad)
    sizes = found.values()
    return Products(sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained))


def _decoder_layer(layer: nn.Module, config: Any, number: int) -> LayerShape:
    names = branch_of(type(layer).__name__, config.model_type).mlps
    mlps = [part for name in names if (part := getattr(layer, name, None)) is not None]
    mlp, whole = (products_of(parts, _experts_met(config)) for parts in (mlps, [layer]))
    kinds = getattr(config, "layer_types", None)
    attends = kinds is None or "attention" in kinds[number] and "linear" not in kinds[number]
    return LayerShape(whole + mlp * -1.0, mlp, _attention_width(config) if attends else 0)


def _attention_width(config: Any) -> int:
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _experts_met(config: Any) -> float:
    """Return the share of a layer's experts that a token enters."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((n for name in names if (n := getattr(config, name, None))), 1)
    return (getattr(config, "num_experts_per_tok", None) or total) / total


def _tower(host: Any, tower: nn.Module) -> TowerShape:
    blocks = _blocks(tower)
    config: Any = getattr(tower, "config", None) or host.config.vision_config
    # Qwen2-VL calls the decoder's size the tower's hidden_size.
    width = getattr(config, "embed_dim", None) or config.hidden_size
    layer_ids = {id(p) for block in blocks for p in block.parameters()}
    rest = [part for part in _outside(tower, blocks) if part is not tower]
    decoder_ids = {id(p) for p in host.get_decoder().parameters()}
    tower_ids = {id(p) for p in tower.parameters()}
    behind = [
        part
        for part in host.base_model.modules()
        if not list(part.children())
        and all(id(p) not in decoder_ids | tower_ids for p in part.parameters())
    ]
    merge = getattr(config, "spatial_merge_size", None)
    shrink = getattr(host.config, "downsample_ratio", None)
    side = merge or (round(1 / shrink) if shrink else 1)
    patch = [p for p in rest if hasattr(p, "kernel_size") and _all_outside(p, layer_ids)]
    merger = [p for p in rest if isinstance(p, nn.Linear) and _all_outside(p, layer_ids)]
    return TowerShape(
        layers=tuple(LayerShape(products_of([block]), NOTHING, width) for block in blocks),
        patch=products_of(patch),
        projector=products_of([*behind, *merger]),
        patches_per_token=side**2,
    )


def _blocks(tower: nn.Module) -> list[nn.Module]:
    """Return the layers of a tower: the longest list of modules in it."""
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


def _outside(tower: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    inside = {id(part) for block in blocks for part in block.modules()}
    return [m for m in tower.modules() if id(m) not in inside and not list(m.children())]


def _all_outside(part: nn.Module, ids: set[int]) -> bool:
    return all(id(p) not in ids for p in part.parameters())
