"""test_local_processes.py starts this as two processes: they agree, disagree, and one of them fails."""

import sys
from pathlib import Path

from dreamllm_jax import distributed

distributed.initialize()
distributed.initialize()  # does nothing

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from dreamllm_jax.checkpoint.model_folder import write_pretrained  # noqa: E402
from dreamllm_jax.config.base import build  # noqa: E402
from dreamllm_jax.config.data import DataConfig  # noqa: E402
from dreamllm_jax.config.model import GenerationConfig  # noqa: E402
from dreamllm_jax.config.train import MeshConfig  # noqa: E402
from dreamllm_jax.data.formats import tar_index  # noqa: E402
from dreamllm_jax.data.sources import open_documents  # noqa: E402
from dreamllm_jax.data.tokenizer import train_tokenizer  # noqa: E402
from dreamllm_jax.sharding import make_mesh, process_row_indices, shard_batch  # noqa: E402
from dreamllm_jax.train.preparation import prepare_index  # noqa: E402
from examples.handwriting import evaluate as evaluation  # noqa: E402
from examples.handwriting.words import corpus_text  # noqa: E402
from tests.data.datasets import picture, write_tar  # noqa: E402
from tests.data.fakes import WordTokenizer  # noqa: E402
from tests.distributed.saving import check_saving  # noqa: E402
from tests.train import tiny  # noqa: E402

folder, index = Path(sys.argv[1]), jax.process_index()
assert distributed.is_multi_process() and distributed.is_main() == (index == 0)
assert distributed.all_gather({"text": "ü" * (index + 1), "n": index}) == [
    {"text": "ü", "n": 0},
    {"text": "üü", "n": 1},
]
assert distributed.broadcast_from_main(["a", index]) == ["a", 0] and distributed.sum_over_processes(
    [1, index]
) == [2, 1]


def complaint(call, *args) -> str:
    try:
        call(*args)
    except (ValueError, OSError) as error:
        return str(error)
    raise AssertionError(f"{call.__name__}{args} went well")


distributed.check_equal_on_processes("recipe", "the same")
assert complaint(distributed.check_equal_on_processes, "recipe", f"mine {index}").startswith(
    "process 1 had a different recipe"
)
distributed.check_shared_folder(folder / "shared")
assert index or not list((folder / "shared").iterdir())  # process 0 has taken its token away
not_shared = complaint(distributed.check_shared_folder, folder / str(index), 0.2)
assert "is not one folder for all processes: process 1 cannot see" in not_shared
(folder / "file").write_text("")
assert complaint(distributed.check_shared_folder, folder / "file").startswith("process 0 cannot write into")
assert "which process 0 has written" in complaint(distributed.wait_for_file, folder / "never", 0.1)

# Rows: along data each process holds half of them; along tensor over both hosts, both hold all.
assert process_row_indices(make_mesh(MeshConfig(data=2, fsdp=1)), 4) == [2 * index, 2 * index + 1]
across = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2))
assert process_row_indices(across, 4) == [0, 1, 2, 3]
rows = np.arange(8.0, dtype=np.float32).reshape(4, 2)
for mesh, held in ((make_mesh(MeshConfig(data=2, fsdp=1)), rows[2 * index : 2 * index + 2]), (across, rows)):
    batch = shard_batch(held, mesh, batch_size=4)
    np.testing.assert_array_equal(distributed.to_host(batch), rows)
divided = jax.make_array_from_callback(
    (4, 2), NamedSharding(across, PartitionSpec(None, ("tensor",))), lambda cut: rows[cut]
)
assert distributed.spans_processes(divided)
np.testing.assert_array_equal(distributed.to_host(divided, 1, 3), rows[1:3])

config = tiny.config(vision=None, unet=None, vae=None)
tokenizer = train_tokenizer(corpus_text(), tiny.VOCABULARY)
check_saving(folder / "saving", config, tokenizer)

# Tars: process 0 alone reads their headers, and all know the pairs; other files are errors everywhere.
read, members = [], tar_index.members
tar_index.members = lambda path: read.append(path.name) or members(path)
if index == 0:
    for name in ("a.tar", "b.tar"):
        write_tar(folder / name, {"1.png": picture(), "1.txt": b"one"})
    (folder / "c.tar").write_bytes(b"no tar")
distributed.barrier("tars are written")
tars = build(DataConfig, {"sources": [{"format": "pairs", "path": f"{folder}/{{a,b}}.tar"}]})
prepare_index(tars, folder / "index")
assert len(open_documents(tars, 16, WordTokenizer(), index_folder=folder / "index").formats[0]) == 2
assert read == ([] if index else ["a.tar", "b.tar"]), read
wrong = build(DataConfig, {"sources": [{"format": "pairs", "path": f"{folder}/c.tar"}]})
assert "c.tar is not an uncompressed tar" in complaint(prepare_index, wrong, folder / "index")
assert "file" in complaint(prepare_index, tars, folder / "file" / "index")


# Evaluation: process 0 alone measures and writes a model, the others wait for it.
def evaluate(workdir: Path, quantize: str | None = None) -> bool:
    write_pretrained(workdir / "trained", tiny.random_params(config), config, tokenizer, GenerationConfig())
    evaluation.export(workdir / "trained", workdir / "exported")
    return True


evaluation.evaluate, evaluation.summary = evaluate, lambda workdir: "measured"
sys.argv = ["evaluate", f"--workdir={folder}"]
evaluation.main()
assert (folder / "exported" / "config.json").exists()

distributed.print_on_main("agreed")
distributed.barrier("before the end")
if index == 1:
    raise OSError("the disk is full")
distributed.barrier("never reached by all")
