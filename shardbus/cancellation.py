"""Tells a task's own cancellation from one that the code in it has brought upon itself."""

from __future__ import annotations

import asyncio


def is_own_cancellation(error: BaseException) -> bool:
    """Whether an error ends the running task, and is nothing that the application has raised: it may await what somebody
    else has cancelled."""
    if not issubclass(type(error), asyncio.CancelledError):
        return False
    task = asyncio.current_task()
    return task is None or bool(task.cancelling())


def end_if_cancelled() -> None:
    """End the running task where somebody has asked for that, whatever the application's code, which it has called, has made
    of it: another error, or nothing. Nobody would ask again.

    Raises:
        CancelledError: the task is cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
