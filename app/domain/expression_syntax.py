"""The syntax of CEL expressions, as far as it bears on what can be said of them before any request.

The engine compiles and evaluates; what it does not tell is how an expression is made up. What is read here are texts
that it has compiled before; what cannot be read here proves nothing.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

TEXT_PATTERN: Final = r"""
    (?: [bB]?[rR][bB]? (?: \"""[\s\S]*?\""" | \'\'\'[\s\S]*?\'\'\' | "[^"]*" | '[^']*' )
    | [bB]? (?: \"""(?:\\.|[^\\])*?\""" | \'\'\'(?:\\.|[^\\])*?\'\'\' | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' ) )"""
"""A text literal, to be compiled with ``re.VERBOSE | re.DOTALL``."""
_LEXEME: Final = re.compile(
    rf"""(?: \s+ | //[^\n]* )
    | (?P<text> {TEXT_PATTERN} )
    | (?P<number> (?: 0[xX][0-9a-fA-F]+ | \d+ (?:\.\d+)? (?:[eE][+-]?\d+)? | \.\d+ (?:[eE][+-]?\d+)? ) [uU]? )
    | (?P<name> [A-Za-z_][A-Za-z0-9_]* )
    | (?P<mark> && | \|\| | == | != | <= | >= | . )""",
    re.VERBOSE | re.DOTALL,
)
MACROS: Final = frozenset({"all", "exists", "existsOne", "exists_one", "filter", "map"})
SIMPLE_TEXT: Final = re.compile(r"""(["'])([^"'\\\n]*)\1""")
_BINDS: Final = {
    **dict.fromkeys(("<", "<=", ">", ">=", "==", "!=", "in"), 1),
    **dict.fromkeys(("+", "-"), 2),
    **dict.fromkeys(("*", "/", "%"), 3),
}
"""How closely an operator between two values binds."""
DEPTH_MAX: Final = 200
"""How deep an expression's parts may be within one another, as the terms of a long sum are."""
BRACKETS_MAX: Final = 40
"""How deep brackets, and ``!`` and ``-`` before a value, may be within one another: far from where reading them would
overflow the stack, which is not as deep everywhere."""
_PARSED_KEPT: Final = 1_024
"""Texts whose parts are kept: compiling one asks for them several times."""


@dataclass(frozen=True, slots=True)
class Node:
    """A part of an expression. ``kind``: or, and, not, if, has, path, literal, or the operator or call that it is.

    A path's ``names`` are its root and the members that follow by name, and its ``span`` where it stands in the text.
    """

    kind: str
    parts: tuple["Node", ...] = ()
    names: tuple[str, ...] = ()
    span: tuple[int, int] = field(default=(0, 0), compare=False, repr=False)


def walk_variables(node: Node) -> frozenset[str]:
    """The names that walks give their elements, anywhere in what is read.

    >>> sorted(walk_variables(syntax("a.all(i, i.exists(j, j > 'b.map(k, 1)'))")))
    ['i', 'j']
    """
    own = node.parts[1].names[:1] if node.kind[:1] == "." and node.kind[1:] in MACROS and len(node.parts) > 2 else ()
    return frozenset(own).union(*map(walk_variables, node.parts))


class _Unreadable(Exception):
    """The text is not in the grammar that is read here."""


@lru_cache(maxsize=_PARSED_KEPT)
def syntax(text: str) -> Node | None:
    """The parts of a compiled expression; None where it cannot be read here, or is deeper than ``DEPTH_MAX``.

    >>> syntax("has(a.b) || !c").kind, [each.kind for each in syntax("has(a.b) || !c").parts]
    ('or', ['has', 'not'])
    """
    try:
        reader = _Reader(text)
        node = reader.expression()
    except (_Unreadable, RecursionError):
        return None
    return node if reader.done and _depth(node) <= DEPTH_MAX else None


def _depth(node: Node) -> int:
    """How many parts are within one another, without recursion: that is what it guards."""
    depth, level = 0, [node]
    while level:
        depth, level = depth + 1, [below for each in level for below in each.parts]
    return depth


def numbers_in(text: str) -> Iterator[float]:
    """The numbers that are written in an expression."""
    for match in _LEXEME.finditer(text):
        if match.lastgroup == "number":
            written = match[0].rstrip("uU")
            yield float(int(written, 16)) if written[:2] in ("0x", "0X") else float(written)


class _Reader:
    """Recursive descent over CEL's grammar, keeping what bears on guards."""

    def __init__(self, text: str) -> None:
        found = [each for each in _LEXEME.finditer(text) if each.lastgroup]
        lexemes = [(str(each.lastgroup), each[0]) for each in found]
        self._spans = [each.span() for each in found]
        self._end = len(lexemes)
        # What is looked at behind the end is nothing; nobody looks further.
        self._lexemes = [*lexemes, ("", "")]
        self._at = 0
        self._open = 0

    @property
    def done(self) -> bool:
        return self._at == self._end

    def expression(self) -> Node:
        condition = self._chain("||", "or", lambda: self._chain("&&", "and", self._binary))
        if not self._take("?"):
            return condition
        held = self.expression()
        self._expect(":")
        return Node("if", (condition, held, self.expression()))

    def _peek(self) -> tuple[str, str]:
        return self._lexemes[self._at]

    def _take(self, mark: str) -> bool:
        kind, word = self._lexemes[self._at]
        taken = word == mark and kind in ("mark", "name")
        self._at += taken
        return taken

    def _expect(self, mark: str) -> None:
        if not self._take(mark):
            raise _Unreadable

    def _chain(self, mark: str, kind: str, operand: Callable[[], Node]) -> Node:
        parts = [operand()]
        while self._take(mark):
            parts.append(operand())
        # `a && (b && c)` is one chain.
        flat = [below for each in parts for below in (each.parts if each.kind == kind else (each,))]
        return Node(kind, tuple(flat)) if len(parts) > 1 else parts[0]

    def _binary(self, least: int = 1) -> Node:
        """Values and what stands between them, of operators that bind as closely as ``least``."""
        left = self._unary()
        while True:
            kind, operator = self._lexemes[self._at]
            binds = _BINDS.get(operator, 0) if kind in ("mark", "name") else 0
            if binds < least:
                return left
            self._at += 1
            left = Node(operator, (left, self._binary(binds + 1)))

    def _unary(self) -> Node:
        for mark, kind in (("!", "not"), ("-", "negative")):
            if self._take(mark):
                return Node(kind, (self._within(self._unary),))
        start = self._at
        return self._member(self._primary(), start)

    def _within(self, read: Callable[[], Node]) -> Node:
        """What ``read`` reads a level below."""
        self._open += 1
        if self._open > BRACKETS_MAX:
            raise _Unreadable
        node = read()
        self._open -= 1
        return node

    def _span(self, start: int) -> tuple[int, int]:
        """From the word at ``start`` to the last that is read."""
        return self._spans[start][0], self._spans[self._at - 1][1]

    def _member(self, node: Node, start: int) -> Node:
        """``node``, which begins with the word at ``start``, and what follows it by ``.``, ``[`` or ``{``."""
        while True:
            if self._take("."):
                kind, name = self._peek()
                if kind != "name":
                    raise _Unreadable
                self._at += 1
                node = Node(f".{name}", (node, *self._list(")"))) if self._take("(") else self._below(node, name, start)
            elif self._take("["):
                index = self._within(self.expression)
                self._expect("]")
                keyed = SIMPLE_TEXT.fullmatch(index.names[0]) if index.kind == "literal" else None
                node = self._below(node, keyed[2], start) if keyed else Node("index", (node, index))
            elif node.kind == "path" and self._take("{"):
                node = Node("message", (node, *self._list("}")))
            else:
                return node

    def _primary(self) -> Node:
        kind, word = self._peek()
        if self.done:
            raise _Unreadable
        self._at += 1
        if kind in ("text", "number") or (kind == "name" and word in ("true", "false", "null")):
            return Node("literal", (), (word,))
        if kind == "name":
            if not self._take("("):
                return Node("path", (), (word,), self._span(self._at - 1))
            arguments = self._list(")")
            return Node("has", arguments) if word == "has" and len(arguments) == 1 else Node(f"{word}()", arguments)
        if word == "(":
            node = self._within(self.expression)
            self._expect(")")
            return node
        if word == "[":
            return Node("list", self._list("]"))
        if word == "{":
            return Node("map", self._list("}"))
        raise _Unreadable

    def _list(self, end: str) -> tuple[Node, ...]:
        """Expressions up to ``end``, with commas or, in a map, colons between."""
        parts: list[Node] = []
        while not self._take(end):
            parts.append(self._within(self.expression))
            if not (self._take(",") or self._take(":")) and self._peek()[1] != end:
                raise _Unreadable
        return tuple(parts)

    def _below(self, node: Node, name: str, start: int) -> Node:
        if node.kind != "path":
            return Node("member", (node,), (name,))
        # From its first word, as in `(a.b).c` its brackets are.
        return Node("path", (), (*node.names, name), self._span(start))
