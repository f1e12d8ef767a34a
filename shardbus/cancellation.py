"""Tells a task's own cancellation from what the code of an application, which it calls, has to do with cancellations."""

from __future__ import annotations

import asyncio
from typing import Any


def is_own_cancellation(error: BaseException) -> bool:
    """Whether an error ends the running task, and is nothing that the application has raised: it may await what somebody
    else has cancelled."""
    if not issubclass(type(error), asyncio.CancelledError):
        return False
    task = asyncio.current_task()
    return task is None or bool(task.cancelling())


def uncancel(task: asyncio.Task[Any] | None) -> None:
    """Take back every cancellation that a task has not been ended by; up to Python 3.12 but for one that it is still to
    hear of.

    Whoever has called an application's code, and not been cancelled meanwhile, does so: in Python 3.11 a `TaskGroup` whose
    child has failed leaves one behind, though its error was caught.
    """
    while task is not None and task.cancelling():
        task.uncancel()
