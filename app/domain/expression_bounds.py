"""What an expression may cost: how much it sees, and what a walk over a list may do at each of its steps.

The engine copies what a ``map`` or ``filter`` has collected at each step, so a walk costs a list's length times all
that is in it; and a list from outside that is looked at within a walk is copied once a step. Both are quadratic, and an
evaluation cannot be interrupted: it would hold up every other request of the worker. So what an expression sees is
bounded by ``LIST_LENGTH_MAX``, and a walk's body looks at its own element and at single values from outside.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from app.domain.expression_syntax import MACROS, Node

LIST_LENGTH_MAX: Final = 500
"""Elements of a list, or members of an object, that an expression sees: a walk over so many takes milliseconds.

A list of objects may be as long as costs the same: its length times all values in it is at most this, squared.
"""
_LENGTH_FLOOR: Final = 50
"""Shorter lists count as this long, so that a few elements do not hold a whole archive."""
_OBJECT_WEIGHT: Final = 4
"""What an object costs to copy beside its members, in numbers."""
_WORK_MAX: Final = LIST_LENGTH_MAX**2
OBJECT_VALUES_MAX: Final = 5_000
"""Values in an object that an expression looks at as a whole, as where it compares it or goes through its members."""
TEXT_LENGTH_MAX: Final = 10_000
"""Characters of a text that an expression sees."""
SHORT_TEXT_MAX: Final = 250
"""Characters that are copied about as fast as a number; a text counts as one value more for each so many."""
COLLECTING_MAX: Final = 2
"""Walks of one expression that collect: ``map`` and ``filter``."""
WHOLES_MAX: Final = 50
"""Uses of ``+``, ``==`` and ``!=`` in one expression that may join or compare whole lists, which each copies."""
_LITERAL_LENGTH_MAX: Final = 10
"""Elements of a list that is written, looks at something, and is walked."""
_WRITTEN_MAX: Final = 100
"""Values in all lists and objects that an expression writes, but for little ones: each is copied into its list."""
_NUMERIC: Final = frozenset({"-", "*", "/", "%", "negative", "double()", "int()", "uint()", "size()", ".size"})
_TRUTHS: Final = frozenset({"<", "<=", ">", ">=", "==", "!=", "in", "and", "or", "not", "has"})
_OVER_LISTS: Final = frozenset({"max", "mean", "min", "size", "vote", "weightedMean"})
_MATCHES: Final = frozenset({".matches", "matches()"})
_COSTLY_PATTERN: Final = re.compile(r"\{|\\[^.^$*+?()\[\]{}|\\/-]|\(\?")
_PATTERNS_LENGTH_MAX: Final = 30
"""Characters of all the patterns that walks of one expression match."""
_PATTERNS_MAX: Final = 500
"""Characters of all the patterns of one expression, each of which is made anew at each evaluation."""
_HIDDEN_PATTERN: Final = re.compile(r"\\[xXuU0-7]|\(\?(?!:)|\{(?![0-9]+(?:,[0-9]*)?\}|\^?[A-Za-z])")
"""Characters that are not written as what they are, flags that give a pattern another grammar, and repetitions that are
not written ``{n}``, ``{n,}`` or ``{n,m}``: the engine reads ``{ n }`` too. A letter begins a class, as ``\\p{L}``."""
_REPEATS_MAX: Final = 80
"""Repetitions that are counted, as in ``{80}``, in all patterns of one expression: a state of the automaton each."""
_REPEAT: Final = re.compile(r"(?<=(.))\{([0-9]+)(?:,([0-9]*))?\}", re.DOTALL)
_LOOKUPS_MAX: Final = 4
"""Uses, in walks over an object's keys, of ``object[key]``, each of which copies the object."""


# --- what is seen -----------------------------------------------------------------------------------------------------


def too_large(root: str, value: object) -> "Sizes | None":
    """What is too large at or below a root; None where nothing is, as nearly always."""
    if _weight(value) is not None:
        return None
    sizes = Sizes(root)
    sizes.weigh(value)
    return sizes


_SCALARS: Final = frozenset({float, int, bool, type(None)})


def _weight(value: object) -> int | None:
    """What ``Sizes.weigh`` says, without telling of where: None where anything is too large."""
    if isinstance(value, str | bytes):
        return 1 + len(value) // SHORT_TEXT_MAX if len(value) <= TEXT_LENGTH_MAX else None
    if not isinstance(value, Mapping | list | tuple):
        return 1
    count = len(value)
    if count > LIST_LENGTH_MAX:
        return None
    in_object = isinstance(value, Mapping)
    total = 0
    for each in value.values() if isinstance(value, Mapping) else value:
        if type(each) in _SCALARS:
            total += 1
            continue
        weight = _weight(each)
        if weight is None:
            return None
        total += weight
    if in_object:
        return _OBJECT_WEIGHT + total if total <= OBJECT_VALUES_MAX else None
    return 1 + total if total <= _WORK_MAX // max(count, _LENGTH_FLOOR) else None


@dataclass(slots=True)
class Sizes:
    """The values below one root that are too large, by the members that lead to them."""

    root: str
    too_large: dict[tuple[str, ...], str] = field(default_factory=dict)
    lists: set[tuple[str, ...]] = field(default_factory=set)
    """Of those the ones that nothing looks through by name, and that need not be converted."""

    def weigh(self, value: object, path: tuple[str, ...] = ()) -> int:
        """How many values there are at ``path``, with all that is within them."""
        match value:
            case str() | bytes():
                if len(value) > TEXT_LENGTH_MAX:
                    self._found(path, f"has {len(value)} characters; an expression sees at most {TEXT_LENGTH_MAX}")
                    self.lists.add(path)
                    return 1
                return 1 + len(value) // SHORT_TEXT_MAX
            case Mapping():
                if len(value) > LIST_LENGTH_MAX:
                    self._found(path, f"has {len(value)} members; an expression sees at most {LIST_LENGTH_MAX}")
                total = sum([self.weigh(each, (*path, str(name))) for name, each in value.items()])
                if total > OBJECT_VALUES_MAX:
                    self._found(path, f"has {total} values in it; an expression sees at most {OBJECT_VALUES_MAX}")
                return _OBJECT_WEIGHT + total
            case list() | tuple():
                count = len(value)
                if count > LIST_LENGTH_MAX:
                    self._found(path, f"has {count} elements; an expression sees at most {LIST_LENGTH_MAX}")
                    self.lists.add(path)
                    return 1
                # What is too large within an element is told of the list, which is what can be named.
                within = Sizes(self.root)
                weight = sum([within.weigh(each) for each in value])
                most = _WORK_MAX // max(count, _LENGTH_FLOOR)
                if within.too_large:
                    self._found(path, f"holds what {next(iter(within.too_large.values()))}")
                elif weight > most:
                    said = f"has {count} elements with {weight} values in them; of so many elements an expression sees"
                    self._found(path, f"{said} at most {most} values")
                else:
                    return 1 + weight
                self.lists.add(path)
        return 1

    def _found(self, path: tuple[str, ...], said: str) -> None:
        self.too_large[path] = said

    def without(self, value: object, path: tuple[str, ...] = ()) -> object:
        """``value`` without its too long lists and texts."""
        if not isinstance(value, Mapping):
            return None if path in self.lists else value
        below = {name: (*path, str(name)) for name in value}
        return {name: self.without(each, below[name]) for name, each in value.items() if below[name] not in self.lists}


def lookup_fault(value: object) -> str | None:
    """Why the object that a walk goes over may not be looked up by key at each step; None where it may."""
    weight = Sizes("").weigh(value)
    if not isinstance(value, Mapping) or len(value) * weight * _LOOKUPS_MAX <= _WORK_MAX:
        return None
    return f"has {len(value)} members with {weight} values, too many to be looked up by key in every step of a walk"


def single_fault(value: object) -> str | None:
    """Why ``value`` may not be looked at once a step of a walk; None where it may."""
    match value:
        case list() | tuple() | Mapping():
            kind = "an object" if isinstance(value, Mapping) else "a list"
            return f"is {kind}, and looked at in every step of a walk, where only single values may be"
        case str() | bytes() if len(value) > SHORT_TEXT_MAX:
            return f"has {len(value)} characters, and is looked at in every step of a walk: at most {SHORT_TEXT_MAX}"
    return None


# --- what is written --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Walk:
    """A macro that walks a list: what it walks, what it calls an element, and what it does with each."""

    macro: str
    walked: Node
    variable: str
    bodies: tuple[Node, ...]

    def looks_up(self, node: Node) -> bool:
        """Whether ``node`` is what the walked object has by the key at hand."""
        return (
            node.kind == "index"
            and self.walked.kind == "path"
            and node.parts == (self.walked, Node("path", (), (self.variable,)))
        )


def walks_of(node: Node) -> Iterator[Walk]:
    """The walks of an expression, those in what another one walks among them."""
    for part in node.parts:
        yield from walks_of(part)
    if _is_walk(node):
        walked, variable, *bodies = node.parts
        yield Walk(node.kind[1:], walked, variable.names[0] if variable.names else "", tuple(bodies))


def _is_walk(node: Node) -> bool:
    return node.kind[:1] == "." and node.kind[1:] in MACROS and len(node.parts) > 2


def costs_too_much(node: Node) -> str | None:
    """Why an expression could cost more than its text shows; None where it cannot.

    >>> from app.domain.expression_syntax import syntax
    >>> costs_too_much(syntax("a.items.filter(i, i.kind in ['x', 'y'] && i.paid < a.limit).map(i, i.paid)"))
    >>> costs_too_much(syntax("a.l.map(i, i in a.others)"))
    'a.others would be gone through in every step of a walk: look at it outside the walk'
    """
    walks = tuple(walks_of(node))
    collecting = sum(walk.macro in ("filter", "map") for walk in walks)
    if collecting > COLLECTING_MAX:
        return f"map and filter are used {collecting} times; at most {COLLECTING_MAX} in one expression"
    wholes = sum(1 for each in _all_of(node) if each.kind in ("+", "==", "!=") and not any(map(_is_little, each.parts)))
    if wholes > WHOLES_MAX:
        said = f"+, == and != are used {wholes} times on what may be lists or texts; at most {WHOLES_MAX}"
        return f"{said} in one expression: write double(…) around numbers"
    found = _patterns_fault([each for each in _all_of(node) if each.kind in _MATCHES])
    if found is not None:
        return found
    if any(each.kind in ("index", "member") and not _is_plain(each.parts[0]) for each in _all_of(node)):
        return "[…] or .name looks into what is joined or made in the expression: write what it has there instead"
    held = sum(not _is_little(part) for each in _all_of(node) if each.kind in ("list", "map") for part in each.parts)
    if held > _WRITTEN_MAX:
        return f"lists and objects are written of {held} values that are looked at; at most {_WRITTEN_MAX} in all"
    lookups = sum(1 for walk in walks for body in walk.bodies for each in _all_of(body) if walk.looks_up(each))
    if lookups > _LOOKUPS_MAX:
        return f"objects are looked up by their keys {lookups} times in walks; at most {_LOOKUPS_MAX} in one expression"
    patterns = [each for walk in walks for body in walk.bodies for each in _all_of(body) if each.kind in _MATCHES]
    if any(not _is_cheap_pattern(each.parts[-1]) for each in patterns) or _length_of(patterns) > _PATTERNS_LENGTH_MAX:
        return (
            "matches makes its pattern anew in every step of a walk: write patterns there, of at most "
            f"{_PATTERNS_LENGTH_MAX} characters in one expression, without {{n}}, (?…) and classes such as \\d ([0-9])"
        )
    for walk in walks:
        found = _range_fault(walk.walked) or next(filter(None, map(_Body(walk).fault, walk.bodies)), None)
        if found is None and walk.macro == "map":
            found = next(filter(None, map(_made_fault, walk.bodies[-1:])), None)
        if found is not None:
            return found
    return None


@dataclass(frozen=True, slots=True)
class Beside:
    """What walks look at outside the elements that they go over, each as a root and the members below it.

    ``singles`` must be single values; ``looked_up`` are objects that are walked, and looked up by key.
    """

    singles: tuple[tuple[str, ...], ...] = ()
    looked_up: tuple[tuple[str, ...], ...] = ()


def beside_walks(node: Node) -> Beside:
    """What the walks of an expression look at beside their elements.

    >>> from app.domain.expression_syntax import syntax
    >>> beside_walks(syntax("a.all(k, a[k].x < b.limit)"))
    Beside(singles=(('b', 'limit'),), looked_up=(('a',),))
    """
    singles: dict[tuple[str, ...], None] = {}
    looked_up: dict[tuple[str, ...], None] = {}
    for walk in walks_of(node):
        for body in walk.bodies:
            for each in _looked_at(walk, body):
                if each.kind == "index":
                    looked_up[walk.walked.names] = None
                elif each.names[0] != walk.variable:
                    singles[each.names] = None
    return Beside(tuple(singles), tuple(looked_up))


def _all_of(node: Node) -> Iterator[Node]:
    yield node
    for part in node.parts:
        yield from _all_of(part)


def _looked_at(walk: Walk, node: Node) -> Iterator[Node]:
    """The paths whose values are looked at, not only whether they are there; and what is looked up."""
    if node.kind == "path" or walk.looks_up(node):
        yield node
        return
    for part in node.parts if node.kind != "has" else ():
        yield from _looked_at(walk, part)


def _is_little(node: Node) -> bool:
    """Whether it is a number, a truth, or a text that is written: joined or compared with one, nothing is long."""
    if node.kind == "if":
        return all(map(_is_little, node.parts[1:]))
    return node.kind in _NUMERIC | _TRUTHS | {"literal"} or (node.kind == "+" and _is_number(node))


def _is_number(node: Node) -> bool:
    if node.kind == "+":
        return any(map(_is_number, node.parts))
    return node.kind in _NUMERIC or (node.kind == "literal" and node.names[0][0] not in "\"'bBrR")


def _range_fault(walked: Node) -> str | None:
    """Why what is walked could be longer than what is seen."""
    match walked.kind:
        case "path" | "member" | "index":
            return None  # what is looked into is plain
        case "list" | "map":
            count = len(walked.parts)
            if count <= _LITERAL_LENGTH_MAX:
                return None
            if all(each.kind == "literal" for each in walked.parts):
                most = f"at most {LIST_LENGTH_MAX}"
                return f"a list of {count} values is written and walked; {most}" if count > LIST_LENGTH_MAX else None
            return f"a list of {count} values is written and walked; at most {_LITERAL_LENGTH_MAX}"
        case "if":
            return _range_fault(walked.parts[1]) or _range_fault(walked.parts[2])
        case _ if _is_walk(walked):
            return None
    return "a walk goes over a value, a list that is written, or what another walk gives: walk other lists one by one"


def _made_fault(body: Node) -> str | None:
    """Why a ``map`` could collect more than it walks."""
    if body.kind == "if":
        return _made_fault(body.parts[1]) or _made_fault(body.parts[2])
    if body.kind == "dyn()":
        return next(filter(None, map(_made_fault, body.parts)), None)
    if body.kind in ("list", "map"):
        return "map would make a list or an object in every step: map to one value"
    return None


@dataclass(frozen=True, slots=True)
class _Body:
    """What is done in every step of ``walk``."""

    walk: Walk

    def fault(self, node: Node) -> str | None:
        """Why a step would cost what a whole list costs."""
        name = node.kind.strip(".()")
        called = node.kind != name
        gone_through: Collection[Node] = ()
        if self.walk.looks_up(node):
            return None
        if node.kind == "in":
            gone_through = node.parts[1:]
        elif node.kind == "index" or (called and name in _OVER_LISTS):
            gone_through = node.parts[:1] if node.kind == "index" else node.parts
        outside = next((each for each in gone_through if self._is_outside(each)), None)
        if outside is not None:
            return (
                f"{'.'.join(outside.names)} would be gone through in every step of a walk: look at it outside the walk"
            )
        if node.kind == "+" and not any(map(_is_little, node.parts)):
            return "+ could join two lists or texts in every step of a walk: write double(…) around a number"
        if node.kind == "literal" and len(node.names[0]) > SHORT_TEXT_MAX:
            return f"a text of more than {SHORT_TEXT_MAX} characters would be copied in every step of a walk"
        return next(filter(None, map(self.fault, node.parts)), None)

    def _is_outside(self, node: Node) -> bool:
        return node.kind == "path" and node.names[0] != self.walk.variable


def _is_plain(node: Node) -> bool:
    """Whether what is looked into holds nothing longer than what is seen, or than what a walk collects of that."""
    if node.kind in ("index", "member"):
        return _is_plain(node.parts[0])
    if node.kind in ("list", "map"):
        return all(map(_is_seen, node.parts))
    return node.kind == "path" or _is_walk(node)


def _is_seen(node: Node) -> bool:
    """Whether it is a value that is seen, or a little one."""
    if node.kind == "if":
        return all(map(_is_seen, node.parts[1:]))
    return _is_little(node) or (node.kind in ("path", "index", "member") and _is_plain(node))


def _patterns_fault(matches: list[Node]) -> str | None:
    """Why the patterns of an expression could cost more than they show."""
    repeats = 0
    for each in matches:
        pattern = each.parts[-1]
        if pattern.kind != "literal":
            return "matches has a pattern that is not written out as one text: who sends a pattern says what it costs"
        if _HIDDEN_PATTERN.search(pattern.names[0]):
            return (
                "a pattern has characters by number, as \\x7b, flags, as (?i), or braces that are no {n}: write "
                "characters as they are, at most by one backslash, [aA] for both cases, and {n} without spaces"
            )
        repeats += _repeats_in(pattern.names[0])
    if repeats > _REPEATS_MAX:
        return f"patterns count {repeats} repetitions; at most {_REPEATS_MAX} in one expression: match less closely"
    if _length_of(matches) > _PATTERNS_MAX:
        return f"patterns have {_length_of(matches)} characters; at most {_PATTERNS_MAX} in one expression"
    return None


def _repeats_in(pattern: str) -> int:
    """How often counted repetitions have a pattern repeat its parts, those of groups multiplied."""
    most, groups = 0, 1
    for before, low, high in _REPEAT.findall(pattern):
        count = max(int(low), int(high or 0))
        if before in ")}?*+":
            groups *= max(count, 1)
        else:
            most += count
    return max(most, groups > 1) * groups


def _length_of(patterns: Iterable[Node]) -> int:
    return sum(len(each.parts[-1].names[0]) for each in patterns)


def _is_cheap_pattern(node: Node) -> bool:
    if node.kind != "literal":
        return False
    # What a text literal escapes twice, a raw one escapes once.
    return _COSTLY_PATTERN.search(node.names[0].replace("\\\\", "\\")) is None
