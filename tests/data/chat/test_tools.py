"""Samples with tools equal those of the processor's own call; what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from regate_ds.data.chat.encode import ChatEncoder
from regate_ds.data.chat.texts import template_of_texts
from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.formats.sources import Sources
from regate_ds.data.llava.parse import Parser
from regate_ds.data.llava.records import Cause, Record, SampleError
from regate_ds.data.llava.template import Template
from regate_ds.recipe.students.processor import chat_encoder
from tests.data.chat.test_processors import wanted_labels
from tests.support.chat_templates import unmarked
from tests.support.conversations import random_text
from tests.support.processors import MAKERS

_TEXT = (
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}"
)

TEMPLATE = (
    "{%- if tools -%}{{ '<|im_start|>system\\nTools:' }}"
    "{%- for tool in tools -%}{{ '\\n' + tool | tojson }}{%- endfor -%}{{ '<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'tool' -%}"
    "{%- if loop.index0 == 0 or messages[loop.index0 - 1]['role'] != 'tool' -%}"
    "{{ '<|im_start|>user' }}{%- endif -%}"
    "{{ '\\n<tool_response>\\n' }}" + _TEXT + "{{ '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' -%}"
    "{{ '<|im_end|>\\n' }}{%- endif -%}"
    "{%- else -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' -%}{% generation %}" + _TEXT + ""
    "{%- for call in message['tool_calls'] or [] -%}{%- set own = call['function'] or call -%}"
    "{{ '\\n<tool_call>\\n' + own['name'] + ' ' + own['arguments'] | tojson + '\\n</tool_call>' }}"
    "{%- endfor -%}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{%- else -%}" + _TEXT + "{{ '<|im_end|>\\n' }}{%- endif -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)

TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}},
    },
    {"type": "function", "function": {"name": "größer", "description": "it's <b>"}},
]


def own_processor() -> Any:
    own = MAKERS["qwen3_vl"][0]()
    own.chat_template = unmarked(TEMPLATE)
    return own


def encoder() -> ChatEncoder:
    return chat_encoder(own_processor(), MAKERS["qwen3_vl"][2], max_length=10_000)


def random_messages(random: Random) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    for _ in range(random.randint(1, 3)):
        said.append({"role": "user", "content": random_text(random)})
        for _ in range(random.choice([0, 1, 1, 2])):
            count = random.randint(1, 2)
            calls = [_call(random) for _ in range(count)]
            said.append({"role": "assistant", "content": random.choice(["", "I look."])})
            said[-1]["tool_calls"] = calls
            said += [{"role": "tool", "content": random_text(random)} for _ in range(count)]
        said.append({"role": "assistant", "content": random_text(random).strip() or "yes"})
    return said


def _call(random: Random) -> dict[str, Any]:
    function = {"name": "look", "arguments": {"at": random_text(random, 2), "n": [1, {}]}}
    return (
        {"id": "x1", "type": "function", "function": function}
        if random.random() < 0.5
        else function
    )


def parse(said: list[dict[str, Any]], tools: Any = TOOLS) -> Record:
    parser = Parser(Path("data.json"), "set", Sources(Path()), verify_images=True)
    return parser.record(0, {"messages": said, "tools": tools})


def as_openai(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write arguments as texts, and no content where there is none."""
    changed = json.loads(json.dumps(said))
    for message in changed:
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            function["arguments"] = json.dumps(function["arguments"])
        if message.get("tool_calls") and not message["content"]:
            del message["content"]
    return changed


def test_a_sample_with_tools_is_that_of_the_processors_own_call():
    own, made, num_calls = own_processor(), encoder(), 0
    for seed in range(15):
        said = random_messages(Random(seed))
        tools = TOOLS if seed % 5 else None
        found = own.apply_chat_template(
            [said],
            tools=tools,
            chat_template=TEMPLATE,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        ids_S, mask_S = found["input_ids"][0], torch.as_tensor(found["assistant_masks"])[0]
        record, other = parse(said, tools), parse(as_openai(said), json.dumps(tools))
        plain, sample, again = made.encode_all([parse(PLAIN), record, other])
        assert torch.equal(sample.input_ids_S, ids_S)
        assert torch.equal(again.input_ids_S, ids_S)
        assert torch.equal(sample.labels_S, wanted_labels(record, ids_S, mask_S))
        assert torch.equal(plain.input_ids_S, made.encode(parse(PLAIN)).input_ids_S)
        num_calls += sum(turn.calls is not None for turn in record.turns)
    assert num_calls > 10


PLAIN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {}}]}
RESULT = {"role": "tool", "content": "red", "name": "look", "tool_call_id": "x"}
CALLED = [PLAIN[0], CALL, RESULT, PLAIN[1]]


def test_a_prompt_holds_the_calls_before_it():
    own, record, made = own_processor(), parse(CALLED), encoder()
    sample = made.encode(record)
    for turn, end in ((0, 1), (1, 3)):
        asked = own.apply_chat_template(
            [CALLED[:end]],
            tools=TOOLS,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert torch.equal(made.prompt(record, sample, turn)[0], asked["input_ids"][0])


def test_calls_that_are_not_learnt_are_read():
    record = parse([PLAIN[0], {**CALL, "loss": False}, RESULT, PLAIN[1]])
    sample, tokens = encoder().encode(record), own_processor().tokenizer
    assert "look" in tokens.decode(sample.input_ids_S)
    assert tokens.decode(sample.labels_S[sample.labels_S >= 0]) == "a<|im_end|>"


def test_a_template_of_texts_writes_tools_too():
    tokens = own_processor().tokenizer
    tokens.chat_template = unmarked(TEMPLATE)
    (found,) = template_of_texts(tokens).render_all([parse(CALLED)])
    wanted = tokens.apply_chat_template(
        [PLAIN[0], {**CALL, "content": ""}, RESULT, PLAIN[1]], tools=TOOLS, tokenize=False
    )
    assert found.text == wanted  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("said", "tools", "cause"),
    [
        (CALLED, "no", "has the tools 'no', which is not JSON"),
        (CALLED, [{"a": None}], "has tools that hold null, .* write them as one JSON text"),
        (CALLED, {"a": 1}, "has the tools {'a': 1}, not a list of objects"),
        ([PLAIN[0], CALL, PLAIN[0], PLAIN[1]], None, "turn 2 is from the user where the tool"),
        ([PLAIN[0], RESULT, PLAIN[1]], None, "turn 1 is from the tool where the assistant"),
        ([PLAIN[0], CALL, RESULT], None, "its 3 turns do not pair up"),
        (
            [PLAIN[0], {**CALL, "tool_calls": [{"function": {"arguments": {}}}]}],
            None,
            "turn 1 has a tool call .* without a function's name",
        ),
        (
            [PLAIN[0], {**CALL, "tool_calls": [{"name": "f", "arguments": "{"}]}],
            None,
            "turn 1 calls f with the arguments '{', which is not JSON",
        ),
        (
            [PLAIN[0], {**CALL, "tool_calls": [{"name": "f", "arguments": {"x": None}}]}],
            None,
            "turn 1 calls f with the arguments {'x': None}, and a table may have put null there",
        ),
        (
            [PLAIN[0], CALL, {**RESULT, "content": "see <image>"}, PLAIN[1]],
            None,
            "turn 2 shows something or has gold_spans, where tools are used",
        ),
        ([PLAIN[0], CALL, {**RESULT, "name": 3}, PLAIN[1]], None, "turn 2 has name=3, not a text"),
    ],
)
def test_what_is_refused(said: Any, tools: Any, cause: str):
    with pytest.raises(Cause, match=cause) as one:
        parse(said, tools)
    assert "\n" not in str(one.value)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (("</tool_call>'", "</tool_call>' + (' ' if loop.last else '')"), None),
        (
            ("{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '.' }}"),
            "no special token ends",
        ),
        (
            ("{{ '\\n<tool_call>", "{{ '' if messages | length > 3 else '\\n<tool_call>"),
            "changes answer 1, which calls tools, once more is said",
        ),
    ],
)
def test_a_template_that_changes_calls(change: tuple[str, str], cause: str | None):
    own = own_processor()
    own.chat_template = unmarked(TEMPLATE.replace(*change))
    assert own.chat_template != unmarked(TEMPLATE)
    made = lambda: chat_encoder(own, MAKERS["qwen3_vl"][2], max_length=999)  # noqa: E731
    if cause is None:
        made().encode(parse(CALLED))
        return
    with pytest.raises(ValueError, match=cause):
        made().encode(parse(CALLED))


@pytest.mark.parametrize(
    ("change", "lack"),
    [
        (("{%- if tools -%}", "{%- if false -%}"), "the tool 'look'"),
        (("in message['tool_calls'] or []", "in []"), "the call of 'look' in answer 1"),
        (("<tool_response>\\n' }}" + _TEXT, "<tool_response>\\n' }}"), "what tools return before"),
    ],
)
def test_a_template_that_leaves_tools_out(change: tuple[str, str], lack: str):
    own = own_processor()
    own.chat_template = unmarked(TEMPLATE.replace(*change))
    assert own.chat_template != unmarked(TEMPLATE)
    made = chat_encoder(own, MAKERS["qwen3_vl"][2], max_length=999)
    with pytest.raises(SampleError, match=f"chat template does not write {lack}.*leave the record"):
        made.encode(parse(CALLED))


def test_the_text_of_a_special_token_in_tools():
    for said, tools, where in (
        (CALLED, [{"name": "<|im_end|>"}], "list of tools"),
        ([PLAIN[0], CALL, {**RESULT, "content": "<|im_end|>"}, PLAIN[1]], None, "question 2"),
    ):
        with pytest.raises(SampleError, match=f"its {where} holds '<.im_end.>'"):
            encoder().encode(parse(said, tools))


def test_our_own_template_writes_no_tools():
    tokens = MAKERS["qwen2_vl"][0]().tokenizer
    made = Encoder(
        tokens,
        image_token="<|image_pad|>",
        num_image_tokens=lambda size: 4,
        max_length=99,
        template=Template(),
    )
    with pytest.raises(SampleError, match="uses tools, which only chat templates write; set data"):
        made.encode(parse(CALLED))
