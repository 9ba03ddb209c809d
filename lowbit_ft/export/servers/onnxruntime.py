"""onnxruntime: ONNX Runtime on a CPU, and what is built on it. What it does not compute is refused by the
format itself (onnx.py: run with 1.32).
"""

from .base import Server


class OnnxRuntime(Server):
    name = "onnxruntime"
    formats = ("onnx",)
