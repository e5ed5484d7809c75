"""Ollama's Modelfile: its template renders what the chat template renders, by Go's own template engine too."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from chat_families import FAMILIES
from test_chat_format_families import tokenizer_of

from qlora_tune.chat_format import ChatFormat
from qlora_tune.errors import ExportError
from qlora_tune.modelfile import TurnPieces, find_pieces, read_modelfile, render_prompt, write_modelfile
from qlora_tune.turns import Message

BY_NAME = {family.name: family for family in FAMILIES}
each_family = pytest.mark.parametrize("name", BY_NAME)

# What Ollama hands to a template: the system text apart, beside all messages in order.
GO_PROGRAM = """
package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template, System string; Messages []Message }

func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    found := []string{}
    for _, each := range cases {
        var text = new(Buffer)
        if err := template.Must(template.New("").Parse(each.Template)).Execute(text, each); err != nil { panic(err) }
        found = append(found, text.said)
    }
    json.NewEncoder(os.Stdout).Encode(found)
}

type Buffer struct { said string }
func (b *Buffer) Write(p []byte) (int, error) { b.said += string(p); return len(p), nil }
"""


def chat_of(name: str) -> ChatFormat:
    return ChatFormat.probe(tokenizer_of(name, "bytes"))


def say(role: str, content: str) -> Message:
    return Message(role=role, content=content)


def conversations() -> list[list[Message]]:
    turns = [
        say("user", "Who wrote {{ .System }}?"),
        say("assistant", "I don't know.\n\nReally."),
        say("user", "Guess <b>@opening@</b>"),
        say("assistant", "x"),
        say("user", "Straße, 你好"),
    ]
    plain = [turns[:1], turns[:3], turns]
    return [*plain, *([say("system", "Be brief.\nAlways."), *each] for each in plain)]


def stop_words(chat: ChatFormat) -> list[str]:
    return list(dict.fromkeys([chat.end_of_turn, chat.tokenizer.eos_token]))


def written(chat: ChatFormat) -> str:
    return write_modelfile(find_pieces(chat), stop_words(chat), "mine.gguf", "someone/base", 2048)


@each_family
def test_the_pieces_that_were_written_render_what_the_chat_template_renders(name: str) -> None:
    chat = chat_of(name)
    pieces, stops = read_modelfile(written(chat))
    assert stops == stop_words(chat)
    for messages in conversations():
        assert pieces.render(messages) == render_prompt(chat, messages), len(messages)


def test_a_text_is_begun_by_ollama_not_by_the_template() -> None:
    begins = [name for name, family in BY_NAME.items() if family.bos_token and family.adds_bos]
    assert len(begins) >= 3
    for name in begins:
        chat = chat_of(name)
        assert not find_pieces(chat).render(conversations()[0]).startswith(chat.tokenizer.bos_token)


@pytest.mark.skipif(not shutil.which("go"), reason="Go is not installed")
def test_gos_template_engine_renders_the_same(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    cases, expected = [], []
    for name in BY_NAME:
        chat = chat_of(name)
        template = re.search('TEMPLATE """(.*?)"""', written(chat), re.DOTALL)[1]
        for messages in conversations():
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            shown = [{"Role": turn["role"], "Content": turn["content"]} for turn in messages]
            cases.append({"Template": template, "System": system, "Messages": shown})
            expected.append(render_prompt(chat, messages))
    found = subprocess.run(
        ["go", "run", str(tmp_path / "main.go")],
        input=json.dumps(cases), capture_output=True, text=True, check=True,
        env={"HOME": str(tmp_path), "PATH": str(Path(shutil.which("go")).parent), "GO111MODULE": "off"},
    )  # fmt: skip
    assert json.loads(found.stdout) == expected


def test_braces_and_quotes_of_a_template_survive_or_are_refused() -> None:
    pieces = TurnPieces("{{a", "b}}", "", "{{{", "@x@", "\n", '"')
    assert read_modelfile(write_modelfile(pieces, ["</s>"], "a.gguf", "b", None)) == (pieces, ["</s>"])
    for stops, opening in (['a"b'], ""), (["a\nb"], ""), ([], '"""'):
        with pytest.raises(ExportError, match="can't hold"):
            write_modelfile(TurnPieces("", "", "", "", "", "", opening), stops, "a.gguf", "b", None)


def test_another_modelfile_is_refused() -> None:
    text = written(chat_of("zephyr"))
    for broken in (text.replace("{{ .Content }}", ""), text.replace("TEMPLATE", "template"), ""):
        with pytest.raises(ExportError, match="not the one that was written"):
            read_modelfile(broken)
