"""Every harness on some inputs, without a fuzzer; and all that once crashed."""

import random

import pytest

from mmptq import QuantizationError

from . import harnesses
from .choices import Choices, mutated, spots


@pytest.mark.parametrize('name', harnesses.HARNESSES)
def test_readers_refuse_or_read(name):
    refused = [
        harnesses.run(name, random.Random(f'{name} {number}').randbytes(64))
        for number in range(60)
    ]
    assert any(refused)


def test_honest_input_is_read():
    honest = harnesses.honest()
    assert (
        harnesses.load_file(harnesses._file(honest.pth, '.pth'))['state_dict'].keys()
        == honest.state.keys()
    )
    assert harnesses.read_packed(harnesses._file(honest.packed, '.safetensors'))[
        'state_dict'
    ]
    assert harnesses.load_progress(harnesses._file(honest.progress, '.pth'), 'me')
    assert harnesses.checked_about(honest.about, 'file').to_dict() == {
        **honest.about,
        'schema': 2,
    }
    harnesses.load_checked(harnesses._fresh(), honest.state, 'file')


def test_a_crash_would_be_seen(monkeypatch):
    def crashes(choices):
        raise KeyError(choices.below(2))

    monkeypatch.setitem(harnesses.HARNESSES, 'recipes', crashes)
    with pytest.raises(KeyError):
        harnesses.run('recipes', b'1')


def test_trees_are_changed_and_may_hold_themselves():
    tree = {'a': [1, {'b': 2}], 'c': 3}
    changed = [
        mutated(tree, Choices(bytes([0, place, act, act, act, 7])))
        for place in range(3)
        for act in range(6)
    ]
    assert tree == {'a': [1, {'b': 2}], 'c': 3} and any(
        each != tree for each in changed
    )
    tree['a'].append(tree)
    assert len(spots(tree)) == 3


# What crashed the version before this one, by kind; each was found by a harness.
CRASHES = {
    'a type of no name': dict(method=dict(type='')),
    'a type of a dot': dict(method=dict(type='.a')),
    'a command': dict(method=dict(type='os.system', command='true')),
    'names that are numbers': {1: 2},
    'bits that are a list': dict(bits=[4, 4]),
    'bits that are a text': dict(bits=dict(weight='4', activation=4)),
    'a number beyond float': dict(bits=dict(weight=10**400, activation=4)),
    'a quantizer that is a text': dict(quantizers='UniformQuantizer'),
    'a name of a screen': dict(name='\x1b[2J'),
}
LAYERS = {
    'a command for a layer': {
        '*': dict(quantizers=dict(key=dict(type='os.system', command='true')))
    },
    'a pattern of a screen': {'\x1b[2J': dict(float=True)},
    'a pattern that is a number': {1: dict(float=True)},
    'an entry that is a list': {'*': [1]},
    'bits beyond float': {'*': dict(bits=dict(weight=10**400))},
}


@pytest.mark.parametrize('name', LAYERS)
def test_layers_of_a_recipe_that_are_none(name):
    recipe = {**harnesses.load_recipe('adalog_w4a4'), 'layers': LAYERS[name]}
    with pytest.raises(QuantizationError):
        harnesses.Recipe.from_dict(recipe)


@pytest.mark.parametrize('name', CRASHES)
def test_recipes_that_once_crashed(name):
    recipe = {**harnesses.load_recipe('adalog_w4a4'), **CRASHES[name]}
    with pytest.raises(QuantizationError):
        harnesses.Recipe.from_dict(recipe)
