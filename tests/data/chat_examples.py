"""Chat templates as models are published with them, and small tokenizers of the kinds that they have."""

import json
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dreamllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from examples.handwriting.words import corpus_text

TEXTS = [*corpus_text(), "USER: ASSISTANT: [INST] </s> | <> chat system user assistant You are helpful."]

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}
{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""

VICUNA = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim + ' ' %}
{% set messages = messages[1:] %}{% else %}{% set system = 'A chat. ' %}{% endif %}
{{ bos_token + system }}
{% for message in messages %}
{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] | trim + ' ' }}
{% else %}{{ 'ASSISTANT: ' + message['content'] | trim + eos_token }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

ZEPHYR = """{{ bos_token }}{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# Qwen2.5's without tools.
CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or
           (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# Qwen3's without tools: an answer after the last question has its thoughts, earlier ones lose them.
THINKING = """{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and ns.searching %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or thoughts) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thoughts + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
                 + message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# As training frameworks rewrite ChatML, so that it says what is learned.
MARKED = """{% for message in messages %}{% if message.role == 'assistant' %}
{{ '<|im_start|>assistant\\n' }}
{%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{% else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The space before an answer is the prompt's; no prompt alone can be encoded as the conversation is.
SPACED = """{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}
{{ 'ASSISTANT: ' }}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}{{ 'USER: ' + message.content + ' ' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"""

# Multimodal models' messages are lists of parts.
PARTS = """{{ bos_token }}{% for message in messages %}{{ message['role'].upper() + ': ' }}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
{{- eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

# Phi-3's control tokens take the spaces after them.
STRIPPING = """{{ bos_token }}{% for message in messages %}
{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' + '\\n' }}{% endif %}"""

# Template -> the tokenizer that it comes with.
KINDS = {
    "llama2": (LLAMA2, "llama"),
    "vicuna": (VICUNA, "llama"),
    "zephyr": (ZEPHYR, "llama"),
    "parts": (PARTS, "llama"),
    "spaced": (SPACED, "llama"),
    "chatml": (CHATML, "qwen"),
    "thinking": (THINKING, "qwen"),
    "marked": (MARKED, "qwen"),
    "llama3": (LLAMA3, "llama3"),
    "stripping": (STRIPPING, "phi3"),
}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(kind: str, folder: Path, template: str | None) -> Path:
    """A folder as a model has it: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("llama", "phi3"):
        train_tokenizer(TEXTS, 420).save(folder)
        if kind == "phi3":
            _strip(folder, ["<|user|>", "<|assistant|>", "<|end|>"])
    else:
        _byte_level(kind, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def load(kind: str, folder: Path, template: str | None) -> Tokenizer:
    """The tokenizer of such a folder, with DreamLLM's control tokens."""
    return Tokenizer.load(write_tokenizer(kind, folder, template), extend=True)


def _byte_level(kind: str, folder: Path) -> None:
    """Qwen's has no token to begin a text, Llama 3's has; neither needs one for the unknown."""
    special, plain = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "<think>", "</think>"]
    config = {"bos_token": None, "eos_token": "<|im_end|>", "unk_token": None}
    if kind == "llama3":
        special = [f"<|{n}|>" for n in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id")]
        special, plain = [*special, "<|eot_id|>"], []
        config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    made.add_special_tokens(special)
    made.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in plain])
    made.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def _strip(folder: Path, names: list[str]) -> None:
    """Adds tokens that take the spaces after them."""
    path = folder / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(str(path))
    made.add_special_tokens([tokenizers.AddedToken(n, special=True, rstrip=True) for n in names])
    made.save(str(path))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "<unk>"})
    )
