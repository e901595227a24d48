"""`DreamLLM` as users call it: batches equal single calls, seeds, guidance, folders, invalid calls."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from dreamllm_jax.checkpoint.model_folder import save_pretrained
from dreamllm_jax.config.train import MeshConfig
from dreamllm_jax.document import Document
from dreamllm_jax.generate.api import DreamLLM
from dreamllm_jax.sharding import make_mesh


def assert_same_pictures(a, b):
    """Asserts equality up to rounding: batches of different sizes are summed in different orders."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 2


def assert_same_documents(a, b):
    assert [p for p in a if isinstance(p, str)] == [p for p in b if isinstance(p, str)]
    assert [isinstance(p, str) for p in a] == [isinstance(p, str) for p in b]
    assert a.finish_reason == b.finish_reason
    assert_same_pictures(a.images, b.images)


def difference(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).mean()


@pytest.fixture(scope="module")
def prompts():
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(7).integers(0, 256, (12, 20, 3), np.uint8))
    return ["one", Document([image, "What comes next?", image]), "Count from three to six."]


def test_batched_text_is_single_text(model, prompts):
    together = model.generate_text(prompts, temperature=1.0, seed=5)
    alone = [model.generate_text(p, temperature=1.0, seed=5 + i) for i, p in enumerate(prompts)]
    assert together == alone
    assert together != model.generate_text(prompts, temperature=1.0, seed=50)
    assert together == model.generate_text(prompts, temperature=1.0, seed=[5, 6, 7])
    assert model.generate_text(prompts, temperature=1.0, top_p=1e-6, seed=1) == model.generate_text(prompts)


def test_batched_images_are_single_images(model, prompts):
    together = model.generate_images(prompts[:2], num_images_per_prompt=2, seed=3)
    assert [len(pictures) for pictures in together] == [2, 2]
    assert together[0][0].size == (8, 8) and together[0][0].mode == "RGB"
    for i, prompt in enumerate(prompts[:2]):
        assert_same_pictures(model.generate_images(prompt, num_images_per_prompt=2, seed=3 + i), together[i])
    assert_same_pictures(model.generate_images(prompts[1], seed=4), together[1][:1])
    assert difference(*together[0]) > 1  # every image has its own noise


def test_batched_documents_are_single_documents(model, prompts):
    together = model.generate_document(prompts, temperature=0.7, seed=19)
    assert any(d.images for d in together) and any(d.text for d in together)
    # Rows end at different times.
    assert len({tuple(isinstance(p, str) for p in d) for d in together}) > 1
    for i, prompt in enumerate(prompts):
        assert_same_documents(model.generate_document(prompt, temperature=0.7, seed=19 + i), together[i])


def test_guidance_and_negative_prompts(model):
    def draw(**settings):
        return model.generate_images("one", seed=1, **settings)[0]

    plain = draw(guidance_scale=1.0)
    assert difference(plain, draw(guidance_scale=1.0 + 1e-6)) < 0.1  # scale 1 turns guidance off
    assert difference(plain, draw(guidance_scale=1.0, negative_prompt="two")) == 0
    guided = draw()
    assert difference(plain, guided) > 0.5
    negative = draw(negative_prompt="two plus two")
    assert difference(guided, negative) > 0.5
    # With the prompt itself as the negative prompt, guidance has no effect.
    assert difference(plain, draw(negative_prompt="one")) < 0.1
    assert difference(guided, draw()) == 0
    assert difference(guided, draw(guidance_rescale=1.0)) > 0.1


def test_more_pictures_than_one_batch_holds(model, monkeypatch):
    monkeypatch.setattr("dreamllm_jax.generate.images.BATCH_SIZES", (1, 4))
    many = model.generate_images("one", num_images_per_prompt=6, seed=2)
    assert len(many) == 6  # in batches of 4, 1 and 1
    assert_same_pictures(model.generate_images("one", num_images_per_prompt=2, seed=2), many[:2])
    assert difference(many[0], many[4]) > 1 and difference(many[1], many[5]) > 1


def test_a_model_on_a_mesh_generates_the_same(model, devices, flatten_params):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    spread = DreamLLM(
        model.config, model.params, model.tokenizer, model.generation, mesh, replicated=("unet",)
    )
    axes = {top: str({x.sharding.spec for x in jax.tree.leaves(spread.params[top])}) for top in spread.params}
    assert "fsdp" in axes["llama"] and "fsdp" not in axes["unet"] and "tensor" in axes["unet"]
    with pytest.raises(ValueError, match=r"replicated names u-net; choose among .*unet"):
        DreamLLM(model.config, model.params, model.tokenizer, model.generation, mesh, replicated=("u-net",))
    assert_same_documents(spread.generate_document("one", seed=3), model.generate_document("one", seed=3))


def test_bfloat16_generates(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    half = DreamLLM.from_pretrained(tmp_path / "m", dtype="bfloat16")
    assert half.params["llama"]["norm"]["scale"].dtype == jnp.bfloat16
    document = half.generate_document("one", guidance_scale=1.0, seed=3)
    assert document.finish_reason in ("stop", "length")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        DreamLLM.from_pretrained(tmp_path / "m", dtype="int8")


def test_folder_there_and_back(model, tmp_path, flatten_params):
    model.save_pretrained(tmp_path / "model")
    again = DreamLLM.from_pretrained(tmp_path / "model")
    assert again.config == model.config and again.generation == model.generation
    assert again.tokenizer.special == model.tokenizer.special
    before, after = flatten_params(model.params), flatten_params(again.params)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(before[path], after[path])
    assert again.generate_text("one") == model.generate_text("one")


def test_foreign_folders(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        DreamLLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no config.json"):
        DreamLLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="has no weights"):
        DreamLLM.from_pretrained(tmp_path)


def test_an_incomplete_folder(model, tmp_path, flatten_params):
    params = dict(flatten_params(model.params))
    name = sorted(params)[0]
    params["llama/strange"] = params.pop(name)
    save_pretrained(tmp_path, params, model.config, model.tokenizer, model.generation)
    with pytest.raises(ValueError) as error:
        DreamLLM.from_pretrained(tmp_path)
    message = str(error.value)
    assert f"{name} is missing" in message and "llama/strange does not belong to it" in message
    config = json.loads((tmp_path / "config.json").read_text())
    del config["generation"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks generation; the folder is damaged"):
        DreamLLM.from_pretrained(tmp_path)


def test_saving_spares_what_is_no_model(model, tmp_path):
    """Saving replaces an older model, but nothing else."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than a saved model"):
        model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    for _ in range(2):
        model.save_pretrained(tmp_path / "model")
    assert DreamLLM.from_pretrained(tmp_path / "model").config == model.config


@pytest.fixture
def nothing_compiles(model, monkeypatch):
    """Fails on every call of compiled code. Runtime type checks are off, as in a user's session."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def refuse(*args, **kwargs):
        raise AssertionError("This came as far as the model.")

    monkeypatch.setattr(model._conditions, "_unconditional", {})  # discards the records of earlier calls
    for function in ("api.decode_text", "conditions.dream"):
        monkeypatch.setattr(f"dreamllm_jax.generate.{function}", refuse)
    monkeypatch.setattr("dreamllm_jax.generate.engine.prefill", refuse)


@pytest.mark.parametrize(
    "call, wrong",
    [
        (lambda m, d: m.generate_text([]), "list of prompts is empty"),
        (lambda m, d: m.generate_document(3), "A prompt is a int"),
        (lambda m, d: m.generate_images([d.images[0]]), "give a string or a Document"),
        (lambda m, d: m.generate_text("one " * 200), "at most 95 fit"),
        (lambda m, d: m.generate_document("one " * 200), "at most 95 fit"),
        (lambda m, d: m.generate_text(Document(d.images * 20)), "20 images"),
        (lambda m, d: m.generate_document(Document(d.images * 20)), "20 images"),
        (lambda m, d: m.generate_images("one", negative_prompt="one " * 93), "with 4 for the dream"),
        (lambda m, d: m.generate_document("one", negative_prompt="one " * 93), "with 4 for the dream"),
        (lambda m, d: m.generate_images("one", negative_prompt=["one"]), "negative_prompt is a list"),
        (
            lambda m, d: m.generate_text("one", max_new_tokens=95),
            "together they exceed the model's context of 96",
        ),
        (lambda m, d: m.generate_images("one " * 93), "with 4 for the dream it exceeds"),
        (lambda m, d: m.generate_text("one", seed=[1, 2]), "2 seeds for 1 prompts"),
        (lambda m, d: m.generate_text("one", seed=0.5), "seed is 0.5"),
        (lambda m, d: m.generate_text("one", temperature=-1.0), "temperature is -1.0"),
        (lambda m, d: m.generate_text("one", top_p=0.0), "top_p 0.0"),
        (lambda m, d: m.generate_text("one", max_new_tokens=0), "max_new_tokens is 0"),
        (lambda m, d: m.generate_images("one", num_images_per_prompt=0), "num_images_per_prompt is 0"),
        (lambda m, d: m.generate_images("one", num_images_per_prompt=1.5), "num_images_per_prompt is 1.5"),
        (lambda m, d: m.generate_images("one", num_images_per_prompt="2"), "num_images_per_prompt is '2'"),
        (
            lambda m, d: m.generate_text("one", temperature=float("nan")),
            "temperature is nan; it must be finite",
        ),
        (lambda m, d: m.generate_images("one", guidance_scale=float("inf")), "guidance_scale is inf"),
        (lambda m, d: m.generate_text("one", seed=-1), "seed -1 .*between 0 and 4294967295"),
        (lambda m, d: m.generate_text(["one", "two"], seed=2**32 - 1), "seed 4294967296 "),
        (
            lambda m, d: m.generate_images("one", sampler="plms"),
            "Unknown sampler 'plms'; known: ddim, ddpm",
        ),
        (lambda m, d: m.generate_document("one", sampler="plms"), "Unknown sampler 'plms'"),
        (lambda m, d: m.generate_images("one", num_inference_steps=5000), "num_steps is 5000"),
        (lambda m, d: m.generate_images("one", eta=0.5, sampler="euler"), "eta is 0.5"),
        (lambda m, d: m.generate_images("one", guidance_scale=0.5), "guidance_scale is 0.5"),
        (lambda m, d: m.generate_images("one", guidance_rescale=2.0), "guidance_rescale is 2.0; it must lie"),
        (lambda m, d: m.generate_images("one", num_inference_steps=2.5), "num_inference_steps: got 2.5"),
        (lambda m, d: m.generate_text("one", max_new_tokens="8"), "max_new_tokens: got '8' .str.; expected"),
        (lambda m, d: m.generate_document("one", max_images=True), "max_images: got True"),
    ],
)
def test_wrong_calls_are_one_sentence_before_anything_compiles(model, picture, nothing_compiles, call, wrong):
    with pytest.raises(ValueError, match=wrong) as error:
        call(model, Document([picture(0)]))
    assert "\n" not in str(error.value)


def test_a_broken_picture_is_named(model, tmp_path, picture, nothing_compiles):
    from PIL import Image

    picture(0, 64).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="broken.png"):
        model.generate_text(Document([Image.open(tmp_path / "broken.png")]))
    with pytest.raises(ValueError, match="broken.png"):
        model.generate_document(Document([Image.open(tmp_path / "broken.png")]))


def test_a_model_that_cannot_see_draws_all_the_same(variant, picture, nothing_compiles, monkeypatch):
    blind = variant(vision=None)
    with pytest.raises(ValueError, match="1 images, but this model has no vision tower"):
        blind.generate_text(Document([picture(0), "one"]))
    monkeypatch.undo()
    document = blind.generate_document("one", max_images=1, seed=3)
    assert len(document.images) == 1


def test_a_model_that_cannot_draw_writes_all_the_same(variant, model):
    writer = variant(unet=None, vae=None)
    with pytest.raises(ValueError, match="no image decoder"):
        writer.generate_images("one")
    document = writer.generate_document("one")
    assert not document.images
    assert document.text == model.generate_text("one") == writer.generate_text("one")


def test_models_without_language_or_with_another_tokenizer(model):
    with pytest.raises(ValueError, match="no language model"):
        DreamLLM(dataclasses.replace(model.config, llama=None), {}, model.tokenizer)
    small = dataclasses.replace(model.config, llama=dataclasses.replace(model.config.llama, vocab_size=300))
    with pytest.raises(ValueError, match="embeds 300"):
        DreamLLM(small, model.params, model.tokenizer)


def test_sdxl_conditions_reach_the_picture(model, variant):
    """Tests the pooled condition, and that of the negative prompt."""
    unet = dataclasses.replace(
        model.config.unet,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 8,
    )
    sdxl = variant(unet=unet)
    drawn = sdxl.generate_images("one", seed=1)[0]
    assert difference(drawn, sdxl.generate_images("one", negative_prompt="two", seed=1)[0]) > 0.5
    kernel = np.asarray(sdxl.params["global_projector"]["linear_0"]["kernel"])
    other = variant(unet=unet, params={"global_projector/linear_0/kernel": 3 * kernel})
    assert difference(drawn, other.generate_images("one", seed=1)[0]) > 0.5
