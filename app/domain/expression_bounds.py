"""What an expression may cost by what is written in it: above all, what a walk over a list may do at each of its steps.

An evaluation cannot be interrupted: it would hold up every other request of the worker. The engine copies what a step
looks at, and at each step what a ``map`` or ``filter`` has collected, so what is quadratic is refused: a walk's body
looks at its own element, at single values from outside and, a few times, at small lists and tables. What those are
members of is not copied: ``expression_looks``. How large what is looked at may be is ``expression_sizes``' part, and
what patterns may cost that of ``expression_patterns``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from app.domain.expression_patterns import Match, patterns_fault, walked_patterns_fault
from app.domain.expression_sizes import LIST_LENGTH_MAX, LOOKUPS_MAX, SHORT_TEXT_MAX
from app.domain.expression_syntax import MACROS, Node

_COLLECTING_MAX: Final = 2
"""Walks of one expression that collect: ``map`` and ``filter``."""
_WHOLES_MAX: Final = 50
"""Uses of ``+``, ``==`` and ``!=`` in one expression that may join or compare whole lists, which each copies."""
_KEYS_MAX: Final = 100
"""Uses of ``in`` in one expression that may ask an object for a list, which is copied to say that it is no key."""
_LITERAL_LENGTH_MAX: Final = 10
"""Elements of a list that is written, looks at something, and is walked."""
_WRITTEN_MAX: Final = 100
"""Values in all lists and objects that an expression writes, but for little ones: each is copied into its list."""
_HELPERS_MAX: Final = 50
"""Calls of the functions for ensembles, which are Python's."""
_HELPERS_IN_WALKS_MAX: Final = 10
_JOINS_MAX: Final = 10
"""Uses of ``+`` in walks that may join lists or texts."""
_JOINS_COLLECTED_MAX: Final = 2
"""Those of them in ``map``: by two, what is collected can grow to four times what is walked."""
_TABLES_MAX: Final = 4
"""Uses in walks of lists and tables from outside, each of which is copied at each step."""
_LEVELS_MAX: Final = 500
"""Members of elements that walks look through, as the ``a`` of ``i.a.b``, each of which is copied."""
_INNER_WALKS_MAX: Final = 2
"""Walks within walks."""
_INNER_HELPERS_MAX: Final = 2
_INNER_PARTS_MAX: Final = 60
"""Operations and values in a walk within a walk: it makes as many steps as all lists have elements together."""
_NUMERIC: Final = frozenset({"-", "*", "/", "%", "negative", "double()", "int()", "uint()", "size()", ".size"})
_TRUTHS: Final = frozenset({"<", "<=", ">", ">=", "==", "!=", "in", "and", "or", "not", "has"})
ENSEMBLES: Final = frozenset({"max", "mean", "min", "vote", "weightedMean"})
_MATCHES: Final = frozenset({".matches", "matches()"})


@dataclass(frozen=True, slots=True)
class Walk:
    """A macro that walks a list: what it walks, what it calls an element, and what it does with each.

    ``outer``: the variables of the walks that it is within, the outermost first.
    """

    macro: str
    walked: Node
    variable: str
    bodies: tuple[Node, ...]
    outer: tuple[str, ...]

    def looks_up(self, node: Node) -> bool:
        """Whether ``node`` is what the walked object has by the key at hand."""
        return (
            node.kind == "index"
            and self.walked.kind == "path"
            and node.parts == (self.walked, Node("path", (), (self.variable,)))
        )


@dataclass(frozen=True, slots=True)
class Beside:
    """What walks look at outside the elements that they go over, each as a root and the members below it.

    ``singles`` must be single values; ``tables`` are gone through, or looked up by what a step has at hand;
    ``looked_up`` are objects that are walked, and looked up by key.
    """

    singles: tuple[tuple[str, ...], ...] = ()
    tables: tuple[tuple[str, ...], ...] = ()
    looked_up: tuple[tuple[str, ...], ...] = ()


NOTHING_BESIDE: Final = Beside()


def beside_walks(node: Node) -> Beside:
    """What the walks of an expression look at beside their elements.

    >>> from app.domain.expression_syntax import syntax
    >>> beside_walks(syntax("a.all(k, a[k].x < b.limit && a[k].y in c.allowed)"))
    Beside(singles=(('b', 'limit'),), tables=(('c', 'allowed'),), looked_up=(('a',),))
    """
    found: dict[str, dict[tuple[str, ...], None]] = {"single": {}, "table": {}, "looked_up": {}}
    for walk in _walks_of(node):
        bound = {*walk.outer, walk.variable}
        for body in walk.bodies:
            for way, each in _looked_at(walk, body):
                if way == "looked_up" or each.names[0] not in bound:
                    found[way][each.names] = None
    if not any(found.values()):
        return NOTHING_BESIDE
    return Beside(*(tuple(found[way]) for way in ("single", "table", "looked_up")))


def costs_too_much(node: Node) -> str | None:
    """Why an expression could cost more than its text shows; None where it cannot.

    >>> from app.domain.expression_syntax import syntax
    >>> costs_too_much(syntax("a.items.filter(i, i.kind in ['x', 'y'] && i.paid < a.limit).map(i, i.paid)"))
    >>> costs_too_much(syntax("a.l.all(i, a.l.all(j, i == j))"))
    'a walk within a walk goes over a list of its own element, here i: walk other lists one by one'
    """
    walks = tuple(_walks_of(node))
    found = (
        _uses_fault(node, walks)
        or _grown_fault(node, walks)
        or patterns_fault(_matches_of(node))
        or _made_of_fault(node)
        or _walked_uses_fault([(walk, body) for walk in walks if not walk.outer for body in walk.bodies])
        or _collected_fault(body for walk in walks if walk.macro == "map" for body in walk.bodies)
    )
    if found is not None:
        return found
    for walk in walks:
        found = _range_fault(walk.walked) if not walk.outer else _inner_fault(walk)
        if found is None and walk.macro == "map":
            found = next(filter(None, map(_made_fault, walk.bodies[-1:])), None)
        if found is not None:
            return found
    return None


# --- what is counted --------------------------------------------------------------------------------------------------


def _uses_fault(node: Node, walks: tuple[Walk, ...]) -> str | None:
    """What is used too often in the whole expression."""
    collecting = sum(walk.macro in ("filter", "map") for walk in walks)
    if collecting > _COLLECTING_MAX:
        return f"map and filter are used {collecting} times; at most {_COLLECTING_MAX} in one expression"
    inner = sum(bool(walk.outer) for walk in walks)
    if inner > _INNER_WALKS_MAX:
        return f"there are {inner} walks within walks; at most {_INNER_WALKS_MAX} in one expression"
    wholes = sum(1 for each in _of_kinds(node, {"+", "==", "!="}) if not any(map(_is_little, each.parts)))
    if wholes > _WHOLES_MAX:
        said = f"+, == and != are used {wholes} times on what may be lists or texts; at most {_WHOLES_MAX}"
        return f"{said} in one expression: write double(…) around numbers"
    keys = sum(not _is_little(each.parts[0]) and each.parts[1].kind != "list" for each in _of_kinds(node, {"in"}))
    if keys > _KEYS_MAX:
        return f"in is used {keys} times on what may be lists; at most {_KEYS_MAX} in one expression"
    helpers = sum(1 for each in _all_of(node) if _called(each) in ENSEMBLES)
    if helpers > _HELPERS_MAX:
        return f"{', '.join(sorted(ENSEMBLES))} are called {helpers} times; at most {_HELPERS_MAX} in one expression"
    return None


def _made_of_fault(node: Node) -> str | None:
    """What is made too large, or made only to be looked into."""
    if any(each.kind in ("index", "member") and not _is_plain(each.parts[0]) for each in _all_of(node)):
        return "[…] or .name looks into what is joined or made in the expression: write what it has there instead"
    held = sum(not _is_little(part) for each in _of_kinds(node, {"list", "map"}) for part in each.parts)
    if held > _WRITTEN_MAX:
        return f"lists and objects are written of {held} values that are looked at; at most {_WRITTEN_MAX} in all"
    return None


def _walked_uses_fault(bodies: list[tuple[Walk, Node]]) -> str | None:
    """What is used too often in the bodies of walks, in all of those that are within no other."""
    within = [each for _, body in bodies for each in _all_of(body)]
    lookups = sum(1 for walk, body in bodies for each in _all_of(body) if walk.looks_up(each))
    if lookups > LOOKUPS_MAX:
        return f"objects are looked up by their keys {lookups} times in walks; at most {LOOKUPS_MAX} in one expression"
    if any(each.kind == "literal" and len(each.names[0]) > SHORT_TEXT_MAX for each in within):
        return f"a text of more than {SHORT_TEXT_MAX} characters would be copied in every step of a walk"
    helpers = sum(1 for each in within if _called(each) in ENSEMBLES)
    if helpers > _HELPERS_IN_WALKS_MAX:
        return f"functions for ensembles are called {helpers} times in walks; at most {_HELPERS_IN_WALKS_MAX}"
    joins = sum(map(_may_join, within))
    if joins > _JOINS_MAX:
        said = f"+ could join lists or texts in walks {joins} times; at most {_JOINS_MAX} in one expression"
        return f"{said}: write double(…) around numbers"
    variables = {walk.variable for outermost, body in bodies for walk in (outermost, *_walks_of(body))}
    levels = sum(_levels(each, variables) for each in within)
    if levels > _LEVELS_MAX:
        return f"walks look through {levels} members of their elements, as a of i.a.b; at most {_LEVELS_MAX} in all"
    tables = sum(1 for walk, body in bodies for way, each in _looked_at(walk, body) if _is_table(walk, way, each))
    if tables > _TABLES_MAX:
        said = f"lists and tables from outside are gone through {tables} times in walks; at most {_TABLES_MAX}"
        return f"{said} in one expression: look at them outside the walk"
    return walked_patterns_fault([match for _, body in bodies for match in _matches_of(body)])


def _collected_fault(bodies: Iterable[Node]) -> str | None:
    """Why what ``map`` collects could grow beyond what is walked."""
    joins = sum(_may_join(each) for body in bodies for each in _all_of(body))
    if joins <= _JOINS_COLLECTED_MAX:
        return None
    said = f"+ could join lists or texts in map {joins} times; at most {_JOINS_COLLECTED_MAX} in one expression"
    return f"{said}: write double(…) around numbers"


def _grown_fault(node: Node, walks: tuple[Walk, ...]) -> str | None:
    """Why ``matches`` could meet a text that ``map`` or a list has joined, which is longer than those that are seen."""
    matched = [each.parts[0] for each in _of_kinds(node, _MATCHES) if each.parts]
    mapped = [body for each in matched for walk in _walks_of(each) if walk.macro == "map" for body in walk.bodies[-1:]]
    walked = [walk.walked for walk in walks if any(_of_kinds(body, _MATCHES) for body in walk.bodies)]
    if any(_joins(each) for each in [*mapped, *walked]):
        return "matches would be held against texts that + joins for a list: match each text before it is joined"
    return None


def _matches_of(node: Node) -> list[Match]:
    return [Match(each.parts[-1], 1 + _joins(each.parts[0])) for each in _of_kinds(node, _MATCHES) if each.parts]


def _joins(node: Node) -> int:
    """How often what it gives may be joined of lists or texts: not what only decides, as the body of ``filter``."""
    if _is_walk(node):
        return sum(map(_joins, node.parts[:1] + (node.parts[-1:] if node.kind == ".map" else ())))
    return _may_join(node) + sum(map(_joins, node.parts))


def _levels(node: Node, variables: set[str]) -> int:
    """Through how many members of an element it looks."""
    if node.kind == "path":
        return max(0, len(node.names) - 2) if node.names[0] in variables else 0
    return node.kind in ("index", "member")


def _is_table(walk: Walk, way: str, node: Node) -> bool:
    return way == "table" and node.names[0] != walk.variable


# --- what is walked ---------------------------------------------------------------------------------------------------


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


def _inner_fault(walk: Walk) -> str | None:
    """Why a walk within another could make more steps than all elements together, or do too much in each."""
    *above, element = walk.outer
    if above:
        return "a walk is within a walk that is within a walk: at most one within another"
    if walk.walked.kind != "path" or walk.walked.names[0] != element:
        return f"a walk within a walk goes over a list of its own element, here {element}: walk other lists one by one"
    parts = [each for body in walk.bodies for each in _all_of(body)]
    if sum(_called(each) in ENSEMBLES for each in parts) > _INNER_HELPERS_MAX:
        return f"a walk within a walk calls functions for ensembles more than {_INNER_HELPERS_MAX} times in each step"
    if len(parts) > _INNER_PARTS_MAX:
        return f"a walk within a walk does {len(parts)} things in each step; at most {_INNER_PARTS_MAX}"
    if element != walk.variable and any(each.kind == "path" and each.names[0] == element for each in parts):
        return f"{element} would be looked at in every step of the walk within its own: look at {walk.variable} there"
    if any(_is_table(walk, way, each) for body in walk.bodies for way, each in _looked_at(walk, body)):
        return "lists and tables from outside would be gone through in every step of a walk within a walk"
    return None


def _made_fault(body: Node) -> str | None:
    """Why a ``map`` could collect more than it walks."""
    if body.kind == "if":
        return _made_fault(body.parts[1]) or _made_fault(body.parts[2])
    if body.kind == "dyn()":
        return next(filter(None, map(_made_fault, body.parts)), None)
    if body.kind in ("list", "map"):
        return "map would make a list or an object in every step: map to one value"
    return None


# --- the parts of an expression ---------------------------------------------------------------------------------------


def _walks_of(node: Node, outer: tuple[str, ...] = ()) -> Iterator[Walk]:
    """The walks of an expression, those in what another one walks, and those in another one's body, among them."""
    if not _is_walk(node):
        for part in node.parts:
            yield from _walks_of(part, outer)
        return
    walked, variable, *bodies = node.parts
    yield from _walks_of(walked, outer)
    name = variable.names[0] if variable.names else ""
    yield Walk(node.kind[1:], walked, name, tuple(bodies), outer)
    for body in bodies:
        yield from _walks_of(body, (*outer, name))


def _is_walk(node: Node) -> bool:
    return node.kind[:1] == "." and node.kind[1:] in MACROS and len(node.parts) > 2


def _all_of(node: Node) -> Iterator[Node]:
    yield node
    for part in node.parts:
        yield from _all_of(part)


def _of_kinds(node: Node, kinds: frozenset[str] | set[str]) -> list[Node]:
    return [each for each in _all_of(node) if each.kind in kinds]


def _called(node: Node) -> str:
    """The function or method that it calls; "" where it calls none."""
    name = node.kind.strip(".()")
    return name if node.kind != name else ""


def _looked_at(walk: Walk, node: Node) -> Iterator[tuple[str, Node]]:
    """The paths whose values are looked at, not only whether they are there, each with how: as a single value, as a
    table that is gone through, or as the walked object that is looked up by key."""
    if walk.looks_up(node):
        yield "looked_up", walk.walked
        return
    if node.kind == "path":
        yield "single", node
        return
    if node.kind == "has":
        return
    if _is_walk(node):
        walked, variable, *bodies = node.parts
        yield from _looked_at(walk, walked)
        for body in bodies:
            yield from (each for each in _looked_at(walk, body) if each[1].names[0] != variable.names[0])
        return
    whole = _called(node) in ENSEMBLES | {"size"}
    gone_through = {"in": 1, "index": 0}.get(node.kind)
    for at, part in enumerate(node.parts):
        if part.kind == "path" and (whole or at == gone_through):
            yield "table", part
        else:
            yield from _looked_at(walk, part)


def _may_join(node: Node) -> bool:
    return node.kind == "+" and not any(map(_is_little, node.parts))


def _is_little(node: Node) -> bool:
    """Whether it is a number, a truth, or a text that is written: joined or compared with one, nothing is long."""
    if node.kind == "if":
        return all(map(_is_little, node.parts[1:]))
    return node.kind in _NUMERIC | _TRUTHS | {"literal"} or (node.kind == "+" and _is_number(node))


def _is_number(node: Node) -> bool:
    if node.kind == "+":
        return any(map(_is_number, node.parts))
    return node.kind in _NUMERIC or (node.kind == "literal" and node.names[0][0] not in "\"'bBrR")


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
