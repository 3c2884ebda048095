"""A stream of bytes as a stream of choices, and what is made of honest data by them."""

import copy
import math

import torch

MOST = 100_000
"""Values of a tensor that is changed; what claims more stays as it is."""


class Choices:
    """Takes decisions by the bytes that a fuzzer gives; after the last one all are the
    first of their kind.
    """

    def __init__(self, data):
        self.data = data
        self.place = 0

    def below(self, limit):
        """A whole number from 0 to ``limit`` - 1."""
        length = max(1, (max(limit, 2) - 1).bit_length() + 7 >> 3)
        piece = self.data[self.place : self.place + length]
        self.place += length
        return int.from_bytes(piece, 'little') % limit

    def of(self, options):
        return options[self.below(len(options))]

    @property
    def left(self):
        return len(self.data) - self.place


SHALLOW = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    4,
    8,
    9,
    16,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**400,
    0.5,
    -1.5,
    math.nan,
    math.inf,
    1e308,
    '',
    '.',
    '.a',
    'a.',
    'os.system',
    'builtins.exec',
    'evil.py',
    '../x',
    'Float',
    'UniformQuantizer',
    'AdaLogQuantizer',
    'DeMaxQuantizer',
    'MinMax',
    'AdaLog',
    'UQViT',
    'AdaLogBRECQ',
    'per_channel',
    'gelu',
    'float16',
    '\x1b[2J',
    '\ud800',
    '\u202e',
    'x' * 1000,
    b'',
    b'bytes',
    (),
    [],
    {},
    set(),
    1j,
    [None],
    [[]],
    {'': None},
    {1: 2},
    {None: 1},
    {'type': 'MinMax'},
    {'type': 'os.system'},
    range(3),
    object,
    len,
]
"""Values that readers do not expect, but a few that they do."""

NAMES = [
    'type',
    'bits',
    'name',
    'axis',
    'rescale',
    'per_head',
    'per_channel',
    'strict',
    'fixed_q',
    'fixed_scale',
    'symmetric',
    'maxima',
    'side',
    'rows',
    'steps',
    'rounds',
    'alphas',
    'images',
    'method',
    'recipe',
    'scope',
    '__class__',
    'self',
    'init_cfg',
    '_scope_',
    'pretrained',
    '\x1b',
]


def spots(tree):
    """All containers of a tree that can be changed, each once: a tree may hold itself."""
    found, open_ = {}, [tree]
    while open_:
        place = open_.pop()
        if isinstance(place, dict | list) and place and id(place) not in found:
            found[id(place)] = place
            open_.extend(place.values() if isinstance(place, dict) else place)
    return list(found.values())


def mutated(tree, choices, most=4):
    """A copy of a tree with a few values replaced, removed, added, moved or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(1 + choices.below(most)):
        places = spots(tree)
        if not places:
            return tree
        place = choices.of(places)
        key = choices.of(list(place) if isinstance(place, dict) else range(len(place)))
        act = choices.below(6)
        if act == 0:
            del place[key]
        elif act == 1 and isinstance(place, dict):
            place[choices.of(NAMES)] = choices.of(SHALLOW)
        elif act == 2:
            other = choices.of(places)  # perhaps one that holds this one
            place[key] = other if choices.below(2) else copy.deepcopy(other)
        elif act == 3:
            place[key] = [place[key]] * choices.below(4)
        else:
            place[key] = choices.of(SHALLOW)
    return tree


def odd_tensor(value, choices):
    """A tensor that is not quite what it was, if torch can make one."""
    if value.numel() > MOST:
        return value
    try:
        return _odd_tensor(value, choices)
    except (RuntimeError, NotImplementedError):
        return value


def _odd_tensor(value, choices):
    act = choices.below(16)
    if act == 0:
        return value[None]
    if act == 1:
        return value[:1] if value.ndim else value.expand(3)
    if act == 2:
        return value.flatten()
    if act == 3:
        return value.to(
            choices.of(
                [
                    torch.float16,
                    torch.bfloat16,
                    torch.float64,
                    torch.int8,
                    torch.int64,
                    torch.bool,
                    torch.uint8,
                ]
            )
        )
    if act == 4:
        return value * choices.of([-1, 0, 1e-45, 1e38, math.nan, math.inf, 1000])
    if act == 5:
        return torch.zeros(1).expand(
            choices.of([3, 70_000, 20_000]), choices.of([1, 20_000])
        )
    if act == 6:
        return torch.empty(0)
    if act == 7:
        return value.to_sparse() if value.ndim else value
    if act == 8:
        return value.to(torch.complex64)
    if act == 9:
        return torch.empty(value.shape, dtype=value.dtype, device='meta')
    if act == 10:
        return choices.of(SHALLOW)
    if act == 11:
        return value.transpose(0, -1) if value.ndim else value
    if act == 12:
        return torch.nn.Parameter(value.float())
    if act == 13:
        return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8)
    if act == 14:
        return value.repeat(2) if value.ndim == 1 else value
    return value.clone().fill_(choices.of([0, 1, -1, 255, 256, 2**31 - 1]))


def mutated_state(state, choices, most=4):
    """A copy of a state with a few tensors changed, removed, renamed or added."""
    state = dict(state)
    for _ in range(1 + choices.below(most)):
        key = choices.of(list(state)) if state else 'x'
        act = choices.below(8)
        if act == 0:
            state.pop(key, None)
        elif act == 1 and key in state:
            state[
                choices.of(
                    [f'{key}x', key[1:], '\x1b', '', 7, None, 'module.' + str(key)]
                )
            ] = state.pop(key)
        elif key in state and isinstance(state[key], torch.Tensor):
            state[key] = odd_tensor(state[key], choices)
        else:
            state[key] = choices.of(SHALLOW)
        if not all(isinstance(key, str) for key in state):
            break
    return state


def mutated_bytes(data, choices):
    """Bytes with a few flipped, cut, repeated or moved."""
    data = bytearray(data)
    for _ in range(1 + choices.below(4)):
        if not data:
            break
        place, act = choices.below(len(data)), choices.below(6)
        if act == 0:
            del data[place:]
        elif act == 1:
            del data[place : place + 1 + choices.below(16)]
        elif act == 2:
            data[place:place] = bytes(
                choices.below(256) for _ in range(1 + choices.below(8))
            )
        elif act == 3:
            data[place:place] = data[choices.below(len(data)) :][
                : 1 + choices.below(64)
            ]
        else:
            data[place] = choices.below(256)
    return bytes(data)
