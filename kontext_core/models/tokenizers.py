"""The two tokenizers of FLUX over the `tokenizers` package: T5 (unigram or BPE) and CLIP (byte-level BPE).

Both pad to a fixed length, and both say what the model will not see: the text that was cut off, and the words
that the vocabulary does not have. Ids are those of transformers' own classes reading the same files.

Source: huggingface/transformers `models/{t5,clip}/tokenization_*.py`; openai/CLIP `simple_tokenizer.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from tokenizers.models import BPE

logger = logging.getLogger("kontext")

T5_LENGTH = 512
CLIP_LENGTH = 77

# What CLIP splits text into before its merges: contractions, runs of letters, single digits, runs of the
# rest.
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A batch of tokenized prompts.

    Attributes:
        ids: (B, L) int64, padded.
        cut: per prompt, the end of its text that did not fit; "" if all of it did.
        unknown: per prompt, the words in what was kept that hold characters the vocabulary lacks, each once.
    """

    ids: Tensor
    cut: list[str]
    unknown: list[list[str]]


class _FixedLengthTokenizer:
    """Encode, cut, add the special tokens, pad; the subclasses say which special tokens."""

    prefix: Sequence[int]

    def __init__(
        self, tokenizer: Tokenizer, *, max_length: int, eos_id: int, pad_id: int, unk_id: int | None
    ) -> None:
        if max_length < 2:
            raise ValueError(f"the tokenizer's max_length is {max_length}; it must be at least 2.")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.unk_id = unk_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, prompts: Sequence[str]) -> Tokens:
        """Tokenize prompts to (B, max_length) ids; an empty prompt is fine.

        Raises:
            ValueError: prompts is a single string, or holds something that is not a string.
        """
        if isinstance(prompts, str):
            raise ValueError(
                f"prompts is the string {prompts[:40]!r}; give a list of prompts, one for each picture."
            )
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt is {prompt!r} ({type(prompt).__name__}); it must be a string.")
        room = self.max_length - len(self.prefix) - 1
        ids = torch.full((len(prompts), self.max_length), self.pad_id, dtype=torch.int64)
        cut, unknown = [], []
        for row, (prompt, encoding) in enumerate(
            zip(prompts, self.tokenizer.encode_batch(list(prompts), add_special_tokens=False), strict=True)
        ):
            kept = [*self.prefix, *encoding.ids[:room], self.eos_id]
            ids[row, : len(kept)] = torch.tensor(kept)
            cut.append(prompt[encoding.offsets[room][0] :] if len(encoding.ids) > room else "")
            unknown.append(self._unknown_words(prompt, encoding, room))
        return Tokens(ids=ids, cut=cut, unknown=unknown)

    def _unknown_words(self, prompt: str, encoding: Encoding, room: int) -> list[str]:
        """Words, split at white space, that an unknown token among the first `room` touches."""
        words: dict[str, None] = {}
        for token, (start, end) in zip(encoding.ids[:room], encoding.offsets[:room], strict=True):
            if token != self.unk_id or self.tokenizer.id_to_token(token) == prompt[start:end]:
                continue
            while start > 0 and not prompt[start - 1].isspace():
                start -= 1
            while end < len(prompt) and not prompt[end].isspace():
                end += 1
            words.update(dict.fromkeys(prompt[start:end].split()))
        return list(words)


class T5Tokenizer(_FixedLengthTokenizer):
    """prompt tokens, `</s>`, then `<pad>` up to max_length."""

    prefix = ()

    @classmethod
    def from_path(cls, path: str | Path, *, max_length: int | None = None) -> T5Tokenizer:
        """Read a folder with tokenizer.json, or that file itself.

        Args:
            path: the folder or file.
            max_length: tokens, the end token included; by default model_max_length of the
                tokenizer_config.json beside it, or 512.

        Raises:
            ValueError: the file is not there, is no tokenizer, or lacks T5's special tokens.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            hint = ""
            if (path / "spiece.model").is_file():
                hint = " There is a spiece.model; take the tokenizer.json of the same model instead."
            raise ValueError(f"no T5 tokenizer at {path}: {file.name} is not there.{hint}")
        tokenizer = _read_tokenizer(file)
        config = _read_json(file.parent / "tokenizer_config.json")
        return cls(
            tokenizer,
            max_length=_max_length(config, T5_LENGTH) if max_length is None else max_length,
            eos_id=_token_id(tokenizer, _content(config.get("eos_token"), "</s>"), file),
            pad_id=_token_id(tokenizer, _content(config.get("pad_token"), "<pad>"), file),
            unk_id=_token_id(tokenizer, _content(config.get("unk_token"), "<unk>"), file),
        )


class ClipTokenizer(_FixedLengthTokenizer):
    """`<|startoftext|>`, prompt tokens, `<|endoftext|>`, then padding (FLUX's CLIP pads with the end
    token)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        start_id: int,
        eos_id: int,
        pad_id: int,
        unk_id: int | None,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, eos_id=eos_id, pad_id=pad_id, unk_id=unk_id)
        self.prefix = [start_id]

    @classmethod
    def from_path(
        cls, path: str | Path | tuple[str | Path, str | Path], *, max_length: int | None = None
    ) -> ClipTokenizer:
        """Read a folder (vocab.json and merges.txt, or tokenizer.json), a tokenizer.json, or (vocab, merges).

        Args:
            path: the folder, the file, or the pair.
            max_length: tokens, start and end included; by default model_max_length of the
                tokenizer_config.json beside it, 77 at most (the host's own copy says 8192, which no CLIP
                takes).

        Raises:
            ValueError: a file is not there, is no tokenizer, or lacks CLIP's special tokens.
        """
        if isinstance(path, (tuple, list)):
            vocab, merges = (Path(part) for part in path)
        else:
            folder = Path(path)
            vocab, merges = folder / "vocab.json", folder / "merges.txt"
            single = folder / "tokenizer.json" if folder.is_dir() else folder
            if not (vocab.is_file() and merges.is_file()) and single.is_file():
                return cls._build(_read_tokenizer(single), single, max_length)
        absent = [file.name for file in (vocab, merges) if not file.is_file()]
        if absent:
            raise ValueError(
                f"no CLIP tokenizer at {vocab.parent}: {' and '.join(absent)} is not there "
                "(vocab.json with merges.txt, or a tokenizer.json, is needed)."
            )
        return cls._build(_clip_from_vocab(vocab, merges), vocab, max_length)

    @classmethod
    def _build(cls, tokenizer: Tokenizer, file: Path, max_length: int | None) -> ClipTokenizer:
        config = _read_json(file.parent / "tokenizer_config.json")
        end = _content(config.get("eos_token"), CLIP_END)
        return cls(
            tokenizer,
            max_length=min(_max_length(config, CLIP_LENGTH), CLIP_LENGTH)
            if max_length is None
            else max_length,
            start_id=_token_id(tokenizer, _content(config.get("bos_token"), CLIP_START), file),
            eos_id=_token_id(tokenizer, end, file),
            pad_id=_token_id(tokenizer, _content(config.get("pad_token"), end), file),
            unk_id=_token_id(tokenizer, _content(config.get("unk_token"), end), file),
        )


def clip_pipeline(model: BPE) -> Tokenizer:
    """CLIP's text preparation around a byte-level BPE model: NFC, single spaces, lower case, split, bytes."""
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens([AddedToken(token) for token in (CLIP_START, CLIP_END) if token in known])
    return tokenizer


def _clip_from_vocab(vocab: Path, merges: Path) -> Tokenizer:
    from tokenizers.models import BPE

    try:
        model = BPE.from_file(
            str(vocab),
            str(merges),
            unk_token=CLIP_END,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{vocab} and {merges.name} are no CLIP vocabulary and merges: {error}") from error
    return clip_pipeline(model)


def _read_tokenizer(file: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{file} is not a tokenizer.json that can be read: {error}") from error


def _read_json(file: Path) -> dict:
    """The object in a JSON file; {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}; a tokenizer config is an object.")
    return value


def _max_length(config: dict, default: int) -> int:
    """model_max_length; absent, or transformers' "no limit" of 1e30, means the default."""
    length = config.get("model_max_length", default)
    return int(length) if isinstance(length, (int, float)) and length < 100_000 else default


def _content(token: str | dict | None, default: str) -> str:
    """A special token's text; configs write it as a string or as an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return default if token is None else token


def _token_id(tokenizer: Tokenizer, token: str, file: Path) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"{file} has no token {token!r}: it belongs to another kind of text encoder.")
    return number
