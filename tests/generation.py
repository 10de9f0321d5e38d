"""``generate`` on tiny models in several modes, on one process and over ranks."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from tests.tiny_models import SMALL, Case

VOCABULARY = SMALL["vocab_size"]
PAD = SMALL["pad_token_id"]
SEED = 100

# Without this, greedy tokens of random models are soon all alike.
VARIED: dict[str, Any] = dict(do_sample=False, no_repeat_ngram_size=2)
SAMPLED: dict[str, Any] = dict(do_sample=True, temperature=0.9, top_k=30, top_p=0.95)
MODES: dict[str, dict[str, Any]] = {
    "greedy": VARIED,
    "sampling": SAMPLED,
    "several": dict(SAMPLED, num_return_sequences=3),
    "beams": dict(do_sample=False, num_beams=4, no_repeat_ngram_size=2),
    "beams, several": dict(do_sample=False, num_beams=3, num_return_sequences=2, length_penalty=0.5),
    "beams, sampling": dict(SAMPLED, num_beams=3),
    "lookup": dict(do_sample=False, prompt_lookup_num_tokens=5, max_matching_ngram_size=2),
    "lookup, sampling": dict(SAMPLED, prompt_lookup_num_tokens=5, max_matching_ngram_size=2),
    "assisted": dict(do_sample=False),
    "assisted, sampling": dict(do_sample=True, temperature=0.9),
    "penalties": dict(do_sample=False, repetition_penalty=1.5, min_new_tokens=4, prefill_chunk_size=8),
}


@dataclass(frozen=True)
class Generation:
    """A call of ``generate``.

    lengths: of the prompts, one a sequence; shorter ones are padded on the left. chunk: of the prefill. more: further
    arguments of ``generate``, by name.
    """

    family: str
    mode: str = "greedy"
    lengths: tuple[int, ...] = (37,)
    chunk: int | None = None
    new: int = 64
    ends: tuple[int, ...] = ()
    more: tuple[tuple[str, Any], ...] = field(default=())

    def model(self, attention: str) -> Any:
        return Case(self.family).model(attention).eval()

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """ids ``[B, S]``, and the attention_mask where there is padding."""
        generator = torch.Generator().manual_seed(5)
        ids = torch.full((len(self.lengths), max(self.lengths)), PAD)
        for row, n in zip(ids, self.lengths, strict=True):
            prompt = torch.randint(1, VOCABULARY, (n,), generator=generator)
            if "lookup" in self.mode:  # what comes again is looked up, and is not all that comes
                prompt = prompt[:11].repeat(-(-n // 11))[:n]
            row[len(row) - n :] = prompt
        padded = len(set(self.lengths)) > 1
        return ids, (ids != PAD).long() if padded else None

    def arguments(self) -> dict[str, Any]:
        """Of ``generate``, but for tokens and cache."""
        given = dict(
            MODES[self.mode],
            max_new_tokens=self.new,
            eos_token_id=list(self.ends) or None,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
        )
        if "assisted" in self.mode:
            given["assistant_model"] = assistant(self.family)
        if self.more_of("stop_strings"):
            given["tokenizer"] = tokenizer()
        if self.more_of("streamer"):
            given["streamer"] = Collecting()
        return {**dict(self.more), **given}

    def more_of(self, name: str) -> Any:
        return dict(self.more).get(name)


@dataclass(frozen=True)
class Generated:
    """tokens ``[B, S + new]``, scores ``[new, B, vocabulary]``, and what a streamer was given, if there was one."""

    tokens: Tensor
    scores: Tensor
    streamed: tuple[int, ...] | None = None


class Collecting(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def assistant(family: str) -> Any:
    """A model that is right now and then."""
    model = Case(family).model("eager").eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    config = model.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 4, "constant"
    config.assistant_confidence_threshold = 0.0
    return model


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Token n is the nth letter; token 0 is padding."""
    letters = "_" + string.ascii_letters[: VOCABULARY - 1]
    characters = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="_")


def of(out: Any, streamer: Collecting | None = None) -> Generated:
    streamed = None if streamer is None else tuple(streamer.tokens)
    assert streamer is None or streamer.ended
    return Generated(out.sequences, torch.stack(out.scores), streamed)


@lru_cache
def on_one_process(asked: Generation) -> Generated:
    """By the library's eager attention and its own cache."""
    ids, padding = asked.inputs()
    model, arguments = asked.model("eager"), asked.arguments()
    torch.manual_seed(SEED)
    return of(model.generate(ids, attention_mask=padding, **arguments), arguments.get("streamer"))


def over_ranks(asked: Generation, cp: Any, capacity: int | None = None) -> Generated:
    """The same over the ranks of ``cp``, which is registered, each with a seed of its own."""
    from distflash.integrations import transformers as tf

    ids, padding = asked.inputs()
    model, arguments, cache = asked.model("distflash"), asked.arguments(), tf.ShardedCache(cp, capacity)
    torch.manual_seed(SEED + cp.rank)
    cache.prefill(model, ids, asked.chunk, padding)
    if "assisted" not in asked.mode:  # an assistant draws before the model's first step
        torch.manual_seed(SEED + cp.rank)
    out = model.generate(ids, attention_mask=padding, past_key_values=cache, **arguments)
    return of(out, arguments.get("streamer"))
