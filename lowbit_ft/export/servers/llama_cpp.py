"""llama.cpp (and Ollama): gguf. What it computes otherwise is refused by the format itself."""

from .base import Server


class LlamaCpp(Server):
    name = "llama.cpp"
    formats = ("gguf",)
