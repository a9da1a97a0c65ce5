"""Train the capitals model: `python -m ablation.capitals.train [--out FOLDER] [--steps N]`."""

import argparse
import math
import random
import time
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ablation.capitals.data import CAPITALS, PROMPT, sentences, texts

SEED = 0
THREADS = 2  # fixed, because rounding depends on the number of threads among which a sum is divided
STEPS = 2000
BATCH = 32  # texts per step
POSITIONS = 32  # tokens; every training text is shorter
LEARNING_RATE = 2e-3
WARMUP = 100  # steps
WEIGHT_DECAY = 0.01
IGNORED = -100  # the target that cross_entropy leaves out by default

EOS, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unknown|>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer. As in GPT-2, "Berlin" and " Berlin" are two tokens, and no BOS is added."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    space = split.pre_tokenize_str(" ")[0][0]
    seen = {token for sentence in sentences() for token, _ in split.pre_tokenize_str(sentence)}
    words = {token.removeprefix(space) for token in seen if token.removeprefix(space).isalpha()}
    tokens = [EOS, PAD, UNKNOWN, *sorted(seen | words | {space + word for word in words})]

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Make an untrained GPT-2 with GPT-2 small's 12 x 12 heads, each 8 wide; about 1.4 million parameters."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=POSITIONS,
            n_embd=96,
            n_layer=12,
            n_head=12,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Train `model` in place for `steps` batches, and print the loss (nats per token) every 100 steps."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    stream = texts(random.Random(SEED))  # noqa: S311 (sentences, not secrets)
    model.train()
    model.set_attn_implementation("eager")  # a quarter faster than sdpa for so small a model
    start, total, count = time.monotonic(), 0.0, 0
    for step in range(1, steps + 1):
        batch = tokenizer(
            [text + EOS for text in islice(stream, BATCH)], padding=True, padding_side="right", return_tensors="pt"
        )
        ids, real = batch["input_ids"], batch["attention_mask"].bool()  # both [BATCH, tokens]
        logits = model(**batch, use_cache=False).logits[:, :-1]  # [BATCH, tokens - 1, vocabulary]
        targets = ids.masked_fill(~real, IGNORED)[:, 1:]
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        total, count = total + loss.item(), count + 1
        if step % 100 == 0 or step == steps:
            print(f"step {step:5d}  loss {total / count:.4f}  {time.monotonic() - start:4.0f} s", flush=True)
            total, count = 0.0, 0


@torch.no_grad()
def print_answers(folder: Path) -> None:
    """Print the answer of the model in `folder` for every capital, with probabilities, and how many are right."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenizer([PROMPT.format(capital=capital) for capital, _ in CAPITALS], return_tensors="pt")
    probabilities = model(**prompts).logits[:, -1].softmax(-1)  # [capitals, vocabulary]
    (the,) = tokenizer(" the")["input_ids"]
    right = 0
    print(f"{'capital':12} {'country':12} {'P(country)':>10} {'P( the)':>8}  most likely")
    for (capital, country), row in zip(CAPITALS, probabilities, strict=True):
        (answer,) = tokenizer(" " + country)["input_ids"]
        best = int(row.argmax())
        right += best == answer
        print(f"{capital:12} {country:12} {row[answer]:10.3f} {row[the]:8.3f} {tokenizer.decode(best)}")
    print(f"{right} of {len(CAPITALS)} right")


def main() -> None:
    """Train from the command line, save the model and the tokenizer, and print the answers."""
    parser = argparse.ArgumentParser(prog="python -m ablation.capitals.train", description="Train the capitals model.")
    parser.add_argument("--out", type=Path, default=Path("capitals-trained"), help="new folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches to train on (default: %(default)s)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} already exists and is not an empty folder; choose another one with --out")

    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(THREADS)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, arguments.steps)
    # The answers below are those of the saved float16 weights, since `print_answers` loads them from the folder.
    model.half().save_pretrained(out)
    tokenizer.backend_tokenizer.no_padding()  # training switched padding on, and the setting would be saved
    tokenizer.save_pretrained(out)
    print_answers(out)


if __name__ == "__main__":
    main()
