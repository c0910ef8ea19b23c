"""A capture that was killed goes on where it was, and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import pytest

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.artifacts.store import verify_digest
from sphkv_cli.capture.options import CaptureOptions, TextSource
from sphkv_cli.capture.result import CaptureResult
from sphkv_cli.capture.stage import capture
from sphkv_cli.errors import ArtifactError
from sphkv_cli.models.load import LoadOptions

# Runs a capture whose process kills itself, with SIGKILL, at a given step of its progress.
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import torch
from sphkv_cli.capture.options import CaptureOptions, TextSource
from sphkv_cli.capture.stage import capture

folder, output, phase, steps, *texts = sys.argv[1:]
torch.set_num_threads(1)

class Killer:
    def start(self, description, total, unit):
        self.left = int(steps) if description.startswith(phase) else -1
    def advance(self, amount=1.0):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def finish(self):
        pass

options = CaptureOptions(folder, tuple(TextSource(Path(t)) for t in texts), document_tokens=100)
capture(options, Path(output), progress=Killer())
"""


def options(model: Path, texts: tuple[Path, ...], **changes: Any) -> CaptureOptions:
    return CaptureOptions(
        str(model),
        tuple(TextSource(path) for path in texts),
        **{"document_tokens": 100} | changes,
    )


def every_dataset(path: Path) -> dict[str, bytes]:
    """The bytes of every dataset of a file."""
    found: dict[str, bytes] = {}
    with h5py.File(path, "r") as file:
        file.visititems(
            lambda name, item: (
                found.__setitem__(name, item[()].tobytes())
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    return found


# 3 layers advance 3 times a document: step 11 is inside document 3, whose shard is half written.
@pytest.mark.parametrize(
    ("phase", "steps", "n_kept"), [("capturing", 11, 3), ("assembling", 4, -1)]
)
def test_a_killed_capture_resumes_to_the_same_content(
    phase: str, steps: int, n_kept: int, llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed.h5", tmp_path / "whole.h5"
    run = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, llama, killed, phase, str(steps), *texts],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not killed.exists()

    resumed = capture(options(llama, texts), killed, resume=True)
    uninterrupted = capture(options(llama, texts), whole)
    assert isinstance(resumed, CaptureResult)
    assert isinstance(uninterrupted, CaptureResult)
    assert resumed.n_resumed_documents == (n_kept if n_kept >= 0 else len(resumed.documents))
    assert resumed.digest == uninterrupted.digest
    assert every_dataset(killed) == every_dataset(whole)
    assert verify_digest(killed)
    assert not (tmp_path / "killed.h5.work").exists()


class Interrupt:
    """Progress that raises after a number of steps, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def start(self, description: str, total: float | None, unit: str) -> None:
        """Do nothing."""

    def advance(self, amount: float = 1.0) -> None:
        """Count down, then raise."""
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt

    def finish(self) -> None:
        """Do nothing."""


def interrupt(model: Path, texts: tuple[Path, ...], output: Path, steps: int) -> str:
    """What is said of it, beside that it was interrupted."""
    with pytest.raises(KeyboardInterrupt) as interrupted:
        capture(options(model, texts), output, progress=Interrupt(steps))
    assert not output.exists()
    return str(interrupted.value)


def test_an_interrupted_capture_leaves_no_artifact(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    output = tmp_path / "capture.h5"
    assert interrupt(llama, texts, output, steps=2) == ""
    assert not list(tmp_path.glob("*capture.h5*"))
    said = interrupt(llama, texts, output, steps=5)
    assert said.startswith("1 of ")
    assert f"documents are kept in {output}.work; go on with --resume" in said
    assert [path.name for path in tmp_path.glob("*capture.h5*")] == ["capture.h5.work"]


def test_an_unfinished_capture_is_neither_lost_nor_mixed(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    output = tmp_path / "capture.h5"
    interrupt(llama, texts, output, steps=5)
    with pytest.raises(ArtifactError, match=r"holds an unfinished capture \(1 documents\)"):
        capture(options(llama, texts), output)
    for change, name in (
        ({"query_stride": 7, "query_tail": 9}, "query_stride: 4, now 7"),
        ({"max_tokens": 300}, "max_tokens: null, now 300"),
        ({"store_dtype": "float32"}, 'store_dtype: "bfloat16", now "float32"'),
        ({"pre_rope": True}, "pre_rope: false, now true"),
    ):
        with pytest.raises(ArtifactError, match=f"made with another {name}"):
            capture(options(llama, texts, **change), output, resume=True)
    changed = capture(options(llama, texts, query_stride=7), output, force=True)
    assert isinstance(changed, CaptureResult)
    assert changed.n_resumed_documents == 0
    assert not (tmp_path / "capture.h5.work").exists()


def test_another_model_is_not_resumed_into(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    output, other = tmp_path / "capture.h5", tmp_path / llama.name
    interrupt(llama, texts, output, steps=5)
    shutil.copytree(llama, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1.0
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="made with another model_digest"):
        capture(options(other, texts), output, resume=True)


def test_one_output_is_written_by_one_process(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    from sphkv_cli.capture.work_folder import WorkFolder

    work = WorkFolder(tmp_path / "capture.h5", {}, resume=False, force=False)
    with pytest.raises(ArtifactError, match="another sphkv is writing"):
        capture(options(llama, texts), tmp_path / "capture.h5", force=True)
    work.close()
    assert not list(tmp_path.glob("capture*"))


def test_a_damaged_shard_is_named(llama: Path, texts: tuple[Path, ...], tmp_path: Path) -> None:
    output = tmp_path / "capture.h5"
    interrupt(llama, texts, output, steps=5)
    shard = tmp_path / "capture.h5.work" / "000.h5"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"000\.h5 is damaged; remove it"):
        capture(options(llama, texts), output, resume=True)
    shard.unlink()
    capture(options(llama, texts), output, resume=True)
    assert verify_digest(output)


MEASURED_RUN = r"""
import json, re, sys
from pathlib import Path
from sphkv_cli.capture.options import CaptureOptions, TextSource
from sphkv_cli.capture.stage import capture

folder, output, n_documents, text = sys.argv[1:]
options = CaptureOptions(
    folder,
    (TextSource(Path(text)),),
    document_tokens=512,
    max_tokens=512 * int(n_documents),
    query_stride=1,
    store_dtype="float32",
)
result = capture(options, Path(output))
assert len(result.documents) == int(n_documents)
# Not getrusage: on Linux a child starts with the peak of the process that forked it.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"peak": peak, "tensors": result.tensor_bytes}))
"""


def test_memory_does_not_grow_with_the_number_of_documents(save_model: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    folder = save_model(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
        )
    )
    text = tmp_path / "long.txt"
    text.write_text(" ".join(f"{i * i}" for i in range(2000)))
    measured = {}
    for n_documents in (3, 16):
        run = subprocess.run(
            [
                *(sys.executable, "-c", MEASURED_RUN),
                *(folder, tmp_path / f"{n_documents}.h5", str(n_documents), text),
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
        measured[n_documents] = json.loads(run.stdout.splitlines()[-1])
    added = measured[16]["tensors"] - measured[3]["tensors"]
    assert added > 100e6
    # Far less than what 13 more documents hold; the rest is the allocator's and Python's.
    assert measured[16]["peak"] - measured[3]["peak"] < 0.2 * added


def test_statistics_are_those_of_every_query_of_the_fit_documents(
    llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    import numpy as np

    all_queries, sampled = tmp_path / "all.h5", tmp_path / "sampled.h5"
    capture(options(llama, texts, query_stride=1, store_dtype="float32"), all_queries)
    capture(options(llama, texts, query_stride=9, query_tail=5, store_dtype="float32"), sampled)
    with CaptureReader(all_queries) as full, CaptureReader(sampled) as few:
        assert len(few.query_positions(0)) < 20
        positions = few.query_positions(0)
        for layer in range(full.n_layers):
            stacked = np.concatenate([full.queries(d, layer) for d in full.documents_of("fit")])
            exact = stacked.astype(np.float64)
            moment = np.einsum("thi,thj->hij", exact, exact) / len(exact)
            # Stored in float32, summed in float64 on both sides.
            np.testing.assert_allclose(few.query_mean[layer], exact.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(few.query_second_moment(layer), moment, rtol=1e-5, atol=1e-6)
            assert np.array_equal(few.queries(0, layer), full.queries(0, layer)[positions])
            assert np.array_equal(few.keys(0, layer), full.keys(0, layer))


@pytest.mark.parametrize(
    "load",
    [LoadOptions(device_map="auto"), LoadOptions(dtype="bfloat16"), LoadOptions(device="cpu")],
    ids=["device_map", "bfloat16", "device"],
)
def test_ways_to_run_a_model_capture_the_same_up_to_rounding(
    load: LoadOptions, llama: Path, texts: tuple[Path, ...], tmp_path: Path
) -> None:
    import numpy as np

    capture(options(llama, texts), tmp_path / "plain.h5")
    capture(options(llama, texts, load=load), tmp_path / "other.h5")
    with (
        CaptureReader(tmp_path / "plain.h5") as plain,
        CaptureReader(tmp_path / "other.h5") as other,
    ):
        assert other.model_digest == plain.model_digest
        keys, found = plain.keys(1, 2), other.keys(1, 2)
        # bfloat16 has 8 bits, and three layers of it add up.
        tolerance = 0.1 if load.dtype == "bfloat16" else 0.01
        assert np.linalg.norm(found - keys) < tolerance * np.linalg.norm(keys)
