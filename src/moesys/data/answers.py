"""Which tokens of a conversation the assistant writes: those, and only those, are learned.

The idea: a conversation is tokenised as the model will see it, and an answer is what the model would have to write.
It begins where the prompt that asks for it ends, and ends with the token that ends the turn, or with the special
token that begins the next one where no other does. Both come from rendering the conversation up to there, or from the
template's own ``{% generation %}`` blocks. Where rendering a part does not give the beginning of the whole, nothing
is guessed: that is an error. Knows nothing of files or sequences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moesys.data.chat_template import ChatTemplate, ChatTemplates
from moesys.data.content_guard import ContentGuard
from moesys.data.conversation import Conversation
from moesys.data.template_sandbox import Rendered
from moesys.data.tokenizer import Tokenizer, TokenPlace
from moesys.errors import DataError, ModelFormatError

Answers = Literal["all", "last"]

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class TokenizedConversation:
    """Tokens, and which of them are the assistant's."""

    name: str
    token_ids: list[int]
    is_target: list[bool]
    num_answer_bytes: int
    """UTF-8 bytes of the answers, without the names of special tokens."""


class AnswerTokenizer:
    """Tokenises conversations through a model's chat templates and marks the answers.

    answers:  ``all``, or only the ``last`` of each conversation, for templates that write an answer differently once
              others follow it.
    now:      an ISO date for templates that write today's; None takes the clock's.
    """

    def __init__(
        self, templates: ChatTemplates, tokenizer: Tokenizer, answers: Answers = "all", now: str | None = None
    ) -> None:
        self._templates = templates
        self._chosen: dict[bool, ChatTemplate] = {}
        self._tokenizer = tokenizer
        self._guard = ContentGuard(tokenizer)
        self._special_ids = tokenizer.special_ids
        self._answers = answers
        self._now = now

    def tokenize(self, conversation: Conversation) -> TokenizedConversation:
        """Returns the tokens that the model sees.

        Names of special tokens in messages are ordinary text. Raises `DataError` or `ModelFormatError`, naming the
        conversation, where the template refuses it or its answers cannot be told from the rest.
        """
        marked = replace(
            conversation,
            messages=self._guard.mark(conversation.messages),
            tools=self._guard.mark(conversation.tools),
            documents=self._guard.mark(conversation.documents),
        )
        whole = self._render(marked, is_prompt=False)
        tokens = self._guard.encode_with_places(whole.text)
        if _GENERATION_BLOCK.search(self._choose_template(marked).text):
            is_target = self._find_blocks(marked, whole, tokens)
        else:
            is_target = self._find_answers(marked, tokens)
        return TokenizedConversation(
            conversation.name,
            [token.token_id for token in tokens],
            is_target,
            self._count_answer_bytes(whole.text, tokens, is_target),
        )

    def _find_blocks(
        self, conversation: Conversation, whole: Rendered, tokens: Sequence[TokenPlace]
    ) -> list[bool]:
        if not whole.spans:
            raise DataError(
                f"{conversation.name}: the chat template marks no answer in this conversation with a generation block "
                "outside macros; mend the template, or give one without such blocks (data.chat_template)"
            )
        spans = whole.spans if self._answers == "all" else whole.spans[-1:]
        return [any(start <= token.start < end for start, end in spans) for token in tokens]

    def _find_answers(self, conversation: Conversation, tokens: Sequence[TokenPlace]) -> list[bool]:
        whole_ids = [token.token_id for token in tokens]
        is_target = [False] * len(tokens)
        chosen = conversation.answer_ids if self._answers == "all" else conversation.answer_ids[-1:]
        for index in chosen:
            prompt_ids = self._encode_part(conversation.take(index), is_prompt=True)
            answered_ids = self._encode_part(conversation.take(index + 1), is_prompt=False)
            start, shared = len(prompt_ids), _count_equal(answered_ids, whole_ids)
            end = self._find_end_of_turn(tokens, start, shared)
            is_whole = shared == len(answered_ids) or (end > start and self._is_special(whole_ids[end - 1]))
            if whole_ids[:start] != prompt_ids or end <= start or not is_whole:
                raise DataError(
                    f"{conversation.name}: message {index} (assistant) is not written as the model would have to write "
                    "it: rendering the conversation up to there does not give the beginning of the whole conversation; "
                    "set data.chat_answers=last to learn only the last answer of each conversation, give a template "
                    "with generation blocks (data.chat_template), or change the line"
                )
            if (
                end < len(tokens)
                and self._is_special(whole_ids[end])
                and not self._is_special(whole_ids[end - 1])
            ):
                end += 1  # the next turn's first token is what ends this one, as for GLM
            is_target[start:end] = [True] * (end - start)
        return is_target

    def _find_end_of_turn(self, tokens: Sequence[TokenPlace], start: int, end: int) -> int:
        """Returns the place after the last special token before ``end``, where only white space follows it."""
        for place in range(end - 1, start - 1, -1):
            if self._is_special(tokens[place].token_id):
                return place + 1
            if self._tokenizer.decode([tokens[place].token_id]).strip():
                break
        return end

    def _is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _encode_part(self, conversation: Conversation, *, is_prompt: bool) -> list[int]:
        return self._guard.encode(self._render(conversation, is_prompt=is_prompt).text)

    def _render(self, conversation: Conversation, *, is_prompt: bool) -> Rendered:
        template = self._choose_template(conversation)
        try:
            return template.render(conversation, add_generation_prompt=is_prompt, now=self._now)
        except ModelFormatError as error:
            raise ModelFormatError(f"{conversation.name}: {self._guard.remove_marks(str(error))}") from None

    def _choose_template(self, conversation: Conversation) -> ChatTemplate:
        with_tools = conversation.tools is not None
        if with_tools not in self._chosen:
            template = self._templates.choose(with_tools=with_tools)
            if template is None:
                raise DataError(
                    f"{self._templates.place} has no chat template, so conversations cannot be written as its model "
                    "expects them; give one with data.chat_template"
                )
            self._chosen[with_tools] = template
        return self._chosen[with_tools]

    def _count_answer_bytes(self, text: str, tokens: Sequence[TokenPlace], is_target: Sequence[bool]) -> int:
        """Counts the text of each run of targets, from the end of the token before it."""
        num_bytes, start = 0, 0
        for token, counts in zip(tokens, is_target, strict=True):
            if counts and not self._is_special(token.token_id):
                num_bytes += len(self._guard.remove_marks(text[start : token.end]).encode())
            start = max(start, token.end)
        return num_bytes


def _count_equal(first: Sequence[int], second: Sequence[int]) -> int:
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))
