"""Runs a command that dies when the process that asked for it dies: ``python tether.py PARENT_PID COMMAND...``.

Linux forgets the parent-death signal at ``fork`` and keeps it over ``exec``, so it is set here, in a process of its
own, rather than in the forked copy of a threaded parent, where running Python code may deadlock. Standard library
only: it runs before anything else is on the path.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel for SIGKILL at the parent's death, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel knew whom to watch
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - no shell is the point


if __name__ == "__main__":
    main()
