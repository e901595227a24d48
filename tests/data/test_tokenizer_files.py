"""The tokenizer of a folder: the reference's ids, whichever of its files they come from."""

import json
import shutil

import numpy as np
import pytest

from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokenizer_backends import SentencePieceBackend
from tests.data.chat_examples import write_tokenizer

FILES = ("tokenizer.model", "added_tokens.json", "tokenizer_config.json")


@pytest.fixture
def folder(golden, tmp_path):
    """The files of the golden checkpoint's tokenizer."""
    place = tmp_path / "published"
    place.mkdir()
    for name in FILES:
        shutil.copy(golden / "dreamllm-a" / "checkpoint" / name, place / name)
    return place


def change(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_of_the_reference_and_of_what_is_saved(golden, folder, tmp_path, legacy):
    change(folder, "tokenizer_config.json", legacy=legacy)
    bare = Tokenizer.load(folder)
    bare.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    model = tmp_path / "saved" / "tokenizer.model"
    assert model.read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert not (tmp_path / "saved" / "tokenizer.json").exists()  # two files could disagree
    added = json.loads((tmp_path / "saved" / "added_tokens.json").read_text())
    assert added == json.loads((folder / "added_tokens.json").read_text())
    rows = json.loads((golden / "sequences.json").read_text())["tokenizer"]
    rows = [row for row in rows if row["legacy"] == legacy]
    assert len(rows) == 25
    for tokenizer in (bare, saved):
        assert tokenizer.legacy == legacy and tokenizer.special == bare.special
        for row in rows:
            assert [tokenizer.special.bos, *tokenizer.encode_marked(row["text"])] == row["ids"], row["text"]


def test_control_tokens_are_those_of_the_files(golden, folder):
    wanted = json.loads((golden / "dreamllm-a" / "reference.json").read_text())["special"]
    added = wanted["additional_special_tokens"]
    for drop in ("added_tokens.json", None):  # either of the two generations of files is enough
        if drop:
            (folder / drop).rename(folder / "aside")
        special = Tokenizer.load(folder).special
        assert (special.bos, special.eos, special.unk, special.pad) == (1, 2, 0, wanted["[PAD]"])
        assert {
            f"<{n}>": getattr(special, n) for n in ("im_patch", "im_start", "dream_end")
        }.items() <= added.items()
        if drop:
            (folder / "aside").rename(folder / drop)
            change(folder, "tokenizer_config.json", added_tokens_decoder={})


def test_legacy_is_the_default(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["legacy"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(folder).legacy


def test_a_vicuna_is_extended(folder):
    """LLaMA's own tokenizer has no control tokens of DreamLLM's; they follow its vocabulary."""
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no \[PAD\], <image>.*Load it with extend=True"):
        Tokenizer.load(folder)
    special = Tokenizer.load(folder, extend=True).special
    assert (special.pad, special.im_start, special.dream) == (512, 513, 519)


def test_what_a_fast_tokenizer_of_transformers_writes(folder, tmp_path):
    """Its `tokenizer.json` alone: control tokens as here, and chunks as its setting says."""
    transformers = pytest.importorskip("transformers")
    for legacy in (True, False):
        fast = transformers.LlamaTokenizerFast.from_pretrained(folder, legacy=legacy)
        fast.save_pretrained(tmp_path / "fast")
        (tmp_path / "fast" / "tokenizer.model").unlink(missing_ok=True)
        ours = Tokenizer.load(tmp_path / "fast")
        assert ours.special == Tokenizer.load(folder).special and ours.legacy == legacy
        assert ours.encode("hello world") == [386, 362, 442, 439, 331, 274, 442, 444]


def test_damaged_files(folder):
    change(folder, "added_tokens.json", **{"<dream>": 600})
    change(folder, "tokenizer_config.json", added_tokens_decoder={})
    with pytest.raises(ValueError, match="'<dream>' has id 600 there, but follows the vocabulary as 519"):
        Tokenizer.load(folder)
    (folder / "added_tokens.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="added_tokens.json holds a list; a JSON object is expected"):
        Tokenizer.load(folder)
    (folder / "added_tokens.json").write_text("{")
    with pytest.raises(ValueError, match="added_tokens.json is not readable JSON"):
        Tokenizer.load(folder)


def test_further_added_tokens_survive_saving(golden, tmp_path):
    """A folder may add tokens that are not DreamLLM's; they stay at their ids, and ours follow."""
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    shutil.copy(golden / "dreamllm-a" / "checkpoint" / "tokenizer.model", first)
    (first / "added_tokens.json").write_text(json.dumps({"<image>": 512, "<pad>": 513}))
    loaded = Tokenizer.load(first, extend=True)
    assert (loaded.special.image, loaded.token_id("<pad>"), loaded.special.pad) == (512, 513, 514)
    loaded.save(again)
    saved = Tokenizer.load(again)
    assert saved.special == loaded.special and saved.token_id("<pad>") == 513
    assert saved.encode_marked("a <pad> b") == loaded.encode_marked("a <pad> b")


def test_a_saved_tokenizer_begins_as_its_model_does_elsewhere(golden, tmp_path):
    """transformers puts `<s>` before a prompt, from the files that we write too."""
    transformers = pytest.importorskip("transformers")
    folder = golden / "dreamllm-a" / "checkpoint"
    ours = Tokenizer.load(folder)
    ours.save(tmp_path)
    expected = [1, *ours.encode("hello world")]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("hello world").input_ids == expected
    assert theirs.pad_token_id == ours.special.pad
    assert theirs.convert_tokens_to_ids("<dream_start>") == ours.special.dream_start


def test_damaged_models_are_one_sentence(golden, tmp_path):
    data = (golden / "dreamllm-a" / "checkpoint" / "tokenizer.model").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, len(data), 150):
        spoiled = bytearray(data)
        spoiled[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "tokenizer.model").write_bytes(spoiled)
        try:
            SentencePieceBackend((tmp_path / "tokenizer.model").read_bytes(), legacy=True)
        except ValueError as error:
            refused += 1
            assert "not a SentencePiece model, or a damaged one" in str(error)
    assert refused > 10


def test_names_are_those_of_the_files(folder, tmp_path):
    """Text begins and ends as the tokenizer's own files say, from old ones and new ones."""
    special = Tokenizer.load(write_tokenizer("llama3", tmp_path / "llama3", None), extend=True)
    assert special.names == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    assert special.special.bos == special.token_id("<|begin_of_text|>")
    assert special.special.unk == special.special.pad
    without = Tokenizer.load(write_tokenizer("qwen", tmp_path / "qwen", None), extend=True)
    assert without.names == {"eos_token": "<|im_end|>"}
    assert without.special.bos == without.special.eos == without.token_id("<|im_end|>")
    for given in (special, without):
        given.save(tmp_path / "again")
        again = Tokenizer.load(tmp_path / "again")
        assert again.special == given.special and again.names == given.names
    change(folder, "tokenizer_config.json", eos_token="", bos_token={"content": "<im_start>"})
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": {"content": "<unk>"}}))
    assert Tokenizer.load(folder).names == {
        "bos_token": "<im_start>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
