"""Errors that keep a system from starting or running, each with one sentence for its user."""

from __future__ import annotations

import errno
from typing import Final

MAX_TEXT: Final = 1000
"""Most characters of an error in a message, which may have those of many attempts at many images."""


class StartError(Exception):
    """This component can never work as configured: a wrong path or option, a missing device.

    Raise it from a builder or from `Actor.started` with one sentence that says what to do. It is reported once, to the
    log and to the supervisor, and the component is not restarted; its siblings go on.
    """


class StartDelayedError(StartError):
    """This component cannot start now, for a reason that may pass: a port in use, a full disk, a missing folder.

    It is reported like a `StartError`, and the component is restarted without end, with growing waits. Such restarts do
    not count towards `[supervision] intensity`.
    """


OF_THE_MACHINE: Final = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE
})  # fmt: skip
"""Numbers of an `OSError` that means that the machine is out of a resource, and nothing is wrong with the caller."""


class ActorCrashedError(Exception):
    """An actor of this process raised an unexpected error; the process has to end.

    `actor` is its name, `__cause__` the error.
    """

    def __init__(self, actor: str, cause: BaseException) -> None:
        super().__init__(f"{actor} crashed: {describe(cause)}")
        self.actor = actor


class UnknownNameError(KeyError):
    """No component or actor has that name; unlike that of a `KeyError`, its `str()` is a sentence."""

    def __str__(self) -> str:
        return str(self.args[0])


class AlreadyRunningError(Exception):
    """Another supervisor on this host runs that component, or another system uses that folder."""


class ForeignStateError(Exception):
    """The state folder has the requests and results of another system, which does not run now."""


class TopologyError(Exception):
    """A topology that cannot be run: `str()` is one sentence that names the file, the key and the fix.

    `file` is the path as given, `key` the key as in the file (`[api] port`), "" for the file as a whole, `problem` what
    is wrong and `fix` how to solve it.
    """

    def __init__(self, file: str, key: str, problem: str, fix: str) -> None:
        where = f"{file}: {key} " if key else f"{file} "
        super().__init__(f"{where}{problem}: {fix}{'' if fix.endswith('?') else '.'}")
        self.file = file
        self.key = key
        self.problem = problem
        self.fix = fix


def describe(error: BaseException) -> str:
    """Return an error as `Type: text`, its form in messages and reports; a long text is shortened."""
    text = str(error)
    return shorten(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def shorten(text: str) -> str:
    """Cut the middle out of a text that is too long for a message: some errors print tensors."""
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT * 3 // 4]} ... {text[-MAX_TEXT // 4 :]}"
