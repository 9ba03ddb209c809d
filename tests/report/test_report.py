"""The report page: each section from its file, what it says without it, escaping, no need of a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit_ft.report.page import write_report
from tests.report.made_up_run import SECTIONS, Page, files, run


def test_a_complete_run_fills_every_section(tmp_path: Path):
    page = run(tmp_path)
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS
    assert not any("Not shown" in text for text in page.text.values())
    assert "made-up-run" in page.text["head"] and "lr_qat" in page.text["head"]
    expected = {
        "result": ["9.8765", "12.5000", "+38.89 %", "64 windows of 256 tokens"],
        "training": ["30", "2.0000", "2.2500", "1,234"],
        "layers": [
            "4 layers quantized (262,144 weights), 1 left alone",
            "excluded by name",
            "3.10 %",
            "65,536 0.02",
        ],
        "trainable": ["q_proj", "A 4,096, B 12", "9,000", "0.0123"],
        "stages": ["90.5", "91.5", "1.25"],
        "samples": ["def f():", "word word", "Return nothing."],
        "recipe": ["method: lr_qat"],
        "environment": ["3.11.7", "git commit", "0a1b2c"],
    }
    for section, words in expected.items():
        for word in words:
            assert word in page.text[section], (section, word)


def test_the_rows_of_the_result_are_in_the_order_of_the_stages(tmp_path: Path):
    text = run(tmp_path).text["result"]
    at = [
        text.index(word)
        for word in ("full precision ", "quantized, not", "trained ", "merged", "exported and")
    ]
    assert at == sorted(at)


def test_the_verdict_compares_the_printed_digits(tmp_path: Path):
    def verdict(trained: float, merged: float | None, exported: float) -> tuple[str, str]:
        rows = [
            {"stage": "trained", "perplexity": trained},
            {"stage": "merged", "perplexity": merged},
            {"stage": "exported", "perplexity": exported},
        ]
        page = run(tmp_path, evaluation__json={"rows": rows})
        return next(
            a["class"] for t, a in page.tags if t == "p" and "verdict" in (a.get("class") or "")
        ), page.text["head"]

    state, text = verdict(9.87654, 9.87654, 9.876541)
    assert state == "verdict good" and "trained = merged = exported perplexity = 9.8765" in text
    state, text = verdict(9.8765, 9.8765, 9.9)
    assert state == "verdict bad" and "exported 9.9000" in text and "is not what was trained" in text
    state, text = verdict(9.8765, None, 9.8765)
    assert state == "verdict open" and "no perplexity of the merged model" in text


def test_in_the_native_format_the_merged_model_is_what_ships(tmp_path: Path):
    rows = [{"stage": stage, "perplexity": 9.5} for stage in ("trained", "merged")]
    head = run(tmp_path, evaluation__json={"rows": rows}).text["head"]
    assert "no perplexity of the exported model" in head
    head = run(tmp_path, evaluation__json={"rows": rows}, recipe__yaml="export: {format: native}").text[
        "head"
    ]
    assert "what ships: trained = merged perplexity = 9.5000" in head


def test_long_runs_and_odd_values_stay_readable(tmp_path: Path):
    stages = [{"stage": "train", "seconds": 7384.0}, {"stage": "export"}]
    facts = {"flag": True, "nested": {"a": [1, 2]}, "list": ["x", "y"], "share": 0.125}
    page = run(tmp_path, stages__json=stages, environment__json=facts)
    assert "2 h 03 min" in page.text["head"]
    for words in ("true", '{"a": [1, 2]}', "x, y", "0.125"):
        assert words in page.text["environment"], words
    (tmp_path / "samples.json").write_bytes(b"\xff\xfe\x00")
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text["samples"]
    assert "samples.json is not valid JSON" in text


def test_tasks_have_a_column_per_stage(tmp_path: Path):
    text = " ".join(run(tmp_path).text["tasks"].split())
    assert "task metric better full precision trained exported and reloaded" in text
    assert "arc<b> acc higher 0.6250 ± 0.0125 0.5000 ± 0.0125 0.5000 ± 0.0125" in text
    assert (
        "arc<b> ppl lower 0.6250 0.5000 0.5000" in text and "lm-eval 0.4.13" in text and "differs" not in text
    )
    rows = files()["tasks.json"]["rows"]
    changed = [
        {**row, "value": 0.75} if (row["stage"], row["metric"]) == ("exported", "acc") else row
        for row in rows
    ]
    odd = [{"stage": 3, "task": None, "metric": ["x"], "value": 1.0, "stderr": "N/A"}, {"value": "none"}, 7]
    text = " ".join(run(tmp_path, tasks__json={"rows": [*changed, *odd]}).text["tasks"].split())
    assert "What ships differs from what was trained in arc<b> acc." in text and "None ['x']" in text


def test_tasks_over_other_rows_are_another_line(tmp_path: Path):
    rows = [{**row, "samples": 48} for row in files()["tasks.json"]["rows"]]
    limited = {**rows[-1], "samples": 2, "value": 0.015625}
    text = " ".join(run(tmp_path, tasks__json={"rows": [*rows, limited]}).text["tasks"].split())
    assert "(48 rows)" in text and "(2 rows)" in text and "differs from what was trained" not in text


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("recipe.yaml", "recipe"),
        ("environment.json", "environment"),
        ("metrics.jsonl", "training"),
        ("quant.json", "layers"),
        ("trainable.json", "trainable"),
        ("evaluation.json", "result"),
        ("tasks.json", "tasks"),
        ("stages.json", "stages"),
        ("samples.json", "samples"),
    ],
)
@pytest.mark.parametrize("content", [None, '{"cut', "3", "[]"], ids=["missing", "cut", "number", "no-rows"])
def test_a_file_that_is_missing_or_broken_costs_only_its_section(
    tmp_path: Path, name: str, section: str, content
):
    page = run(tmp_path, **{name.replace(".", "__"): content})
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == SECTIONS
    without = [key for key in SECTIONS if "Not shown" in page.text[key]]
    if name == "recipe.yaml" and content is not None:
        assert without == [] and (content.strip() in page.text["recipe"])  # any text is shown as it is
    else:
        assert without == [section], page.text[section]
        assert name in page.text[section]


def test_an_empty_run_directory_says_what_was_not_run(tmp_path: Path):
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert all("Not shown" in page.text[key] for key in SECTIONS)
    assert tmp_path.name in page.text["head"] and "evaluation did not run" in page.text["head"]


NOTHING = "eval: {perplexity: false, tasks: [], generate: []}"


def test_what_the_recipe_did_not_ask_for_is_not_missed(tmp_path: Path):
    gone = dict.fromkeys(("evaluation__json", "tasks__json", "samples__json"))
    page = run(tmp_path, **gone, recipe__yaml=NOTHING)
    left = [key for key in SECTIONS if key not in ("result", "tasks", "samples")]
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == left
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [f"#{key}" for key in left]
    assert not any("Not shown" in text for text in page.text.values())


def test_what_the_recipe_asked_for_and_is_missing_is_said(tmp_path: Path):
    gone = dict.fromkeys(("evaluation__json", "tasks__json", "samples__json"))
    asked = "eval: {perplexity: true, tasks: [arc_easy], generate: [hello]}"
    page = run(tmp_path, **gone, recipe__yaml=asked)
    assert [key for key in SECTIONS if "Not shown" in page.text[key]] == ["result", "tasks", "samples"]
    assert "evaluation did not run" in page.text["head"]


def test_what_was_measured_later_is_shown_whatever_the_recipe_asked_for(tmp_path: Path):
    page = run(tmp_path, recipe__yaml=NOTHING)  # lowbit-ft eval --task
    assert "lm-eval 0.4.13" in page.text["tasks"] and "word word" in page.text["samples"]


def test_a_run_directory_must_exist(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere: not a run directory"):
        write_report(tmp_path / "nowhere")


def test_codes_not_moved_is_said_for_a_method_that_trains_scales(tmp_path: Path):
    page = run(tmp_path, moved__json={"model.layers.0.mlp.down_proj": 0.0, "scale_change": 0.5})
    assert "Training changed no code" in page.text["layers"] and "50.00 %" in page.text["layers"]
    page = run(tmp_path, moved__json="broken")
    assert "Codes moved: not shown" in page.text["layers"]


def test_texts_of_a_run_cannot_become_markup(tmp_path: Path):
    evil = '<script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)> & "quoted"'
    page = run(
        tmp_path,
        samples__json=[{"prompt": evil, "before": evil, "after": evil}],
        recipe__yaml=f"name: '{evil}'\n",
        environment__json={evil: evil},
        quant__json=[{"layer": evil, "action": "skipped", "reason": evil, "error": 0.1}],
        stages__json=[{"stage": evil, "seconds": 1}],
        trainable__json={"rows": [{evil: evil}], evil: evil},
        evaluation__json={"rows": [{"stage": evil, "perplexity": evil}]},
    )
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert all("onerror" not in attrs for _, attrs in page.tags)
    for section in ("samples", "environment", "recipe", "layers", "stages", "trainable", "result"):
        assert evil.split("<img")[0] in page.text[section], section


def test_the_page_needs_no_network(tmp_path: Path):
    page = run(tmp_path)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    links = [
        attrs[key] or ""
        for _, attrs in page.tags
        for key in ("src", "href", "srcset", "action")
        if key in attrs
    ]
    assert links and all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in links)
    assert "@import" not in raw and "url(" not in raw
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in page.tags)
    pictures = page.images()
    assert len(pictures) == 3
    for picture in pictures:
        for element in picture.iter():
            for key, value in element.attrib.items():
                if key.rpartition("}")[2] in ("href", "src"):
                    assert value.startswith(("#", "data:")), value


def test_numbers_are_right_aligned_and_words_left(tmp_path: Path):
    page = run(tmp_path)
    result = [attrs for tag, attrs in page.tags if tag == "th"][:5]
    assert [attrs.get("class") for attrs in result] == [None, "n", "n", "n", "n"]
    assert "th.n, td.n { text-align: right" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_same_run_gives_the_same_bytes_and_leaves_nothing_beside_it(tmp_path: Path):
    run(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    before = sorted(path.name for path in tmp_path.iterdir())
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_metrics_of_a_killed_and_resumed_run(tmp_path: Path):
    """A half line is left out, a repeated step counts once (the later line), NaN is no number."""
    lines = [
        '{"step": 1, "loss": 4.0}',
        '{"step": 2, "loss": 9.0}',
        '{"step": 3, "lo',
        '{"step": 2, "loss": 3.5}',
        '{"step": 3, "loss": NaN}',
        '{"loss": 1.0}',
        "[1]",
    ]
    page = run(tmp_path, metrics__jsonl="\n".join(lines))
    assert "3.5000" in page.text["training"] and "9.0000" not in page.text["training"]


def test_how_near_the_teacher_was(tmp_path: Path):
    facts = {"kl": 0.001, "student_kl": 0.03}
    page = run(tmp_path, teacher__json=facts, recipe__yaml="train: {teacher: residual}")
    said = "Teacher residual: KL to full precision 0.001000; the model as it started 0.030000."
    assert said in page.text["training"]


def test_a_run_that_trains_no_step_says_so(tmp_path: Path):
    page = run(tmp_path, metrics__jsonl=None, recipe__yaml="train: {max_steps: 0}")
    assert "No step was asked for (train.max_steps: 0)." in page.text["training"]


def test_rotations_have_a_section_where_there_are_some(tmp_path: Path):
    assert "rotation" not in run(tmp_path).text
    errors = [
        {"layer": n, "site": site, "weight_off": 0.01, "weight_on": 0.01, "on": site == "r4"}
        | {"activation_off": 0.2, "activation_on": 0.05 if site == "r4" else 0.3}
        for n in range(2)
        for site in ("r2", "r4")
    ]
    facts = {"seed": 7, "r1": True, "r2": [False, False], "r3": [], "r4": [True, True], "errors": errors}
    facts |= {"criterion": "both", "alphas": {"model.layers.0.input_layernorm": 0.5}, "smooth": {}}
    folder = tmp_path
    (folder / "base").mkdir()
    (folder / "base" / "rotation.json").write_text(json.dumps(facts))
    page = run(folder)
    text = page.text["rotation"]
    for words in (
        "Turned: r1 (residual stream), r4 in 2 of 2 layers; signs from seed 7",
        "criterion: both",
        "1 r4 turned 0.01000 0.01000 0.20000 0.05000",
        "0 r2 as it is",
        "model.layers.0.input_layernorm 0.50",
    ):
        assert words in text, (words, text)
    assert any(tag == "img" and "error of each site" in (a.get("alt") or "") for tag, a in page.tags)
    (folder / "base" / "rotation.json").write_text("{}")
    assert "Not shown: Nothing was rotated" in run(folder).text["rotation"]


def test_what_inputs_are_on_has_a_table_where_some_are_quantized(tmp_path: Path):
    assert "activations" not in run(tmp_path).text
    tried = {"A8 token": 0.0012, "A8 dual": 0.0004}
    rows = [
        {"layers": ["m.0.q_proj", "m.0.k_proj"], "scheme": {"kind": "token", "bits": 8}, "error": 0.001}
        | {"why": "as the recipe says", "tried": {}},
        {"layers": ["m.1.q_proj"], "scheme": {"kind": "token", "bits": 8}, "error": 0.003}
        | {"why": "as the recipe says", "tried": {}},
        {"layers": ["m.0.<down>"], "scheme": {"kind": "dual", "bits": 4, "dynamic": False, "learn": "m"}}
        | {"why": "the least output error of 2", "tried": tried, "error": 0.0004},
        {"layers": ["m.0.o_proj"], "scheme": {"kind": "group", "bits": 4, "group_size": 64}, "error": None},
        "odd",
    ]
    page = run(tmp_path, activations__json={"rows": rows})
    text = page.text["activations"]
    for words in (
        "3: q_proj, k_proj token 8 as the recipe says 0.002000",
        "1: <down> dual, static, learned 4 the least output error of 2 0.000400",
        "m.0.q_proj, m.0.k_proj token 8",
        "m.0.o_proj group of 64 4",
        "m.0.<down> A8 token 0.001200",
    ):
        assert words in text, (words, text)
    for odd in ([], {}, {"rows": 3}, {"rows": [{"scheme": 4, "layers": 5}]}):
        assert "activations" in run(tmp_path, activations__json=odd).text
    assert "Not shown: No input is on a grid" in run(tmp_path, activations__json={}).text["activations"]


def test_what_a_run_of_pairs_prefers(tmp_path: Path):
    said = {"rewards/accuracies": 0.75, "rewards/margins": 0.125}
    valid = {f"valid_{key}": value / 2 for key, value in said.items()}
    rows = [{"step": 1, "loss": 0.7, **said}, {"step": 1, "valid_loss": 0.6, **valid}]
    page = run(tmp_path, metrics__jsonl="\n".join(map(json.dumps, rows)))
    text = page.text["training"]
    for words in ("chosen answers preferred", "75 %", "preferred, validation", "38 %", "0.125"):
        assert words in text


def test_speech_has_its_spectrograms(tmp_path: Path):
    assert "speech" not in run(tmp_path).text
    rows: list[Any] = [
        {"stage": s, "mel": [[0.5, -1.0], [2.0, 1.0]]} for s in ("spoken", "trained", "merged")
    ]
    facts = {"text": "a <b> c", "seconds_per_frame": 0.02, "rows": rows}
    text = run(tmp_path, speech__json=facts).text["speech"]
    assert "a <b> c: as it was spoken" in text
    odd: list[Any] = [
        7,
        {"stage": "trained", "mel": [[1.0], []]},
        {"stage": "base", "mel": [["x"]]},
        {"mel": []},
    ]
    for wrong in ({**facts, "rows": odd}, {**facts, "seconds_per_frame": 0}, {"rows": "x"}):
        text = run(tmp_path, speech__json=wrong).text["speech"]
        assert "speech.json has no spectrogram" in text
