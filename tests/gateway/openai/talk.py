"""A conversation with two tool calls, known by heart."""

from __future__ import annotations

import json

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
]


def _call(a: int, b: int) -> str:
    # Spaces that no template would write: what is sampled is not what would be rendered.
    call = json.dumps({"name": "add", "arguments": {"a": a, "b": b}}, indent=1)
    return f"<tool_call>{call}</tool_call>"


ANSWERS = ["I add." + _call(1, 2), _call(3, 4), "7, not 8"]
MESSAGES = [
    {"role": "user", "content": "1 + 2 + 4?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": ANSWERS[1]},
    {"role": "tool", "content": "7"},
]
