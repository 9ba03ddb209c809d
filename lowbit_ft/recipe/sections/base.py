"""What all sections share: how values are read, and the types of bounded numbers.

A check is a function over the resolved sections it names in check.py (`r.model`, `r.quant`, ...; one that it
can do without it asks for with hasattr) and yields Problems.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..values import number
from ..yaml import Problem

GroupSize = Literal[32, 64, 128, 256, -1]
Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Problems = Iterator[Problem]


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no infinities, numbers from text such as '1e-4',
    true/false not a number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: Any) -> Any:
        return number(cls.model_fields[info.field_name].annotation, value)
