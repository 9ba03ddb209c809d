"""lowbit_ft: fine-tune a low-bit language model whose trained integers are the integers that ship."""

from .integrations import register

register()
