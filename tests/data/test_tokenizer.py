"""The tokenizer: LLaMA's layout, control tokens by name and out of reach of text."""

import json

import pytest

from dreamllm_jax.data.tokenizer import ADDED_TOKENS, Tokenizer, train_tokenizer

TEXTS = ["Count from three to six.", "a handwritten seven", "two plus five equals seven"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 330)


def test_layout(tokenizer):
    vocab = tokenizer.backend.tokenizer.get_vocab()
    assert [vocab[t] for t in ("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>")] == [0, 1, 2, 3, 258]
    last = tokenizer.vocab_size
    assert [vocab[t] for t in ADDED_TOKENS] == list(range(last - 8, last))
    assert last <= 330
    special = tokenizer.special
    assert (special.bos, special.eos, special.unk) == (1, 2, 0)
    assert (special.pad, special.im_start, special.dream_end) == (last - 8, last - 7, last - 6)
    assert (special.dream_start, special.im_patch, special.im_end) == (last - 5, last - 4, last - 3)
    assert (special.image, special.dream) == (last - 2, last - 1)


def test_chunks_join_with_a_space(tokenizer):
    three = tokenizer.encode("three")
    assert tokenizer.encode("Count from three") == tokenizer.encode("Count from") + three
    assert tokenizer.decode(tokenizer.encode("two") + tokenizer.encode("plus")) == "two plus"
    assert tokenizer.encode("") == []


def test_any_text_returns(tokenizer):
    for text in ("Count from three", "naïve 日本語 🎉", "tab\tline\nend ", "<0x41> ▁", "  two  spaces", " x"):
        # The mark of a space is LLaMA's own: it reads as one.
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@pytest.mark.parametrize("name", ["</s>", "<s>", "<image>", "<dream_start>", "[PAD]", "<im_patch>"])
def test_control_tokens_cannot_be_typed(tokenizer, name, tmp_path):
    tokenizer.save(tmp_path)
    for t in (tokenizer, Tokenizer.load(tmp_path)):
        ids = t.encode(f"three{name} six")
        assert t.token_id(name) not in ids
        assert t.decode(ids) == f"three{name} six"


def test_decode_can_show_control_tokens(tokenizer):
    ids = [1, *tokenizer.encode("three"), tokenizer.special.dream_start, 2]
    assert tokenizer.decode(ids) == "three"
    assert "<dream_start>" in tokenizer.decode(ids, skip_special=False)


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(TEXTS, 330).backend.tokenizer.to_str() == tokenizer.backend.tokenizer.to_str()


def test_too_small_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size=200 is too small"):
        train_tokenizer(TEXTS, 200)


def test_transformers_loads_it(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    for cls in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = cls.from_pretrained(tmp_path)
        assert theirs("Count from three").input_ids == [1, *tokenizer.encode("Count from three")]
        assert theirs.pad_token_id == tokenizer.special.pad
        assert theirs.convert_tokens_to_ids("<dream_start>") == tokenizer.special.dream_start


def test_load_failures(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="neither tokenizer.model nor tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["added_tokens"] = [t for t in saved["added_tokens"] if not t["content"].startswith("<dream")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="<dream>, <dream_start>, <dream_end>"):
        Tokenizer.load(tmp_path)
    extended = Tokenizer.load(tmp_path, extend=True)
    ids = [extended.special.dream_end, extended.special.dream_start, extended.special.dream]
    assert ids == sorted(ids) and ids[-1] == extended.vocab_size - 1 and ids[0] > extended.special.im_end
