"""A tokenizer's own conversation template: the ids that transformers gives, and what cannot be used."""

import json

import pytest

from dreamllm_jax.data.chat_templates import derive, template_of
from dreamllm_jax.data.numbers import corpus_text
from dreamllm_jax.data.pieces import conversation
from dreamllm_jax.data.sequences import encode_pieces, encode_prompt
from dreamllm_jax.data.templates import TEMPLATES
from dreamllm_jax.data.tokenizer import Tokenizer, train_tokenizer

# In the manners that LLaMA's descendants are published with.
PROGRAMS = {
    "llama2": """{{ bos_token }}{% for m in messages %}
{% if m['role'] == 'user' %}{% if loop.index0 > 0 %}{{ bos_token }}{% endif %}
{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}{% else %}
{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "vicuna": """{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
{{ bos_token + 'A chat.' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}
{% else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}""",
    "zephyr": """{{ bos_token }}{% for m in messages %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}""",
    "parts": """{{ bos_token }}{% for m in messages %}{{ m['role'].upper() + ':' }}
{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}
{% generation %}{{ ' ' + part['text'] }}{% endgeneration %}
{% endfor %}{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
}
TALK = ["Count  from two to four.", "two three four", "Which digit </s> is this?", "seven"]


@pytest.fixture(scope="module")
def plain():
    return train_tokenizer([*corpus_text(), "USER: ASSISTANT: [INST] </s> | <> chat"], 420)


def with_program(tokenizer, folder, program):
    """The tokenizer as it is loaded from a folder that has a program."""
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(program)
    return Tokenizer.load(folder)


def messages(texts, parts):
    contents = [[{"type": "text", "text": text}] if parts else text for text in texts]
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_ids_are_those_of_transformers(name, plain, tmp_path):
    """Prompts and whole conversations; only that `</s>` in a question is text here."""
    transformers = pytest.importorskip("transformers")
    tokenizer = with_program(plain, tmp_path, PROGRAMS[name])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=PROGRAMS[name],
    )
    talk = [text.replace("</s> ", "") for text in TALK]

    def expected(texts, prompt):
        text = theirs.apply_chat_template(
            messages(texts, name == "parts"), tokenize=False, add_generation_prompt=prompt
        )
        return theirs(text, add_special_tokens=False).input_ids

    prompt = encode_prompt(talk[0], tokenizer, 4, 400, template="tokenizer")
    assert prompt.tokens.tolist() == expected(talk[:1], True)
    whole = encode_pieces(
        conversation(talk, template=template_of("tokenizer", tokenizer)), tokenizer, 4, 4, 400
    )
    wanted = expected(talk, False)
    assert whole.tokens.tolist() == wanted[: len(whole)] and len(wanted) - len(whole) < 3  # a line end
    learned = [int(t) for t, s in zip(whole.tokens, whole.supervised, strict=True) if s]
    assert tokenizer.decode(learned).replace(" ", "") == "twothreefourseven"
    assert learned.count(2) == 2


def test_control_names_in_a_question_stay_text(plain, tmp_path):
    tokenizer = with_program(plain, tmp_path, PROGRAMS["vicuna"])
    ids = encode_prompt("Which </s> <dream_start>?", tokenizer, 4, 200, template="tokenizer").tokens.tolist()
    assert ids.count(1) == 1 and 2 not in ids and tokenizer.special.dream_start not in ids


def test_what_is_said_loses_its_spaces_where_the_program_strips(plain, tmp_path):
    tokenizer = with_program(plain, tmp_path, PROGRAMS["llama2"])
    assert derive(PROGRAMS["llama2"]).trims and not derive(PROGRAMS["vicuna"]).trims
    said, bare = (encode_prompt(t, tokenizer, 4, 90, template="tokenizer") for t in ("  two ", "two"))
    assert said.tokens.tolist() == bare.tokens.tolist()


def test_the_known_templates_as_programs():
    """A program that writes what a named template writes gives that template."""
    ours = derive(PROGRAMS["llama2"])
    named = TEMPLATES["llama2"]
    for field in ("opening", "before_user", "after_user", "after_answer", "between", "glued", "cue", "unfit"):
        assert getattr(ours, field) == getattr(named, field), field


def test_where_the_program_is_kept(plain, tmp_path):
    """In a file of its own, or in tokenizer_config.json, alone or by names; and saved again."""
    plain.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    content = json.loads(path.read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": PROGRAMS["vicuna"]}]
    for found in (PROGRAMS["vicuna"], named):
        path.write_text(json.dumps(content | {"chat_template": found}))
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.chat_template == PROGRAMS["vicuna"]
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").chat_template == PROGRAMS["vicuna"]


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("{% for %}", "chat template is not readable"),
        ("{{ raise_exception('too old') }}", "cannot be used: too old; name another template"),
        ("{{ ''.__class__.__mro__ }}", "cannot be used"),
        ("hello", "leaves out what was said"),
        (
            "{% for m in messages %}{{ '<im_start>' + m['content'] + eos_token }}{% endfor %}",
            "writes <im_start>; of control tokens only <s> and </s> are supported",
        ),
    ],
)
def test_programs_that_cannot_be_used(program, sentence, plain, tmp_path):
    tokenizer = with_program(plain, tmp_path, program)
    with pytest.raises(ValueError, match=sentence):
        encode_prompt("two", tokenizer, 4, 90, template="tokenizer")


def test_what_never_ends_an_answer_is_no_teacher(plain, tmp_path):
    program = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}assistant:"
    tokenizer = with_program(plain, tmp_path, program)
    assert encode_prompt("two", tokenizer, 4, 90, template="tokenizer").tokens[0] == 1
    with pytest.raises(ValueError, match="cannot write conversations to learn from: its answers do not end"):
        conversation(["two", "three"], template=template_of("tokenizer", tokenizer))
    with pytest.raises(ValueError, match="'tokenizer' is the tokenizer's own, and this tokenizer has none"):
        template_of("tokenizer", plain)
