"""The layers of a checkpoint, from its headers."""

from lowbit_ft.recipe.layers import read_shapes
from tests.recipe.recipe_text import TINY


def test_shapes_of_the_tiny_model():
    shapes = read_shapes(TINY)
    layers = {layer.name: (layer.out_features, layer.in_features) for layer in shapes.linears}
    assert len(layers) == 28 and layers["model.layers.3.mlp.down_proj"] == (256, 768)
    assert not any("embed" in name for name in layers)
    assert shapes.number("max_position_embeddings") == 1024 and shapes.number("absent") is None
