"""Fails unless enough of the core's branches were taken: reads `.coverage`, lists what was missed, by file.

`coverage report --fail-under` mixes lines into its figure; a core that decides is judged by its branches.
"""

import argparse
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from coverage import Coverage

CORE = "app/domain/*"


def main() -> int:
    """Print the figure; exit code 1 where it is below `--least`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--least", type=float, required=True, help="per cent of branches")
    least = parser.parse_args().least
    if not Path(".coverage").exists():
        print("no .coverage here: run `make test`", file=sys.stderr)
        return 1
    measured = Coverage()
    measured.load()
    text = io.StringIO()
    with redirect_stdout(text):
        measured.json_report(outfile="-", include=[CORE])
    report = json.loads(text.getvalue())
    for name, file in sorted(report["files"].items()):
        for start, end in file["missing_branches"]:
            print(f"{name}: from line {start} never to {f'line {end}' if end > 0 else 'the exit'}")
    totals = report["totals"]
    taken = 100 * totals["covered_branches"] / totals["num_branches"]
    print(f"{CORE}: {totals['covered_branches']} of {totals['num_branches']} branches taken, {taken:.1f} %")
    if taken < least:
        print(f"that is less than {least} %: test what is listed above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
