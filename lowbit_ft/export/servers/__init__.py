"""export.server: who will load the folder. One file per server; SERVERS is the list.

A server says which formats it reads, and which grids, layers and caches of those it refuses (`reject*`), so
that training never ends in a folder that the named server cannot load. Each fact has where it was read or run
in its file. To add one: a subclass of Server in its own file and one line in SERVERS.
"""

from .any import AnyServer
from .base import Server
from .llama_cpp import LlamaCpp
from .mlx import Mlx
from .onnxruntime import OnnxRuntime
from .transformers import Transformers
from .vllm import Vllm

SERVERS: dict[str, Server] = {
    "any": AnyServer(),
    "vllm": Vllm(),
    "llama.cpp": LlamaCpp(),
    "mlx": Mlx(),
    "onnxruntime": OnnxRuntime(),
    "transformers": Transformers(),
}

__all__ = ["SERVERS", "Server"]
