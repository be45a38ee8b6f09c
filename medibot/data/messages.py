"""Read conversations in the spellings that files have, and tell which of them are regular."""

import json
from collections import Counter
from typing import Any

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}
TOOL_ROLES = {"tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython"}
TOOL_KEYS = {"tool_calls", "function_call"}
# Where files write what an assistant thinks before it answers
THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")
READ_KEYS = {"role", "content", "from", "value", "weight", *TOOL_KEYS, *THINKING_KEYS}


class Malformed(Exception):
    """A conversation whose turns are not regular; its text says how."""


def is_chat(value: Any) -> bool:
    """Tell whether a value is a list of messages, in OpenAI's spelling (role, content) or ShareGPT's (from, value)."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, dict) and ("role" in x or "from" in x) for x in value)
    )


def as_messages(value: Any, role: str) -> list[Message]:
    """Return a cell as messages: a list of them, JSON of one (a CSV file has nothing else), or text of `role`."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Malformed(f"its text is not JSON: {error}") from error
    if is_chat(value):
        return value
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    raise Malformed("it is no list of messages with role and content")


def read_message(message: Message, unread: Counter[str]) -> Message:
    """Return a message's role, content, thinking, and whether it is learned from; count the keys that are not read."""
    written = str(message.get("role", message.get("from")))
    role, content = ROLES.get(written.lower()), message.get("content", message.get("value"))
    if written.lower() in TOOL_ROLES or any(message.get(key) for key in TOOL_KEYS):
        raise Malformed("it calls tools, which are not trained")
    if role is None:
        raise Malformed(f"unknown role {written!r}")
    unread.update(key for key, value in message.items() if key not in READ_KEYS and value is not None)
    if isinstance(content, list) and all(isinstance(x, dict) and x.get("type") == "text" for x in content):
        content = "".join(str(x.get("text") or "") for x in content)
    if not isinstance(content, str | None):
        raise Malformed(f"a {role} turn holds {type(content).__name__}, not text")
    thinking = next((message[key] for key in THINKING_KEYS if message.get(key)), None)
    # OpenAI's files mark the answers that are not learned from by weight 0
    return {"role": role, "content": content or "", "thinking": thinking, "learned": message.get("weight") != 0}


def join_turns(messages: list[Message], merge: bool) -> tuple[list[Message], str | None]:
    """Return a system's message, if any, then user and assistant in turns, and how that was reached where it took a merge.

    With `merge` two turns of one role become one, empty turns and a greeting before the first user turn go. Raises
    Malformed for what is left irregular, or without it for anything irregular.
    """
    joined: list[Message] = []
    how = None
    for message in messages:
        role, last = message["role"], joined[-1]["role"] if joined else None
        if not message["content"].strip() and not message["thinking"]:
            fault = f"an empty {role} turn"
        elif role == "system" and joined:
            raise Malformed("a system turn after the first turn")
        elif role == "assistant" and last in (None, "system"):
            fault = "it begins with an assistant turn"
        elif role == last:
            fault = f"two {role} turns in a row"
            # What is learned from one of two is not told apart any more
            both = {"content": f"{joined[-1]['content']}\n\n{message['content']}"}
            both |= {"learned": joined[-1]["learned"] and message["learned"]}
            joined[-1] = joined[-1] | both if merge else joined[-1]
        else:
            joined.append(message)
            continue
        how = how or fault
        if not merge:
            raise Malformed(fault)
    return joined, how
