"""A recipe: which quantizer at which site, at how many bits, with parameters chosen by
which method.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mmengine.registry import Registry

from ..errors import QuantizationError
from ..layers import RESCALES, QuantLinear, QuantOp
from ..quantizers import Quantizer
from ..registry import METHODS, QUANTIZERS, registered
from .by_layer import LayerEntry, read_entries
from .spec import SITES
from .stages import canonical

GRANULARITIES: dict[str, tuple[str, ...]] = {
    'per_channel': ('weight',),
    'per_head': ('query', 'key', 'post_softmax', 'value'),
}
"""Options of a recipe's quantizer, and the sites whose tensors have such an axis."""


RESCALED: dict[str, tuple[str, ...]] = {
    'per_channel': ('post_norm', 'post_attention', 'post_gelu', 'linear'),
    'gelu': ('post_gelu',),
}
"""Values of the option ``rescale`` (names of :data:`mmptq.layers.RESCALES`), and the
sites whose quantizer may have it.
"""


NAME = re.compile(r'[A-Za-z0-9_.+-]+')
"""What a recipe may be called: the name is part of a folder's."""


@dataclass(frozen=True)
class Bits:
    """Bits of weights, of activations, and of attention probabilities (as activations
    if not given).
    """

    weight: int
    activation: int
    softmax: int

    def at(self, site: str) -> int:
        """The bits of a site."""
        number: int = getattr(self, bits_kind(site))
        return number


def bits_kind(site: str) -> str:
    """Which of the numbers of bits is that of a site."""
    return {'weight': 'weight', 'post_softmax': 'softmax'}.get(site, 'activation')


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a quantized model but the data.

    Attributes:
        name: As it appears in reports.
        bits: The bits, where a site's quantizer does not fix its own.
        quantizers: By site: ``type`` and options of a quantizer; ``per_channel`` or
            ``per_head`` sets its granularity, ``rescale`` how the input is rescaled
            before it (:mod:`mmptq.layers.rescale`).
        method: ``type`` and options of the method; None where there are ``stages``.
        stages: ``type`` and options of each stage, where there is no short name for
            them (:mod:`mmptq.backbones.stages`).
        propagate_error: With ``stages``: whether a block's inputs are from the
            quantized model; None: as the first stage prefers.
        layers: What differs at single layers and attention products. Of the entries
            that match a name the last one wins: for each kind of bits, for each site,
            and for whether it stays float.
    """

    name: str
    bits: Bits
    quantizers: dict[str, dict[str, Any]]
    method: dict[str, Any] | None = None
    stages: list[dict[str, Any]] | None = None
    propagate_error: bool | None = None
    layers: tuple[LayerEntry, ...] = ()

    @classmethod
    def from_dict(cls, recipe: Mapping[str, Any]) -> Recipe:
        """Checks a recipe as a config has it.

        Raises:
            QuantizationError: If a key, site, type or number of bits is unknown, or a
                quantizer does not fit its site, naming it.
        """
        _require_dict(recipe, 'it')
        recipe = canonical(recipe)
        how = ('stages', 'propagate_error') if 'stages' in recipe else ('method',)
        if not isinstance(recipe.get('name', ''), str):
            raise QuantizationError(
                f'recipe: name is to be text, not {recipe["name"]!r}'
            )
        if not NAME.fullmatch(recipe.get('name', 'unnamed')):
            raise QuantizationError(
                'recipe: name is part of a folder: letters, digits and _ . + - only,'
                f' not {recipe["name"]!r}'
            )
        unknown = set(recipe) - {'name', 'bits', 'quantizers', 'layers', *how}
        missing = {'bits', 'quantizers', how[0]} - set(recipe)
        if unknown or missing:
            raise QuantizationError(
                f'a recipe has the keys name, bits, quantizers, {", ".join(how)} and'
                f' layers; unknown: {sorted(unknown)}, missing: {sorted(missing)}'
            )
        for what in {'bits', 'quantizers', 'method'} & set(recipe):
            _require_dict(recipe[what], what)
        for site, quantizer in recipe['quantizers'].items():
            _require_dict(quantizer, f'quantizer of site {site}')
        quantizers = {
            site: dict(quantizer) for site, quantizer in recipe['quantizers'].items()
        }
        if set(quantizers) != set(SITES):
            raise QuantizationError(
                f'a recipe names a quantizer for each of the sites {", ".join(SITES)};'
                f' unknown: {sorted(set(quantizers) - set(SITES))}, missing:'
                f' {sorted(set(SITES) - set(quantizers))}'
            )
        bits = dict(recipe['bits'])
        if (
            not {'weight', 'activation'}
            <= set(bits)
            <= {'weight', 'activation', 'softmax'}
        ):
            raise QuantizationError(
                'bits has the keys weight, activation and, optionally, softmax, not'
                f' {sorted(bits)}'
            )
        bits.setdefault('softmax', bits['activation'])
        method = dict(recipe['method']) if 'method' in recipe else None
        result = cls(
            recipe.get('name', 'unnamed'),
            Bits(**bits),
            quantizers,
            method,
            recipe.get('stages'),
            recipe.get('propagate_error'),
            read_entries(recipe.get('layers', {})),
        )
        for site in SITES:
            result.build_quantizer(site, -2)
        for (
            what,
            number,
        ) in bits.items():  # those of a site that has its own were not looked at
            if type(number) is not int or not 2 <= number <= 8:
                raise QuantizationError(
                    f'recipe: bits of {what} must be an integer from 2 to 8, not'
                    f' {number!r}'
                )
        result._check_stages()
        result._check_rescales()
        result._check_layers()
        return result

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a config has it, without what it does not say; ``layers``, if
        there are any, as a list.
        """
        recipe = {
            key: value
            for key, value in asdict(replace(self, layers=())).items()
            if value is not None
        }
        del recipe['layers']
        return (
            {**recipe, 'layers': [entry.to_dict() for entry in self.layers]}
            if self.layers
            else recipe
        )

    @property
    def method_name(self) -> str:
        """The type of the method, or those of the stages with + between them."""
        return '+'.join(
            str(method['type']) for method in self.stages or [self.method or {}]
        )

    def _methods(self) -> list[Any]:
        methods = self.build_method()
        return methods if isinstance(methods, list) else [methods]

    def _check_stages(self) -> None:
        first = self._methods()[0]
        if getattr(first, 'improves', False):
            raise QuantizationError(
                f'recipe: {type(first).__name__} improves what a stage before it found:'
                ' put one such as AdaLog before it, in stages'
            )

    def for_layer(self, name: str) -> Recipe | None:
        """The recipe of one layer or attention product, by its name in the whole model;
        None if that stays float.
        """
        entries = [entry for entry in self.layers if entry.matches(name)]
        flags = [entry.keep_float for entry in entries if entry.keep_float is not None]
        return None if flags and flags[-1] else self._changed_by(entries)

    def leaving_float(self, names: Iterable[str]) -> Recipe:
        """The recipe with further layers that stay float, by their names."""
        entries = [LayerEntry.from_dict(name, {'float': True}) for name in names]
        return replace(self, layers=(*self.layers, *entries))

    def bits_of_weights(self) -> set[int]:
        """All numbers of bits that weights may have, in one layer or another."""
        recipes = [self, *(self._changed_by([entry]) for entry in self.layers)]
        return {recipe.build_quantizer('weight', None).bits for recipe in recipes}

    def _changed_by(self, entries: Sequence[LayerEntry]) -> Recipe:
        bits, changes = {}, {}
        for entry in entries:
            bits.update(entry.bits)
            changes.update(entry.quantizers)
        quantizers = {}
        for site, options in self.quantizers.items():
            if bits_kind(site) in bits:  # the layer was named, and the site was not
                options = {
                    key: value for key, value in options.items() if key != 'bits'
                }
            change = changes.get(site, {})
            another = change.get('type', options.get('type')) != options.get('type')
            quantizers[site] = dict(change) if another else {**options, **change}
        return replace(
            self, bits=replace(self.bits, **bits), quantizers=quantizers, layers=()
        )

    def _check_layers(self) -> None:
        for entry in self.layers:
            try:
                changed = self._changed_by([entry])
                for site in SITES:
                    changed.build_quantizer(site, -2)
                changed._check_rescales()
            except QuantizationError as error:
                reason = str(error).removeprefix('recipe: ')
                raise QuantizationError(
                    f'recipe: layers: {entry.pattern!r}: {reason}'
                ) from None

    def _check_rescales(self) -> None:
        rescaled = any(options.get('rescale') for options in self.quantizers.values())
        if rescaled and not any(
            getattr(method, 'rescales', False) for method in self._methods()
        ):
            raise QuantizationError(
                f'recipe: method {self.method_name} does not rescale: drop the option'
                ' rescale of its quantizers'
            )

    def build_quantizer(self, site: str, weight_axis: int | None) -> Quantizer:
        """A quantizer for a site; ``weight_axis`` is the axis of output channels where
        the tensor is a weight.
        """
        options = {'bits': self.bits.at(site), **self.quantizers[site]}
        rescale = options.pop('rescale', None)
        if rescale is not None and (
            not isinstance(rescale, str) or rescale not in RESCALED
        ):
            raise QuantizationError(
                f'recipe: rescale is one of {", ".join(RESCALED)}, not {rescale!r} for'
                f' site {site}'
            )
        if rescale is not None and site not in RESCALED[rescale]:
            raise QuantizationError(
                f'recipe: rescale={rescale!r} is for {", ".join(RESCALED[rescale])},'
                f' not for site {site}'
            )
        if 'axis' in options:
            raise QuantizationError(
                f'recipe: quantizer of site {site}: axis follows from per_channel or'
                ' per_head, a recipe has none'
            )
        for granularity, sites in GRANULARITIES.items():
            wanted = options.pop(granularity, False)
            if not isinstance(wanted, bool):
                raise QuantizationError(
                    f'recipe: {granularity} of site {site} must be True or False, not'
                    f' {wanted!r}'
                )
            if wanted:
                if site not in sites:
                    raise QuantizationError(
                        f'recipe: {granularity} is for {", ".join(sites)}, not for site'
                        f' {site}'
                    )
                options['axis'] = weight_axis if site == 'weight' else -3
        quantizer: Quantizer = _build(QUANTIZERS, options, f'quantizer of site {site}')
        misfit = _misfit(quantizer, site, rescale)
        if misfit:
            raise QuantizationError(
                f'recipe: quantizer of site {site}: {type(quantizer).__name__} {misfit}'
            )
        return quantizer

    def build_method(self) -> Any:
        """What chooses the parameters, as :func:`mmptq.calibration.calibrate` takes it:
        the method, or the list of stages.
        """
        if self.stages is None:
            return _build(METHODS, dict(self.method or {}), 'method')
        return [
            _build(METHODS, dict(stage), f'stage {number}')
            for number, stage in enumerate(self.stages, 1)
        ]

    def equip(
        self, op: QuantOp, sites: dict[str, str], heads: int | None = None
    ) -> None:
        """Gives an operation the quantizers of its operands' sites; a product may say
        how many ``heads`` it has.
        """
        axis = getattr(op, 'weight_axis', None)
        op.set_quantizers(
            sites,
            {role: self.build_quantizer(site, axis) for role, site in sites.items()},
            heads,
        )
        if isinstance(op, QuantLinear):
            rescale = self.quantizers[sites['input']].get('rescale')
            op.rescale = (
                None
                if rescale is None
                else RESCALES[rescale](op.in_features, op.out_features)
            )


def _require_dict(value: Any, what: str) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise QuantizationError(
            f'recipe: {what} is to be a dict with text as keys, not {value!r}'
        )


def _misfit(quantizer: Quantizer, site: str, rescale: str | None) -> str | None:
    """Why a quantizer is not for a site's values, if it is not."""
    if rescale == 'per_channel' and not (
        quantizer.uniform and quantizer.param_names == ('scale', 'zero_point')
    ):
        return (
            "has no scale and zero point to share, as rescale='per_channel' needs them;"
            ' use UniformQuantizer'
        )
    if quantizer.dynamic and site != 'post_softmax':
        return 'is for rows of probabilities, that is post_softmax'
    if not quantizer.signed and site not in (
        'post_softmax',
        'post_gelu',
    ):  # GELU's negative values are few and small
        return 'is for values that are hardly ever negative: post_softmax and post_gelu'
    return None


def _build(registry: Registry, options: dict[str, Any], what: str) -> Any:
    kind = options.pop('type', None)
    cls = registered(registry, kind) if isinstance(kind, str) else kind
    if not callable(cls):
        raise QuantizationError(
            f'recipe: {what}: unknown type {kind!r}; known are'
            f' {", ".join(sorted(registry.module_dict))}'
        )
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise QuantizationError(f'recipe: {what}: {error}') from None
