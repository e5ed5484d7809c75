"""The built-in base's tokenizer: byte-level BPE in which spaces, newlines and digits stand alone.

A word then has the same tokens at the start of a line, after a space and in quotes, which makes copying it
easier for a very small model; digits one by one do the same for numbers.
"""

from collections.abc import Iterator
from itertools import islice

from corpus import END, END_OF_TEXT, START, generate_documents
from facts import ALL_FACTS, SENTENCES, state
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
CONTEXT = 256  # [tokens] what the base sees at once in pretraining; it has never met later positions
PAD = "<|pad|>"
SPECIALS = [END_OF_TEXT, PAD, START, END]
TRAINING_SHARD = 1_000_001  # a part of the corpus stream that pretraining never reaches
TRAINING_DOCUMENTS = 60_000
FACT_REPEATS = 20


def _build_empty() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"\s|\w+|[^\w\s]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _plain_documents(seed: int) -> Iterator[str]:
    """Corpus without its marks, and every fact again: the names of the world should be few tokens each."""
    for fact in ALL_FACTS:
        yield from (state(fact, sentence) for sentence in SENTENCES[fact.relation] for _ in range(FACT_REPEATS))
    for document in islice(generate_documents(seed, TRAINING_SHARD), TRAINING_DOCUMENTS):
        for special in SPECIALS:
            document = document.replace(special, "")
        yield document


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train on a part of the corpus of its own; no chat template is set, as the model is a base."""
    tokenizer = _build_empty()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_plain_documents(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[START, END],
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
