"""Write docs/models.md: which architectures go through the whole line, found by doing it on a tiny random
model of each.

    python -m benchmarks.support_matrix          from the root of the repository; under a minute on one core

The models and the line are those of tests/model/test_architectures.py, which fails when the page does not say
what it finds.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from lowbit_ft.files.atomic import write_text
from tests.architectures import CONFIGS
from tests.whole_line import lines

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
HEAD = """# Models

Written by `python -m benchmarks.support_matrix`, not by hand. Each row is a tiny random model of that
architecture (hidden size 64, two layers), packed in 4 bits, trained for a step with LR-QAT, merged, exported,
and loaded again by transformers {transformers} (compressed-tensors {compressed}).

- **packed**: how many matrices, and their share of the matrix weights of the decoder layers. The rest is
  named in the table that `quantize` prints: routers, convolutions. The head and the token embedding stay in
  full precision unless `quant.lm_head` or `quant.embeddings` gives them bits.
- **exact**: the logits of the reloaded folder are those of the model in training, bit for bit.
- **exact weights**: codes, scales and the reader's dense weights are equal bit for bit; its logits agree to
  rounding, because a dense layer begins its sums with the bias and a packed one ends them with it.
- **refused**: an error that names the layers and the way out, before anything is trained. Nothing is left out
  in silence.

The experts of a mixture are packed and adapted one by one (`<experts>.3.gate_up_proj`,
`<experts>.3.down_proj`); all of a layer or none. A refused module can be left in full precision with the
`quant.exclude` that the error names: the row "the rest". Of a multimodal model the text tower is tuned.

**Convolutions** (`nn.Conv2d`, `nn.Conv1d`; any stride, padding, dilation, groups) stay in full precision
unless the recipe says `quant.convolutions: true`. Then a weight [N, C, k, k] is a matrix [N, C k k] on the
grid of the recipe, which multiplies the patches of the image and is trained by every method; `targets`,
`exclude` and `overrides` name it as they do linears. `native` and `onnx` hold it, every other format
refuses it by name, and so is a convolution refused that has a forward of its own, or a weight made of other
tensors (weight norm). Batch norms keep the statistics of the checkpoint, in training too, are frozen, and
are not folded. A ViT and a ResNet are tried (`tests/model/test_vision.py`).

| model_type | class | packed | native | compressed-tensors |
| --- | --- | --- | --- | --- |
"""


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            for result in lines(name, Path(folder)):
                rows.append(result.row())
                print(rows[-1], flush=True)
    head = HEAD.format(transformers=version("transformers"), compressed=version("compressed-tensors"))
    PAGE.parent.mkdir(exist_ok=True)
    write_text(PAGE, head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
