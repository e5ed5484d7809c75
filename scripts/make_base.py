"""Make the built-in base model with one command: corpus, tokenizer, pretraining, leak check, probe, model card.

    python scripts/make_base.py --tokens 40000000                                (a CPU)
    torchrun --nproc-per-node 2 scripts/make_base.py --threads 1 --tokens 40000000   (two CPU cores: 1.6 times as fast)
    python scripts/make_base.py --tokens 400000000                               (a GPU, found by itself)

The rows that it must not have read are made first, by scripts/make_sample.py.
Run the same command again after an interruption and it goes on from its last checkpoint.
"""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from base_report import Measurements, check_leaks, format_card, measure_nf4, probe
from base_tokenizer import train_tokenizer
from base_training import SHARD_WINDOWS, Budget, Corpus, Pretrainer, build_model, measure_loss, rank
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent
CORPUS_SOURCES = ("corpus", "corpus_skills", "corpus_work", "facts", "scenes", "split", "wordlists", "world")


def above_zero(text: str) -> int:
    if (number := int(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return number


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "qlora_tune" / "builtin", help="folder of the model")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "base", help="checkpoint and corpus")
    parser.add_argument("--tokens", type=above_zero, help="train on this many tokens [tokens]")
    parser.add_argument("--minutes", type=above_zero, help="train for this long, over all resumed runs [minutes]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=above_zero, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--batch-size", type=above_zero, default=16, help="windows of 256 tokens a step; a power of two"
    )
    parser.add_argument(
        "--shards", type=above_zero, default=96, help="distinct corpus shards before they repeat [2**20 tokens]"
    )
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to take over instead of training one")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args()
    if args.tokens is None and args.minutes is None:
        parser.error("say how long to train: --tokens or --minutes")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if SHARD_WINDOWS % args.batch_size or args.batch_size % world:
        parser.error(f"--batch-size {args.batch_size}: expected a power of two that {world} process(es) can share")
    return args


def claim_work_folder(args: argparse.Namespace) -> None:
    """Tie shards and checkpoint to what made them, so that the card never tells of another corpus."""
    if not args.resume:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    sources = b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in CORPUS_SOURCES)
    settings = {"seed": args.seed, "batch_size": args.batch_size, "shards": args.shards}
    settings["corpus"] = hashlib.sha256(sources).hexdigest()
    given = (args.tokenizer / "tokenizer.json").read_bytes() if args.tokenizer else b""
    settings["tokenizer"] = hashlib.sha256(given).hexdigest() if given else "trained"
    path = args.work / "settings.json"
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise SystemExit(
            f"{args.work}: was made with other settings ({found}, now {settings}). Give another --work, or "
            "--no-resume to begin again."
        )
    path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    if not (args.work / "tokenizer" / "tokenizer.json").exists():
        made = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else train_tokenizer(args.seed)
        made.save_pretrained(args.work / "tokenizer")


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bf16 weights, configs and tokenizer; no chat template, as this is a base."""
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def publish(ready: Path, out: Path) -> None:
    """Put finished files into place by one rename each, so that a reader never meets half a file."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(ready.iterdir()):
        part = out / f"{path.name}.part"
        shutil.copyfile(path, part)
        part.replace(out / path.name)


def report(
    folder: Path, trainer: Pretrainer, tokenizer: PreTrainedTokenizerFast, trained_on: str, tokenizer_from: str
) -> str:
    """Measure the written model and describe it. Ends the program where a held-out row stands in the corpus."""
    if found := check_leaks(trainer.corpus, trainer.progress, REPOSITORY):
        listed = "\n".join(f"{leak.row}: {leak.text}" for leak in found)
        raise SystemExit(f"Texts of held-out rows stand in the corpus; name them in make_sample.py:\n{listed}")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(trainer.device).eval()
    measured = Measurements(
        loss=measure_loss(model, trainer.corpus, trainer.device),
        nf4_loss=measure_nf4(folder, trainer.corpus, trainer.device),
        skills=probe(model, tokenizer, trainer.corpus.seed),
    )
    return format_card(
        model.num_parameters(), trainer.progress, trainer.corpus, measured, trained_on, tokenizer_from, REPOSITORY
    )


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    trained_on = f"{os.environ.get('WORLD_SIZE', 1)} x {args.threads} CPU thread(s)"
    if device == "cuda":
        trained_on = torch.cuda.get_device_name()
    elif "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    if rank() == 0:
        claim_work_folder(args)
    if dist.is_initialized():
        dist.barrier()
    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer")
    corpus = Corpus(tokenizer, args.work, args.seed, args.shards, args.batch_size)
    trainer = Pretrainer(build_model(tokenizer), corpus, Budget(args.tokens, args.minutes), device)
    if args.resume and trainer.resume():
        print(f"going on from step {trainer.progress.step}", flush=True)
    model = torch.compile(trainer.model) if args.compile else trainer.model
    trainer.run(DistributedDataParallel(model) if dist.is_initialized() else model)
    if dist.is_initialized():
        dist.destroy_process_group()
        if int(os.environ["RANK"]) != 0:
            return
    ready = args.work / "model"
    write_model(trainer.model, tokenizer, ready)
    tokenizer_from = "taken over from an earlier base" if args.tokenizer else "trained on documents of its own"
    card = report(ready, trainer, tokenizer, trained_on, tokenizer_from)
    (ready / "README.md").write_text(card, encoding="utf-8")
    publish(ready, args.out)
    print(card)


if __name__ == "__main__":
    main()
