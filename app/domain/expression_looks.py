"""What an expression looks at, each as a variable of its own.

The engine copies what a name stands for each time it comes to it, in each step of a walk again: for
``inputs.bureau.limit`` the whole ``bureau``. So the engine is given what is named, and never what it is looked up in:
``hoisted`` puts a variable in the place of each path, and ``Look.at`` says what the variable holds. (Compilers do the
same where they move what does not change out of a loop.)
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from app.domain.expression_syntax import MACROS, SIMPLE_TEXT, Node

ABSENT: Final = object()
"""What a look finds where there is nothing. The engine is given no such variable, so it fails if it comes to it."""
OWN_PREFIX: Final = "__"
"""What the names of these variables begin with, and no name that an expression gives."""


def value_at(path: Iterable[str], values: Mapping[str, object]) -> object:
    """What ``values`` hold at ``path``, or ABSENT."""
    value: object = values
    for name in path:
        value = value.get(name, ABSENT) if isinstance(value, Mapping) else ABSENT
    return value


@dataclass(frozen=True, slots=True)
class Look:
    """A path that is looked at; ``asked``: only whether its last member is there, by ``has()`` or ``"name" in``.

    The same looks of any expressions are the same ``variable``.
    """

    path: tuple[str, ...]
    asked: bool
    variable: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = "_".join(each.encode(errors="surrogatepass").hex() for each in self.path)
        object.__setattr__(self, "variable", f"{OWN_PREFIX}{'h' if self.asked else 'v'}{name}")

    def at(self, values: Mapping[str, object]) -> object:
        """What the variable holds: the value, or of what is only asked for an object that has no other members.

        >>> values = {"a": {"b": 1, "c": [2]}}
        >>> Look(("a", "c"), False).at(values), Look(("a", "c"), True).at(values), Look(("a", "d"), True).at(values)
        ([2], {'c': True}, {})
        """
        value = value_at(self.path[:-1] if self.asked else self.path, values)
        if not self.asked or not isinstance(value, Mapping):
            return value
        return {self.path[-1]: True} if self.path[-1] in value else {}

    def failure(self, values: Mapping[str, object]) -> KeyError | TypeError:
        """Why there is nothing: which name is unknown, or what has no members at all."""
        value: object = values
        for depth, name in enumerate(self.path):
            if not isinstance(value, Mapping):
                return TypeError(f"{'.'.join(self.path[:depth])} is no object, and has no {name}")
            if name not in value:
                return KeyError(name)
            value = value[name]
        return KeyError(self.path[-1])


def hoisted(text: str, node: Node, roots: Collection[str]) -> tuple[str, tuple[Look, ...]]:
    """``text``, whose parts are ``node``, with a variable in the place of each path from ``roots``, and those.

    >>> from app.domain.expression_syntax import syntax
    >>> text = "has(a.b) && a.l.all(i, i.x < a.b)"
    >>> hoisted(text, syntax(text), {"a"})
    ('has(__h61_62.b) && __v61_6c.all(i, i.x < __v61_62)', \
(Look(path=('a', 'b'), asked=True), Look(path=('a', 'l'), asked=False), Look(path=('a', 'b'), asked=False)))
    """
    found: dict[Look, None] = {}
    parts: list[str] = []
    at = 0
    for path, look, way in sorted(_looks_of(node, frozenset(roots)), key=lambda each: each[0].span):
        found[look] = None
        start, end = path.span
        parts += [text[at:start], look.variable, f".{look.path[-1]}" if way == "has" else ""]
        at = end
    return "".join([*parts, text[at:]]), tuple(found)


def _looks_of(node: Node, roots: frozenset[str]) -> Iterator[tuple[Node, Look, str]]:
    """The paths from ``roots`` that no walk's own variable hides, each with its look and how it is looked at."""
    if node.kind == "path":
        if node.names[0] in roots:
            yield node, Look(node.names, False), "path"
        return
    if node.kind == "has" and node.parts[0].kind == "path" and len(node.parts[0].names) > 1:
        (asked,) = node.parts
        if asked.names[0] in roots:
            yield asked, Look(asked.names, True), "has"
        return
    if node.kind == "in" and node.parts[1].kind == "path" and node.parts[1].names[0] in roots:
        member, within = node.parts
        keyed = SIMPLE_TEXT.fullmatch(member.names[0]) if member.kind == "literal" else None
        if keyed is not None:
            yield within, Look((*within.names, keyed[2]), True), "in"
            return
    if node.kind[:1] == "." and node.kind[1:] in MACROS and len(node.parts) > 2:
        walked, variable, *bodies = node.parts
        yield from _looks_of(walked, roots)
        for body in bodies:
            yield from _looks_of(body, roots - set(variable.names[:1]))
        return
    # A message's name is no value.
    for part in node.parts[1:] if node.kind == "message" else node.parts:
        yield from _looks_of(part, roots)
