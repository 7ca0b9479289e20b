"""Small tokenizers of the kinds that people bring: their normalizers, splits, special tokens and chat templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The capital of Norway is Oslo.",
    "Question: 1 + 1?\nAnswer: two",
    "user assistant system",
    "a  b   c",
    "naïve café 漢字 🙂",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
HEADERS = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def _trained(tokenizer: Tokenizer, special: list[str], *, bytes_first: bool = False) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytes_first else []
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def _byte_level(
    normalizer: Any = None, *, digits: bool = False, regex: str | None = None, special: list[str]
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    parts += [pre_tokenizers.Split(Regex(regex), behavior="isolated")] if regex else []
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, special, bytes_first=True)


def _sentencepiece(*, dummy: bool, special: list[str]) -> Tokenizer:
    """A BPE with byte fallback; with a dummy space before every text, as Llama 2 has it, or without."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace] if dummy else [replace])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _trained(tokenizer, ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))])


def smollm2_like() -> PreTrainedTokenizerFast:
    """Byte-level, digits one by one; a begin-of-text token that the tokenizer does not set."""
    tokenizer = _byte_level(digits=True, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrapped(tokenizer, CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>")


def llama2_like() -> PreTrainedTokenizerFast:
    """Sentencepiece with a dummy space, byte fallback and a begin-of-text token that is set."""
    tokenizer = _sentencepiece(dummy=True, special=["<s>", "</s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return _wrapped(tokenizer, INST, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gpt2_like() -> PreTrainedTokenizerFast:
    """Byte-level with one token for begin and end, which is not set."""
    tokenizer = _byte_level(special=["<|endoftext|>"])
    return _wrapped(tokenizer, HEADERS, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def qwen_like() -> PreTrainedTokenizerFast:
    """Byte-level over NFC, with a split of its own and no begin-of-text token."""
    regex = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = _byte_level(normalizers.NFC(), regex=regex, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrapped(tokenizer, CHATML, eos_token="<|im_end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Sentencepiece without a dummy space, as Gemma has it."""
    tokenizer = _sentencepiece(dummy=False, special=["<bos>", "<eos>"])
    begin = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", begin)])
    return _wrapped(tokenizer, HEADERS, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def _wrapped(tokenizer: Tokenizer, template: str, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens.values()])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)
    wrapped.pad_token = tokens["eos_token"]
    wrapped.chat_template = template
    return wrapped


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    made.__name__: made for made in (smollm2_like, llama2_like, gpt2_like, qwen_like, byte_fallback)
}


def save(kind: str, folder: Path) -> str:
    """Write a tokenizer to a folder and return its path."""
    KINDS[kind]().save_pretrained(folder / kind)
    return str(folder / kind)
