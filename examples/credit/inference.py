"""Fitted pipelines, compiled to lookups: what answers a request, without scikit-learn's cost of a call.

A pipeline's call costs about a millisecond for one row, nearly all of it validation and dispatch made for thousands of
rows. Decisions come one row at a time, so the fitted parameters are taken out once: the scorecard becomes a weight for
each label and number, and each tree becomes nested tuples `(feature, threshold, left, right)` ending in a float. The
results are those of scikit-learn to rounding, which the tests check on every applicant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.credit.artifacts import Artifact

Row = Sequence[str | int]
"""A model's attributes in the order of its columns."""

# A node: `(feature, threshold, left, right)`, or the leaf's value.
Node = Any

TEXT_STEP = "text"
NUMBER_STEP = "number"


class UnknownLabelError(Exception):
    """A text is none of the labels that the model knows for its column."""

    def __init__(self, column: str, value: str, known: Sequence[str]) -> None:
        super().__init__(f"{column} is {value!r}, which is none of the labels known: {', '.join(known)}")
        self.column = column


@dataclass(frozen=True, slots=True)
class Scorecard:
    """Logistic regression: a bias and a weight for each label and each number."""

    columns: tuple[str, ...]
    bias: float
    texts: tuple[tuple[int, Mapping[str, float]], ...]
    numbers: tuple[tuple[int, float], ...]

    def margin(self, row: Row) -> float:
        """The log-odds of a row."""
        total = self.bias
        try:
            for place, weights in self.texts:
                total += weights[row[place]]  # type: ignore[index]  # text columns hold str, checked by callers
        except KeyError as error:
            raise UnknownLabelError(self.columns[place], str(row[place]), sorted(weights)) from error
        for place, weight in self.numbers:
            total += weight * row[place]  # type: ignore[operator]  # number columns hold int, checked by callers
        return total


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees over one-hot labels and plain numbers, whose leaves add up."""

    columns: tuple[str, ...]
    bias: float
    texts: tuple[tuple[int, Mapping[str, int]], ...]
    numbers: tuple[tuple[int, int], ...]
    width: int
    trees: tuple[Node, ...]

    def margin(self, row: Row) -> float:
        """The bias and each tree's leaf for a row, added."""
        x: list[Any] = [0] * self.width
        try:
            for place, indexes in self.texts:
                x[indexes[row[place]]] = 1  # type: ignore[index]  # text columns hold str, checked by callers
        except KeyError as error:
            raise UnknownLabelError(self.columns[place], str(row[place]), sorted(indexes)) from error
        for place, index in self.numbers:
            x[index] = row[place]
        total = self.bias
        for tree in self.trees:
            node = tree
            while node.__class__ is tuple:
                feature, threshold, left, right = node
                node = left if x[feature] <= threshold else right
            total += node
        return total


@dataclass(frozen=True, slots=True)
class Compiled:
    """A model version ready to answer: rows in, one float a row out."""

    model: str
    version: str
    digest: str
    columns: tuple[str, ...]
    predict: Callable[[Row], float]
    """What the row's model says: probability of default, anomaly score (0 to 1), or amount."""


def compile_artifact(artifact: Artifact) -> Compiled:
    """Take the fitted parameters out of an artifact's pipeline.

    Raises LookupError for an estimator that none of the example's models is.
    """
    encoder = artifact.pipeline.named_steps["encode"]
    model = artifact.pipeline.named_steps["model"]
    columns = artifact.spec.columns
    predict: Callable[[Row], float]
    match type(model).__name__:
        case "LogisticRegression":
            scorecard = _scorecard(columns, encoder, model)

            def predict(row: Row) -> float:
                return _probability(scorecard.margin(row))

        case "GradientBoostingClassifier":
            prior = float(model.init_.class_prior_[1])
            forest = _forest(columns, encoder, math.log(prior / (1 - prior)), _boosted_trees(model))

            def predict(row: Row) -> float:
                return _probability(forest.margin(row))

        case "IsolationForest":
            forest = _forest(columns, encoder, 0.0, [_isolation_tree(tree) for tree in model.estimators_])
            scale = -1 / (len(model.estimators_) * _average_path(int(model.max_samples_)))

            def predict(row: Row) -> float:
                return float(2 ** (scale * forest.margin(row)))

        case "TransformedTargetRegressor":
            regressor = model.regressor_
            mean = float(regressor.init_.constant_.ravel()[0])
            forest = _forest(columns, encoder, mean, _boosted_trees(regressor))

            def predict(row: Row) -> float:
                return math.exp(forest.margin(row))

        case other:
            raise LookupError(f"{artifact.spec.name} is a {other}, which this example does not compile")
    return Compiled(artifact.spec.model, artifact.spec.version, artifact.digest, columns, predict)


def _probability(margin: float) -> float:
    if margin >= 0:
        return 1 / (1 + math.exp(-margin))
    odds = math.exp(margin)
    return odds / (1 + odds)


def _places(encoder: Any) -> tuple[list[tuple[int, list[str]]], list[int]]:
    """Which columns the fitted encoder reads as text, with their labels in order, and which as numbers."""
    steps = {name: (step, places) for name, step, places in encoder.transformers_}
    one_hot, texts = steps[TEXT_STEP]
    labels = [[str(label) for label in known] for known in one_hot.categories_]
    return list(zip(texts, labels, strict=True)), list(steps[NUMBER_STEP][1])


def _scorecard(columns: tuple[str, ...], encoder: Any, model: Any) -> Scorecard:
    texts, numbers = _places(encoder)
    scaler = encoder.named_transformers_[NUMBER_STEP]
    coefficients = iter(float(c) for c in model.coef_[0])
    weights = tuple((place, {label: next(coefficients) for label in labels}) for place, labels in texts)
    scaled = [next(coefficients) / float(scale) for scale in scaler.scale_]
    bias = float(model.intercept_[0]) - sum(
        weight * float(mean) for weight, mean in zip(scaled, scaler.mean_, strict=True)
    )
    return Scorecard(columns, bias, weights, tuple(zip(numbers, scaled, strict=True)))


def _forest(columns: tuple[str, ...], encoder: Any, bias: float, trees: Sequence[Node]) -> Forest:
    texts, numbers = _places(encoder)
    index = 0
    one_hot: list[tuple[int, dict[str, int]]] = []
    for place, labels in texts:
        one_hot.append((place, {label: index + i for i, label in enumerate(labels)}))
        index += len(labels)
    plain = tuple((place, index + i) for i, place in enumerate(numbers))
    return Forest(columns, bias, tuple(one_hot), plain, index + len(plain), tuple(trees))


def _boosted_trees(model: Any) -> list[Node]:
    rate = float(model.learning_rate)
    return [
        _tree(stage.tree_, lambda tree, node, _: rate * float(tree.value[node].ravel()[0]))
        for stage in model.estimators_.ravel()
    ]


def _isolation_tree(estimator: Any) -> Node:
    """A leaf is worth its depth and the depth that its rows would need to be told apart."""
    return _tree(estimator.tree_, lambda tree, node, depth: depth + _average_path(int(tree.n_node_samples[node])))


def _tree(tree: Any, leaf: Callable[[Any, int, int], float], node: int = 0, depth: int = 0) -> Node:
    left, right = int(tree.children_left[node]), int(tree.children_right[node])
    if left == right:
        return leaf(tree, node, depth)
    return (
        int(tree.feature[node]),
        float(tree.threshold[node]),
        _tree(tree, leaf, left, depth + 1),
        _tree(tree, leaf, right, depth + 1),
    )


def _average_path(rows: int) -> float:
    """Mean depth of an unsuccessful search in a binary search tree of `rows` (Liu, Ting, Zhou, 2008).

    >>> _average_path(1), _average_path(2), round(_average_path(128), 3)
    (0.0, 1.0, 8.867)
    """
    if rows <= 1:
        return 0.0
    if rows == 2:
        return 1.0
    return 2 * (math.log(rows - 1) + _EULER) - 2 * (rows - 1) / rows


_EULER = 0.5772156649015329
