"""What capturing costs: time against a bare forward pass, peak memory, file size.

    python examples/benchmark_capture.py [--model smollm2] [--document-tokens 640] [--documents 8]

The bare pass runs the same model's body over the same documents, one at a time, without logits and
without keeping anything; capture adds listening, rounding, writing and syncing every document, and
assembling and digesting the file. Bare and captured passes alternate, and the least of each is
compared, as other work on the machine only ever adds time. Peak memory is that of a process of its
own per number of documents (three is the least: one each to fit, select and judge).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.capture.options import CaptureOptions, TextSource
from sphkv_cli.capture.result import CaptureResult
from sphkv_cli.capture.stage import capture

TEXTS = Path(__file__).parent / "text"
NOVELS = ("pride_and_prejudice.txt", "persuasion.txt", "emma.txt")


def options(arguments: argparse.Namespace, n_documents: int) -> CaptureOptions:
    """Capture `n_documents` documents of the bundled novels."""
    return CaptureOptions(
        model=arguments.model,
        texts=tuple(TextSource(TEXTS / name) for name in NOVELS),
        document_tokens=arguments.document_tokens,
        max_tokens=n_documents * arguments.document_tokens,
    )


def run_capture(arguments: argparse.Namespace, n_documents: int, folder: Path) -> CaptureResult:
    """One capture into a new file of `folder`, overwriting the last one."""
    result = capture(options(arguments, n_documents), folder / "capture.h5", force=True)
    assert isinstance(result, CaptureResult)
    return result


def bare_seconds(model: Any, documents: list[Any]) -> float:
    """The model's body over every document, nothing kept."""
    import torch

    body = model.get_decoder()
    started = time.perf_counter()
    with torch.inference_mode():
        for token_ids in documents:
            body(input_ids=token_ids, use_cache=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_time(arguments: argparse.Namespace) -> None:
    """Print the times of bare and captured passes, their ratio, and the sizes."""
    import torch

    from sphkv_cli.models.load import load_model
    from sphkv_cli.models.source import resolve_model

    setup = options(arguments, arguments.documents)
    model = load_model(resolve_model(arguments.model), setup.load)
    bare, captured = [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        result = run_capture(arguments, arguments.documents, Path(name))
        with CaptureReader(result.path) as reader:
            documents = [
                torch.from_numpy(reader.token_ids(document))[None].to(model.device)
                for document in reader.documents
            ]
        bare_seconds(model, documents[:1])
        for _ in range(arguments.repeats):
            bare.append(bare_seconds(model, documents))
            result = run_capture(arguments, arguments.documents, Path(name))
            captured.append((result.forward_s, result.assemble_s))
    forward, assemble = min(captured, key=sum)
    total = forward + assemble
    print(f"model            {result.model} on {model.device}, {torch.get_num_threads()} threads")
    print(f"tokens           {result.n_tokens} in {len(documents)} documents")
    print(f"bare forward     {min(bare):.2f} s, {result.n_tokens / min(bare):.0f} tokens/s")
    print(
        f"capture          {total:.2f} s ({forward:.2f} s documents, {assemble:.2f} s assembling)"
    )
    print(f"ratio            {total / min(bare):.3f} (of {arguments.repeats} runs each)")
    print(f"tensors          {result.tensor_bytes / 1e6:.1f} MB")
    print(
        f"file             {result.file_bytes / 1e6:.1f} MB, "
        f"{result.file_bytes / result.tensor_bytes:.4f} of the tensors"
    )


def peak_bytes() -> int:
    """Peak resident memory of this process.

    Not `getrusage`: on Linux a child starts with the peak of the process that forked it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")


def measure_memory(arguments: argparse.Namespace) -> None:
    """Print the peak memory of a process that captures 3, and of one that captures 16 documents."""
    for n_documents in (3, 16):
        command = [sys.executable, __file__, "--memory-of", str(n_documents)]
        command += ["--model", arguments.model]
        command += ["--document-tokens", str(arguments.document_tokens)]
        command += ["--folder", str(arguments.folder)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        measured = json.loads(run.stdout.splitlines()[-1])
        print(
            f"peak memory      {measured['peak_bytes'] / 1e6:.0f} MB for {n_documents} documents "
            f"({measured['tensor_bytes'] / 1e6:.0f} MB of tensors)"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--document-tokens", type=int, default=640)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: /tmp")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder = arguments.folder or Path(tempfile.gettempdir())
    if arguments.memory_of is None:
        measure_time(arguments)
        measure_memory(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        result = run_capture(arguments, arguments.memory_of, Path(name))
    print(json.dumps({"peak_bytes": peak_bytes(), "tensor_bytes": result.tensor_bytes}))


if __name__ == "__main__":
    main()
