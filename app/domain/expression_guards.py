"""Guards: which of an expression's references could be met while what they name is absent.

CEL fails where a member is missing, unless the expression does not come to look at it: ``has(outputs.pd) && ...``, a
ternary, or ``||``. In CEL ``false && failure`` is false and ``true || failure`` is true in either order, so an operand
is guarded by any other of its chain. What is read here is syntax alone, of texts that the engine has compiled before;
what syntax cannot tell is for a trial (``registry_results``).
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from app.domain.expressions import TEXT_PATTERN

_LEXEME: Final = re.compile(
    rf"""(?: \s+ | //[^\n]* )
    | (?P<text> {TEXT_PATTERN} )
    | (?P<number> (?: 0[xX][0-9a-fA-F]+ | \d+ (?:\.\d+)? (?:[eE][+-]?\d+)? | \.\d+ (?:[eE][+-]?\d+)? ) [uU]? )
    | (?P<name> [A-Za-z_][A-Za-z0-9_]* )
    | (?P<mark> && | \|\| | == | != | <= | >= | . )""",
    re.VERBOSE | re.DOTALL,
)
_SIMPLE: Final = re.compile(r"""(["'])([^"'\\\n]*)\1""")
_BINARY: Final = (
    frozenset({"<", "<=", ">", ">=", "==", "!=", "in"}),
    frozenset({"+", "-"}),
    frozenset({"*", "/", "%"}),
)


@dataclass(frozen=True, slots=True)
class Node:
    """A part of an expression. ``kind``: or, and, not, if, has, path, literal, or the operator or call that it is.

    A path's ``names`` are its root and the members that follow by name; its ``parts`` are what else is looked at there.
    """

    kind: str
    parts: tuple["Node", ...] = ()
    names: tuple[str, ...] = ()


class _Unreadable(Exception):
    """The text is not in the grammar that is read here."""


def syntax(text: str) -> Node | None:
    """The parts of a compiled expression; None where it cannot be read here.

    >>> syntax("has(a.b) || !c").kind, [each.kind for each in syntax("has(a.b) || !c").parts]
    ('or', ['has', 'not'])
    """
    try:
        reader = _Reader(text)
        node = reader.expression()
    except (_Unreadable, RecursionError):
        return None
    return node if reader.done else None


def numbers_in(text: str) -> Iterator[float]:
    """The numbers that are written in an expression."""
    for match in _LEXEME.finditer(text):
        if match.lastgroup == "number":
            written = match[0].rstrip("uU")
            yield float(int(written, 16)) if written[:2] in ("0x", "0X") else float(written)


class _Reader:
    """Recursive descent over CEL's grammar, keeping what bears on guards."""

    def __init__(self, text: str) -> None:
        self._lexemes = [(str(each.lastgroup), each[0]) for each in _LEXEME.finditer(text) if each.lastgroup]
        self._at = 0

    @property
    def done(self) -> bool:
        return self._at == len(self._lexemes)

    def expression(self) -> Node:
        condition = self._chain("||", "or", lambda: self._chain("&&", "and", lambda: self._binary(0)))
        if not self._take("?"):
            return condition
        held = self.expression()
        self._expect(":")
        return Node("if", (condition, held, self.expression()))

    def _peek(self) -> tuple[str, str]:
        return ("", "") if self.done else self._lexemes[self._at]

    def _take(self, mark: str) -> bool:
        kind, word = self._peek()
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

    def _binary(self, level: int) -> Node:
        if level == len(_BINARY):
            return self._unary()
        left = self._binary(level + 1)
        while self._peek()[0] in ("mark", "name") and self._peek()[1] in _BINARY[level]:
            operator = self._peek()[1]
            self._at += 1
            left = Node(operator, (left, self._binary(level + 1)))
        return left

    def _unary(self) -> Node:
        if self._take("!"):
            return Node("not", (self._unary(),))
        if self._take("-"):
            return Node("negative", (self._unary(),))
        return self._member(self._primary())

    def _member(self, node: Node) -> Node:
        while True:
            if self._take("."):
                kind, name = self._peek()
                if kind != "name":
                    raise _Unreadable
                self._at += 1
                node = Node(f".{name}", (node, *self._list(")"))) if self._take("(") else _below(node, name)
            elif self._take("["):
                index = self.expression()
                self._expect("]")
                keyed = _SIMPLE.fullmatch(index.names[0]) if index.kind == "literal" else None
                node = _below(node, keyed[2]) if keyed else Node("index", (node, index))
            elif node.kind == "path" and self._take("{"):
                node = Node("message", (node, *self._list("}")))
            else:
                return node

    def _primary(self) -> Node:
        kind, word = self._peek()
        self._at += 1
        if kind in ("text", "number") or (kind == "name" and word in ("true", "false", "null")):
            return Node("literal", (), (word,))
        if kind == "name":
            if not self._take("("):
                return Node("path", (), (word,))
            arguments = self._list(")")
            return Node("has", arguments) if word == "has" and len(arguments) == 1 else Node(f"{word}()", arguments)
        if word == "(":
            node = self.expression()
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
            parts.append(self.expression())
            if not (self._take(",") or self._take(":")) and self._peek()[1] != end:
                raise _Unreadable
        return tuple(parts)


def _below(node: Node, name: str) -> Node:
    return Node("path", (), (*node.names, name)) if node.kind == "path" else Node("member", (node,), (name,))


@dataclass(frozen=True, slots=True)
class Absence:
    """When members of a root may be absent: ``names`` are those that may, at most ``most`` at once.

    ``unless``: conditions without which a name is not absent, so that whoever asks for the same has asked enough.
    """

    names: Collection[str]
    most: int
    unless: Mapping[str, Node]


def unguarded(node: Node, root: str, absence: Absence) -> frozenset[str]:
    """The members of ``root`` that may be absent while ``node`` comes to look into them.

    >>> absence = Absence({"pd", "fraud"}, 2, {})
    >>> sorted(unguarded(syntax("has(outputs.pd) && outputs.pd.p > outputs.fraud.p"), "outputs", absence))
    ['fraud']
    >>> sorted(unguarded(syntax("has(outputs.pd) ? outputs.pd.p : outputs.fraud.p"), "outputs", absence))
    ['fraud']
    >>> first = Absence({"pd", "fraud"}, 1, {})
    >>> sorted(unguarded(syntax("has(outputs.pd) ? outputs.pd.p : outputs.fraud.p"), "outputs", first))
    []
    """
    return frozenset(_Guards(root, absence).unguarded(node, frozenset(), frozenset()))


class _Guards:
    """What follows from a member's absence, part by part."""

    def __init__(self, root: str, absence: Absence) -> None:
        self._root, self._absence = root, absence

    def unguarded(self, node: Node, safe: frozenset[str], missing: frozenset[str]) -> set[str]:
        """``safe``: were they absent, ``node`` would not be looked at. ``missing``: absent wherever it is looked at."""
        match node.kind:
            case "and" | "or":
                # An operand that is false (true, of `or`) settles the chain, whatever becomes of the others.
                settled = node.kind == "or"
                found: set[str] = set()
                for number, part in enumerate(node.parts):
                    others = [each for at, each in enumerate(node.parts) if at != number]
                    spared = safe.union(*(self._makes(each, settled) for each in others))
                    gone = missing.union(*(self._shows(each, not settled) for each in others))
                    found |= self.unguarded(part, spared, gone)
                # Operands together may ask what none of them asks alone.
                return found - self._makes(node, settled)
            case "if":
                condition, held, otherwise = node.parts
                return (
                    self.unguarded(condition, safe, missing)
                    | self.unguarded(held, safe | self._makes(condition, False), missing | self._shows(condition, True))
                    | self.unguarded(
                        otherwise, safe | self._makes(condition, True), missing | self._shows(condition, False)
                    )
                )
            case "has":
                (asked,) = node.parts
                if asked.kind == "path" and len(asked.names) <= 2 and asked.names[0] == self._root:
                    return set()
                return self.unguarded(asked, safe, missing)
            case "path":
                if len(node.names) < 2 or node.names[0] != self._root:
                    return set()
                name = node.names[1]
                at_risk = name in self._absence.names and name not in safe
                return {name} if at_risk and len(missing | {name}) <= self._absence.most else set()
            case _:
                return set().union(*(self.unguarded(part, safe, missing) for part in node.parts))

    def _asked(self, node: Node) -> str | None:
        """The member whose presence ``node`` is."""
        if node.kind == "has" and node.parts[0].kind == "path":
            names = node.parts[0].names
            return names[1] if len(names) == 2 and names[0] == self._root else None
        if node.kind == "in" and node.parts[1] == Node("path", (), (self._root,)):
            keyed = _SIMPLE.fullmatch(node.parts[0].names[0]) if node.parts[0].kind == "literal" else None
            return keyed[2] if keyed else None
        return None

    def _makes(self, node: Node, value: bool) -> frozenset[str]:
        """The members whose absence makes ``node`` surely ``value``."""
        asked = self._asked(node)
        if asked is not None:
            return frozenset() if value else frozenset({asked})
        made = frozenset() if value else self._implied(node)
        match node.kind:
            case "literal" if node.names[0] in ("true", "false"):
                return frozenset(self._absence.names) if (node.names[0] == "true") is value else frozenset()
            case "not":
                return self._makes(node.parts[0], not value)
            case "and" | "or":
                each = [self._makes(part, value) for part in node.parts]
                # One operand is enough for a conjunction to be false or a disjunction to be true.
                enough = (node.kind == "or") is value
                return made | (frozenset().union(*each) if enough else frozenset.intersection(*each))
            case "if":
                condition, held, otherwise = node.parts
                return (self._makes(condition, True) & self._makes(held, value)) | (
                    self._makes(condition, False) & self._makes(otherwise, value)
                )
            case _:
                return made

    def _implied(self, node: Node) -> frozenset[str]:
        """The members that are absent only where ``node`` is false."""
        parts = set(node.parts) if node.kind == "and" else set()
        return frozenset(
            name
            for name, condition in self._absence.unless.items()
            if node == condition or (condition.kind == "and" and parts and set(condition.parts) <= parts)
        )

    def _shows(self, node: Node, value: bool) -> frozenset[str]:
        """The members that are surely absent where ``node`` is ``value``."""
        asked = self._asked(node)
        if asked is not None:
            return frozenset() if value else frozenset({asked})
        match node.kind:
            case "not":
                return self._shows(node.parts[0], not value)
            case "and" | "or":
                each = [self._shows(part, value) for part in node.parts]
                together = (node.kind == "and") is value
                return frozenset().union(*each) if together else frozenset.intersection(*each)
            case _:
                return frozenset()


def whole_of(node: Node, root: str) -> bool:
    """Whether ``root`` is looked at as a whole, other than by asking whether a member is there."""
    if node.kind == "path":
        return node.names == (root,)
    if node.kind == "in" and node.parts[0].kind == "literal" and node.parts[1].kind == "path":
        return False
    return any(whole_of(part, root) for part in node.parts)
