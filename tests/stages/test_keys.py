"""What is made once and reused is made again when what it depends on has changed."""

from types import SimpleNamespace
from typing import Any

import pytest

from lowbit_ft.data.examples import StreamedExamples
from lowbit_ft.data.synthesis import SYNTHESIS
from lowbit_ft.recipe.recipe import load_recipe
from lowbit_ft.stages.quantize import base_key
from lowbit_ft.stages.synthesis import synthesis_key


def key(*overrides: str) -> str:
    recipe = load_recipe("recipes/quickstart.yaml", overrides)
    session: Any = SimpleNamespace(recipe=recipe, checkpoint=SimpleNamespace(revision="a", purpose=None))
    return base_key(session)


@pytest.mark.parametrize(
    "change",
    ["data.packing=false", "data.on_bad_row=skip", "train.seed=1", "data.train.limit=7"],
)
def test_a_base_knows_the_text_that_its_calibrator_looked_at(change: str, in_the_repository: None):
    assert key("quant.calibrate=gptq") != key("quant.calibrate=gptq", change)
    assert key("quant.calibrate=mse") == key("quant.calibrate=mse", change), "it looks at none"


def test_text_of_its_own_leaves_the_rows_out(in_the_repository: None):
    own = ["quant.calibrate=gptq", "quant.calibration.path=recipes/assets/text/train.jsonl"]
    assert key(*own) == key(*own, "data.train.limit=7") != key("quant.calibrate=gptq")


def test_a_choice_of_inputs_knows_what_the_adapter_ships_beside_it(in_the_repository: None):
    auto = ["quant.calibrate=mse", "quant.activations={kind: auto}", "export.format=native"]
    l4q, moved = "adapter={method: l4q}", "adapter={method: l4q, offset: integer}"
    assert key(*auto, l4q) != key(*auto, moved), "trained zero points: what a format carries is another thing"
    assert key(*auto, l4q) == key(*auto, "adapter={method: dl_qat}"), "the same grid ships"
    assert key(*auto) != key(*auto, "adapter.targets=['*.q_proj']")
    told = ["quant.calibrate=mse", "quant.activations={kind: token}", "export.format=native"]
    assert key(*told, l4q) == key(*told, moved), "nothing is chosen"


def test_a_base_knows_how_it_is_turned_and_smoothed(in_the_repository: None):
    turned = ["quant.rotation.kind=hadamard", "quant.calibrate=mse"]
    keys = [
        key("quant.calibrate=mse"),
        key(*turned),
        key(*turned, "quant.rotation.seed=1"),
        key(*turned, "quant.rotation.sites.r2=false"),
        key("quant.calibrate=mse", "quant.smooth=0.5"),
        key("quant.calibrate=mse", "quant.smooth=auto"),
    ]
    assert len(set(keys)) == len(keys), "another rotation would reuse an old base"
    assert key(*turned) == key(*turned, "train.seed=1"), "hadamard looks at no text"
    adaptive = ["quant.rotation.kind=adaptive", "quant.calibrate=mse"]
    assert key(*adaptive) != key(*adaptive, "train.seed=1"), "adaptive does"


def test_what_is_made_of_rows_knows_how_chats_are_written(in_the_repository: None):
    text = "data.chat_template='{{ messages }}{{ x }}'"
    changes = [(), ("data.chat_template=chatml",), (text,), (text, "data.chat_template_kwargs={x: 1}")]
    keys = [key("quant.calibrate=gptq", *change) for change in changes]
    assert len(set(keys)) == len(keys)


def test_rows_of_chats_and_streams_know_how_chats_are_written(in_the_repository: None):
    def written(*overrides: str) -> list[str]:
        recipe = load_recipe("recipes/quickstart.yaml", ["data.streaming=true", *overrides])
        checkpoint = SimpleNamespace(revision="a", purpose=None)
        session: Any = SimpleNamespace(recipe=recipe, checkpoint=checkpoint)
        found = [
            synthesis_key(session, SYNTHESIS[kind].model_validate({}))
            for kind in ("self_chat", "self_generated")
        ]
        return [*found, StreamedExamples(recipe.data.train, recipe.data, None).digest]

    own, other = written(), written("data.chat_template=chatml")
    assert own[0] != other[0] and own[1] == other[1] and own[2] != other[2]
