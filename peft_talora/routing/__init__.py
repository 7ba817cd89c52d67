"""Which task each sample of a forward belongs to."""

from .blocks import Routing
from .replay import checkpoint_context
from .requests import Task, TaskRequest
from .router import TaskRouter, find_routers, set_task, use_task

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
