# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A byte-level tokenizer without merges: any text in, any token id out."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for token ids below `vocab`.

    Ids 0 to 2 are the special tokens, then one id a byte; the rest decode to words.

    Raises:
        ValueError: `vocab` has no room for the special tokens and 256 bytes.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL_TOKENS, *letters]
    if vocab < len(words):
        raise ValueError(f"vocab is {vocab}, a byte-level one needs {len(words)}")
    words += [f"\u0120w{index}" for index in range(len(words), vocab)]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, begin, end = SPECIAL_TOKENS
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        clean_up_tokenization_spaces=False,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
