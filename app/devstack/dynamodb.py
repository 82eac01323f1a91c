"""DynamoDB Local, AWS's own, on Java and one native library; moto where that library does not exist.

Tables are kept in a file, so they come back with the process. Maven names the native library with its version and
Java wants it without, hence the copy.
"""

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from app.devstack.java import JVM_OPTIONS, find_java, resolve_jars
from app.devstack.moto import MotoService
from app.devstack.process import StackError

COORDINATES = "com.amazonaws:DynamoDBLocal:2.6.1"
MAIN = "com.amazonaws.services.dynamodbv2.local.main.ServerRunner"
NATIVE_LIBRARY = "libsqlite4java-linux-amd64"


def has_native_library() -> bool:
    """Whether DynamoDB Local can keep its tables on this kind of machine."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


class DynamoDBService(MotoService):
    """One DynamoDB endpoint."""

    name = "dynamodb"
    endpoint_variable = "AWS_ENDPOINT_URL_DYNAMODB"

    def prepare(self) -> None:
        """Fetch the jars and lay out the native library."""
        if not has_native_library():
            super().prepare()
            return
        jars = resolve_jars(COORDINATES, self.progress)
        self._classpath = os.pathsep.join(str(jar) for jar in jars if jar.suffix == ".jar")
        self._java = find_java()
        self._native = self.directory / "native"
        self._native.mkdir(exist_ok=True)
        library = self._native / f"{NATIVE_LIBRARY}.so"
        if not library.exists():
            shutil.copy(self._find_library(jars), library)

    @staticmethod
    def _find_library(jars: Sequence[Path]) -> Path:
        for folder in {jar.parent for jar in jars} | {jar.parent.parent / "jars" for jar in jars}:
            for library in folder.glob(f"{NATIVE_LIBRARY}-*.so"):
                return library
        raise StackError(f"{COORDINATES} came without its native library {NATIVE_LIBRARY}")

    def command(self) -> Sequence[str]:
        """See Service."""
        if not has_native_library():
            return super().command()
        native = f"-Djava.library.path={self._native.resolve()}"
        arguments = ["-sharedDb", "-dbPath", str(self.data.resolve())]
        arguments += ["-port", str(self.ports["port"]), "-disableTelemetry"]
        return [self._java, "-Xms64m", "-Xmx256m", *JVM_OPTIONS, native, "-cp", self._classpath, MAIN, *arguments]
