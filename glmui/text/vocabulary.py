"""The sentencepiece vocabularies of the three models: ChatGLM-6B has one, ChatGLM2 and 3 share another."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from glmui.errors import ModelError
from glmui.text.model_files import ChatGLMFamily

NAMES: dict[ChatGLMFamily, str] = {
    "chatglm": "ice_text.model",
    "chatglm2": "tokenizer.model",
    "chatglm3": "tokenizer.model",
}
MODELS: dict[ChatGLMFamily, str] = {
    "chatglm": "ChatGLM-6B",
    "chatglm2": "ChatGLM2-6B",
    "chatglm3": "ChatGLM3-6B",
}

# Pieces by which each vocabulary is known. ChatGLM2 and 3 have their special ids behind their pieces.
UNK, PAD, MASK, GMASK, SOP, EOP = 0, 3, 130000, 130001, 130004, 130005
CHATGLM_PLACES = {"<unk>": UNK, "<pad>": PAD, "[MASK]": MASK, "[gMASK]": GMASK, "<sop>": SOP, "<eop>": EOP}
CHATGLM2_PLACES = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x00>": 3, "<0xFF>": 258}
CHATGLM2_PIECES = 64789


def vocabulary_file(path: Path, family: ChatGLMFamily) -> Path:
    """The vocabulary in a folder (or the file itself). Raises ModelError("model_no_vocabulary")."""
    file = path / NAMES[family] if path.is_dir() else path
    if not file.is_file():
        raise ModelError("model_no_vocabulary", file=file, name=NAMES[family])
    return file


def open_vocabulary(file: Path, family: ChatGLMFamily) -> sentencepiece.SentencePieceProcessor:
    """The file's pieces. Raises ModelError: "model_other_vocabulary" where it is the vocabulary of a model
    of the other kind, "model_wrong_vocabulary" where it is none."""
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(file.read_bytes())
        found = _belongs_to(pieces)
    except (OSError, RuntimeError) as error:
        raise _wrong("model_wrong_vocabulary", file, family) from error
    if found is None:
        raise _wrong("model_wrong_vocabulary", file, family)
    if (found == "chatglm") != (family == "chatglm"):
        raise _wrong("model_other_vocabulary", file, family, found=MODELS[found])
    return pieces


def _belongs_to(pieces: sentencepiece.SentencePieceProcessor) -> ChatGLMFamily | None:
    """Whose vocabulary it is; "chatglm2" stands for ChatGLM3 too."""

    def has(places: dict[str, int]) -> bool:
        return all(pieces.piece_to_id(name) == place for name, place in places.items())

    if has(CHATGLM_PLACES):
        return "chatglm"
    return "chatglm2" if pieces.get_piece_size() == CHATGLM2_PIECES and has(CHATGLM2_PLACES) else None


def _wrong(code: str, file: Path, family: ChatGLMFamily, **values: str) -> ModelError:
    return ModelError(code, file=file, name=NAMES[family], model=MODELS[family], **values)
