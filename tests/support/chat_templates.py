"""Chat templates built as released models build theirs, in our own words.

The markers of what is learnt are in them; ``unmarked`` takes them out, as most releases have none.
"""

from __future__ import annotations

import re

_PARTS = (
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ IMAGE }}"
    "{%- elif part['type'] == 'video' -%}{{ VIDEO }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}"
)
_TEXT = "{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}"
_TRIMMED = "{%- for part in message['content'] -%}{{ part['text'] | trim }}{%- endfor -%}"


def _parts(image: str, video: str = "<video>") -> str:
    return _PARTS.replace("IMAGE", repr(image)).replace("VIDEO", repr(video))


def _learnt(text: str, end: str) -> str:
    return "{% generation %}" + text + "{{ " + repr(end) + " }}{% endgeneration %}"


def _turns(head: str, user: str, answer: str, ask: str) -> str:
    """Return a template of turns that each begin with ``head``, an expression of ``message``."""
    return (
        "{%- for message in messages -%}{{ " + head + " }}"
        "{%- if message['role'] == 'assistant' -%}"
        + answer
        + "{%- else -%}"
        + user
        + "{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ " + repr(ask) + " }}{%- endif -%}"
    )


_IM_HEAD = "'<|im_start|>' + message['role'] + '\\n'"
_IM_END = "{{ '<|im_end|>\\n' }}"
_IM_ASK = "<|im_start|>assistant\n"


def _chatml(image: str, video: str) -> str:
    answer = _learnt(_TEXT, "<|im_end|>") + "{{ '\\n' }}"
    return _turns(_IM_HEAD, _parts(image, video) + _IM_END, answer, _IM_ASK)


_VISION = tuple(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
_QWEN_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}"
)

# Pictures come first, then videos, whatever their place in the question.
_ONEVISION = _turns(
    "'<|im_start|>' + message['role'] + ' '",
    "{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}"
    "{{ '<image>' }}{%- endfor -%}"
    "{%- for part in message['content'] | selectattr('type', 'equalto', 'video') -%}"
    "{{ '<video>' }}{%- endfor -%}"
    "{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}"
    "{{ '\\n' + part['text'] }}{%- endfor -%}{{ '<|im_end|>' }}",
    "{{ '\\n' }}" + _learnt(_TEXT, "<|im_end|>"),
    "<|im_start|>assistant\n",
)

_LLAMA = "{{ bos_token }}" + _turns(
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'",
    _parts("<image>\n") + "{{ '<|eot_id|>' }}",
    _learnt(_TRIMMED, "<|eot_id|>"),
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)


def _mistral(image: str, system: tuple[str, str]) -> str:
    head, tail = system
    return (
        "{{ bos_token }}{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{{ '[INST]' }}" + _parts(image) + "{{ '[/INST]' }}"
        "{%- elif message['role'] == 'system' -%}{{ " + repr(head) + " }}" + _TEXT + "{{ "
        "" + repr(tail) + " }}{%- else -%}" + _learnt(_TEXT, "</s>") + "{%- endif -%}{%- endfor -%}"
    )


_GEMMA_MODEL = "('model' if message['role'] == 'assistant' else message['role'])"
# The system text stands before the first question; all texts are stripped.
_GEMMA = (
    "{{ bos_token }}{%- set first = '' -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'][0]['text'] + '\\n\\n' -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<start_of_turn>' + " + _GEMMA_MODEL + " + '\\n' + (first if loop.first else '') }}"
    "{%- if message['role'] == 'assistant' -%}" + _learnt(_TRIMMED, "<end_of_turn>") + "{{ '\\n' }}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- else -%}{{ part['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{{ '<end_of_turn>\\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)

_IDEFICS = "{{ '<|im_start|>' }}" + _turns(
    "message['role'] | capitalize + ': '",
    _parts("<image>") + "{{ '<end_of_utterance>\\n' }}",
    _learnt(_TEXT, "<end_of_utterance>") + "{{ '\\n' }}",
    "Assistant:",
)

_COHERE = "{{ bos_token }}" + _turns(
    "'<|START_OF_TURN_TOKEN|>' + ('<|CHATBOT_TOKEN|>' if message['role'] == 'assistant' else "
    "'<|USER_TOKEN|>' if message['role'] == 'user' else '<|SYSTEM_TOKEN|>')",
    _parts("<image>") + "{{ '<|END_OF_TURN_TOKEN|>' }}",
    _learnt(_TEXT, "<|END_OF_TURN_TOKEN|>"),
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
)

MARKED: dict[str, str] = {
    "qwen": _QWEN_SYSTEM + _chatml(*_VISION),
    "qwen3": _chatml(*_VISION),
    "internvl": _chatml("<IMG_CONTEXT>\n", "<video>\n"),
    "onevision": _ONEVISION,
    "llama": _LLAMA,
    "llava_next": _mistral("<image>\n", ("<<SYS>>\n", "\n<</SYS>>\n\n")),
    "pixtral": _mistral("[IMG]", ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    "gemma": _GEMMA,
    "idefics": _IDEFICS,
    "cohere": _COHERE,
}


def unmarked(template: str) -> str:
    return re.sub(r"{%-? (end)?generation -?%}", "", template)
