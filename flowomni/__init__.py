"""FlowOmni: ears and a voice for a pretrained language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Answer, Event, FlowOmni, Question
    from .configuration import FlowOmniConfig
    from .modeling import FlowOmniModel
    from .processing import FlowOmniProcessor

_HOMES = {
    "Answer": "api",
    "Event": "api",
    "FlowOmni": "api",
    "Question": "api",
    "FlowOmniConfig": "configuration",
    "FlowOmniModel": "modeling",
    "FlowOmniProcessor": "processing",
}
__all__ = ["Answer", "Event", "FlowOmni", "FlowOmniConfig", "FlowOmniModel", "FlowOmniProcessor", "Question"]


def __getattr__(name: str) -> Any:
    """Load on first use, so that importing the package costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'flowomni' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
