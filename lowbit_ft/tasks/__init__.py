"""task: what the model is for. TASKS is the list.

Acts wherever a stage would otherwise assume a language model: which class transformers builds, what a row
becomes, what the loss is a sum over, what is measured. It may touch nothing of the weights: grids, adapters,
the merge and the exporters are the same for all.

    base.py       the contract, and the keys that all tasks share
    causal_lm.py  a language model: windows of tokens, signals, perplexity
    rows.py       rows with answers: read, encoded, counted      batches.py  padded batches of them
    labelled.py   what the tasks with such rows share: the goal of training, the table, the head
    speech_tokens.py  a codec of speech: rows with sound, velocities, the spectrogram that is made again
    image_generation.py  a diffusion transformer: pictures on their way to noise, sheets of samples
    labels.py     the names of the labels      scores.py  accuracy, F1, Matthews and their kin
    spans.py      answers that are spans of a text, and SQuAD's measures
    boxes.py      answers that are boxes of a picture, and COCO's measures

A kind is a config class; its keys are the section `task` of a recipe, and `task: <kind>` is one without keys.
To add one: a subclass of Labelled (or of Task), and a line in TASKS.
"""

from .base import Task
from .causal_lm import CausalLM
from .image_classification import ImageClassification
from .image_generation import ImageGeneration
from .masked_lm import MaskedLM
from .object_detection import ObjectDetection
from .question_answering import QuestionAnswering
from .sequence_classification import SequenceClassification
from .speech_tokens import SpeechTokens
from .token_classification import TokenClassification

USUAL = "causal_lm"

TASKS: dict[str, type[Task]] = {
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
    "sequence_classification": SequenceClassification,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
    "image_classification": ImageClassification,
    "object_detection": ObjectDetection,
    "image_generation": ImageGeneration,
    "speech_tokens": SpeechTokens,
}

__all__ = ["TASKS", "USUAL", "Task"]
