import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from posae.pipeline.errors import RunError, RunNotFoundError
from posae.pipeline.ranges import PositionRange, equal_ranges, parse_ranges, range_of_position
from posae.pipeline.sae.autoencoder import Autoencoder
from posae.pipeline.sae.hierarchical import Hierarchical, dropout_mask
from posae.pipeline.sae.registry import ARCHITECTURES, new_autoencoder
from posae.pipeline.sae.saving import (
    CONFIGURATION_FILE,
    WEIGHTS_FILE,
    load_autoencoder,
    save_autoencoder,
)
from posae.pipeline.sae.standard import Standard
from posae.pipeline.sae.topk import BatchTopK
from posae.store.errors import SettingsError, StoreWriteError

D_MODEL, DICTIONARY_SIZE, WIDTH, LENGTH = 6, 10, 4, 16
RANGES = parse_ranges("0:1,1:4,4:10,10:16", LENGTH)
each_mean = pytest.mark.parametrize("position_mean", ["none", "range", "exact", "lowrank:3"])
SCALE = 0.3
Weights = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower with more, far slower where the cores are busy."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def common(seed: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "d_model": D_MODEL,
        "dictionary_size": DICTIONARY_SIZE,
        "ranges": RANGES,
        "generator": generator(seed),
        "activation_scale": SCALE,
    } | more


OWN: dict[str, dict[str, Any]] = {
    "hierarchical": {"l1_coefficient": 0.04, "adapter_width": WIDTH},
    "standard": {"l1_coefficient": 0.04},
    "topk": {"target_l0": 4},
    "batchtopk": {"target_l0": 4},
    "jumprelu": {"target_l0": 4},
    "masked": {"l1_coefficient": 0.04, "mask": "gaussian"},
    "separate": {"l1_coefficient": 0.04},
}
"""What each architecture must be told."""


def new(architecture: str, seed: int = 0, **settings: Any) -> Autoencoder:
    return new_autoencoder(architecture, **common(seed) | OWN[architecture] | settings)


def hierarchical(seed: int = 0, **settings: Any) -> Hierarchical:
    return Hierarchical(**common(seed) | OWN["hierarchical"] | settings)


def standard(seed: int = 0, **settings: Any) -> Standard:
    return Standard(**common(seed) | OWN["standard"] | settings)


def made(architecture: str, **settings: Any) -> Autoencoder:
    """One whose weights and means are all far from their first values, as after training."""
    autoencoder = new(architecture, **settings)
    draw = generator(1)
    autoencoder.fit_means(np.random.default_rng(1).normal(size=(LENGTH, D_MODEL)), np.arange(LENGTH))
    with torch.no_grad():
        for weight in autoencoder.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=draw)
        if isinstance(autoencoder, BatchTopK):
            autoencoder.threshold.fill_(0.2)
    autoencoder.alpha = 0.7
    return autoencoder


def test_all_architectures_are_tested() -> None:
    assert OWN.keys() == ARCHITECTURES.keys()


def batch(n_rows: int = 37, seed: int = 2) -> tuple[Tensor, Tensor, list[int]]:
    """Activations, positions and range offsets; sorted by range, one range with no row."""
    draw = generator(seed)
    positions = torch.randint(1, LENGTH, (n_rows,), generator=draw)
    range_of_row = torch.tensor(range_of_position(RANGES))[positions]
    order = range_of_row.argsort(stable=True)
    offsets = torch.searchsorted(range_of_row[order], torch.arange(len(RANGES) + 1))
    x = 5 * torch.randn(n_rows, D_MODEL, generator=draw) + 1
    return x, positions[order], [int(offset) for offset in offsets]


def numbers(autoencoder: Autoencoder) -> Weights:
    return {name: weight.double().numpy() for name, weight in autoencoder.state_dict().items()}


def agree(actual: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def layer_norm(z: Any, gain: Any, bias: Any) -> Any:
    return (z - z.mean()) / np.sqrt(z.var() + 1e-5) * gain + bias


def equations_2_to_5(
    weights: Weights, x: Any, range_index: int, alpha: float, mask: Any
) -> tuple[Any, Any, Any, float, float]:
    """One row, in float64: h_b, h_r, the reconstruction, and the two parts of the loss."""
    w = weights
    a = f"adapters.{range_index}."
    z = w["W_enc"].T @ x + w["b_enc"]
    h_b = np.maximum(layer_norm(z, w["norm.weight"], w["norm.bias"]), 0)
    f_r = w[a + "W_out"].T @ np.maximum(w[a + "W_in"].T @ h_b + w[a + "b_in"], 0) + w[a + "b_out"]
    h_r = h_b + alpha * mask * layer_norm(f_r, w[a + "norm.weight"], w[a + "norm.bias"])
    reconstruction = w["W_dec"].T @ h_r
    error = ((x - reconstruction) ** 2).sum()
    sparsity = 0.04 * (np.abs(h_b).sum() + alpha * np.abs(h_r - h_b).sum())
    return h_b, h_r, reconstruction, error, sparsity


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_equations_row_by_row(alpha: float, training: bool) -> None:
    autoencoder = made("hierarchical").train(training)
    autoencoder.alpha = alpha
    x, positions, offsets = batch()
    mask = np.ones((len(x), DICTIONARY_SIZE))
    if training:
        same = generator()
        same.set_state(autoencoder.generator.get_state())
        mask = dropout_mask((len(x), DICTIONARY_SIZE), 0.1, same).double().numpy() / 0.9
    rows = [
        equations_2_to_5(numbers(autoencoder), SCALE * row, index, alpha, row_mask)
        for row, index, row_mask in zip(
            x.double().numpy(), range_of_position(RANGES)[positions], mask, strict=True
        )
    ]
    h_b, h_r, decoded, errors, penalties = (np.array(column) for column in zip(*rows, strict=True))

    output = autoencoder(x, offsets)
    assert output.base_code is not None
    agree(output.base_code, h_b)
    agree(output.code, h_r)
    agree(output.reconstruction, decoded / SCALE)
    assert output.losses.reconstruction.item() == pytest.approx(errors.mean(), rel=1e-5)
    assert output.losses.sparsity.item() == pytest.approx(penalties.mean(), rel=1e-5)
    assert output.losses.total.item() == pytest.approx((errors + penalties).mean(), rel=1e-5)


def test_the_standard_autoencoder_row_by_row() -> None:
    autoencoder = made("standard")
    x, _, offsets = batch()
    w, scaled = numbers(autoencoder), SCALE * x.double().numpy()
    code = np.maximum((scaled - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    decoded = code @ w["W_dec"] + w["b_dec"]

    output = autoencoder(x, offsets)
    assert output.base_code is None
    agree(output.code, code)
    agree(output.reconstruction, decoded / SCALE)
    errors, penalties = ((scaled - decoded) ** 2).sum(1), 0.04 * np.abs(code).sum(1)
    assert output.losses.reconstruction.item() == pytest.approx(errors.mean(), rel=1e-5)
    assert output.losses.sparsity.item() == pytest.approx(penalties.mean(), rel=1e-5)


def test_without_alpha_the_adapters_are_left_out() -> None:
    autoencoder = made("hierarchical")
    assert isinstance(autoencoder, Hierarchical)
    x, _, offsets = batch()
    autoencoder.alpha = 0.0
    before = autoencoder.generator.get_state()
    output = autoencoder(x, offsets)
    torch.autograd.backward(output.losses.total)
    assert output.code is output.base_code
    assert torch.equal(before, autoencoder.generator.get_state())
    adapter_weights = set(autoencoder.adapters.parameters())
    for weight in autoencoder.parameters():
        assert (weight.grad is None) == (weight in adapter_weights)

    autoencoder.alpha = 0.5
    torch.autograd.backward(autoencoder(x, offsets).losses.total)
    assert all(weight.grad is not None for weight in autoencoder.parameters())


# The gradient of a jump is made up.
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"jumprelu"}))
def test_gradients(architecture: str) -> None:
    autoencoder = made(architecture).double().eval()
    x, positions, offsets = batch(n_rows=7)
    names = [name for name, _ in autoencoder.named_parameters()]

    def loss(x: Tensor, *weights: Tensor) -> Tensor:
        values = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(autoencoder, values, (x, offsets, positions)).losses.total

    assert torch.autograd.gradcheck(loss, (x.double().requires_grad_(), *autoencoder.parameters()))


def test_each_row_uses_the_adapter_of_its_own_range_alone() -> None:
    autoencoder = hierarchical().eval()
    autoencoder.alpha = 1.0
    x, _, offsets = batch()
    before = autoencoder(x, offsets).code
    with torch.no_grad():
        for weight in autoencoder.adapters[2].parameters():
            weight += 1
    changed = (autoencoder(x, offsets).code != before).any(1)
    assert changed[offsets[2] : offsets[3]].all()
    assert changed.sum() == offsets[3] - offsets[2] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@each_mean
def test_encode_takes_any_order_and_shape(architecture: str, position_mean: str) -> None:
    autoencoder = made(architecture, position_mean=position_mean).eval()
    x, positions, offsets = batch(n_rows=40)
    output = autoencoder(x, offsets, positions)
    expected = output.code
    shuffled = torch.randperm(40, generator=generator(3))
    code = autoencoder.encode(x[shuffled].view(5, 8, -1), positions[shuffled].view(5, 8))
    assert code.shape == (5, 8, DICTIONARY_SIZE)
    torch.testing.assert_close(code.view(40, -1), expected[shuffled])
    decoded = autoencoder.decode(code, positions[shuffled].view(5, 8))
    torch.testing.assert_close(decoded.view(40, -1), output.reconstruction[shuffled])


def test_encode_takes_whole_contexts_in_bfloat16() -> None:
    autoencoder = made("hierarchical").eval()
    contexts = torch.randn(3, LENGTH, D_MODEL, generator=generator(4)).bfloat16()
    code = autoencoder.encode(contexts, torch.arange(LENGTH, dtype=torch.int32))
    assert code.dtype == torch.float32
    one = autoencoder.encode(contexts[2, 5].float(), torch.tensor(5))
    torch.testing.assert_close(code[2, 5], one)
    assert autoencoder.encode(contexts[:0], torch.arange(LENGTH)).shape == (0, LENGTH, DICTIONARY_SIZE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_positions_may_be_left_out_where_they_change_nothing(architecture: str) -> None:
    x, positions, _ = batch()
    autoencoder = made(architecture).eval()
    if architecture in ("hierarchical", "masked", "separate"):
        with pytest.raises(SettingsError, match="needs the position of each row"):
            autoencoder.encode(x)
    else:
        torch.testing.assert_close(autoencoder.encode(x), autoencoder.encode(x, positions))


def test_shapes_that_do_not_fit_are_refused() -> None:
    autoencoder, x = hierarchical(), torch.zeros(4, D_MODEL)
    for wrong in (torch.zeros(4, 2 * D_MODEL), torch.zeros(2 * D_MODEL), torch.tensor(0.0)):
        with pytest.raises(SettingsError, match=f"the last axis of this autoencoder's is {D_MODEL}"):
            autoencoder.encode(wrong, torch.tensor(0))
    with pytest.raises(SettingsError, match=f"the last axis of this autoencoder's is {DICTIONARY_SIZE}"):
        autoencoder.decode(x)
    for positions in (torch.arange(3), torch.arange(2)[:, None]):
        with pytest.raises(SettingsError, match="give one to each row"):
            autoencoder.encode(x, positions)


@pytest.mark.parametrize("position", [-1, LENGTH])
def test_encode_refuses_a_position_without_a_range(position: int) -> None:
    with pytest.raises(SettingsError, match="0:1, 1:4, 4:10, 10:16"):
        hierarchical().encode(torch.zeros(1, D_MODEL), torch.tensor([position]))


def test_equal_generators_give_equal_autoencoders_and_nothing_else_is_drawn() -> None:
    before = torch.get_rng_state()
    one, other = hierarchical(), hierarchical()
    for autoencoder in (one, other):
        autoencoder.alpha = 1.0
    x, _, offsets = batch()
    for _ in range(3):
        assert torch.equal(one(x, offsets).code, other(x, offsets).code)
    assert not torch.equal(one(x, offsets).code, one(x, offsets).code)
    assert not torch.equal(one.W_enc, hierarchical(seed=1).W_enc)
    standard()
    assert torch.equal(before, torch.get_rng_state())


def test_a_saved_generator_state_goes_on_with_the_same_dropout() -> None:
    one, other = hierarchical(), hierarchical(seed=5)
    x, _, offsets = batch()
    one.alpha = other.alpha = 1.0
    one(x, offsets)
    other.load_state_dict(one.state_dict())
    other.generator.set_state(one.generator.get_state())
    assert torch.equal(one(x, offsets).code, other(x, offsets).code)


def test_dropout_drops_a_tenth_and_keeps_the_mean() -> None:
    autoencoder = hierarchical(ranges=equal_ranges(LENGTH, 1))
    autoencoder.alpha = 1.0
    with torch.no_grad():  # LayerNorm's output becomes 1 everywhere
        for name, weight in autoencoder.adapters.named_parameters():
            if "norm" in name:
                weight.fill_("bias" in name)
    output = autoencoder(torch.randn(20_000, D_MODEL, generator=generator(6)), [0, 20_000])
    assert output.base_code is not None
    adaptation = (output.code - output.base_code).detach()
    dropped = (adaptation == 0).double().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.005)
    assert adaptation.mean().item() == pytest.approx(1.0, abs=0.005)
    torch.testing.assert_close(adaptation.max().item(), 1 / 0.9, rtol=1e-5, atol=1e-5)


def test_first_weights_of_the_hierarchical_autoencoder() -> None:
    autoencoder = hierarchical(d_model=64, dictionary_size=64, adapter_width=32, adapter_gain=0.5)
    for weight in (autoencoder.W_enc, autoencoder.W_dec):
        torch.testing.assert_close(weight @ weight.T, torch.eye(64), atol=1e-5, rtol=0)
    values = dict(autoencoder.named_parameters())
    for name, n_inputs in (("W_in", 64), ("b_in", 64), ("W_out", 32), ("b_out", 32)):
        weight = values[f"adapters.3.{name}"]
        assert 0.8 * n_inputs**-0.5 < weight.abs().max().item() <= n_inputs**-0.5
        assert not torch.equal(weight, values[f"adapters.0.{name}"])
    assert (values["adapters.1.norm.weight"] == 0.5).all()
    assert (values["norm.weight"] == 1).all()
    assert not values["b_enc"].any()


def test_first_weights_of_the_standard_autoencoder() -> None:
    autoencoder = standard()
    assert torch.equal(autoencoder.W_enc, autoencoder.W_dec.T)
    assert not autoencoder.b_enc.any()
    assert not autoencoder.b_dec.any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dictionary_size", [4, D_MODEL, 20])
def test_decoder_rows_have_unit_norm(architecture: str, dictionary_size: int) -> None:
    autoencoder = new(architecture, dictionary_size=dictionary_size)
    ones = torch.ones(dictionary_size)
    torch.testing.assert_close(autoencoder.W_dec.square().sum(1), ones)
    direction = autoencoder.W_dec.detach().clone()
    with torch.no_grad():
        autoencoder.W_dec.mul_(torch.rand(dictionary_size, 1, generator=generator(7)) + 0.1)
    autoencoder.normalise_decoder()
    torch.testing.assert_close(autoencoder.W_dec.detach(), direction)
    assert autoencoder.W_dec.is_leaf
    assert autoencoder.W_dec.requires_grad


@pytest.mark.parametrize(
    ("width", "n_adapters", "overhead"), [(1152, 21_265_920, 2.0017), (85, None, 0.1501)]
)
def test_the_papers_size(width: int, n_adapters: int | None, overhead: float) -> None:
    autoencoder = Hierarchical(
        d_model=2304,
        dictionary_size=2304,
        ranges=equal_ranges(128, 4),
        generator=None,
        l1_coefficient=0.04,
        adapter_width=width,
    )
    base = autoencoder.base_parameters()
    adapters = autoencoder.n_parameters() - base
    assert base == 2 * 2304**2 + 3 * 2304
    assert n_adapters in (None, adapters)
    assert adapters / base == pytest.approx(overhead, abs=1e-4)


def test_the_standard_autoencoder_has_no_overhead() -> None:
    n_parameters = 2 * D_MODEL * DICTIONARY_SIZE + DICTIONARY_SIZE + D_MODEL
    assert standard().n_parameters() == standard().base_parameters() == n_parameters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_makes_the_loss_small(architecture: str) -> None:
    autoencoder = new(architecture)
    optimiser: Any = torch.optim.AdamW(autoencoder.parameters(), lr=1e-2)
    x, positions, offsets = batch(n_rows=64)
    losses: list[float] = []
    for step in range(100):
        autoencoder.alpha = step / 100
        optimiser.zero_grad()
        output = autoencoder(x, offsets, positions)
        torch.autograd.backward(output.losses.total)
        optimiser.step()
        autoencoder.normalise_decoder()
        losses.append(output.losses.total.item())
    # Behind a mask the ten features are not enough.
    assert losses[-1] < losses[0] / (1.5 if architecture == "masked" else 3)


# ---- files


METADATA = {"model_name": "demo", "hook_name": "model.layers.2", "context_size": LENGTH}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@each_mean
def test_a_saved_autoencoder_gives_the_same_on_raw_activations(
    architecture: str, position_mean: str, tmp_path: Path
) -> None:
    autoencoder = made(architecture, position_mean=position_mean).eval()
    before = {name: weight.clone() for name, weight in autoencoder.state_dict().items()}
    save_autoencoder(autoencoder, tmp_path / "run", METADATA)
    for name, weight in autoencoder.state_dict().items():
        assert torch.equal(weight, before[name])

    loaded = load_autoencoder(tmp_path / "run")
    assert type(loaded) is type(autoencoder)
    assert not loaded.training
    assert (loaded.alpha, loaded.ranges, loaded.activation_scale) == (0.7, RANGES, 1.0)
    assert loaded.own_settings() == autoencoder.own_settings()
    assert loaded.n_parameters() == autoencoder.n_parameters()
    x, positions, offsets = batch()
    mine, theirs = autoencoder(x, offsets, positions), loaded(x, offsets, positions)
    torch.testing.assert_close(theirs.code, mine.code, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.reconstruction, mine.reconstruction, rtol=1e-4, atol=1e-5)
    assert theirs.losses.reconstruction.item() == pytest.approx(
        mine.losses.reconstruction.item() / SCALE**2, rel=1e-4
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        CONFIGURATION_FILE,
        WEIGHTS_FILE,
    ]


def test_the_configuration_is_what_saelens_wants(tmp_path: Path) -> None:
    save_autoencoder(made("standard"), tmp_path, METADATA)
    configuration = json.loads((tmp_path / CONFIGURATION_FILE).read_text())
    ours = configuration.pop("posae")
    assert configuration == {
        "architecture": "standard",
        "d_in": D_MODEL,
        "d_sae": DICTIONARY_SIZE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": METADATA | {"sae_lens_version": "6.0.0"},
    }
    assert ours["architecture"] == "standard"
    assert ours["ranges"] == [[0, 1], [1, 4], [4, 10], [10, 16]]
    assert ours["folded_activation_scale"] == SCALE

    weights = safetensors.torch.load((tmp_path / WEIGHTS_FILE).read_bytes())
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "W_enc": (D_MODEL, DICTIONARY_SIZE),
        "b_enc": (DICTIONARY_SIZE,),
        "W_dec": (DICTIONARY_SIZE, D_MODEL),
        "b_dec": (D_MODEL,),
    }
    # As SAELens decodes it.
    x, positions, _ = batch()
    code = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    autoencoder = made("standard")
    torch.testing.assert_close(autoencoder.encode(x, positions), code, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        autoencoder.decode(code), code @ weights["W_dec"] + weights["b_dec"], rtol=1e-4, atol=1e-5
    )


def test_the_configuration_of_the_hierarchical_autoencoder(tmp_path: Path) -> None:
    save_autoencoder(made("hierarchical"), tmp_path, METADATA)
    configuration = json.loads((tmp_path / CONFIGURATION_FILE).read_text())
    assert configuration["architecture"] == "posae_hierarchical"
    assert configuration["apply_b_dec_to_input"] is False
    ours = configuration["posae"]
    assert ours.pop("weights_sha256")
    assert ours == {
        "architecture": "hierarchical",
        "ranges": [[0, 1], [1, 4], [4, 10], [10, 16]],
        "alpha": 0.7,
        "folded_activation_scale": SCALE,
        "position_mean": "none",
        "position_adapter": "none",
        "shared_adapters": False,
        "reconstruction_loss": "squared",
        "l1_coefficient": 0.04,
        "adapter_width": WIDTH,
        "dropout": 0.1,
        "adapter_gain": 1.0,
        "layer_norm": "both",
        "layer_norm_affine": True,
        "adapter_norm": "after",
        "residual": True,
        "rectify": False,
        "penalty": "text",
        "base_loss_coefficient": 0.0,
        "decoder_bias": False,
    }


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made("standard")
    save_autoencoder(first, tmp_path, METADATA)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", refuse)
        with pytest.raises(StoreWriteError, match="no space left"):
            save_autoencoder(made("hierarchical"), tmp_path, METADATA)
    assert len(list(tmp_path.iterdir())) == 2
    assert isinstance(load_autoencoder(tmp_path), Standard)
    save_autoencoder(made("hierarchical"), tmp_path, METADATA)
    assert isinstance(load_autoencoder(tmp_path), Hierarchical)


def test_a_folder_without_an_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="no such folder"):
        load_autoencoder(tmp_path / "nowhere")
    with pytest.raises(RunNotFoundError, match=r"has no cfg\.json"):
        load_autoencoder(tmp_path)
    save_autoencoder(made("standard"), tmp_path, METADATA)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(RunNotFoundError, match=r"has no sae_weights\.safetensors"):
        load_autoencoder(tmp_path)
    (tmp_path / WEIGHTS_FILE).mkdir()
    with pytest.raises(RunError, match="cannot be read"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("damage", ["bit", "short", "empty"])
def test_damaged_weights_are_noticed(damage: str, tmp_path: Path) -> None:
    save_autoencoder(made("standard"), tmp_path, METADATA)
    path = tmp_path / WEIGHTS_FILE
    content = path.read_bytes()
    flipped = bytes([*content[:-5], content[-5] ^ 1, *content[-4:]])
    path.write_bytes({"bit": flipped, "short": content[:-1], "empty": b""}[damage])
    with pytest.raises(RunError, match="damaged"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "gated"},
            "no architecture 'gated'; take one of hierarchical, standard, topk, batchtopk, jumprelu, masked",
        ),
        ({"ranges": [[0, 4], [5, 16]]}, "should start at 4"),
        ({"ranges": []}, "ranges is"),
        ({"ranges": [[0, "16"]]}, r"posae\.ranges"),
        ({"adapter_width": 0}, "adapter_width is 0; it must be at least 1"),
        ({"adapter_width": "4"}, r"posae\.adapter_width"),
        ({"adapter_width": 4.5}, "cfg.json: "),
        ({"adapter_width": 10**30}, "cfg.json: "),
        ({"adapter_width": 5}, r"W_in is float32 \[10, 4\], but by cfg.json .* \[10, 5\]"),
        ({"k": 3}, r"posae\.k: Extra inputs"),
        ({"penalty": "h_r"}, r"posae\.penalty"),
        ({"residual": 1}, r"posae\.residual"),
        ({"alpha": None}, r"posae\.alpha"),
    ],
)
def test_a_wrong_configuration_gives_one_clear_line(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_autoencoder(made("hierarchical"), tmp_path, METADATA)
    path = tmp_path / CONFIGURATION_FILE
    configuration = json.loads(path.read_text())
    configuration["posae"] |= change
    path.write_text(json.dumps(configuration))
    with pytest.raises(RunError, match=message) as caught:
        load_autoencoder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"architecture": "standard"}'])
def test_a_file_that_is_no_configuration(content: str, tmp_path: Path) -> None:
    save_autoencoder(made("standard"), tmp_path, METADATA)
    (tmp_path / CONFIGURATION_FILE).write_text(content)
    with pytest.raises(RunError, match=r"cfg\.json: .*posae opens only what posae has saved"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("b_dec", None, r"b_dec is missing, but .* should be float32 \[6\]"),
        ("threshold", torch.zeros(10), r"threshold is float32 \[10\], but .* should be absent"),
        ("W_dec", torch.zeros(6, 10), r"W_dec is float32 \[6, 10\], but .* \[10, 6\]"),
        ("b_enc", torch.zeros(10).double(), r"b_enc is float64 \[10\]"),
    ],
)
def test_wrong_weights_are_named(name: str, weight: Tensor | None, message: str, tmp_path: Path) -> None:
    save_autoencoder(made("standard"), tmp_path, METADATA)
    weights = safetensors.torch.load((tmp_path / WEIGHTS_FILE).read_bytes())
    if weight is None:
        del weights[name]
    else:
        weights[name] = weight
    replace_weights(tmp_path, safetensors.torch.save(weights))
    with pytest.raises(RunError, match=message):
        load_autoencoder(tmp_path)


def test_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    save_autoencoder(made("standard"), tmp_path, METADATA)
    replace_weights(tmp_path, b"PK\x03\x04 a pickle, say")
    with pytest.raises(RunError, match="not a safetensors file"):
        load_autoencoder(tmp_path)


def replace_weights(folder: Path, content: bytes) -> None:
    """Put other weights in place, and their digest beside them."""
    (folder / WEIGHTS_FILE).write_bytes(content)
    path = folder / CONFIGURATION_FILE
    configuration = json.loads(path.read_text())
    configuration["posae"]["weights_sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(configuration))


# ---- settings


def test_an_unknown_architecture_is_refused_with_those_that_exist() -> None:
    with pytest.raises(
        SettingsError,
        match="'gated'; take one of hierarchical, standard, topk, batchtopk, jumprelu, masked, separate",
    ):
        new_autoencoder("gated", **common())


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 0},
        {"dictionary_size": -1},
        {"l1_coefficient": -0.1},
        {"l1_coefficient": float("nan")},
        {"activation_scale": 0.0},
        {"activation_scale": float("inf")},
        {"ranges": ()},
        {"ranges": (PositionRange(1, 4),)},
        {"adapter_width": 0},
        {"dropout": 1.0},
        {"adapter_gain": float("inf")},
        {"position_mean": "mean"},
        {"position_mean": "lowrank:7"},
        {"position_mean": "lowrank:0"},
        {"position_adapter": "offset"},
        {"position_adapter": "bias+bias"},
        {"position_adapter": "bias:2"},
        {"position_adapter": "decoder"},
        {"position_adapter": "decoder:0"},
        {"position_adapter": "decoder:7"},
        {"position_adapter": "none+bias"},
        {"reconstruction_loss": "l1"},
        {"decoder_norm": "rows"},
        {"layer_norm": "all"},
        {"adapter_norm": "pre"},
        {"penalty": "h_r"},
        {"base_loss_coefficient": -1.0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"must be|should start"):
        hierarchical(**change)
