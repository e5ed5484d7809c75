"""The model card of an export: what was tuned on what and how, how it scored, how to use it, where its limits are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from qlora_tune import __version__
from qlora_tune.adapters import saved_rank, virtual_tokens_of
from qlora_tune.base import BaseModel
from qlora_tune.comparison import measure_table, read_comparison, score_table
from qlora_tune.config import BUILTIN, TrainConfig
from qlora_tune.pair_scores import SCORES
from qlora_tune.parity import Parity
from qlora_tune.recipe import RECIPE, describe_heldout, describe_method, describe_recipe
from qlora_tune.runs import Run, read_json

Form = Literal["adapter", "gguf", "quantized", "original"]  # the last two are what a merged model was merged into
MERGED_INTO = {
    "quantized": "merged into the dequantized 4-bit base, which is what was trained",
    "original": "merged into the original 16-bit base, which is close to what was trained, not equal",
}
# What vLLM takes as --max-lora-rank (docs.vllm.ai, engine arguments).
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 512)
_NO_GGUF = (
    "llama.cpp and Ollama read GGUF files, which this folder does not hold; who has the run makes them with "
    "`python -m qlora_tune export RUN --gguf`."
)
_MERGED_IS_WHOLE = " A merged model (`python -m qlora_tune export RUN --merged`) is whole, and Transformers loads it."
_LICENSE_KEYS = ("license", "license_name", "license_link")
_LIMITS = (
    "The scores are of rows held out of one data set; they say little about other requests.",
    "Intervals tell what another draw of such rows would change, not what another training would.",
    "What the base model gets wrong, and what its training text was biased to, it still does.",
    "Nothing was done to make answers safe. Check them before anyone depends on them.",
    "The licences of the base model and of the training data apply to this model.",
)


def write_model_card(
    run: Run, base: BaseModel, stops: Sequence[int], parity: Parity | None = None, form: Form = "adapter"
) -> str:
    """The card of a run's adapter, or of its merged model, as the text of README.md.

    `stops` are the token ids that end an answer. Holds no rows and no paths.
    """
    config, state = run.read_config(), run.read_state()
    kind = {"adapter": "LoRA adapter", "gguf": "LoRA adapter in GGUF"}.get(form, "merged model")
    lines = [
        *_front_matter(base, form),
        "",
        f"# {run.name}",
        "",
        f"A {kind}: `{base.label}` instruction-tuned with {describe_method(config)} by qlora-tune {__version__}.",
        "",
        *_section("Base model", _base_lines(config, state, base, form)),
        *_section("Data", _data_lines(run)),
        *_section("Recipe", _recipe_lines(run, state)),
        *_section("Scores", _score_lines(run, state)),
    ]
    if parity:
        lines += _section("Parity", [f"Loaded again and compared with the trained model: {parity.describe()}."])
    return "\n".join([*lines, *_standing_lines(config, base, stops, form)])


def public_text(run: Run, base: BaseModel, stops: Sequence[int], form: Form = "adapter") -> str:
    """What a card says whatever the data and the run's name are; nothing in it is a leak.

    A base in a local folder is left out by name: only ids of the hub are public.
    """
    lines = [*_front_matter(base, form), *_standing_lines(run.read_config(), base, stops, form)]
    return "\n".join(lines).replace(base.label, base.label if "/" in base.label else "")


def _standing_lines(config: TrainConfig, base: BaseModel, stops: Sequence[int], form: Form) -> list[str]:
    use = _use_lines(config, base, stops, form)
    return [*_section("Use", use), *_section("Limits", [f"- {limit}" for limit in _LIMITS])]


def read_license(base: BaseModel) -> dict[str, str]:
    """The licence that a base's own README.md names in its front matter; empty where it has none."""
    from huggingface_hub.repocard import metadata_load

    try:
        found = metadata_load(base.path / "README.md") or {}
    except (OSError, ValueError):
        return {}
    except Exception as error:  # what the YAML library raises, which is not ours to import
        if type(error).__module__.startswith("yaml"):
            return {}
        raise
    named = {key: found[key] for key in _LICENSE_KEYS if isinstance(found.get(key), str)}
    return named if "license" in named else {}


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _front_matter(base: BaseModel, form: Form) -> list[str]:
    fields: dict[str, Any] = {"base_model": base.label} if "/" in base.label else {}  # the hub takes its own ids only
    fields |= read_license(base)
    library = {"adapter": "peft", "gguf": "gguf"}.get(form, "transformers")
    fields |= {"library_name": library, "pipeline_tag": "text-generation"}
    fields |= {"tags": ["qlora", "lora", "sft", "qlora-tune"]}
    return ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()), "---"]


def _base_lines(config: TrainConfig, state: dict[str, Any], base: BaseModel, form: Form) -> list[str]:
    where = f"[{base.label}](https://huggingface.co/{base.label})" if "/" in base.label else f"`{base.label}`"
    revision = f", revision `{base.revision}`" if base.revision else ""
    held = state["precision"]
    if config.load_in_4bit:
        double = " with double quantization" if config.bnb_4bit_use_double_quant else ""
        held = f"4-bit {config.bnb_4bit_quant_type}{double}, computed in {held}"
    found = read_license(base)
    licence = " ".join(found.values())
    told = (
        f"licence `{licence}`, which applies here too" if found else f"its licence is not known here: look at {where}"
    )
    if base.name == BUILTIN:
        told = "built into qlora-tune, whose licence (Apache-2.0) applies here too"
    return [
        f"- {where}{revision}; fingerprint of its weights `{base.fingerprint}`",
        f"- {told}",
        f"- in training held in {held}",
        *([f"- {MERGED_INTO[form]}"] if form in MERGED_INTO else []),
    ]


def _data_lines(run: Run) -> list[str]:
    data = read_json(run.path / "data.json")
    lines = [
        f"{data['train_sequences']} sequences of {data['train_tokens']:,} tokens, of which {data['learned_tokens']:,} "
        f"(the answers) are learned; {describe_heldout(data)}.",
        "",
    ]
    if not data.get("files"):
        return [*lines, "Trained by an earlier version, which kept no hashes of its data files."]
    rows = [
        f"| {_cell(file['name'])} | {file['use']} | {file['rows']:,} | `{file['sha256']}` |" for file in data["files"]
    ]
    sample = [] if run.read_config().data else ["The sample that is built into qlora-tune:", ""]
    return [*lines, *sample, "| file | use | rows | sha256 |", "| --- | --- | ---: | --- |", *rows]


def _recipe_lines(run: Run, state: dict[str, Any]) -> list[str]:
    steps = f"{state['steps']} steps on {state['device']}"
    versions = [", ".join(f"{name} {number}" for name, number in each.items()) for each in state.get("versions", [])]
    data = " --data FILE" if run.read_config().data else ""
    again = f"`{RECIPE}` holds all settings: `python -m qlora_tune reproduce FOLDER{data}` trains it again."
    return [
        f"{steps}. The settings that matter most, and all that are not the default:",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {_cell(name)} | {_cell(value)} |" for name, value in describe_recipe(run)),
        "",
        *(f"- {'then resumed with' if place else 'trained with'} {each}" for place, each in enumerate(versions)),
        *(["", again] if versions and run.stage == "train" else []),
    ]


def _score_lines(run: Run, state: dict[str, Any]) -> list[str]:
    loss = state.get("eval_loss")
    lines = [f"Held-out loss {loss:.4f} nats per answer token.", ""] if loss is not None else []
    if (run.path / SCORES).exists():
        lines += [_pair_words(read_json(run.path / SCORES)), ""]
    if not (run.path / "scores.json").exists():
        return [*lines, "Not scored."]
    comparison = read_comparison(run)
    return [
        *lines,
        "Greedy answers of base and tuned model to the same held-out rows. Changes are tuned minus base, with the",
        "interval in which they lie with 95 % confidence. First exact match:",
        "",
        score_table([*comparison.by_task(), comparison.total()]),
        "",
        measure_table(comparison.total()),
    ]


def _pair_words(scores: dict[str, Any]) -> str:
    mean, low, high = scores["accuracy"]
    return (
        f"Held-out preference pairs: in {mean:.1%} of {scores['rows']} ({low:.1%} to {high:.1%} with 95 % confidence) "
        "the chosen answer gained more likelihood over the adapter begun with than the rejected one."
    )


def _use_lines(config: TrainConfig, base: BaseModel, stops: Sequence[int], form: Form) -> list[str]:
    if form == "gguf":
        return _llama_cpp(base)
    if form != "adapter":
        served = [
            *("vLLM, with the chat template and the stop tokens that lie in this folder:", "", "```bash"),
            *("vllm serve FOLDER", "```"),
        ]
        if base.name == BUILTIN:
            served = ["Other programs were not tried with the built-in base."]
        return [*_transformers(base, stops, [], "."), "", *served, "", _NO_GGUF]
    if base.name == BUILTIN:
        return [
            "The base is the one built into qlora-tune. Install that, unpack this zip, and run "
            "`python -m qlora_tune chat FOLDER` on the unpacked folder.",
            "",
            "It is on no hub, so Transformers, PEFT, vLLM, llama.cpp and Ollama can't fetch it by its name."
            + (_MERGED_IS_WHOLE if not virtual_tokens_of(config) else ""),
        ]
    return [
        *_transformers(base, stops, ["from peft import PeftModel"], base.label),
        "",
        *_vllm(config, base, stops),
        *([] if virtual_tokens_of(config) else ["", _NO_GGUF]),
    ]


def _transformers(base: BaseModel, stops: Sequence[int], imports: list[str], name: str) -> list[str]:
    revision = f', revision="{base.revision}"' if imports and base.revision else ""
    attach = ['model = PeftModel.from_pretrained(model, ".")'] if imports else []
    return [
        f"Transformers{' and PEFT' if imports else ''}, in this folder:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *imports,
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{revision}, dtype="auto")',
        *attach,
        'prompt = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], add_generation_prompt=True,',
        '                                       enable_thinking=False, return_tensors="pt", return_dict=True)',
        f"answer = model.generate(**prompt, max_new_tokens=200, eos_token_id={list(stops)})",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
    ]


def _vllm(config: TrainConfig, base: BaseModel, stops: Sequence[int]) -> list[str]:
    """How vLLM serves an adapter beside its base; from its documentation, not tried here."""
    if virtual_tokens_of(config):
        return [f"vLLM serves no adapters of type {config.peft_type}."]
    rank = next((rank for rank in _VLLM_RANKS if rank >= saved_rank(config)), None)
    if config.use_dora or rank is None:
        why = "DoRA adapters" if config.use_dora else f"adapters of rank {saved_rank(config)}"
        return [f"vLLM serves no {why}: merge it (`python -m qlora_tune export RUN --merged`)."]
    revision = f" --revision {base.revision}" if base.revision else ""
    return [
        "vLLM, which takes the chat template from this folder and needs the stop tokens in every request",
        f'(`"stop_token_ids": {list(stops)}`):',
        "",
        "```bash",
        f"vllm serve {base.label}{revision} --enable-lora --max-lora-rank {rank} \\",
        "  --lora-modules tuned=FOLDER --chat-template FOLDER/chat_template.jinja",
        "```",
        "",
        *(
            ["Both load the base in 16 bits, which is close to the 4-bit one of training, not equal."]
            * config.load_in_4bit
        ),
    ]


def _llama_cpp(base: BaseModel) -> list[str]:
    where = f"`{base.label}` converted by llama.cpp's `convert_hf_to_gguf.py`, or had from somebody"
    if base.name == BUILTIN:
        where = "which nobody has published for the one built into qlora-tune"
    return [
        f"Both programs need the base as GGUF too: {where}. The adapter was trained on the base as said above; on one "
        "that is quantized otherwise, answers may differ.",
        "",
        "```bash",
        "llama-server -m base.gguf --lora ADAPTER.gguf --jinja --chat-template-file chat_template.jinja",
        "ollama create tuned -f Modelfile   # with base.gguf beside it",
        "ollama run tuned",
        "```",
        "",
        "The Modelfile carries the chat template and the stop words, not the functions that a conversation may offer. "
        "Both programs encode a prompt's text as a whole, where training encoded what was said apart from the "
        "template: at their borders some tokens may differ.",
    ]


def _cell(text: str) -> str:
    """Text inside a table of Markdown: what would end the cell or the row is escaped."""
    return " ".join(text.replace("|", "\\|").split())
