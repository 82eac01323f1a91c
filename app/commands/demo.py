"""``model-broker demo``: the credit example on embedded services, from nothing to a proven audit."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STATE_DIR = Path(".model-broker/demo")

demo_app = typer.Typer(rich_markup_mode=None, add_completion=False)


@demo_app.command(epilog="Example: model-broker demo --requests 1000 --json demo.json")
def demo(
    requests: Annotated[
        int, typer.Option("--requests", min=1, help="How many; past 1,000 applicants ask again.")
    ] = 1_000,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON; - is standard output.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave everything running, and say how to use and end it.")
    ] = False,
    state_dir: Annotated[
        Path, typer.Option("--state-dir", help="Of --keep: where data and logs are; else a temporary directory.")
    ] = DEFAULT_STATE_DIR,
) -> None:
    """Run the whole broker on this machine, decide on real loan applications, and show what happened."""
    if find_spec("examples") is None or find_spec("examples.credit") is None:
        raise _missing("the example is not here: run the demo in a clone of the repository, by `make demo`")
    if find_spec("sklearn") is None:
        raise _missing("scikit-learn is not installed: pip install 'model-broker[demo]'")
    if json_file not in (None, "-") and not Path(str(json_file)).resolve().parent.is_dir():
        raise typer.BadParameter(f"{Path(str(json_file)).parent} is no directory", param_hint="--json")
    from examples.credit.demo import run  # noqa: PLC0415 - not part of the package; may be absent, see above

    raise typer.Exit(run(requests=requests, json_file=json_file, keep=keep, state_dir=state_dir))


def _missing(what: str) -> typer.Exit:
    typer.echo(f"error: {what}", err=True)
    return typer.Exit(1)
