"""`tokenizer.model` without sentencepiece: what sentencepiece makes of any text, and what is no such file."""

import random

import pytest
import sentencepiece

from dreamllm_jax.data.sentencepiece_model import backend_of, read_model

WORDS = "the cat and a dog drew seven lines over twenty  two big hats, then counted them again".split(" ")
ALPHABET = [
    *"abcdefghijklmnop     .,?!\n\tABCé日1234",
    "▁",
    "<s>",
    "</s>",
    "  ",
    "🎉",
    "ﬁ",
    "Å",
    " the",
    "and ",
]


def texts(number, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 30))) for _ in range(number)]


@pytest.fixture(scope="module", params=["llama", "trims", "nfkc"])
def trained(request, tmp_path_factory):
    """A small model with the options of LLaMA's, with trimmed spaces, and with normalized characters."""
    rng = random.Random(1)
    lines = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12))) for _ in range(500)]
    prefix = tmp_path_factory.mktemp(request.param) / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc" if request.param == "nfkc" else "identity",
        remove_extra_whitespaces=request.param == "trims",
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def different(path, number):
    """The texts whose ids, or whose way back, are not sentencepiece's."""
    theirs, ours = sentencepiece.SentencePieceProcessor(str(path)), backend_of(read_model(path), legacy=True)
    ours.encode_special_tokens = True
    found = []
    for text in texts(number):
        ids = ours.encode(text, add_special_tokens=False).ids if text else []
        if ids != theirs.encode(text) or ours.decode(ids) != theirs.decode(ids):
            found.append(text)
    return found


def test_ids_are_those_of_sentencepiece(trained):
    assert different(trained, 3000) == []


def test_ids_of_the_reference_model(golden):
    assert different(golden / "dreamllm-a" / "checkpoint" / "tokenizer.model", 3000) == []


def test_what_the_file_holds(golden):
    path = golden / "dreamllm-a" / "checkpoint" / "tokenizer.model"
    model, theirs = read_model(path), sentencepiece.SentencePieceProcessor(str(path))
    assert [p.text for p in model.pieces] == [theirs.id_to_piece(i) for i in range(len(theirs))]
    assert [p.score for p in model.pieces] == pytest.approx([theirs.get_score(i) for i in range(len(theirs))])
    assert model.control_names() == ["<unk>", "<s>", "</s>"] and model.dummy_prefix and model.trims


def test_what_is_no_such_file(golden, tmp_path):
    whole = (golden / "dreamllm-a" / "checkpoint" / "tokenizer.model").read_bytes()
    unigram = tmp_path / "unigram"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20), model_prefix=str(unigram), vocab_size=30, minloglevel=2
    )
    for name, data, words in (
        ("cut", whole[: len(whole) // 2 + 3], "a field reaches beyond the end"),
        ("empty", b"", "it has no pieces"),
        ("text", b"This is no model at all.", "is no SentencePiece model, or is damaged"),
        ("unigram", unigram.with_suffix(".model").read_bytes(), "its algorithm is not BPE"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            read_model(tmp_path / name)
