"""Codes in a file: JSON that says which sound they are of, and which codec made them.

`encoder` names the weights that made the codes, so that another codec refuses them, and one whose decoder was
trained on or packed since (its encoder left as it was) takes them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from ..files.atomic import write_text
from ..files.jsonfile import read_json

MOST_CODES = 1 << 20
# of a codec's config.json, what codes depend on beside its encoder's weights
HEARD = (
    "code",
    "sample_rate",
    "hop_length",
    "n_fft",
    "num_mel_bins",
    "frames_per_code",
    "mel_mean",
    "mel_std",
)
ENCODER = ("body.mel_in.", "body.encoder.", "body.codes.to_code.")


class CodesFile(BaseModel):
    """samples: of the sound at sample_rate, before silence filled the last code."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lowbit_ft speech codes"] = "lowbit_ft speech codes"
    version: Literal[1] = 1
    encoder: str
    code: dict[str, Any]
    sample_rate: Annotated[StrictInt, Field(gt=0)]
    samples_per_code: Annotated[StrictInt, Field(gt=0)]
    samples: Annotated[StrictInt, Field(gt=0)]
    codes: Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1, max_length=MOST_CODES)]

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(self.model_dump(mode="json")) + "\n")


def read_codes(path: Path) -> CodesFile:
    """ValueError, naming the file, for what is wrong with it."""
    found = read_json(path, CodesFile, "give a file that `lowbit-ft encode` wrote")
    size = found.samples_per_code
    if -(-found.samples // size) != len(found.codes):
        raise ValueError(
            f"{path}: {len(found.codes)} codes of {size} samples do not fit {found.samples} samples; the "
            "file was changed; encode the sound again"
        )
    return found


def encoder_digest(model: Any) -> str:
    """sha256 over what makes the codes, as numbers of fp32 or integers, whatever the files keep them in."""
    heard = {key: getattr(model.config, key) for key in HEARD}
    sha = hashlib.sha256(json.dumps(heard, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(ENCODER):
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
            sha.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
