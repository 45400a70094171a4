"""NVF: a differentiable two-stage retriever over a frozen memory of vectors.

The names below load on first use, so that `python -m nvf.train --help` answers without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvf.errors import InputError
    from nvf.models.attention import SoftAttention
    from nvf.models.memory import VectorMemory
    from nvf.models.pipeline import Pipeline
    from nvf.models.reranker import Reranker

__all__ = ["InputError", "Pipeline", "Reranker", "SoftAttention", "VectorMemory"]
__version__ = "0.1.0"

_HOME = {
    "InputError": "nvf.errors",
    "Pipeline": "nvf.models.pipeline",
    "Reranker": "nvf.models.reranker",
    "SoftAttention": "nvf.models.attention",
    "VectorMemory": "nvf.models.memory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nvf' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
