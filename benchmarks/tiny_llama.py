"""A random Llama of two layers whose tokens are single bytes: a whole model that loads and answers in no time."""

from __future__ import annotations

from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)


def save_tiny_llama(folder: Path, seed: int = 0, max_position_embeddings: int = 256, times: int = 1) -> dict[str, int]:
    """Write model and tokenizer, `times` wider and deeper; returns the vocabulary."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    vocab = {text: id for id, text in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE).save_pretrained(
        folder
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=32 * times, intermediate_size=64 * times, num_hidden_layers=2 * times,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=max_position_embeddings,
        initializer_range=0.5, bos_token_id=None, eos_token_id=len(letters) - 1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return vocab
