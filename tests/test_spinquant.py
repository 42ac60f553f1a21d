"""Learned rotations: the network against our runtime, the optimiser against its definition."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", reason="needs the torch extra")

from singlequant import _C  # noqa: E402
from singlequant._C import FormatError  # noqa: E402
from singlequant.checkpoint.folder import load_checkpoint  # noqa: E402
from singlequant.checkpoint.views import RandomizedHadamard  # noqa: E402
from singlequant.config import QuantConfig  # noqa: E402
from singlequant.methods import spinquant, spinquant_learn, spinquant_network  # noqa: E402
from singlequant.methods.quarot import quarot_checkpoint  # noqa: E402
from singlequant.methods.spinquant import online_rotations, spinquant_checkpoint  # noqa: E402
from singlequant.models.families import FAMILIES  # noqa: E402
from singlequant.models.parts import Stored  # noqa: E402
from singlequant.runtime.model import Model  # noqa: E402
from singlequant.runtime.open import load  # noqa: E402
from singlequant.study.evaluate import perplexity  # noqa: E402
from singlequant.sweep.layer import quantize  # noqa: E402
from singlequant.sweep.run import save  # noqa: E402
from singlequant.sweep.texts import bundled_model, bundled_path, calibration_windows  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
MODELS = {
    "gqa-tied": {"tie": True},
    "mha-bias-untied": {"tie": False, "bias": True, "kv_heads": 4},
    "gqa-bias": {"bias": True},
    "wide-heads": {"head_dim": 24, "dtype": "bfloat16"},
    "llama3-rope": {"rope_scaling": LLAMA3},
    "mistral": {"architecture": "MistralForCausalLM"},
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
}


def random_orthogonal(order, seed):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((order, order)))[0]
    return torch.from_numpy(q.astype(np.float32))


def random_rotations(spec, seed=0):
    r2 = [random_orthogonal(spec.attention.head_dim, [seed, i]) for i in range(spec.layers)]
    return random_orthogonal(spec.hidden, seed), torch.stack(r2)


def tokens_of(checkpoint, count=2, length=40, seed=5):
    return np.random.default_rng(seed).integers(0, checkpoint.spec.vocab, (count, length))


def torch_logits(checkpoint, tokens, R1, R2, weight_bits=16, activation_bits=16, clip=1.0):
    network = spinquant_network.Network(checkpoint)
    with torch.no_grad():
        network.rotate(R1, R2, weight_bits)
        return network.logits(torch.from_numpy(tokens), activation_bits, clip).numpy()


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_unrounded_logits_are_the_runtimes_for_any_rotation(tmp_path, make_checkpoint, options):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path / "m", **options))
    tokens = tokens_of(checkpoint)
    expected = Model(checkpoint).forward(tokens)
    for seed in (0, 1):
        found = torch_logits(checkpoint, tokens, *random_rotations(checkpoint.spec, seed))
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_sliding_window_is_the_runtimes(tmp_path, make_checkpoint):
    folder = make_checkpoint(tmp_path / "m", architecture="MistralForCausalLM")
    plain = load_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 7}))
    windowed = load_checkpoint(folder)
    tokens = tokens_of(windowed)
    expected = Model(windowed).forward(tokens)
    found = torch_logits(windowed, tokens, *random_rotations(windowed.spec))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found - Model(plain).forward(tokens)).max() > 0.1


def test_linears_that_share_a_tensor_are_the_runtimes(tmp_path, monkeypatch):
    """Phi-3's q, k and v are rows of one tensor, its gate and up of another."""
    row = dataclasses.replace(
        FAMILIES["LlamaForCausalLM"], name="Phi3ForCausalLM",
        fused=(Stored("model.layers.{i}.self_attn.qkv_proj.weight", ("q", "k", "v")),
               Stored("model.layers.{i}.mlp.gate_up_proj.weight", ("gate", "up"))),
        ignored_keys=("original_max_position_embeddings",),
    )  # fmt: skip
    monkeypatch.setitem(FAMILIES, row.name, row)
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(tmp_path / "m")
    checkpoint = load_checkpoint(tmp_path / "m")
    tokens = tokens_of(checkpoint)
    found = torch_logits(checkpoint, tokens, *random_rotations(checkpoint.spec))
    for ours in (checkpoint, quarot_checkpoint(checkpoint)):
        np.testing.assert_allclose(found, Model(ours).forward(tokens), atol=1e-3)


def test_norms_that_no_rotation_passes_are_refused(model):
    checkpoint = load_checkpoint(model)
    (kind,) = checkpoint.spec.kinds
    norms = {place: dataclasses.replace(norm, kind="layer") for place, norm in kind.norms.items()}
    kinds = (dataclasses.replace(kind, norms=norms),)
    other = dataclasses.replace(checkpoint, spec=dataclasses.replace(checkpoint.spec, kinds=kinds))
    with pytest.raises(ValueError, match="expected RMSNorms in front of attention and MLP alone"):
        spinquant_network.Network(other)


# Loss and norms of the gradients of R1 and R2 that an independent decoder in plain torch gave, by
# bits of weights and activations.
KEPT = {
    (4, 4): (4.1448851, 4.7093124, 0.5708629),
    (16, 16): (4.0397964, 5.2370939, 0.5820185),
    (4, 16): (4.0613441, 5.0673981, 0.5611245),
    (16, 8): (4.0404291, 5.2155995, 0.5809991),
}


@pytest.mark.parametrize("bits", KEPT)
def test_losses_and_gradients_are_those_of_an_independent_decoder(bits):
    checkpoint = load_checkpoint(bundled_model())
    windows = calibration_windows(checkpoint, QuantConfig(calibration_tokens=512),
                                  bundled_path("calibration"))[:, :256]
    R1, R2 = (r.requires_grad_() for r in random_rotations(checkpoint.spec))
    network = spinquant_network.Network(checkpoint)
    loss = network.loss(torch.from_numpy(windows), R1, R2, bits, 1.0)
    loss.backward()
    expected, *norms = KEPT[bits]
    # an activation on a boundary of rounding may fall on its other side
    assert loss.item() == pytest.approx(expected, rel=2e-6 if bits[1] == 16 else 5e-4)
    assert [float(r.grad.norm()) for r in (R1, R2)] == pytest.approx(
        norms, rel=2e-5 if bits[1] == 16 else 1e-2)


def test_a_weight_that_is_not_finite_is_named(tmp_path, make_checkpoint):
    from safetensors.numpy import load_file, save_file

    path = make_checkpoint(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].flat[3] = np.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="model.layers.1.self_attn.o_proj.weight, rows 0 to"):
        spinquant_network.Network(load_checkpoint(path))


def test_rounded_logits_are_those_of_the_packed_folder(tmp_path, make_checkpoint):
    """What is learned on is what is deployed; codes on a rounding boundary may differ."""
    checkpoint = load_checkpoint(make_checkpoint(tmp_path / "m", dtype="float32", bias=True))
    R1, R2 = random_rotations(checkpoint.spec)
    view = spinquant_checkpoint(checkpoint, R1.numpy(), R2.numpy())
    config = QuantConfig("w4a4", "none", "rtn", 4, clip=0.9, head_bits=16, embedding_bits=16)
    layers = [online_rotations(view.spec, i) for i in range(view.spec.layers)]
    out = save(quantize(view, layers, config), tmp_path / "out", view, config)
    packed = load(out, kv_bits=32)  # as torch's attention
    tokens = tokens_of(checkpoint)
    expected, plain = packed.forward(tokens), Model(checkpoint).forward(tokens)
    found = torch_logits(checkpoint, tokens, R1, R2, 4, 4, 0.9)
    assert np.mean((found - expected) ** 2) < 0.02 * np.mean((plain - expected) ** 2)


@pytest.mark.parametrize(("bits", "clip"), [(4, 1.0), (4, 0.8), (8, 1.0)])
def test_fake_quantize_rounds_as_the_core_does(bits, clip):
    x = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    x[3] = 0.0
    codes, scales, _ = _C.quantize(x, bits, 0, True, clip, False)
    found = spinquant_network.fake_quantize(torch.from_numpy(x), bits, clip).numpy()
    np.testing.assert_allclose(found, _C.dequantize(codes, scales), rtol=1e-6, atol=1e-7)


def test_fake_quantize_passes_gradients_straight_through():
    x = torch.randn(5, 8, requires_grad=True)
    gradient = torch.randn(5, 8)
    spinquant_network.fake_quantize(x, 4, 0.5).backward(gradient)
    torch.testing.assert_close(x.grad, gradient)
    assert spinquant_network.fake_quantize(x, 16) is x


def test_gradients_of_the_rotations_are_those_of_plain_autograd(model):
    """The fused linear against weights rotated and rounded as ordinary operations."""
    checkpoint = load_checkpoint(model)
    network = spinquant_network.Network(checkpoint)
    tokens, gradients = torch.from_numpy(tokens_of(checkpoint)), []
    fused = spinquant_network.fused_linear()

    class Plain:
        @staticmethod
        def apply(x, rounded, weight, R1, transposed):
            rotated = R1.T @ weight if transposed else weight @ R1
            return x @ spinquant_network.fake_quantize(rotated, 4).T

    for kind in (fused, Plain):
        R1, R2 = (r.clone().requires_grad_() for r in random_rotations(checkpoint.spec))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spinquant_network, "fused_linear", lambda kind=kind: kind)
            network.loss(tokens, R1, R2, (4, 4), 1.0).backward()
        gradients.append((R1.grad, R2.grad))
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gradient_without_rounding_is_tangential(model):
    """Along the manifold the unrounded loss does not change: R^T G is symmetric."""
    checkpoint = load_checkpoint(model)
    network = spinquant_network.Network(checkpoint)
    R1, R2 = (r.requires_grad_() for r in random_rotations(checkpoint.spec))
    network.loss(torch.from_numpy(tokens_of(checkpoint)), R1, R2, (16, 16), 1.0).backward()
    for r, g in zip([R1, *R2], [R1.grad, *R2.grad], strict=True):
        product = (r.T @ g).detach()
        assert (product - product.T).abs().max() < 1e-4 * g.abs().max() + 1e-7


def dense_cayley(x, gradient, rate):
    """(I - alpha/2 W)^-1 (I + alpha/2 W) X in float64, W and alpha as in Li et al. 2020."""
    start, v = x.T.astype(np.float64), -gradient.T.astype(np.float64)
    a = v @ start.T - 0.5 * start @ (start.T @ v @ start.T)
    w = a - a.T
    alpha = min(rate, 1.0 / np.abs(w).sum(axis=0).max())
    eye = np.eye(len(w))
    return np.linalg.solve(eye - alpha / 2 * w, (eye + alpha / 2 * w) @ start).T, alpha


@pytest.mark.parametrize("scale", [1e-3, 1e-1, 10.0], ids=["tiny", "small", "bounded"])
def test_cayley_step_equals_a_dense_solve(scale):
    x = random_orthogonal(24, 0)
    gradient = scale * torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    found, alpha = spinquant_learn.cayley_step(x, gradient, 0.5)
    expected, dense_alpha = dense_cayley(x.numpy(), gradient.numpy(), 0.5)
    assert alpha == pytest.approx(dense_alpha, rel=1e-5)
    assert (alpha == 0.5) == (scale < 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)  # five iterations are not all
    assert np.abs(found.numpy() - x.numpy()).max() > 1e-4


def test_cayley_step_goes_down_a_smooth_function():
    """Procrustes: |x A - B|^2 for B = Q A falls to zero."""
    generator = torch.Generator().manual_seed(0)
    a, x = torch.randn(8, 12, generator=generator), torch.eye(8)
    b = random_orthogonal(8, 3) @ a
    if torch.linalg.det(random_orthogonal(8, 3)) < 0:  # reachable: the rotations' component
        b[0] = -b[0]
    losses = []
    for _ in range(400):
        losses.append(float(((x @ a - b) ** 2).sum()))
        x, _ = spinquant_learn.cayley_step(x, 2 * (x @ a - b) @ a.T, 0.01)
    assert losses[-1] < 1e-3 * losses[0]


def test_the_start_is_the_randomized_hadamard_of_the_residual_stream():
    found = spinquant.randomized_hadamard(96, [3, 0])
    expected = RandomizedHadamard(96, [3, 0]).apply(np.eye(96))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_retract_gives_the_nearby_orthogonal_matrix():
    x = random_orthogonal(16, 0)
    r = spinquant_learn.retract(x + 1e-3 * torch.randn(16, 16))
    np.testing.assert_allclose((r @ r.T).numpy(), np.eye(16), atol=1e-6)
    assert (r - x).abs().max() < 0.02


@pytest.fixture(scope="module")
def bundled_run(tmp_path_factory):
    """30 steps on the bundled model, as published but shorter, and the file of its state."""
    checkpoint = load_checkpoint(bundled_model())
    windows = calibration_windows(checkpoint, QuantConfig(calibration_tokens=512),
                                  bundled_path("calibration"))[:, :256]
    path = tmp_path_factory.mktemp("spinquant") / "learned.safetensors"
    calls = []
    learned = spinquant.learn_rotations(
        checkpoint, windows, steps=30, threads=1, save=path,
        progress=lambda done, loss: calls.append((done, loss)),
    )  # fmt: skip
    return checkpoint, windows, learned, path, calls


def test_learning_lowers_the_loss_and_stays_orthogonal(bundled_run):
    checkpoint, _, learned, _, calls = bundled_run
    assert learned.finished
    assert calls == list(zip(range(1, 31), learned.losses, strict=True))
    assert learned.losses[-5:].mean() < learned.losses[0] - 0.02
    assert learned.smooth_losses[-1] < learned.smooth_losses[0] - learned.noise.max()
    assert learned.orthogonality_error < 1e-4
    assert learned.R1.shape == (192, 192)
    assert learned.R2.shape == (5, 32, 32)
    assert list(learned.probe_steps) == [0, 30]
    assert (learned.noise > 0).all()
    assert (learned.seconds > 0).all()
    assert (learned.cpu_seconds > 0).all()
    assert (learned.step_sizes <= 1.5 * (1 - np.arange(30) / 30)).all()


def test_learned_rotations_beat_their_start_on_what_they_learned_from(bundled_run, tmp_path):
    """The packed model's own loss falls, as that of the simulation does. Other text is another
    matter: 30 steps on 512 tokens need not help there."""
    checkpoint, windows, learned, _, _ = bundled_run
    tokens = windows.reshape(-1)
    config = QuantConfig("w4a4", "none", "rtn", 4, clip=1.0)
    start = spinquant.starting_rotations(checkpoint.spec)
    perplexities = []
    for name, (r1, r2) in {"start": start, "end": (learned.R1, learned.R2)}.items():
        view = spinquant_checkpoint(checkpoint, r1, r2)
        layers = [online_rotations(view.spec, i) for i in range(5)]
        out = save(quantize(view, layers, config), tmp_path / name, view, config)
        perplexities.append(perplexity(load(out), tokens, windows.shape[1]).perplexity)
    assert perplexities[1] < 0.99 * perplexities[0]


def test_state_comes_back_from_its_file(bundled_run):
    _, _, learned, path, _ = bundled_run
    loaded = spinquant.load_learned(path)
    assert dict(loaded.settings) == dict(learned.settings)
    for name in spinquant_learn.ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(learned, name))


def test_a_run_that_was_cut_goes_on_as_if_it_was_not(model, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(model)
    windows, path = tokens_of(checkpoint, 3), tmp_path / "state.safetensors"
    options = {"steps": 8, "batch": 2, "threads": 1}
    whole = spinquant.learn_rotations(checkpoint, windows, **options)

    def cut(done, loss):
        if done == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(spinquant_learn, "SAVE_STEPS", 1)
    with pytest.raises(KeyboardInterrupt):
        spinquant.learn_rotations(checkpoint, windows, **options, progress=cut, save=path)
    part = spinquant.load_learned(path)
    assert (part.steps, part.finished) == (5, False)
    resumed = spinquant.learn_rotations(checkpoint, windows, **options, resume=part)
    for name in ("R1", "R2", "losses", "step_sizes", "probe_losses"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    with pytest.raises(ValueError, match="resume: learning_rate: expected 0.5, found 1.5"):
        spinquant.learn_rotations(checkpoint, windows, **options, resume=part, learning_rate=0.5)


def test_time_limit_leaves_an_unfinished_run(model):
    checkpoint = load_checkpoint(model)
    learned = spinquant.learn_rotations(checkpoint, tokens_of(checkpoint), steps=4, time_limit=0.0,
                                        noise=False)
    assert learned.steps == 0
    assert learned.probe_losses.shape == (0, 5)


def test_activations_alone_can_be_rounded(model):
    checkpoint = load_checkpoint(model)
    learned = [
        spinquant.learn_rotations(checkpoint, tokens_of(checkpoint), steps=1, noise=False,
                                  weight_bits=w, activation_bits=a).losses[0]
        for w, a in ((16, 16), (16, 4), (4, 16), (4, 4))
    ]
    assert len(set(np.round(learned, 6))) == 4


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 0}, "steps: expected at least 1, found 0"),
    ({"learning_rate": -1.0}, "learning_rate: expected a number above 0"),
    ({"threads": 0}, "threads: expected None or at least 1, found 0"),
    ({"batch": 3}, "batch: expected 1 to 2, found 3"),
    ({"clip": 0.0}, "clip: expected a number in"),
    ({"weight_bits": 3}, "weight_bits: expected 4, 8 or 16, found 3"),
    ({"windows": np.zeros(8, np.int64)}, r"windows: expected \(count, length\)"),
    ({"windows": np.full((1, 8), 999)}, "windows: expected token ids from 0 to 319"),
])  # fmt: skip
def test_bad_arguments_are_named(model, options, message):
    checkpoint = load_checkpoint(model)
    with pytest.raises(ValueError, match=message):
        spinquant.learn_rotations(checkpoint, **{"windows": tokens_of(checkpoint), **options})


def test_a_file_that_lies_is_refused(bundled_run, tmp_path):
    _, _, learned, path, _ = bundled_run
    with pytest.raises(FormatError, match="no such file"):
        spinquant.load_learned(tmp_path / "none")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FormatError, match="cut"):
        spinquant.load_learned(tmp_path / "cut")
    spinquant.save_learned(dataclasses.replace(learned, R1=2 * learned.R1), tmp_path / "skewed")
    with pytest.raises(FormatError, match="skewed: expected orthogonal R1 and R2"):
        spinquant.load_learned(tmp_path / "skewed")
