"""The chat template that ships: the files that say it, where it is not the checkpoint's own.

As transformers saves it: one text is chat_template.jinja, and tokenizer_config.json says none, so that no
reader finds another there; texts by name are a list in tokenizer_config.json. gguf holds the same value in
its metadata.
"""

from pathlib import Path
from typing import Any

from ..files.jsonfile import read_json
from ..files.manifest import json_bytes
from ..model.chat_template import Template

CONFIG, TEXT, OLD = "tokenizer_config.json", "chat_template.jinja", "chat_template.json"


def chat_files(folder: Path, template: Template | None) -> dict[str, bytes | None]:
    """Name -> content of the files of `folder` that do not ship as they are (None: not at all) when chats are
    written with `template` (None: all ship as they are)."""
    if template is None:
        return {}
    config = read_json(folder / CONFIG, dict[str, Any]) if (folder / CONFIG).is_file() else {}
    config.pop("chat_template", None)
    if isinstance(template, dict):
        config["chat_template"] = listed_by_name(template)
        return {CONFIG: json_bytes(config), TEXT: None, OLD: None}
    return {CONFIG: json_bytes(config), TEXT: template.encode(), OLD: None}


def listed_by_name(template: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in template.items()]
