"""What can be said of expressions before any request: those that fail whatever the tasks' versions answer.

Only what the documents prove is a fault. Requests have no types, so an expression over them is left alone.
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

from app.domain.documents import ModelVersionSpec, RuleSpec
from app.domain.errors import ExpressionFailed
from app.domain.expressions import Activation, Expression
from app.domain.registry_parts import is_unread
from app.domain.registry_shapes import shown


def constant_fault(expression: Expression) -> str | None:
    """Why a condition that looks at nothing cannot hold or fail to hold; None where it can, or looks at something."""
    if expression.roots:
        return None
    try:
        value = expression.evaluate(Activation({}))
    except ExpressionFailed as error:
        return str(error)
    said = f"is always {shown(value)}, and a condition is true or false; compare it with something"
    return None if isinstance(value, bool) else said


def maybe_absent(rule: RuleSpec) -> frozenset[str]:
    """The tasks that may have no output in a decision that has a result."""
    if rule.join.policy != "all":
        return frozenset(task.name for task in rule.tasks)
    return frozenset(task.name for task in rule.tasks if task.need == "optional" or task.when is not None)


def result_faults(
    expression: Expression, served: Mapping[str, tuple[ModelVersionSpec, ...] | None], absent_at_times: Collection[str]
) -> list[str]:
    """Why ``expression`` fails for every answer that the tasks' versions can give, or for every one of some version.

    Only what the documents prove is a fault: members named by a computed key and types of requests are not known.
    """
    named = expression.members("outputs")
    asked = {path for path, tested in named if tested}
    faults = []
    for path in dict.fromkeys(path for path, _ in named):
        task, output = path[0], path[1] if len(path) > 1 else None
        if task not in served:
            if any(map(is_unread, served)):
                continue
            faults.append(f"outputs.{task}: there is no task {task} (there is: {', '.join(served) or 'none'})")
            continue
        versions = served[task]
        if output is None or versions is None:
            continue
        lacking = [each for each in versions if all(contract.name != output for contract in each.outputs)]
        if len(lacking) == len(versions):
            have = ", ".join(dict.fromkeys(contract.name for each in versions for contract in each.outputs))
            faults.append(f"outputs.{task}.{output}: task {task} has no output {output} (there is: {have})")
        elif lacking and path[:2] not in asked and " in " not in expression.text:
            without = ", ".join(f"{each.model} {each.version}" for each in lacking)
            faults.append(
                f"outputs.{task}.{output}: {without} has no such output; ask has(outputs.{task}.{output}) first"
            )
    absent = {path[0] for path, _ in named} & set(absent_at_times)
    if faults or absent or not set(expression.roots) <= {"outputs", "path"} or None in served.values():
        return faults
    known = {task: versions for task, versions in served.items() if versions}
    for turn in range(max(map(len, known.values()), default=0)):
        outputs = {task: _sample(versions[turn % len(versions)]) for task, versions in known.items()}
        said = expression.mistyped(Activation({"outputs": outputs, "path": "/"}))
        if said is not None:
            return [said]
    return []


_SAMPLES: Final[Mapping[str, Any]] = {"BOOL": True, "BYTES": "", "FP32": 0.5, "FP64": 0.5}


def _sample(version: ModelVersionSpec) -> dict[str, Any]:
    """An answer of the types that ``version`` declares."""
    return {output.name: _SAMPLES.get(output.datatype, 1) for output in version.outputs}
