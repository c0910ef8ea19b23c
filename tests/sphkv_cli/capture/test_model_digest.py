"""A model is recognised however it is run, and not confused with another."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sphkv_cli.models.digest import model_digest
from sphkv_cli.models.load import LoadOptions, load_model, weight_of
from sphkv_cli.models.source import ModelSource


def load(folder: Path, dtype: str = "float32") -> Any:
    return load_model(ModelSource("m", str(folder), local_only=True), LoadOptions(dtype=dtype))


def test_the_digest_is_that_of_the_model_not_of_the_way_it_is_run(
    llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "elsewhere")
    digest = model_digest(load(llama))
    assert model_digest(load(tmp_path / "elsewhere")) == digest
    assert model_digest(load(llama, "bfloat16")) == digest
    eager = load(llama)
    eager.set_attn_implementation("eager")
    assert model_digest(eager) == digest


@pytest.mark.parametrize("changed", ["weight", "rope"])
def test_another_model_has_another_digest(changed: str, llama: Path) -> None:
    model = load(llama)
    before = model_digest(model)
    if changed == "weight":
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.mul_(1.1)
    else:
        model.config.rope_parameters["rope_theta"] = 5e5
    assert model_digest(model) != before


def test_weights_that_accelerate_has_put_away_are_fetched(llama: Path) -> None:
    from accelerate import cpu_offload

    model = load(llama)
    digest = model_digest(model)
    linear = model.model.layers[1].self_attn.o_proj
    weight = weight_of(linear).clone()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert linear.weight.is_meta
    assert model_digest(model) == digest
    assert torch.equal(weight_of(linear), weight)
