"""Decoder layers that are rounded together (signround): what they are fitted to."""

from pathlib import Path

from lowbit_ft.quantize.quantize import quantize
from lowbit_ft.recipe.sections.quant import QuantSection
from tests.quantize.test_quantize import CONFIGS, checkpoint_of, tokens


def test_signround_follows_the_dense_model_through_layers_that_stay_dense(tmp_path: Path) -> None:
    """Layers without a matrix to pack are passed by both streams: a later one is fitted to the dense model's
    output there.
    """
    quant = QuantSection.model_validate(
        {
            "bits": 4,
            "group_size": 32,
            "calibrate": "signround",
            "targets": ["*.layers.2.*"],
            "calibration": {"steps": 2},
        }
    )
    _, table = quantize(checkpoint_of(CONFIGS["llama"](), tmp_path), quant, calibration=tokens)
    (reason,) = {row.reason for row in table.quantized}
    assert reason.startswith("its layer's loss ")
    assert 0 < float(reason.split()[3]) < 0.1, "before the first step: the rounding of this layer alone"
