"""The two libraries behind a tokenizer: the reference's ids, offsets, and no control token out of text."""

import json
import random

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models

from dreamllm_jax.data.tokenizer import ADDED_TOKENS, Tokenizer
from dreamllm_jax.data.tokenizer_backends import SentencePieceBackend
from tests.data.chat_examples import CHATML, MARKED, load

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


def train(folder, **options):
    """A small model with the options of LLaMA's."""
    rng = random.Random(1)
    lines = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12))) for _ in range(500)]
    options = dict(normalization_rule_name="identity", remove_extra_whitespaces=False) | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module", params=["llama", "trims", "nfkc", "golden"])
def path(request, tmp_path_factory, golden):
    """With the options of LLaMA's, with trimmed spaces, with normalized characters; and the reference's."""
    if request.param == "golden":
        return golden / "dreamllm-a" / "checkpoint" / "tokenizer.model"
    options = {
        "llama": {},
        "trims": {"remove_extra_whitespaces": True},
        "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    }
    return train(tmp_path_factory.mktemp(request.param), **options[request.param])


def reference(path, text, legacy, continues):
    """What the slow `LlamaTokenizer` of transformers 4.35 makes of one chunk, in its own words."""
    content = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    if legacy:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes()).encode(text)
    content.normalizer_spec.add_dummy_prefix = False
    model = sentencepiece.SentencePieceProcessor(model_proto=content.SerializeToString())
    text = text.replace("▁", " ") if continues else "▁" + text.replace("▁", " ")
    if not text.startswith(("▁", " ")):
        return model.encode(text)
    return model.encode("<unk>" + text)[len(model.encode("<unk>")) :]


@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_ids_are_those_of_the_reference(path, legacy, continues):
    backend = SentencePieceBackend(path.read_bytes(), legacy)
    for text in filter(None, texts(600)):
        prefix = legacy or not continues
        ids, spans = backend.encode_with_offsets(text, prefix)
        assert ids == backend.encode(text, prefix) == reference(path, text, legacy, continues), text
        assert [start for start, _ in spans] == sorted(start for start, _ in spans)
        assert all(0 <= start <= end <= len(text) for start, end in spans)


def test_decoding_is_that_of_sentencepiece(path):
    backend = SentencePieceBackend(path.read_bytes(), legacy=True)
    theirs = sentencepiece.SentencePieceProcessor(str(path))
    for text in texts(600):
        assert backend.decode(theirs.encode(text), True) == theirs.decode(theirs.encode(text))


@pytest.mark.parametrize("legacy", [False, True])
def test_decoding_shows_control_tokens(tmp_path, legacy):
    train(tmp_path)
    tokenizer = Tokenizer.load(tmp_path, extend=True, legacy=legacy)
    text = "a <dream> cat</s>"
    ids = tokenizer.encode_marked(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids).split() == ["a", "cat"]
    size = tokenizer.vocab_size
    with pytest.raises(ValueError, match=f"{size} is not an id of the tokenizer in .*; its ids are below"):
        tokenizer.decode([size])


def test_what_is_no_such_file(golden, tmp_path):
    whole = (golden / "dreamllm-a" / "checkpoint" / "tokenizer.model").read_bytes()
    for name, data in (("cut", whole[: len(whole) // 2 + 3]), ("empty", b""), ("text", b"This is no model.")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(data)
        with pytest.raises(ValueError, match="tokenizer.model is not a SentencePiece model, or a dam"):
            Tokenizer.load(tmp_path / name)


def unreachable(tokenizer, names):
    """Asserts that no text makes these tokens, and that every text comes back."""
    control = {tokenizer.token_id(name) for name in tokenizer.control}
    rng = random.Random(0)
    strange = [*names, *ADDED_TOKENS, *tokenizer.control, "two", " ", "<", ">", "\n", "日"]
    for _ in range(300):
        text = "".join(rng.choice(strange) for _ in range(rng.randint(1, 8)))
        for continues in (False, True):
            ids, spans = tokenizer.encode_with_offsets(text, continues)
            assert ids == tokenizer.encode(text, continues)
            assert control.isdisjoint(ids), text
            assert all(0 <= start <= end <= len(text) for start, end in spans)
            assert [start for start, _ in spans] == sorted(start for start, _ in spans)
        back = tokenizer.decode(tokenizer.encode(text), skip_special=False)
        assert back.replace(" ", "") == text.replace(" ", "")


def test_added_tokens_that_the_template_writes_cannot_be_typed(tmp_path):
    """A library that finds them in text is not asked again with their names whole."""
    tokenizer = load("qwen", tmp_path / "chat", CHATML + "{% if false %}<tool_call>{% endif %}")
    assert "<tool_call>" in tokenizer.control and "<think>" not in tokenizer.control
    unreachable(tokenizer, ["<tool_call>"])
    assert tokenizer.encode("<tool_call>") != [tokenizer.token_id("<tool_call>")]
    # A word that somebody added, and that means nothing to the template, is a word.
    assert tokenizer.encode("<think>") == [tokenizer.token_id("<think>")]


def test_pieces_that_a_model_defines_cannot_be_typed(tmp_path):
    """Control tokens inside of `tokenizer.model`, which sentencepiece itself finds in text."""
    names = ["<|im_start|>", "<|im_end|>"]
    train(tmp_path, user_defined_symbols=names)
    plain = Tokenizer.load(tmp_path, extend=True)
    assert plain.encode("a<|im_end|>b").count(plain.token_id("<|im_end|>")) == 1
    (tmp_path / "chat_template.jinja").write_text(MARKED)
    for legacy in (True, False):
        tokenizer = Tokenizer.load(tmp_path, extend=True, legacy=legacy)
        assert set(names) <= set(tokenizer.control)
        unreachable(tokenizer, names)


def test_merges_that_lead_to_a_control_token(tmp_path):
    """A tokenizer.json whose pieces join to `</s>`, as converters wrote them."""
    letters = ["<unk>", "<s>", "</s>", "<", "/", "s", ">", "</", "s>", "a"]
    vocab = {piece: i for i, piece in enumerate(letters)}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>")]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    made.add_special_tokens(["<unk>", "<s>", "</s>", *ADDED_TOKENS])
    made.encode_special_tokens = True
    assert made.encode("a</s>").ids == [9, 2]  # the library alone is deceived
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": True}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a</s>") == [9, 3, 4, 8]
    assert tokenizer.encode("<s>a<s>") == [3, 8, 9, 3, 8]
    assert tokenizer.encode_with_offsets("a</s>")[1] == [(0, 1), (1, 2), (2, 3), (3, 5)]
    assert tokenizer.encode_marked("a</s>") == [9, 2]


def test_names_that_a_normalizer_makes(tmp_path):
    """Text that becomes a control token's name only on the way: then every character is encoded alone."""
    from tokenizers import normalizers

    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *"</s>a"])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.add_special_tokens(["<unk>", "<s>", "</s>", *ADDED_TOKENS])
    made.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("<think>{{ messages[0].content }}</s>")
    tokenizer = Tokenizer.load(tmp_path)
    assert made.encode("a<THINK>").ids == [7, made.token_to_id("<think>")]
    assert tokenizer.token_id("<think>") not in tokenizer.encode("a<THINK>")
