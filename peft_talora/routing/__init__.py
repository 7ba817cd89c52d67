"""Which task each sample of a forward belongs to."""

from .router import (
    Routing,
    Task,
    TaskRequest,
    TaskRouter,
    checkpoint_context,
    find_routers,
    set_task,
    use_task,
)

__all__ = [
    "Routing",
    "Task",
    "TaskRequest",
    "TaskRouter",
    "checkpoint_context",
    "find_routers",
    "set_task",
    "use_task",
]
