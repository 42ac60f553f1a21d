"""vLLM's plugin: what it gives vLLM, without vLLM; and vLLM itself where it is installed."""

import importlib.metadata
import importlib.util
import pickle
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

import singlequant as sq  # noqa: E402
from singlequant.integrations.vllm import Folder, Operator, register  # noqa: E402

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
FAST = {"method": "hadamard", "weights": "rtn", "bits": 4}
HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    sq.quantize_folder(sq.bundled_model(), out, sq.QuantConfig("w4a8", **FAST, ignore=(
        "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj")))
    return out


@pytest.fixture(scope="module")
def folder(packed):
    return Folder(packed)


@pytest.mark.parametrize(("name", "parts"), [
    ("self_attn.qkv_proj", ["q", "k", "v"]), ("self_attn.o_proj", ["o"]),
    ("mlp.gate_up_proj", ["gate", "up"]), ("mlp.down_proj", ["down"])])
def test_linears_that_vllm_fuses_are_ours_side_by_side(folder, name, parts):
    found = folder.linear(f"model.layers.2.{name}", FUSED)
    weights = folder.checkpoint.layer(2)
    site = next(site for site in folder.checkpoint.spec.layer(2).sites.values()
                if parts[0] in site.roles)
    x = torch.randn(3, site.k)
    expected = [sq._C.linear(x.numpy(), sq._C.PackedWeight(
        weights.linears[p].weight.words, weights.linears[p].weight.scales, site.k), 8,
        weights.clips.get(site.name, 1.0), weights.rotations.get(site.name)) for p in parts]
    assert np.array_equal(found(x).numpy(), np.concatenate(expected, -1))
    assert found(x.bfloat16()).dtype == torch.bfloat16


def test_tables_are_those_of_the_native_runtime(folder, packed):
    native = sq.load(packed)
    ids = torch.tensor([[1, 5, 2047]])
    rows = folder.table(False, torch.float32)(ids)
    assert np.array_equal(rows[0].numpy(), native.outer.embed(ids[0].numpy(), np.arange(3)))
    hidden = torch.randn(4, native.spec.width)
    assert np.array_equal(folder.table(True, torch.float32)(hidden).numpy(),
                          native.outer.logits(hidden.numpy()))
    assert folder.table(False, torch.bfloat16)(ids).dtype == torch.bfloat16


def test_unquantized_parts_are_left_to_vllm_and_mixed_ones_refused(folder):
    assert folder.linear("model.layers.0.mlp.down_proj", FUSED) is None
    with pytest.raises(ValueError, match="qkv_proj: expected all linears of it packed or none"):
        folder.linear("model.layers.1.self_attn.qkv_proj", FUSED)
    with pytest.raises(ValueError, match="expected a linear model.layers.0.mlp.fc1, as vLLM calls"):
        folder.linear("model.layers.0.mlp.fc1", FUSED)


def test_operators_stand_in_a_whole_graph(folder):
    """As vLLM compiles models: a graph without breaks, of any number of tokens."""
    linear, table = folder.linear("model.layers.2.mlp.down_proj", {}), folder.table(True, None)
    embed = Operator(lambda ids: torch.ones(*ids.shape, 5), 5, torch.float32)

    def forward(x, ids):
        return linear(x * 2) + 1, table(linear(x)), embed(ids)

    compiled = torch.compile(forward, fullgraph=True, backend="eager", dynamic=True)
    for tokens in (1, 4):
        k = folder.checkpoint.layer(2).linears["down"].weight.shape[1]
        x, ids = torch.randn(tokens, k), torch.arange(tokens)
        for found, expected in zip(compiled(x, ids), forward(x, ids), strict=True):
            assert torch.equal(found, expected)


def test_a_folder_goes_to_another_process(folder):
    again = pickle.loads(pickle.dumps(folder))
    assert again.checkpoint.path == folder.checkpoint.path


def test_what_is_no_packed_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="model: expected a packed folder on this machine"):
        Folder("a/model")
    with pytest.raises(ValueError, match="expected a packed folder, found an unquantized model"):
        Folder(sq.bundled_model())


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_the_file_is_imported_and_registers_nothing():
    with pytest.raises(ImportError, match="vllm"):
        register()


def test_entry_point_names_the_function():
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "singlequant" not in points.names:
        pytest.skip("the package is not installed with this entry point")
    assert points["singlequant"].load() is register


GENERATE = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64)
    ids = [int(i) for i in sys.argv[2].split(",")]
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (out,) = llm.generate({"prompt_token_ids": ids}, sampling)
    print("tokens", *out.outputs[0].token_ids)
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_vllm_generates_what_the_native_runtime_does(tmp_path):
    out = tmp_path / "out"
    sq.quantize_folder(sq.bundled_model(), out, sq.QuantConfig("w4a16", **FAST))
    native = sq.load(out, kv_bits=32)
    ids = native.encode("The function returns").tolist()
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    done = subprocess.run([sys.executable, script, out, ",".join(map(str, ids))],
                          capture_output=True, text=True)
    expected = native.generate(ids, 12, stop_tokens=[])
    assert f"tokens {' '.join(map(str, expected))}\n" in done.stdout, done.stderr[-3000:]
