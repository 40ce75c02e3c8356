"""Chat templates: found like transformers finds them, rendered like transformers renders them."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from moesys.data import ChatTemplate, ChatTemplates, Conversation, Tokenizer
from moesys.errors import DataError, ModelFormatError

TEMPLATES = sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds <things> & 'more' é",
            "parameters": {
                "type": "object",
                "properties": {"what": {"type": "string", "enum": ["a", "b"]}, "n": {"type": "array"}},
                "required": ["what"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "<a> é", "n": [1, 2]}}}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [{"role": "user", "content": " Was ist <b> & 'c'?\n"}]},
    "two turns": {
        "messages": [
            {"role": "system", "content": "Kurz.\n"},
            {"role": "user", "content": "hi 🙂"},
            {"role": "assistant", "content": "\nho </think>\n\nha "},
            {"role": "user", "content": "again"},
        ]
    },
    "an answer that thinks": {
        "messages": [
            {"role": "user", "content": "2+2"},
            {"role": "assistant", "content": "4", "reasoning_content": "two and two\n", "tool_calls": None},
        ]
    },
    "a tool": {
        "messages": [
            {"role": "user", "content": "find it"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "found\n{}"},
        ],
        "tools": TOOLS,
    },
    "documents": {
        "messages": [{"role": "user", "content": "read"}],
        "documents": [{"title": "t", "text": "first"}, {"title": "u", "text": "second"}],
    },
}


def make_conversation(parts: dict[str, Any]) -> Conversation:
    return Conversation("here", **{key: tuple(value) for key, value in parts.items()})


def render(template: str, parts: dict[str, Any] | None = None, **options: Any) -> str:
    conversation = make_conversation(parts or CONVERSATIONS["two turns"])
    return (
        ChatTemplate(template, "here", SPECIAL)
        .render(conversation, **({"add_generation_prompt": True} | options))
        .text
    )


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose template the tests write."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(folder)
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_every_family_renders_as_in_transformers(file: Path, folder: Path, oracle: Any) -> None:
    (folder / "chat_template.jinja").write_text(file.read_text())
    template = ChatTemplates.load(folder).choose()
    assert template is not None
    for parts in CONVERSATIONS.values():
        conversation = make_conversation(parts)
        for options in (
            {},
            {"enable_thinking": False, "reasoning_effort": "high", "date_string": "1 May 2025"},
        ):
            for prompt in (False, True):
                given: dict[str, Any] = {"tools": None, "documents": None} | parts
                try:
                    expected = oracle.apply_chat_template(
                        given["messages"],
                        chat_template=file.read_text(),
                        tools=given["tools"],
                        documents=given["documents"],
                        add_generation_prompt=prompt,
                        tokenize=False,
                        **options,
                    )
                except Exception as error:  # noqa: BLE001  jinja2 and Python raise many kinds
                    with pytest.raises(ModelFormatError, match=re.escape(str(error))):
                        template.render(conversation, add_generation_prompt=prompt, variables=options)
                    continue
                found = template.render(conversation, add_generation_prompt=prompt, variables=options)
                assert found.text == expected


def test_generation_blocks_are_where_transformers_finds_them(folder: Path, oracle: Any) -> None:
    text = (Path(__file__).parent / "chat_templates" / "generation.jinja").read_text()
    messages = [*CONVERSATIONS["two turns"]["messages"], {"role": "assistant", "content": "end"}]
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    _, expected = utils.render_jinja_template(
        [messages], chat_template=text, return_assistant_tokens_mask=True
    )
    found = ChatTemplate(text, "here").render(
        make_conversation({"messages": messages}), add_generation_prompt=False
    )
    assert [list(span) for span in found.spans] == [list(span) for span in expected[0]]
    assert [found.text[start:end] for start, end in found.spans] == [
        "\nho </think>\n\nha <|im_end|>",
        "end<|im_end|>",
    ]


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": "a\r\nb {{ bos_token }}", "chat_template.json": '{"chat_template": "no"}'},
        {"chat_template.jinja": "d", "additional_chat_templates/tool_use.jinja": "t {{ tools }}"},
        {"tokenizer_config.json": {"chat_template": "c {{ eos_token }}"}},
        {
            "tokenizer_config.json": {
                "chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
            }
        },
        {"tokenizer_config.json": {"chat_template": "c"}, "chat_template.jinja": "j"},
        {"special_tokens_map.json": '{"bos_token": {"content": "<other>"}}', "chat_template.jinja": "{{ bos_token }}"},
    ],
)  # fmt: skip
def test_files_are_found_as_in_transformers(
    files: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    config = SPECIAL | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in ({"tokenizer_config.json": {}} | files).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(config | content)
        (tmp_path / name).write_bytes(text.encode())
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    templates = ChatTemplates.load(tmp_path)
    for tools in (None, TOOLS):
        parts = CONVERSATIONS["one question"] | ({} if tools is None else {"tools": tools})
        template = templates.choose(with_tools=tools is not None)
        assert template is not None
        found = template.render(make_conversation(parts), add_generation_prompt=False).text
        assert found == oracle.apply_chat_template(parts["messages"], tools=tools, tokenize=False)


def test_the_json_file_of_processors_is_read_last(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from json"}')
    assert ChatTemplates.load(tmp_path).texts == {"default": "from json"}
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "from config"}')
    assert ChatTemplates.load(tmp_path).texts == {"default": "from config"}
    (tmp_path / "chat_template.jinja").write_text("from jinja")
    assert ChatTemplates.load(tmp_path).texts == {"default": "from jinja"}


def test_a_named_template_must_exist() -> None:
    templates = ChatTemplates({"rag": "r", "other": "o"}, "model")
    chosen = templates.choose("rag")
    assert chosen is not None
    assert (chosen.text, chosen.place) == ("r", "model, template 'rag'")
    with pytest.raises(
        ModelFormatError, match="model has no chat template 'default'; choose one of: other, rag"
    ):
        templates.choose()
    assert ChatTemplates({}, "model").choose() is None
    with pytest.raises(ModelFormatError, match="model has no chat template 'rag'; choose one of: none"):
        ChatTemplates({}, "model").choose("rag")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("chat_template.jinja", b"x" * 65537, "one text of at most 65536 characters"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("additional_chat_templates/a.jinja", b"\xff", "a.jinja is not UTF-8"),
        ("chat_template.json", b"[]", "must be a JSON object with the key chat_template"),
        ("tokenizer_config.json", b'{"chat_template": ["a"]}', "entries must be objects with name and template"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "must be one text"),
        ("tokenizer_config.json", b'{"chat_template": {"a": 1}}', "template 'a' must be one text"),
    ],
)  # fmt: skip
def test_files_that_hold_no_template_are_errors(
    tmp_path: Path, name: str, contents: bytes, message: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ModelFormatError, match=message):
        ChatTemplates.load(tmp_path)


@pytest.mark.parametrize("contents", [b"{", b"\xff", b"[]"])
def test_a_broken_tokenizer_config_is_an_error(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(contents)
    with pytest.raises(DataError, match=r"tokenizer_config.json: not a JSON object"):
        ChatTemplates.load(tmp_path)


def test_the_date_can_be_given() -> None:
    template = "{{ strftime_now('%d %B %Y') }}"
    assert render(template, now="2025-05-01") == "01 May 2025"
    assert render(template).endswith(str(datetime.now().year))


def test_an_error_names_the_template_and_the_cause() -> None:
    with pytest.raises(
        ModelFormatError, match=r"cannot render .*: line 2: .*expected token.* \(here; change"
    ):
        render("\n{{ 1 2 }}")
    with pytest.raises(ModelFormatError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
