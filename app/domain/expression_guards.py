"""Guards: which of an expression's references could be met while what they name is absent.

CEL fails where a member is missing, unless the expression does not come to look at it: ``has(outputs.pd) && ...``, a
ternary, or ``||``. In CEL ``false && failure`` is false and ``true || failure`` is true in either order, so an operand
is guarded by any other of its chain. What syntax cannot tell is for a trial (``registry_results``).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from app.domain.expression_syntax import SIMPLE_TEXT, Node


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

    >>> from app.domain.expression_syntax import syntax
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
            keyed = SIMPLE_TEXT.fullmatch(node.parts[0].names[0]) if node.parts[0].kind == "literal" else None
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
