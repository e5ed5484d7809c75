"""Pretraining of the built-in base: next-token prediction on the corpus, resumable at any step.

The position in the data follows from the step alone: step -> shard of the corpus -> shuffled windows, so a
resumed run reads on where it stopped. Under torchrun each process takes its part of every step's windows; on two
CPU cores two processes of one thread train 1.6 times as fast as one process of two (docs/log.md).
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from base_tokenizer import CONTEXT
from corpus import generate_documents
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = CONTEXT  # [tokens]
SHARD_WINDOWS = 4096
VALIDATION_SHARD = 1_000_000  # never reached by training
VALIDATION_WINDOWS = 256
LEARNING_RATE = 4e-3
WARMUP_STEPS = 60
FINAL_RATE = 0.03  # share of the learning rate left at the end
CHECKPOINT_EVERY_S = 150
REPORT_EVERY_S = 20


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@dataclass
class Budget:
    """When to stop: after so many tokens or minutes, whichever comes first."""

    tokens: int | None
    minutes: float | None

    def fraction(self, tokens: int, seconds: float) -> float:
        by_tokens = tokens / self.tokens if self.tokens else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_tokens, by_time)


@dataclass
class Corpus:
    """Tokenized shards, made when first needed and kept in the work folder."""

    tokenizer: PreTrainedTokenizerFast
    work: Path
    seed: int
    shards: int
    batch_size: int
    _loaded: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    def load_shard(self, shard: int) -> np.ndarray:
        path = self.work / f"shard_{shard:07d}.u16"
        if rank() == 0 and not path.exists():
            save_atomically(path, lambda part: self._tokenize(shard).tofile(part))
        if dist.is_initialized():
            dist.barrier()
        return np.fromfile(path, dtype=np.uint16).reshape(SHARD_WINDOWS, WINDOW)

    def _tokenize(self, shard: int) -> np.ndarray:
        ids: list[int] = []
        for document in generate_documents(self.seed, shard):
            ids += self.tokenizer.backend_tokenizer.encode(document).ids
            if len(ids) >= SHARD_WINDOWS * WINDOW:
                break
        return np.array(ids[: SHARD_WINDOWS * WINDOW], dtype=np.uint16)

    def batch(self, step: int) -> torch.Tensor:
        """This process's windows of one step, of shape (batch_size / processes, WINDOW)."""
        epoch_shard, offset = divmod(step * self.batch_size, SHARD_WINDOWS)
        if self._loaded is None or self._loaded[0] != epoch_shard:
            windows = self.load_shard(epoch_shard % self.shards)
            order = np.random.default_rng([self.seed, epoch_shard]).permutation(SHARD_WINDOWS)
            self._loaded = (epoch_shard, windows[order])
        rows = self._loaded[1][offset : offset + self.batch_size][rank() :: processes()]
        return torch.from_numpy(rows.astype(np.int64))


@dataclass
class Progress:
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # running mean


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename: a kill leaves the old file or the new one."""
    part = path.with_suffix(path.suffix + ".part")
    write(part)
    part.replace(path)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """3.5M parameters; every linear dimension is a multiple of 64, the block of NF4."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: LlamaForCausalLM) -> None:
    """Scale by fan-in, and what writes into the residual stream also by depth: 0.02 is too small."""
    depth = 2 * model.config.num_hidden_layers
    for name, weight in model.named_parameters():
        if "layers" not in name or weight.dim() != 2:
            continue
        scale = math.sqrt(depth) if "o_proj" in name or "down_proj" in name else 1.0
        weight.normal_(0.0, 0.8 / math.sqrt(weight.shape[1]) / scale)


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if "layers" in name and p.dim() == 2]
    others = [p for name, p in named if not ("layers" in name and p.dim() == 2)]
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def learning_rate_share(step: int, fraction: float) -> float:
    """Warm up, hold, then fall linearly over the second half of the budget."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(FINAL_RATE, min(1.0, 2 * (1 - fraction)))


def compute_loss(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def autocast(device: str) -> AbstractContextManager[None]:
    return torch.autocast(device, dtype=torch.bfloat16)


@torch.no_grad()
def measure_loss(model: torch.nn.Module, corpus: Corpus, device: str) -> float:
    """Mean next-token loss [nats] on a shard that training never reads."""
    windows = torch.from_numpy(corpus.load_shard(VALIDATION_SHARD)[:VALIDATION_WINDOWS].astype(np.int64))
    losses = [compute_loss(model, part.to(device)).item() for part in windows.split(16)]
    return sum(losses) / len(losses)


class Pretrainer:
    """The loop's state, and how it is saved and brought back."""

    def __init__(self, model: LlamaForCausalLM, corpus: Corpus, budget: Budget, device: str) -> None:
        self.model, self.corpus, self.budget, self.device = model.to(device), corpus, budget, device
        self.optimizers = build_optimizers(model)
        self.progress = Progress()
        self.checkpoint = corpus.work / "checkpoint.pt"

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "progress": vars(self.progress)}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save_atomically(self.checkpoint, lambda part: torch.save(state, part))

    def resume(self) -> bool:
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        return True

    def run(self, compiled: torch.nn.Module) -> None:
        """Train until the budget is spent; checkpoints and a line of progress on the way. Ctrl-C saves and ends."""
        try:
            self._train(compiled)
        except KeyboardInterrupt:
            self._save_on_first()
            raise SystemExit("stopped; the same command goes on from here") from None
        self._save_on_first()

    def _save_on_first(self) -> None:
        if rank() == 0:
            self.save()

    def _train(self, compiled: torch.nn.Module) -> None:
        started, before, tokens_before = time.monotonic(), self.progress.seconds, self.progress.tokens
        saved = reported = started
        while (fraction := self.budget.fraction(self.progress.tokens, self.progress.seconds)) < 1:
            self._step(compiled, fraction)
            now = time.monotonic()
            self.progress.seconds = self._agree(before + now - started)
            if rank() != 0:
                continue
            if now - reported >= REPORT_EVERY_S:
                reported = now
                self._report((self.progress.tokens - tokens_before) / (now - started))
            if now - saved >= CHECKPOINT_EVERY_S:
                saved = now
                self.save()

    def _agree(self, seconds: float) -> float:
        """The first process's clock, so that all of them stop at the same step."""
        if processes() == 1:
            return seconds
        clock = torch.tensor(seconds, dtype=torch.float64)
        dist.broadcast(clock, 0)
        return clock.item()

    def _step(self, compiled: torch.nn.Module, fraction: float) -> None:
        share = learning_rate_share(self.progress.step, fraction)
        windows = self.corpus.batch(self.progress.step).to(self.device)
        with autocast(self.device):
            loss = compute_loss(compiled, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._count(loss.item(), windows.numel() * processes())

    def _count(self, loss: float, tokens: int) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {self.progress.step}: lower the learning rate")
        progress = self.progress
        progress.loss = loss if progress.step == 0 else 0.97 * progress.loss + 0.03 * loss
        progress.step += 1
        progress.tokens += tokens

    def _report(self, tokens_per_s: float) -> None:
        progress = self.progress
        fraction = self.budget.fraction(progress.tokens, progress.seconds)
        left_min = progress.seconds * (1 / fraction - 1) / 60
        print(
            f"step {progress.step:6d}  {progress.tokens / 1e6:8.2f}M tokens  loss {progress.loss:.3f}  "
            f"{tokens_per_s:,.0f} tokens/s  {left_min:.1f} min left",
            flush=True,
        )
