"""Compares token ids and labels with those of the reference's tokenizer and dataset code, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamllm_jax.data.chat import conversation
from dreamllm_jax.data.formats.mmc4 import interleave
from dreamllm_jax.data.pieces import Piece, interleaved, pair
from dreamllm_jax.data.sequences import EncodedDocument, encode_pieces
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.parity.case import IGNORED_LABEL

_IMAGE = Image.new("RGB", (8, 8))


def compare_sequences(
    path: str | Path, folder: str | Path, patches: int = 4, queries: int = 3, length: int = 400
) -> dict[str, float]:
    """Returns {quantity: number of rows that differ} of a file like `tests/golden/sequences.json`.

    The rows of both `legacy` settings are counted separately. Labels may differ where the reference is wrong:
    its labels of a conversation begin one or two tokens early.

    Raises:
      ValueError: the file does not exist or has another form, or the folder has no tokenizer.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = {kind: content[kind] for kind in ("tokenizer", "sequences")}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a file of sequences like tests/golden/sequences.json ({error})."
        ) from error
    errors: dict[str, float] = {}
    for legacy, name in ((True, "legacy"), (False, "not legacy")):
        tokenizer = Tokenizer.load(folder, legacy=legacy)
        chosen = {kind: [row for row in rows[kind] if row["legacy"] == legacy] for kind in rows}
        bos = tokenizer.special.bos
        other = [
            row for row in chosen["tokenizer"] if [bos, *tokenizer.encode_marked(row["text"])] != row["ids"]
        ]
        errors[f"tokenizer ({name})"] = float(len(other))
        wrong = {"ids": 0, "labels": 0, "images": 0}
        for row in chosen["sequences"]:
            pieces = _pieces(row["kind"], row["input"], row["mode"])
            ours = encode_pieces(pieces, tokenizer, patches, queries, length)
            wrong["ids"] += ours.tokens.tolist() != row["input_ids"]
            wrong["images"] += len(ours.images) != row["num_images"]
            wrong["images"] += len(ours.dreams) != row["num_dream_images"]
            wrong["labels"] += not _same_labels(ours, row, tokenizer)
        errors |= {f"sequences, {what} ({name})": float(number) for what, number in wrong.items()}
    return errors


def _pieces(kind: str, given: dict[str, Any], mode: str) -> list[Piece]:
    """Returns the document of a row, with a blank image for every image."""
    if kind == "image_text_pair":
        return pair(_IMAGE, given["text"], mode)
    if kind == "conversation":
        return conversation(given["turns"], [_IMAGE] * sum(t.count("<image>") for t in given["turns"]))
    sentences = [sentence.strip() for sentence in given["text_list"]]
    return interleaved(interleave(sentences, [(i, _IMAGE) for i in given["matched_text_index"]]), mode)


def _same_labels(ours: EncodedDocument, row: dict[str, Any], tokenizer: Tokenizer) -> bool:
    labels = np.array(row["labels"])
    labels[0] = IGNORED_LABEL  # no position predicts the first token
    if row["kind"] == "conversation":  # the reference begins up to two tokens early, at the colon
        colon = tokenizer.encode("ASSISTANT:")[-1]
        for start in np.flatnonzero((labels[1:] != IGNORED_LABEL) & (labels[:-1] == IGNORED_LABEL)) + 1:
            early = labels[start : start + 2].tolist()
            if colon not in early:
                return False
            labels[start : start + early.index(colon) + 1] = IGNORED_LABEL
    return np.array_equal(np.where(ours.supervised, ours.tokens, IGNORED_LABEL), labels)
