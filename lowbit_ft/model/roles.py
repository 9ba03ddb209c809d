"""What the name of a layer says of its part in a language model: the head, the token embedding, another
tower. The names are those of transformers' models.
"""

from __future__ import annotations

# Names that the output head and the token embedding have in transformers' models.
HEADS = frozenset({"lm_head", "embed_out"})


TOKEN_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings"})


OTHER_TOWERS = (
    "vision",
    "visual",
    "audio",
    "image",
)  # how parts of a multimodal model are called that read no text

# Model types in whose gguf files the rows of a head of q and k stand in another order: llama.cpp rotates
# neighbours (x0, x1), transformers halves (x0, x_d/2). Its caches have keys in that order.
NEIGHBOURS = frozenset({"llama", "mistral"})


def is_head(layer_name: str) -> bool:
    """Whether a layer of this name makes the logits."""
    return layer_name.rpartition(".")[2] in HEADS


def is_token_embedding(layer_name: str) -> bool:
    """Whether an embedding of this name is the one of the tokens (not of positions, or of other towers)."""
    return layer_name.rpartition(".")[2] in TOKEN_EMBEDDINGS
