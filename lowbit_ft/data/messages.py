"""The chat of a row, as chat templates want it.

    messages | conversations, system, tools   ->   Conversation(messages, learn, tools, places)

What differs between the layouts ends here: ShareGPT's names, a system prompt in a column of its own, tools
and arguments that are JSON text (a template would quote them once more), calls that are turns of their own,
keys whose value is null, and what a turn says of its own loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .columns import ROLES, learn_flag
from .errors import BadRow, MissingKey, kind

_NOT_JSON = object()


@dataclass(frozen=True)
class Conversation:
    """messages: [{"role", "content", ...}], checked.  learn: for each, whether it says to be learned (None:
    it does not say).  tools: list of objects, or None.  places: for each message, where in the row it
    stands."""

    messages: list[dict[str, Any]]
    learn: list[bool | None]
    tools: list[dict[str, Any]] | None
    places: list[str]


def read_chat(row: Mapping[str, Any]) -> Conversation:
    """The chat of a row with `messages` or `conversations`. BadRow says what is wrong and where."""
    key = "messages" if "messages" in row else "conversations"
    if key not in row:
        raise MissingKey("'messages' (or 'conversations')", row)
    items = row[key]
    if not isinstance(items, list):
        raise BadRow(f"{key!r} must be a list of messages; got {kind(items)}")
    if not items:
        raise BadRow(f"{key!r} is empty")
    places = [f"{key}[{i}]" for i in range(len(items))]
    read = [_message(item, place) for item, place in zip(items, places, strict=True)]
    messages, learn = [message for message, _ in read], [flag for _, flag in read]
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRow(f"'system' must be a string; got {kind(system)}")
    if system and system.strip():
        if messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
            learn.insert(0, None)
            places.insert(0, "system")
        elif messages[0]["content"] != system:
            raise BadRow(f"'system' and {places[0]} are two system prompts; keep one of them")
    return Conversation(messages, learn, _tools(row.get("tools")), places)


def _message(item: object, place: str) -> tuple[dict[str, Any], bool | None]:
    if not isinstance(item, dict):
        raise BadRow(f"{place} must be an object; got {kind(item)}")
    # A null says that there is nothing. Of content it says so aloud: the turn is a call.
    message = {k: v for k, v in item.items() if v is not None or k in ("role", "content", "from", "value")}
    shared = "role" not in message and "from" in message
    if shared:
        role = _string_of(message.pop("from"), f"{place}.from")
        if role not in ROLES:
            raise BadRow(f"{place}.from is {role[:40]!r}; known: {', '.join(ROLES)}")
        message["role"], message["content"] = role, message.pop("value", None)
    if "role" not in message:
        raise BadRow(f"{place}: key 'role' is missing")
    role = _string_of(message["role"], f"{place}.role")
    flag = learn_flag(message, place)
    calls = _calls(message, role, place)
    if shared or role in ("function_call", "observation"):
        role = message["role"] = ROLES[role]
    if calls:
        message["tool_calls"] = calls
    content = message.get("content")
    if isinstance(content, list):  # the parts layout of vision models; text is all we train on
        texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        if not all(isinstance(t, str) for t in texts):
            raise BadRow(f"{place}.content has a part that is not text; only text can be trained on")
        content = message["content"] = "".join(str(t) for t in texts)
    if content is None and calls:
        return message | {"content": None}, flag
    if content is None:
        raise BadRow(f"{place}: {'content is null' if 'content' in message else 'content is missing'}")
    if not isinstance(content, str):
        raise BadRow(f"{place}.content must be a string; got {kind(content)}")
    if role == "assistant" and not content.strip() and not calls:
        raise BadRow(f"{place}: the assistant's content is empty")
    return message, flag


def _calls(message: dict[str, Any], role: str, place: str) -> list[dict[str, Any]]:
    """Takes the calls out of a message, wherever it has them: [{"name", "arguments"}], bare or in "function"
    as they came; from a turn that is a call, or from OpenAI's old key, in "function"."""
    calls, where, bare = message.pop("tool_calls", None), f"{place}.tool_calls", False
    if "function_call" in message:
        calls, where, bare = [message.pop("function_call")], f"{place}.function_call", True
    if role == "function_call":
        calls, where, bare = message.get("content"), f"{place}, a function_call,", True
        message["content"] = None
    if isinstance(calls, str):
        calls = _parsed(calls)
    if bare and isinstance(calls, dict):
        calls = [calls]
    if calls is None and not bare:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        got = "text that is no JSON" if calls is _NOT_JSON else kind(calls)
        raise BadRow(f"{where} must be a list of objects; got {got}")
    made = [_call(call, where) for call in calls]
    return [{"type": "function", "function": call} for call in made] if bare else made


def _call(call: dict[str, Any], place: str) -> dict[str, Any]:
    call = {k: v for k, v in call.items() if v is not None}
    inner = call.get("function")
    if isinstance(inner, dict):
        return call | {"function": _call(inner, place)}
    if not isinstance(call.get("name"), str):
        raise BadRow(f"{place}: a call has no name")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        call["arguments"] = _parsed(arguments) if arguments.strip() else {}
    if "arguments" in call and not isinstance(call["arguments"], dict):
        raise BadRow(f"{place}: arguments of {call['name'][:40]!r} must be an object, or JSON text of one")
    return call


def _tools(tools: object) -> list[dict[str, Any]] | None:
    """The tools as templates and servers have them: {"type": "function", "function": {...}}."""
    found = tools
    if isinstance(tools, str):
        found = _parsed(tools) if tools.strip() else None
    if found is _NOT_JSON:
        raise BadRow("'tools' must be a list of objects; got a string that is no JSON")
    if not found:
        return None
    if isinstance(found, list):
        found = [_parsed(tool) if isinstance(tool, str) else tool for tool in found]
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadRow(f"'tools' must be a list of objects; got {kind(found)}")
    # A server is always asked with wrapped functions, so one that is not wrapped is.
    return [
        {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        if {"name", "parameters"} <= tool.keys()
        else tool
        for tool in found
    ]


def _parsed(text: str) -> Any:
    """The value of JSON text, or _NOT_JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _string_of(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{place} must be a string; got {kind(value)}")
    return value
