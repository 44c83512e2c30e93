"""Train the small GPT-2 that actstore ships, on the Python standard library's source.

    python scripts/train_demo_model.py --out ingest/demo/model

On one CPU thread the run is reproducible bit for bit for a given Python, PyTorch and
processor. With `--checkpoint FILE` it saves its state as it goes, and goes on from that
file where there is one: the resumed run ends with the same weights as an unbroken one.
"""

import argparse
import hashlib
import itertools
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from actstore.ingest.demo import DEMO_MODEL, standard_library_files

END_OF_TEXT: Final = "<|endoftext|>"
VOCABULARY: Final = 4096
CONTEXT: Final = 256
BATCH: Final = 16
WARM_UP: Final = 40
DECAYING: Final = 0.6  # the share of the run, its last, over which the rate falls to 0
MUON_RATE: Final = 0.02
ADAMW_RATE: Final = 3e-3
LARGEST: Final = 3_000_000  # bytes of weights and tokenizer that the package may carry


@dataclass(frozen=True, slots=True)
class Corpus:
    """The text as tokens, each file opened by the end-of-text token."""

    train: Tensor
    validation: Tensor
    validation_characters: int


@dataclass(slots=True)
class Progress:
    """What a run has done so far; goes into checkpoints and into `training.json`."""

    step: int = 0
    seconds: float = 0.0
    train_loss: float = math.log(VOCABULARY)  # moving average, nats per token
    curve: list[dict[str, float]] = field(default_factory=list)
    plan: dict[str, int] = field(default_factory=dict)  # from which step, how many in all


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Learn a byte-level BPE whose token 0 is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_corpus() -> tuple[Tokenizer, Corpus]:
    """Read the standard library, learn the tokenizer on the training files, encode.

    One file in 25 is held out, by its name, so that it is the same on every machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    validation: list[str] = []
    for path in standard_library_files():
        name = hashlib.sha256(path.relative_to(root).as_posix().encode())
        held_out = int(name.hexdigest(), 16) % 25 == 0
        (validation if held_out else train).append(path.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(train)

    def encode(texts: list[str]) -> Tensor:
        encodings = tokenizer.encode_batch(texts)
        return torch.tensor([token for one in encodings for token in (0, *one.ids)])

    characters = sum(map(len, validation))
    return tokenizer, Corpus(encode(train), encode(validation), characters)


def training_batches(tokens: Tensor, seed: int, first_step: int) -> Iterator[Tensor]:
    """Yield batches of `[BATCH, CONTEXT + 1]` from `first_step` on, without end.

    Every epoch cuts the tokens into windows at an offset of its own and shuffles them.
    A batch depends on the seed and its step alone, so a resumed run sees the same ones.
    """
    windows = len(tokens) // CONTEXT - 1
    current, starts = -1, torch.empty(0, dtype=torch.long)
    for step in itertools.count(first_step):
        rows = []
        for position in range(step * BATCH, (step + 1) * BATCH):
            epoch, index = divmod(position, windows)
            if epoch != current:
                generator = torch.Generator().manual_seed(seed * 10_000 + epoch)
                starts = CONTEXT * torch.randperm(windows, generator=generator)
                starts += torch.randint(CONTEXT, (), generator=generator)
                current = epoch
            start = int(starts[index])
            rows.append(tokens[start : start + CONTEXT + 1])
        yield torch.stack(rows)


def build_model(seed: int) -> GPT2LMHeadModel:
    """Initialise the model: 4 layers of width 128, 1.35 million parameters."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        # The same function as the saved configuration's gelu_new, in one kernel.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def next_token_loss(model: GPT2LMHeadModel, rows: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of every token of the rows but the first."""
    logits = model(rows[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: GPT2LMHeadModel, tokens: Tensor) -> float:
    """Mean loss over the held-out files, cut into windows one after the other."""
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    total = 0.0
    for start in range(0, len(windows), BATCH):
        rows = windows[start : start + BATCH]
        total += next_token_loss(model, rows).item() * len(rows)
    return total / len(windows)


def build_optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, biases and norms."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if ".h." in name and parameter.ndim == 2 else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE),
        torch.optim.AdamW(others, lr=ADAMW_RATE, fused=True),
    ]


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, a plateau, then a linear fall to 0 at the end."""
    warm_up = min(1.0, (step + 1) / WARM_UP)
    return warm_up * min(1.0, (steps - step) / (DECAYING * steps))


def export(out: Path, model: GPT2LMHeadModel, tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Write the model folder: weights in float16, tokenizer, configurations, record.

    Raises:
        ValueError: Weights and tokenizer together are over `LARGEST` bytes.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    del state["lm_head.weight"]  # tied to the token embedding
    halves = {name: value.half() for name, value in state.items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})
    config = GPT2Config(**model.config.to_dict())
    config.update({"activation_function": "gelu_new", "use_cache": True, "dtype": "float32"})
    config.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    documents: dict[str, dict[str, Any]] = {
        "generation_config.json": {f"{name}_id": 0 for name in special},
        "tokenizer_config.json": fast | special,
        "training.json": record,
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for path in out.iterdir():
        path.chmod(0o644)
    size = sum((out / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    if size > LARGEST:
        raise ValueError(f"weights and tokenizer take {size:,} bytes of {LARGEST:,}")


def describe(progress: Progress, corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """Say what a finished run did, as `training.json` records it."""
    end = progress.curve[-1]
    bits = end["validation"] / math.log(2) * len(corpus.validation) / corpus.validation_characters
    return {
        "steps": progress.step,
        "plan": progress.plan,
        "seed": options.seed,
        "tokens_seen": progress.step * BATCH * CONTEXT,
        "train_loss": end["train"],
        "validation_loss": end["validation"],
        "validation_bits_per_character": round(bits, 4),
        "seconds": round(progress.seconds),
        "files": len(standard_library_files()),
        "train_tokens": len(corpus.train),
        "validation_tokens": len(corpus.validation),
        "validation_characters": corpus.validation_characters,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "curve": progress.curve,
    }


def train(options: argparse.Namespace) -> None:
    """Train, with progress lines and checkpoints, and write the model folder."""
    torch.set_num_threads(1)
    steps, checkpoint = int(options.steps), options.checkpoint
    tokenizer, corpus = read_corpus()
    model = build_model(options.seed)
    optimizers, rates = build_optimizers(model), (MUON_RATE, ADAMW_RATE)
    progress = Progress()
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        progress = Progress(**saved["progress"])
    progress.plan[str(progress.step)] = steps
    print(f"{len(corpus.train):,} tokens, steps {progress.step} to {steps}", flush=True)
    first, before, started = progress.step, progress.seconds, time.monotonic()
    batches = training_batches(corpus.train, options.seed, first)
    for step in range(first, steps):
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * rate_factor(step, steps)
            optimizer.zero_grad()
        # Weights, gradients and updates stay float32; a quarter less time on one core.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(model, next(batches))
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        progress.step = done = step + 1
        progress.train_loss += (loss.item() - progress.train_loss) / min(done, 50)
        elapsed = time.monotonic() - started
        progress.seconds = before + elapsed
        if done % 20 == 0:
            speed = (done - first) / elapsed
            pace = f"{speed * BATCH * CONTEXT:,.0f} tokens/s, {(steps - done) / speed:,.0f} s left"
            print(f"step {done}/{steps}  loss {progress.train_loss:.3f}  {pace}", flush=True)
        if done % options.every == 0 or done == steps:
            if done == steps:
                # Measure what is shipped: parameters rounded to float16.
                model.load_state_dict({k: v.half() for k, v in model.state_dict().items()})
            held_out = validation_loss(model, corpus.validation)
            losses = {"train": progress.train_loss, "validation": held_out}
            progress.curve.append({"step": done} | {k: round(v, 4) for k, v in losses.items()})
            print(f"step {done}/{steps}  held-out loss {held_out:.4f}", flush=True)
            if checkpoint:
                states = [optimizer.state_dict() for optimizer in optimizers]
                saved = {"model": model.state_dict(), "optimizers": states}
                partial = checkpoint.with_suffix(".partial")
                torch.save(saved | {"progress": asdict(progress)}, partial)
                partial.replace(checkpoint)
    export(options.out, model, tokenizer, describe(progress, corpus, options))


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the small GPT-2 that actstore ships.")
    add = parser.add_argument
    add("--out", type=Path, default=DEMO_MODEL, help="folder to write the model to")
    add("--steps", type=int, default=6000, help="updates of 16 x 256 tokens")
    add("--seed", type=int, default=0, help="for the initial weights and the order")
    add("--every", type=int, default=250, help="steps between held-out losses and checkpoints")
    add("--checkpoint", type=Path, help="file to keep the run's state in, and to resume from")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
