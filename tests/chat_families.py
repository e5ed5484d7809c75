"""Chat formats of real model families, and for each a hand-written statement of the response mask.

A Family carries what the model's published tokenizer carries (Jinja template, control tokens, bos and eos)
and an `oracle`: plain Python string building, sharing nothing with Jinja nor with qlora_tune, that says for a
conversation which training sequences we want and which of their text is learned.  The templates are written
in our own words to render what the published ones render for system/user/assistant text without tools.

An oracle returns a list of sequences; a sequence is a list of Piece(text, learned, template).  `template`
pieces are text that the template writes, where control tokens are meant as such; the others are text that
somebody typed, which must stay plain text whatever it looks like.

What every oracle states:
* the sequence starts where the rendering starts and stops with the last answer's end-of-turn token;
* learned is what follows the generation prompt of an assistant turn, through its end-of-turn token;
* thinking is off (enable_thinking=False), so an empty think block belongs to the generation prompt;
* a system message that the template refuses is put before the first user message, with an empty line between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

Message = dict[str, str]

# SmolLM3's template asks the clock for the date; the tests stop the clock here, so midnight changes nothing.
NOW = datetime.now()


class Piece(NamedTuple):
    text: str
    learned: bool
    template: bool  # written by the template (True) or typed by somebody (False)


@dataclass(frozen=True)
class Family:
    name: str
    template: str
    special_tokens: tuple[str, ...]  # every control token of the tokenizer that matters here, bos and eos too
    bos_token: str | None
    eos_token: str
    end_of_turn: str  # closes an answer; not always the eos token
    system: str  # "own": the template renders a system turn; "refused": it raises, or drops the text
    oracle: Callable[[list[Message]], list[list[Piece]]]
    plain_tokens: tuple[str, ...] = ()  # added to the vocabulary, but not flagged as special (<think>)
    adds_bos: bool = False  # the tokenizer's post-processor puts a bos before any text that it encodes
    alternates: bool = False  # the template raises unless user and assistant take turns

    @property
    def one_sequence_per_answer(self) -> bool:
        """True where earlier turns are rendered anew, so that no single sequence serves all answers."""
        return self.name == "qwen3"


def fixed(text: str, learned: bool = False) -> Piece:
    """Text of the template."""
    return Piece(text, learned, True)


def typed(text: str, learned: bool = False) -> Piece:
    """Text of a message."""
    return Piece(text, learned, False)


def through_last_answer(pieces: list[Piece]) -> list[Piece]:
    """Drops what is rendered after the last learned piece: newlines, a final eos."""
    while not pieces[-1].learned:
        pieces.pop()
    return pieces


def fold_system(messages: list[Message]) -> list[Message]:
    """What we do for a template that refuses a system message."""
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": system["content"] + "\n\n" + user["content"]}, *rest]


# --- ChatML, as OpenHermes and Hermes 2 carry it: no default system text, and no bos in the template.

CHATML = r"""{% for turn in messages %}
{{- '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def chatml_oracle(messages: list[Message]) -> list[list[Piece]]:
    out: list[Piece] = []
    for m in messages:
        answer = m["role"] == "assistant"
        out += [fixed("<|im_start|>" + m["role"] + "\n"), typed(m["content"], answer)]
        out += [fixed("<|im_end|>", answer), fixed("\n")]
    return [through_last_answer(out)]


# --- Llama 3.1: always a system block with two dates (the second is fixed by default); all texts trimmed.

LLAMA3 = r"""{{- bos_token }}
{%- set day = date_string if date_string is defined else '26 Jul 2024' %}
{%- set has_system = messages[0].role == 'system' %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{{- 'Today Date: ' + day + '\n\n' }}
{%- if has_system %}{{ messages[0].content | trim }}{% endif %}
{{- '<|eot_id|>' }}
{%- for turn in (messages[1:] if has_system else messages) %}
    {{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\n\n' + turn.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""


def llama3_oracle(messages: list[Message]) -> list[list[Piece]]:
    out = [
        fixed("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"),
        fixed("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
    ]
    if messages[0]["role"] == "system":
        out.append(typed(messages[0]["content"].strip()))
        messages = messages[1:]
    out.append(fixed("<|eot_id|>"))
    for m in messages:
        answer = m["role"] == "assistant"
        out.append(fixed(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n"))
        out += [typed(m["content"].strip(), answer), fixed("<|eot_id|>", answer)]
    return [through_last_answer(out)]


# --- Mistral 7B Instruct v0.2 as first published: no system role, and no generation prompt of its own: the
# --- user turn ends in [/INST] and the answer follows without a space.  [INST] is plain text, not a token.

MISTRAL = r"""{{ bos_token }}
{%- for turn in messages %}
    {%- if turn.role != ('user', 'assistant')[loop.index0 % 2] %}
        {{- raise_exception('roles must alternate, user first') }}
    {%- endif %}
    {{- '[INST] ' + turn.content + ' [/INST]' if turn.role == 'user' else turn.content + eos_token }}
{%- endfor %}"""


def mistral_oracle(messages: list[Message]) -> list[list[Piece]]:
    out = [fixed("<s>")]
    for m in fold_system(messages):
        if m["role"] == "user":
            out += [fixed("[INST] "), typed(m["content"]), fixed(" [/INST]")]
        else:
            out += [typed(m["content"], True), fixed("</s>", True)]
    return [through_last_answer(out)]


# --- Mistral's later v1 template: it folds the system text itself, and puts spaces around everything.

MISTRAL_V1 = r"""{%- set told = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if told else messages %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn.role != ('user', 'assistant')[loop.index0 % 2] %}
        {{- raise_exception('after an optional system message, roles must alternate') }}
    {%- elif turn.role == 'user' %}
        {{- ' [INST] ' + (told if loop.first else '') + turn.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + turn.content + eos_token }}
    {%- endif %}
{%- endfor %}"""


def mistral_v1_oracle(messages: list[Message]) -> list[list[Piece]]:
    out, told = [fixed("<s>")], []
    for m in messages:
        if m["role"] == "system":
            told = [typed(m["content"]), fixed("\n\n")]
        elif m["role"] == "user":
            out += [fixed(" [INST] "), *told, typed(m["content"]), fixed(" [/INST]")]
            told = []
        else:  # the space is written after the generation prompt, so it is the answer's
            out += [fixed(" ", True), typed(m["content"], True), fixed("</s>", True)]
    return [through_last_answer(out)]


# --- Gemma 2: the assistant is called model, texts are trimmed, system messages raise; eos is another token.

GEMMA = r"""{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for turn in messages %}
    {%- if turn.role != ('user', 'assistant')[loop.index0 % 2] %}
        {{- raise_exception('Conversation roles must alternate') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('user' if turn.role == 'user' else 'model') + '\n' }}
    {{- turn.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


def gemma_oracle(messages: list[Message]) -> list[list[Piece]]:
    out = [fixed("<bos>")]
    for m in fold_system(messages):
        if m["role"] == "assistant":
            out += [fixed("<start_of_turn>model\n"), typed(m["content"].strip(), True)]
            out += [fixed("<end_of_turn>", True), fixed("\n")]
        else:
            out += [fixed("<start_of_turn>user\n"), typed(m["content"].strip()), fixed("<end_of_turn>\n")]
    return [through_last_answer(out)]


# --- Phi 3.5: without a generation prompt, an eos follows the conversation; it is neither kept nor learned.

PHI = r"""{% for turn in messages if turn.role != 'system' or turn.content %}
{{- '<|' + turn.role + '|>\n' + turn.content + '<|end|>\n' }}
{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}"""


def phi_oracle(messages: list[Message]) -> list[list[Piece]]:
    out: list[Piece] = []
    for m in messages:
        answer = m["role"] == "assistant"
        out += [fixed("<|" + m["role"] + "|>\n"), typed(m["content"], answer)]
        out += [fixed("<|end|>", answer), fixed("\n")]
    return [through_last_answer(out)]


# --- Phi 3 mini as first published: it drops system messages without a word, and the user turn brings the
# --- generation prompt with it, asked for or not.

PHI3_FIRST = r"""{{ bos_token }}
{%- for turn in messages %}
    {%- if turn.role == 'user' %}
        {{- '<|user|>\n' + turn.content + '<|end|>\n<|assistant|>\n' }}
    {%- elif turn.role == 'assistant' %}
        {{- turn.content + '<|end|>\n' }}
    {%- endif %}
{%- endfor %}"""


def phi3_first_oracle(messages: list[Message]) -> list[list[Piece]]:
    out = [fixed("<s>")]
    for m in fold_system(messages):
        if m["role"] == "user":
            out += [fixed("<|user|>\n"), typed(m["content"]), fixed("<|end|>\n<|assistant|>\n")]
        else:
            out += [typed(m["content"], True), fixed("<|end|>", True), fixed("\n")]
    return [through_last_answer(out)]


# --- Phi 4: three control tokens and no newline anywhere.

PHI4 = r"""{% for turn in messages %}
{{- '<|im_start|>' + turn.role + '<|im_sep|>' + turn.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""


def phi4_oracle(messages: list[Message]) -> list[list[Piece]]:
    out: list[Piece] = []
    for m in messages:
        answer = m["role"] == "assistant"
        out += [fixed("<|im_start|>" + m["role"] + "<|im_sep|>"), typed(m["content"], answer)]
        out.append(fixed("<|im_end|>", answer))
    return [through_last_answer(out)]


# --- Qwen 3: the answer to the last user message gets a think block, earlier answers lose theirs.  So each
# --- answer is a sequence of its own.  Newlines before the answer that has the block are dropped.

QWEN3 = r"""{%- set ns = namespace(asked=0) %}
{%- for turn in messages if turn.role == 'user' %}{% set ns.asked = ns.asked + 1 %}{% endfor %}
{%- set seen = namespace(asked=0) %}
{%- for turn in messages %}
    {%- set body, thought = turn.content, '' %}
    {%- if turn.role == 'user' %}
        {%- set seen.asked = seen.asked + 1 %}
    {%- elif turn.role == 'assistant' %}
        {%- if '</think>' in body %}
            {%- set thought = body.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set body = body.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if seen.asked == ns.asked and (loop.last or thought) %}
            {%- set body = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + body.lstrip('\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + turn.role + '\n' + body + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '' }}
{%- endif %}"""


def qwen3_oracle(messages: list[Message]) -> list[list[Piece]]:
    sequences, history = [], []
    for m in messages:
        if m["role"] == "assistant":
            answer = typed(m["content"].lstrip("\n"), True)
            block = fixed("<|im_start|>assistant\n<think>\n\n</think>\n\n")
            sequences.append([*history, block, answer, fixed("<|im_end|>", True)])
        history += [fixed("<|im_start|>" + m["role"] + "\n"), typed(m["content"]), fixed("<|im_end|>\n")]
    return sequences


# --- SmolLM3: a long system block, today's date in it; in no_think mode every answer has the empty block.

SMOLLM3 = r"""{%- set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}
{%- set told = '' %}
{%- if messages[0].role == 'system' %}
    {%- set told = messages[0].content %}
    {%- set mode = '/no_think' if '/no_think' in told else '/think' if '/think' in told else mode %}
    {%- set told = told.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{%- set brief = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face.' %}
{%- set opening = '<think>\n\n</think>\n' if mode == '/no_think' else '' %}
{{- '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n' }}
{{- 'Today Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' + mode + '\n\n' }}
{{- '## Custom Instructions\n\n' + (told or brief) + '\n\n' }}
{{- '## Tools\n\n### XML Tools\n\nNone\n\n### Python Tools\n\nNone\n\n<|im_end|>\n' }}
{%- for turn in messages %}
    {%- if turn.role == 'user' %}
        {{- '<|im_start|>user\n' + turn.content + '<|im_end|>\n' }}
    {%- elif turn.role == 'assistant' %}
        {%- generation %}
            {{- '<|im_start|>assistant\n' + opening + turn.content.lstrip('\n') + '<|im_end|>\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' + opening }}{% endif %}"""


def smollm3_oracle(messages: list[Message]) -> list[list[Piece]]:
    out = [
        fixed("<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"),
        fixed("Today Date: " + NOW.strftime("%d %B %Y") + "\nReasoning Mode: /no_think\n\n"),
        fixed("## Custom Instructions\n\n"),
    ]
    if messages[0]["role"] == "system":
        out.append(typed(messages[0]["content"].rstrip()))
        messages = messages[1:]
    else:
        out.append(fixed("You are a helpful AI assistant named SmolLM, trained by Hugging Face."))
    out.append(fixed("\n\n## Tools\n\n### XML Tools\n\nNone\n\n### Python Tools\n\nNone\n\n<|im_end|>\n"))
    for m in messages:
        if m["role"] == "assistant":
            out.append(fixed("<|im_start|>assistant\n<think>\n\n</think>\n"))
            out += [typed(m["content"].lstrip("\n"), True), fixed("<|im_end|>", True), fixed("\n")]
        else:
            out += [fixed("<|im_start|>user\n"), typed(m["content"]), fixed("<|im_end|>\n")]
    return [through_last_answer(out)]


# --- Zephyr: only </s> is a control token, <|user|> is plain text; the newlines are the template's own lines.

ZEPHYR = r"""{% for turn in messages %}
{{ '<|' + turn.role + '|>\n' + turn.content + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}"""


def zephyr_oracle(messages: list[Message]) -> list[list[Piece]]:
    out: list[Piece] = []
    for m in messages:
        answer = m["role"] == "assistant"
        out += [fixed("<|" + m["role"] + "|>\n"), typed(m["content"], answer)]
        out += [fixed("</s>", answer), fixed("\n")]
    return [through_last_answer(out)]


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SPM = ("<unk>", "<s>", "</s>")
_PHI3 = (*_SPM, "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
          "<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>")  # fmt: skip
_SMOL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_HERMES = (*_SPM, "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>")

FAMILIES = [
    # name, template, special tokens, bos, eos, end of turn, system, oracle
    Family("chatml", CHATML, _HERMES, "<s>", "<|im_end|>", "<|im_end|>", "own", chatml_oracle, adds_bos=True),
    Family("llama3", LLAMA3, _LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", "own", llama3_oracle,
           adds_bos=True),
    Family("mistral", MISTRAL, _SPM, "<s>", "</s>", "</s>", "refused", mistral_oracle, adds_bos=True,
           alternates=True),
    Family("mistral_v1", MISTRAL_V1, _SPM, "<s>", "</s>", "</s>", "own", mistral_v1_oracle, adds_bos=True,
           alternates=True),
    Family("gemma", GEMMA, _GEMMA, "<bos>", "<eos>", "<end_of_turn>", "refused", gemma_oracle, adds_bos=True,
           alternates=True),
    Family("phi", PHI, _PHI3, "<s>", "<|endoftext|>", "<|end|>", "own", phi_oracle),
    Family("phi3_first", PHI3_FIRST, _PHI3, "<s>", "<|endoftext|>", "<|end|>", "refused", phi3_first_oracle),
    Family("phi4", PHI4, (*_IM, "<|im_sep|>"), "<|endoftext|>", "<|im_end|>", "<|im_end|>", "own",
           phi4_oracle),
    Family("qwen3", QWEN3, _IM, None, "<|im_end|>", "<|im_end|>", "own", qwen3_oracle, plain_tokens=_THINK),
    Family("smollm3", SMOLLM3, _SMOL, None, "<|im_end|>", "<|im_end|>", "own", smollm3_oracle,
           plain_tokens=_THINK),
    Family("zephyr", ZEPHYR, _SPM, "<s>", "</s>", "</s>", "own", zephyr_oracle, adds_bos=True),
]  # fmt: skip
