"""What a pickle would do, found without doing it: a small machine that knows kinds, not
values.

torch's restricted reader calls nothing unknown, but it builds what a pickle says before
anyone can look at it: to hash a key of a dict that is a tuple in a tuple in a tuple, or
one whose parts are shared a million times, ends the process or never ends.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any, NamedTuple

MOST_PARTS = 64
"""Parts of a tuple that is a key, those of its tuples included."""

MOST_DEPTH = 40
"""How deep tuples may lie in each other."""

MOST_OPERATIONS = 20_000_000

SCALARS = {
    'NONE',
    'NEWTRUE',
    'NEWFALSE',
    'BININT',
    'BININT1',
    'BININT2',
    'LONG1',
    'BINFLOAT',
    'BINUNICODE',
    'SHORT_BINSTRING',
}
CONTAINERS = {'EMPTY_LIST', 'EMPTY_DICT'}


class Kind(NamedTuple):
    """What is known of a value: its sort (scalar, tuple, container, name, object), and
    more of it.

    Attributes:
        sort: One of these words.
        name: Of a name, as ``module name``.
        parts: Of a tuple: how many values lie in it, up to one more than a key may
            have.
        depth: Of a tuple: how many lie in each other.
    """

    sort: str
    name: str = ''
    parts: int = 0
    depth: int = 0


MARK = Kind('mark')
OBJECT = Kind('object')


class UnsafePickleError(ValueError):
    """A pickle that is not as torch.save writes it."""


class Machine:
    """Follows the operations of one pickle and collects the names that it would import.

    Args:
        never_called: Names that may stand in it and not be called, such as those of
            storages.
    """

    def __init__(self, never_called: set[str]) -> None:
        self.never_called = never_called
        self.names: set[str] = set()
        self.stack: list[Kind] = []
        self.memo: dict[int, Kind] = {}

    def run(self, pickle: bytes | IO[bytes]) -> set[str]:
        """The names in a pickle.

        Args:
            pickle: Its bytes, or a file from which one pickle is read.

        Returns:
            The names, as ``module name``.

        Raises:
            UnsafePickleError: If it does anything that no checkpoint needs.
            ValueError: If it is no pickle.
        """
        for number, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if number > MOST_OPERATIONS:
                raise UnsafePickleError('its pickle is endless')
            try:
                self.step(opcode.name, argument)
            except IndexError:
                raise UnsafePickleError('its pickle takes what is not there') from None
        return self.names

    def step(self, operation: str, argument: Any) -> None:
        """Follows one operation."""
        if operation in SCALARS:
            self.stack.append(Kind('scalar'))
        elif operation in CONTAINERS:
            self.stack.append(Kind('container'))
        elif operation == 'MARK':
            self.stack.append(MARK)
        elif operation in ('BINPUT', 'LONG_BINPUT'):
            self.memo[argument] = self.stack[-1]
        elif operation in ('BINGET', 'LONG_BINGET'):
            self.stack.append(self.remembered(argument))
        elif operation == 'GLOBAL':
            self.names.add(str(argument))
            self.stack.append(Kind('name', str(argument)))
        elif operation in ('EMPTY_TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'TUPLE'):
            self.tuple(operation)
        elif operation in ('SETITEM', 'SETITEMS', 'APPEND', 'APPENDS'):
            self.fill(operation)
        elif operation in ('REDUCE', 'NEWOBJ', 'BUILD', 'BINPERSID'):
            self.make(operation)
        elif operation == 'PROTO' and argument > 2:
            raise UnsafePickleError(
                f'it was saved with pickle protocol {argument}; save it with the'
                ' default of torch.save, 2'
            )
        elif operation not in ('PROTO', 'STOP'):
            raise UnsafePickleError(
                f'its pickle has an operation {operation} that torch.save does not'
                ' write'
            )

    def remembered(self, number: int) -> Kind:
        """What was stored under a number."""
        if number not in self.memo:
            raise UnsafePickleError('its pickle asks for what it did not store')
        return self.memo[number]

    def taken_to_mark(self) -> list[Kind]:
        """What lies above the last mark, which goes, too."""
        taken = []
        while (top := self.stack.pop()) is not MARK:
            taken.append(top)
        return taken[::-1]

    def tuple(self, operation: str) -> None:
        """A tuple of what was made before it; a long or deep one is none of a
        checkpoint.
        """
        count = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}.get(operation)
        items = (
            self.taken_to_mark()
            if count is None
            else [self.stack.pop() for _ in range(count)]
        )
        parts = len(items) + sum(item.parts for item in items)
        depth = 1 + max((item.depth for item in items), default=0)
        if depth > MOST_DEPTH:
            raise UnsafePickleError('its pickle nests tuples as no checkpoint does')
        self.stack.append(Kind('tuple', parts=min(parts, MOST_PARTS + 1), depth=depth))

    def fill(self, operation: str) -> None:
        """Entries of a dict or list; keys are text or numbers, or a few of these."""
        items = self.taken_to_mark() if operation.endswith('S') else [self.stack.pop()]
        if operation == 'SETITEM':
            items.insert(0, self.stack.pop())
        for key in items[::2] if operation.startswith('SET') else ():
            if key.sort != 'scalar' and not (
                key.sort == 'tuple' and key.parts <= MOST_PARTS
            ):
                raise UnsafePickleError(
                    'a dict in it has keys that are neither text nor numbers'
                )

    def make(self, operation: str) -> None:
        """An object: a call of what is known to make one, a state for it, or a storage
        of the file.
        """
        argument = self.stack.pop()
        if operation == 'BINPERSID':
            self.stack.append(OBJECT)
            return
        if operation == 'BUILD':
            return
        maker = self.stack.pop()
        if maker.sort == 'name' and maker.name in self.never_called:
            raise UnsafePickleError(f'it calls {maker.name.replace(" ", ".")}')
        if maker.sort not in ('name', 'object') or argument.sort not in (
            'tuple',
            'object',
        ):
            raise UnsafePickleError('it calls what cannot be called')
        self.stack.append(OBJECT)
