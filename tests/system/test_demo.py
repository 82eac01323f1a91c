"""The demo as a user runs it, smaller: from nothing to proven records, and nothing left behind unless asked for."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import psutil
import pytest

from examples.credit.applicants import applicants

REQUESTS = 100
SERVICES = 4
WITHIN_S = 300.0
COMMAND = [sys.executable, "-m", "app.cli", "demo", "--requests", str(REQUESTS)]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """This process's, without settings of its own, and with a place for temporary files that can be looked into."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "AWS_"))}
    return inherited | {"TMPDIR": str(tmp_path)}


def processes_in(directory: Path) -> list[psutil.Process]:
    """Those that name the directory in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(directory) in word for word in words):
            found.append(process)
    return found


def written_in(file: Path) -> dict[str, str]:
    """The variables of a file that a shell reads."""
    return dict(line.split("=", 1) for line in shlex.split(file.read_text()))


def test_every_request_is_answered_once_and_proven(tmp_path: Path, environment: dict[str, str]) -> None:
    """The figures have exactly the promised members, nothing is lost or doubled, and no process or file is left."""
    done = subprocess.run(
        [*COMMAND, "--json", "-"], env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert list(figures) == [
        "requests",
        "replied",
        "lost",
        "duplicated",
        "by_status",
        "by_version",
        "p50_ms",
        "p99_ms",
        "decisions_per_second",
        "audit_objects",
        "audit_items",
        "audit_missing",
        "http_requests",
        "shadow_compared",
        "flip_rate",
        "rollout",
        "feature_statuses",
        "cache_hit_rate",
    ]
    assert figures["requests"] == figures["replied"] == figures["audit_items"] == REQUESTS
    assert figures["lost"] == figures["duplicated"] == figures["audit_missing"] == 0
    assert figures["http_requests"] == REQUESTS // 10
    assert set(figures["by_status"]) <= {"completed", "partial"}
    assert sum(figures["by_status"].values()) == REQUESTS
    versions = figures["by_version"]
    assert versions["credit-pd-1"] + versions.get("credit-pd-2", 0) == REQUESTS
    assert versions["application-anomaly-1"] + versions.get("application-anomaly-2", 0) == REQUESTS
    assert versions["expected-amount-1"] == REQUESTS
    assert 0 < figures["p50_ms"] <= figures["p99_ms"]
    assert figures["decisions_per_second"] > 0
    assert figures["audit_objects"] > 0
    # Of the small arm's requests there is nothing to compare, and of the others about half is.
    assert 0 < figures["shadow_compared"] <= versions["credit-pd-1"]
    assert 0 <= figures["flip_rate"] < 1
    # So few requests are not enough for a step; that it began is told, and nothing took it back.
    assert list(figures["rollout"]) == ["name", "state", "percent", "steps"]
    assert figures["rollout"]["name"] == "credit/consumer/anomaly"
    assert figures["rollout"]["state"] in ("progressing", "promoted")
    assert figures["rollout"]["percent"] == [20, 100, 100][figures["rollout"]["steps"]]
    # All that the models asked for was there, or was computed; nothing stood in for anything.
    statuses = figures["feature_statuses"]
    assert list(statuses) == ["PRESENT", "NULL", "MISSING", "STALE", "DEFAULTED", "COMPUTED", "ERROR"]
    assert {status for status, sources in statuses.items() if sources} == {"PRESENT", "COMPUTED"}
    # So soon after the load the cache leaves its rows alone for a while, and so few requests may be over by then.
    assert {"request", "redis"} <= set(statuses["PRESENT"]) <= {"request", "redis", "cache"}
    # Amount, duration and purpose of the two models that read all three; the third is not told the amount.
    assert statuses["PRESENT"]["request"] == 8 * REQUESTS
    computed = versions.get("credit-pd-2", 0) + versions.get("application-anomaly-2", 0)
    assert statuses["COMPUTED"] == {"onDemand": computed}
    assert 0 <= figures["cache_hit_rate"] < 1
    assert "view purpose: 1,000 rows" in done.stderr
    assert "accuracy" in done.stderr
    assert "The rollout of credit/consumer/anomaly" in done.stderr
    assert processes_in(tmp_path) == []
    assert not list(tmp_path.glob("model-broker-demo-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_stops_its_children(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    """Ctrl-C, and SIGTERM, in the middle of the start end every child; the exit code says so."""
    demo = subprocess.Popen(COMMAND, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + WITHIN_S
        while len(psutil.Process(demo.pid).children()) < SERVICES:
            assert demo.poll() is None, demo.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.1)
        demo.send_signal(number)
        said, _ = demo.communicate(timeout=60)
        assert demo.returncode == 130, said
        assert "Interrupted" in said
        assert "Traceback" not in said
        assert processes_in(tmp_path) == []
    finally:
        demo.kill()
        demo.wait(10)


def test_a_kept_demo_runs_on_until_it_is_put_down(tmp_path: Path, environment: dict[str, str]) -> None:
    """--keep leaves services, broker and features, says how to use them, refuses a second demo there; down ends all."""
    state = tmp_path / "kept"
    down = [sys.executable, "-m", "app.cli", "dev", "down", "--json", "--state-dir", str(state)]
    try:
        command = [*COMMAND, "--keep", "--state-dir", str(state)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"model-broker dev down --state-dir {state}" in done.stdout
        status = subprocess.run(
            [sys.executable, "-m", "app.cli", "dev", "status", "--json", "--state-dir", str(state)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        names = {service["name"] for service in json.loads(status.stdout)["services"] if service["serving"]}
        mean = fmean(each.inputs["credit_amount"] for each in applicants() if each.purpose == "car (new)")
        shown = subprocess.run(
            [sys.executable, "-m", "app.cli", "features", "get", "purpose", "purpose=car (new)", "--json"],
            env=environment | written_in(state / "dev.env"),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        told = {each["feature"]: each["value"] for each in json.loads(shown.stdout)["features"]}
        assert told["credit_amount_mean_30d"] == pytest.approx(mean, rel=1e-12)
        broker = {"models", "decide", "pool", "features", "audit", "rollouts", "gateway"}
        assert names == {"kafka", "redis", "s3", "dynamodb"} | broker
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert again.returncode == 1
        assert "dev down" in again.stdout
    finally:
        ended = subprocess.run(down, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert set(json.loads(ended.stdout)["stopped"]) == names
    assert processes_in(tmp_path) == []
