"""qlora-tune: instruction-tune a language model with QLoRA on one small GPU, or none.

A row's journey: shapes -> data -> chat_format -> model -> train -> evaluate -> export. Each module imports only from
those before it, and the heavy libraries (torch, transformers, trl, peft) only inside functions.
"""

__version__ = "0.1.0.dev0"
