"""T5's tokenizer, read from a local file: text to token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAD, EOS = 0, 1  # of every T5
FILES = ("tokenizer.json", "spiece.model")  # the first is what the release reads


@dataclass(frozen=True)
class T5Tokenizer:
    """Texts to ids; `load_t5_tokenizer` makes one from a file.

    Attributes:
        pieces: ids of a text, without end mark.
        vocab_size: ids are below this.
        length: tokens per text; longer texts are cut, the end mark stays last.
    """

    pieces: Callable[[str], list[int]]
    vocab_size: int
    length: int

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [n, length], and which of them are tokens, bool [n, length].

        Every text ends with the end mark (EOS); the rest is padding. An empty text is one token.
        """
        tokens = np.full((len(texts), self.length), PAD, np.int32)
        used = np.zeros(tokens.shape, bool)
        for row, mask, text in zip(tokens, used, texts):
            ids = [*self.pieces(text)[: self.length - 1], EOS]
            row[: len(ids)] = ids
            mask[: len(ids)] = True
        return tokens, used


def load_t5_tokenizer(path: str | Path, length: int = 512) -> T5Tokenizer:
    """Reads a T5 tokenizer.

    Args:
        path: a folder in Hugging Face layout with `tokenizer.json` or `spiece.model` (the first is
            taken where both are there), or such a file under any name.
        length: tokens per text, end mark included; 512 as published.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package that reads this kind of file is not installed.
        ValueError: the file is not a T5 tokenizer, or the length is not positive.
    """
    if length < 1:
        raise ValueError(f"A text needs a length of 1 token or more (its end mark), got {length}.")
    file = _tokenizer_file(Path(path))
    with file.open("rb") as stream:
        is_json = stream.read(1) == b"{"
    pieces, vocab_size, marks = (_from_json if is_json else _from_sentencepiece)(file)
    if marks != (PAD, EOS):
        raise ValueError(
            f"{file} has the padding and end marks {marks} where T5 has {(PAD, EOS)}; use the "
            "tokenizer that belongs to the T5 weights."
        )
    return T5Tokenizer(pieces, vocab_size, length)


def _tokenizer_file(path: Path) -> Path:
    for file in (path, *(path / name for name in FILES)):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"There is no tokenizer at {path}; give a folder that holds {FILES[0]} or {FILES[1]} "
        "(as google-t5/t5-11b does), or one of these files."
    )


def _from_json(file: Path):
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"Reading {file} needs a package: pip install tokenizers.") from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{file} is not a tokenizer.json of Hugging Face: {error}") from error
    # What the file says of length and padding is for other uses; ours is the caller's.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    marks = tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>")
    pieces = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    return pieces, tokenizer.get_vocab_size(), marks


def _from_sentencepiece(file: Path):
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(f"Reading {file} needs a package: pip install sentencepiece.") from error
    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{file} is neither a tokenizer.json nor a sentencepiece model: {error}"
        ) from error
    return processor.encode, processor.vocab_size(), (processor.pad_id(), processor.eos_id())
