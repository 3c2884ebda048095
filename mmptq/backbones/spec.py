"""What mmptq must know of a family of backbones, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from ..errors import QuantizationError

Site = Literal[
    'weight',
    'image',
    'post_norm',
    'post_attention',
    'post_gelu',
    'query',
    'key',
    'post_softmax',
    'value',
    'conv',
    'linear',
]
SITES: tuple[str, ...] = get_args(Site)
"""Where a quantized tensor stands; a recipe gives a quantizer for each."""


@dataclass(frozen=True)
class BackboneSpec:
    """One family of backbones. Patterns are module names below the backbone in which
    ``*`` stands for one part.

    Attributes:
        classes: ``package.ClassName`` of the backbones, subclasses included; package is
            the top-level one.
        blocks: Calibration units, registered in the order in which they run.
        attentions: Modules that compute exactly two products, or
            ``nn.MultiheadAttention``.
        sites: What the input of a Linear or Conv2d is, by the layer's name.
        title: What the family is called in tables.
        models: Where it is used, for tables.
    """

    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    attentions: tuple[str, ...]
    sites: dict[str, Site]
    title: str = ''
    models: tuple[str, ...] = ()

    def block_names(self, backbone: nn.Module) -> list[str]:
        """Names of the calibration units, in forward order; what has no parameters, as
        an absent classifier, is none.

        Raises:
            QuantizationError: If there is none, or one lies within another.
        """
        names = [
            name
            for name, module in backbone.named_modules()
            if matches(name, self.blocks) and any(True for _ in module.parameters())
        ]
        if not names:
            raise QuantizationError(
                f'{type(backbone).__name__} has no module named like'
                f' {", ".join(self.blocks)}'
            )
        for outer in names:
            for inner in names:
                if inner.startswith(outer + '.'):
                    raise QuantizationError(
                        f'{type(backbone).__name__}: block {inner} lies within block'
                        f' {outer}'
                    )
        return names

    def site(self, name: str) -> Site | None:
        """The site of a layer's input, or None if the spec does not name the layer."""
        return next(
            (site for pattern, site in self.sites.items() if matches(name, (pattern,))),
            None,
        )

    def below(self, path: str) -> BackboneSpec:
        """The spec of a module that has a backbone of this family as its submodule
        ``path``.
        """
        return replace(
            self,
            blocks=tuple(f'{path}.{name}' for name in self.blocks),
            attentions=tuple(f'{path}.{name}' for name in self.attentions),
            sites={f'{path}.{name}': site for name, site in self.sites.items()},
        )


_SPECS: list[BackboneSpec] = []
_WRAPPERS: dict[str, str] = {}


def register_spec(spec: BackboneSpec) -> BackboneSpec:
    """Makes a family known; a later spec wins over an earlier one for the same class."""
    _SPECS.insert(0, spec)
    return spec


def register_wrapper(name: str, path: str) -> None:
    """Makes a class, ``package.ClassName``, known that has the backbone proper as its
    submodule ``path``.
    """
    _WRAPPERS[name] = path


def known_classes() -> list[str]:
    """All backbones with a spec, and their wrappers, sorted."""
    return sorted({name for spec in _SPECS for name in spec.classes} | {*_WRAPPERS})


def support_table() -> str:
    """The families and their classes, as a table in Markdown."""
    rows = [
        f'| {spec.title} | {", ".join(f"`{name}`" for name in spec.classes)} |'
        f' {", ".join(spec.models)} |'
        for spec in sorted(_SPECS, key=lambda spec: spec.title)
    ]
    return '\n'.join(['| backbone | classes | models |', '|---|---|---|', *rows])


def find_spec(backbone: nn.Module) -> BackboneSpec:
    """The spec of a backbone, by its class or the nearest base class.

    Raises:
        QuantizationError: If none fits, or a wrapper does not hold its backbone.
    """
    for cls in type(backbone).__mro__:
        qualified = f'{cls.__module__.split(".")[0]}.{cls.__name__}'
        if qualified in _WRAPPERS:
            path = _WRAPPERS[qualified]
            if path not in dict(backbone.named_modules()):
                raise QuantizationError(
                    f'{qualified} has no module {path} here, so this model cannot be'
                    ' quantized in it; a transformer of timm can be in'
                    ' mmptq.TimmBackbone (docs/timm.md)'
                )
            return find_spec(backbone.get_submodule(path)).below(path)
        for spec in _SPECS:
            if qualified in spec.classes:
                return spec
    raise QuantizationError(
        f'the backbone {type(backbone).__module__}.{type(backbone).__name__} is not'
        f' known. Known are: {", ".join(known_classes())}. To add one, describe it in a'
        ' mmptq.backbones.BackboneSpec and pass that to register_spec (README, "To'
        ' add")'
    )


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a module name fits one of the patterns; ``*`` stands for one part of the
    name.
    """
    return any(
        name.count('.') == pattern.count('.') and fnmatchcase(name, pattern)
        for pattern in patterns
    )
