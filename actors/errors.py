"""What can keep a cluster from starting, each as one sentence for the person who runs it."""

from __future__ import annotations

import errno
from typing import Final

MAX_TEXT: Final = 1000
"""Characters of an error that travel: a message has room for those of many attempts at many images."""


class StartError(Exception):
    """This actor can never work as configured: a bad model path, a bad option, a device that is not there.

    Raise it from a builder or from `Actor.started` with one sentence that says what to do. It is reported
    once, to the log and to the supervisor, and the actor is not started again; its siblings go on.
    """


class StartDelayedError(StartError):
    """This actor cannot start for a reason that may pass: a port that is taken, a full disk, a folder that is away.

    It is reported as a `StartError` is, and the actor is started again, after longer and longer waits and without
    end. Such starts do not count as restarts within `[supervision] intensity`.
    """


OF_THE_MACHINE: Final = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE
})  # fmt: skip
"""Numbers of `OSError` that say that the machine has no room now: nothing is wrong with whoever asked."""


class ActorCrashedError(Exception):
    """An actor of this process raised something it did not expect; the process has to end.

    `actor` is its name, `__cause__` what it raised.
    """

    def __init__(self, actor: str, cause: BaseException) -> None:
        super().__init__(f"{actor} crashed: {describe(cause)}")
        self.actor = actor


class UnknownNameError(KeyError):
    """No component, no actor is called that; `str()` is a sentence, other than that of a bare `KeyError`."""

    def __str__(self) -> str:
        return str(self.args[0])


class AlreadyRunningError(Exception):
    """Another supervisor on this host already runs that component, or another system has that folder."""


class ForeignStateError(Exception):
    """The state folder holds the requests and results of another system, which does not run now."""


class TopologyError(Exception):
    """A topology that cannot be run: `str()` is one sentence that names the file, the key and the fix.

    `file` is the path as given, `key` the place in it as a reader would write it (`[api] port`), "" for the
    file as a whole, `problem` what is wrong and `fix` what to do about it.
    """

    def __init__(self, file: str, key: str, problem: str, fix: str) -> None:
        where = f"{file}: {key} " if key else f"{file} "
        super().__init__(f"{where}{problem}: {fix}{'' if fix.endswith('?') else '.'}")
        self.file = file
        self.key = key
        self.problem = problem
        self.fix = fix


def describe(error: BaseException) -> str:
    """`Type: text`, the form in which errors travel in failures and reports; long texts are shortened."""
    text = str(error)
    return shorten(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def shorten(text: str) -> str:
    """Leave out the middle of a text that is too long to travel: some errors print tensors."""
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT * 3 // 4]} ... {text[-MAX_TEXT // 4 :]}"
