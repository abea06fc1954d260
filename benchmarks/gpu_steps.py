"""The steps of gpu.py: what is measured, and against what."""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gemma_2_2b import DEMO, true_configuration
from gpu import Bench
from harvest import LENGTH, LoadedHarvest, bare, flops_to_a_token, measured_peak, small_configuration
from scoring import N_SCORED, N_TRAINED, Passing
from torch import Tensor
from train import made
from transformers import AutoModel

from posae.pipeline.evaluate.evaluate import evaluate
from posae.pipeline.harvest.harvest import Harvest
from posae.pipeline.harvest.language_model import LanguageModel
from posae.pipeline.harvest.model_facts import model_facts
from posae.pipeline.ranges import equal_ranges
from posae.pipeline.sae import sparse
from posae.pipeline.sae.run_settings import resolve_train_settings, train_presets
from posae.pipeline.settings import EvaluateSettings, HarvestSettings, TrainSettings
from posae.pipeline.train import LayerMemory, Ongoing, Team, Training, train_together
from posae.pipeline.train.batch import Batch
from posae.pipeline.train.batches import ShuffledBatches
from posae.pipeline.train.state import State
from posae.store.reader import ActivationStore
from posae.store.shards import index_bytes, parse_index

CPU = torch.device("cpu")
ACTIVATIONS_MAY_DIFFER = 0.02
"""By so much of their norm: bfloat16 has 8 bits, and rounding adds up over the demo model's blocks."""
STEPS_MAY_DIFFER = 1e-3
"""Loss, gradient norm and weights of one float32 step, relatively."""
SCORES_MAY_DIFFER = 1e-3


def _work(bench: Bench, name: str) -> Path:
    path = bench.out / "work" / name
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _verdict(found: float, most: float) -> str:
    return f"{'right' if found <= most else 'WRONG'}: differs by {found:.2e}, at most {most:g} is allowed"


def _settings(preset: str, **words: Any) -> TrainSettings:
    return resolve_train_settings(preset=preset, options=words)


# --- correctness


def correctness(bench: Bench) -> None:
    """Harvest, batches, a step of every preset and scores, against the same on the CPU."""
    on_cpu, there = (_demo_harvest(bench, device) for device in (CPU, bench.device))
    bench.attempt("harvest of the demo model", _same_activations, on_cpu, there)
    bench.attempt("batches of activations", _same_batches, on_cpu, bench.device)
    for preset in train_presets():
        bench.attempt(f"a step of {preset}", _same_step, bench, on_cpu, preset)
    bench.attempt("scores", _same_scores, bench, on_cpu)
    bench.attempt("an interrupted training", _resumed, bench, on_cpu)


def _demo_harvest(bench: Bench, device: torch.device) -> ActivationStore:
    root = _work(bench, f"demo-{device.type}.zarr")
    words: dict[str, Any] = {"contexts": 64, "context_length": 64, "layers": (1, 2), "batch_contexts": 8}
    Harvest(root, HarvestSettings(**words, device=str(device))).run()
    return ActivationStore.open(root)


def _floats(bits: np.ndarray[Any, np.dtype[np.uint16]]) -> Tensor:
    return torch.as_tensor(bits.view(np.int16)).view(torch.bfloat16).double()


def _same_activations(one: ActivationStore, other: ActivationStore) -> str:
    if not np.array_equal(one.tokens(), other.tokens()):
        return "WRONG: other tokens"
    worst = 0.0
    for layer in (1, 2):
        mine, theirs = _floats(one.read(layer)), _floats(other.read(layer))
        worst = max(worst, float((mine - theirs).norm() / mine.norm()))
    return _verdict(worst, ACTIVATIONS_MAY_DIFFER)


def _same_batches(store: ActivationStore, device: torch.device) -> str:
    def bits(device: torch.device) -> list[Any]:
        batches = ShuffledBatches(
            store, 1, equal_ranges(64, 4), batch_size=256, window_contexts=16, device=device
        )
        return [batch.activations.copy() for batch in batches.steps(0, 40)]

    same = all(np.array_equal(*pair) for pair in zip(bits(CPU), bits(device), strict=True))
    return "right: bit by bit" if same else "WRONG: other rows"


def _same_step(bench: Bench, store: ActivationStore, preset: str) -> str:
    """One update from the same weights, with everything that comes in with alpha."""
    words: dict[str, Any] = {"layer": 2, "steps": 100, "batch_size": 512, "warmup_steps": 0, "device": "cpu"}
    if train_presets()[preset]["architecture"] in ("hierarchical",):
        words["dropout"] = 0.0  # drawn otherwise there
    training = Training(store, bench.out / "work" / "unused", _settings(preset, **words))
    (batch,) = training.batches().steps(0, 1)
    x = batch.on_device.to(torch.float32, copy=True)
    lines: list[dict[str, Any]] = []
    weights: list[dict[str, Tensor]] = []
    for device in (CPU, bench.device):
        autoencoder = training.new_state(Team()).autoencoder.to(device)
        settings = training.settings.model_copy(update={"precision": "float32"})
        state = State(autoencoder, settings, training.ranges, device, Team())
        state.schedule(99)
        line = state.update(batch, x.to(device), measure=True)
        assert line is not None
        lines.append(line)
        weights.append({name: value.cpu().double() for name, value in autoencoder.state_dict().items()})
    keys = ("loss", "gradient_norm", "l0")
    far = [abs(lines[1][key] - lines[0][key]) / max(1e-9, abs(lines[0][key])) for key in keys]
    far += [float((weights[1][n] - w).norm() / w.norm().clamp(min=1e-9)) for n, w in weights[0].items()]
    return _verdict(max(far), STEPS_MAY_DIFFER)


def _trained(bench: Bench, store: ActivationStore, name: str, device: torch.device, **words: Any) -> Training:
    words = {"layer": 2, "steps": 40, "batch_size": 256, "window_contexts": 16, "log_steps": 20} | words
    settings = _settings("posae", **words, position_mean="lowrank:4", target_l0=16, device=str(device))
    return Training(store, _work(bench, name), settings)


def _same_scores(bench: Bench, store: ActivationStore) -> str:
    run = _trained(bench, store, "scored", CPU).train().run
    on_cpu, there = (
        evaluate(run.folder, EvaluateSettings(device=str(device)), None, store)
        for device in (CPU, bench.device)
    )
    keys = ("fvu", "l0", "dead_fraction", "fvu_with_special")
    far = [abs(there[key] - on_cpu[key]) / max(1e-6, abs(on_cpu[key])) for key in keys]
    return _verdict(max(far), SCORES_MAY_DIFFER)


def _resumed(bench: Bench, store: ActivationStore) -> str:
    """Trained on the device at once, and in two parts: the largest difference of the weights."""
    whole, parted = (
        _trained(bench, store, name, bench.device, checkpoint_steps=20) for name in ("whole", "parted")
    )
    whole.train()

    class _Enough(Passing):
        n = 0

        def advance(self, amount: int, note: str = "") -> None:
            self.n += 1
            if self.n == 30:
                raise KeyboardInterrupt

        def begin(self, *_: object, **__: object) -> None: ...

        def end(self) -> None: ...

    try:
        parted.train(_Enough())
    except KeyboardInterrupt:
        parted.train()
    names = [training.run.folder / "sae_weights.safetensors" for training in (whole, parted)]
    return "right: bit by bit" if names[0].read_bytes() == names[1].read_bytes() else "other last bits"


# --- harvest


def harvesting(bench: Bench) -> None:
    """Tokens a second of a harvest, and of the model's bare pass over the same batches, in the same run."""
    configuration = true_configuration() if bench.sizes.is_gemma else small_configuration()
    if not bench.sizes.is_gemma:
        configuration.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    layers = (5, 12, 19) if bench.sizes.is_gemma else (1, 2, 4)
    folder = _work(bench, "model")
    configuration.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    with torch.device(bench.device):
        text_model = AutoModel.from_config(configuration, dtype=torch.bfloat16, attn_implementation="eager")
    model = LanguageModel._of(model_facts(str(folder)), bench.device, text_model)
    peak = measured_peak(bench.device, None if bench.sizes.is_gemma else 64)
    bench.note("bfloat16 product, TFLOP/s", peak / 1e12)
    for attention in ("eager", "sdpa"):
        # transformers refuses sdpa with Gemma 2, as it has no soft-capping: without, for its speed alone.
        model.text_model.config._attn_implementation = attention
        if attention == "sdpa":
            for block in model.text_model.layers:
                block.self_attn.attn_logit_softcapping = None
        for batch in bench.sizes.batches:
            name = f"{attention}, {batch} contexts a batch"
            bench.attempt(name, _harvested, bench, model, folder, layers, attention, batch, peak)
        bench.attempt(f"profile, {attention}", _profile, bench, model, max(layers))


def _harvested(
    bench: Bench,
    model: LanguageModel,
    folder: Path,
    layers: tuple[int, ...],
    attention: str,
    batch: int,
    peak: float,
) -> str:
    n_contexts, last = bench.sizes.harvested, max(layers)
    words: dict[str, Any] = {"model": str(folder), "layers": layers, "contexts": n_contexts}
    words |= {"attention": attention, "batch_contexts": batch, "device": str(bench.device)}
    tokens = torch.randint(5, 1000, (n_contexts, LENGTH), dtype=torch.int32)
    bare(model, tokens[:batch], last, batch)
    rates: dict[str, list[float]] = {"bare": [], "posae": []}
    for _ in range(2):
        seconds = bench.seconds(lambda: bare(model, tokens, last, batch), warm=0)
        rates["bare"].append(tokens.numel() / seconds)
        root = _work(bench, "harvest.zarr")
        work = LoadedHarvest(root, HarvestSettings(**words))
        work.loaded = model
        work.run()
        rates["posae"].append(tokens.numel() / (time.perf_counter() - work.started[0]))
        shutil.rmtree(root)
    shares = [mine / theirs for mine, theirs in zip(rates["posae"], rates["bare"], strict=True)]
    rate = statistics.median(rates["posae"])
    used = flops_to_a_token(model.text_model.config, last + 1) * rate / peak
    return (
        f"{rate:,.0f} tokens/s, {statistics.median(shares):.3f} of the bare pass, "
        f"model FLOP utilisation {used:.3f}"
    )


def _profile(bench: Bench, model: LanguageModel, last: int) -> list[str]:
    """The 20 operations of a bare batch that take longest, as lines of text."""
    from torch.profiler import ProfilerActivity, profile

    is_gpu = bench.device.type == "cuda" and torch.version.cuda is not None
    tokens = torch.randint(5, 1000, (bench.sizes.batches[0], LENGTH), dtype=torch.int32)
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if is_gpu else [ProfilerActivity.CPU]
    with profile(activities=kinds) as found:
        bare(model, tokens, last, len(tokens))
    by = "self_cuda_time_total" if is_gpu else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=20).splitlines()


# --- training


def training(bench: Bench) -> None:
    """Steps fed from memory and from the store, beside a plain loop of the same products; and scoring."""
    sizes = bench.sizes
    held_out = sizes.contexts // 8
    store = made(_work(bench, "trained.zarr"), sizes.d_model, sizes.contexts, held_out)
    tf32: dict[int, float] = {}
    for features in sizes.features:
        for precision in ("float32", "tf32", "bfloat16"):
            name = f"{features} features, {precision}: ms a step"
            took = bench.attempt(name, _step_ms, bench, store, features, precision=precision)
            if precision == "tf32" and took is not None:
                tf32[features] = took
            bench.attempt(f"{name} of a plain loop", _plain_ms, bench, features, precision)
        name = f"{features} features, tf32"
        bench.attempt(f"{name}: ms a step, dense products", _dense_step_ms, bench, store, features)
        bench.attempt(f"{name}: ms a step, topk", _step_ms, bench, store, features, preset="topk")
        bench.attempt(f"{name}: from the store / from memory, 4 runs", _fed, bench, store, features)
        bench.attempt(
            f"{name}: scoring / training", _scoring_share, bench, store, features, tf32.get(features)
        )
    for features in sizes.features:
        name = f"{features} features, tf32, compiled: ms a step"
        bench.attempt(name, _step_ms, bench, store, features, is_compiled=True)
        bench.attempt(f"{name} of a plain loop", _plain_ms, bench, features, "tf32", is_compiled=True)


def _ongoing(
    bench: Bench,
    store: ActivationStore,
    features: int,
    *,
    preset: str = "batchtopk",
    precision: str = "tf32",
    steps: int | None = None,
    seed: int = 0,
) -> Ongoing:
    words: dict[str, Any] = {"steps": steps or 10**6, "batch_size": bench.sizes.batch, "seed": seed}
    words |= {"window_contexts": bench.sizes.window, "dictionary_size": features, "log_steps": 10**6}
    words |= {"checkpoint_steps": 10**6, "warmup_steps": 0, "precision": precision}
    run = _work(bench, f"run-{seed}")
    begun = Ongoing.begin(
        Training(store, run, _settings(preset, **words, target_l0=32, device=str(bench.device)))
    )
    assert begun is not None
    return begun


def _in_memory(bench: Bench, ongoing: Ongoing, n: int) -> list[tuple[Batch, Tensor]]:
    batches = ongoing.training.batches().steps(0, n)
    return [(batch, batch.on_device.to(torch.float32, copy=True)) for batch in batches]


def _step_ms(
    bench: Bench, store: ActivationStore, features: int, *, is_compiled: bool = False, **words: Any
) -> float:
    ongoing = _ongoing(bench, store, features, **words)
    batches = _in_memory(bench, ongoing, 4)
    if is_compiled:
        ongoing.state.autoencoder.compile(backend=bench.sizes.compiler)

    def steps() -> None:
        for batch, x in batches:
            ongoing.take(batch, x)

    return 1000 * bench.seconds(steps, warm=2, times=max(1, bench.sizes.steps // 4)) / len(batches)


def _dense_step_ms(bench: Bench, store: ActivationStore, features: int) -> float:
    """As where active features are not listed."""
    before = sparse.ARE_FEW[bench.device.type]
    sparse.ARE_FEW[bench.device.type] = 10**9
    try:
        return _step_ms(bench, store, features)
    finally:
        sparse.ARE_FEW[bench.device.type] = before


def _plain_ms(bench: Bench, features: int, precision: str, *, is_compiled: bool = False) -> float:
    """A loop of torch's own operations: TopK with dense products, and fused AdamW."""
    sizes, device = bench.sizes, bench.device
    encoder, decoder = (
        torch.nn.Parameter(0.02 * torch.randn(shape, device=device))
        for shape in ((sizes.d_model, features), (features, sizes.d_model))
    )
    optimizer = torch.optim.AdamW([encoder, decoder], lr=1e-4, fused=device.type == "cuda")
    x = torch.randn(sizes.batch, sizes.d_model, device=device)

    def loss(x: Tensor) -> Tensor:
        values, places = (x @ encoder).relu().topk(32, dim=1, sorted=False)
        code = torch.zeros(len(x), features, device=x.device, dtype=values.dtype).scatter(1, places, values)
        return (code @ decoder - x).square().sum() / len(x)

    compiled = torch.compile(loss, backend=sizes.compiler)
    computed = cast("Callable[[Tensor], Tensor]", compiled) if is_compiled else loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            lost = computed(x)
        lost.backward()
        torch.nn.utils.clip_grad_norm_([encoder, decoder], 1.0)
        optimizer.step()

    matmul: Any = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32" if precision == "tf32" else "ieee")
    if not hasattr(matmul, name):
        name, value = "allow_tf32", precision == "tf32"
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        return 1000 * bench.seconds(step, warm=3, times=bench.sizes.steps)
    finally:
        setattr(matmul, name, before)


def _fed(bench: Bench, store: ActivationStore, features: int) -> float:
    """Seconds of steps of four runs fed from the store, over those fed from memory."""
    n_steps = bench.sizes.steps
    runs = [_ongoing(bench, store, features, steps=n_steps + 4, seed=seed) for seed in range(4)]
    batches = _in_memory(bench, runs[0], 4)

    def from_memory() -> None:
        for batch, x in batches:
            for run in runs:
                run.take(batch, x)

    a_step = bench.seconds(from_memory) / len(batches)
    runs.clear()
    group = [_ongoing(bench, store, features, steps=n_steps, seed=seed) for seed in range(4)]
    for one in group:
        one.finish = lambda *_: None  # what follows the steps is no part of them
    taken = bench.seconds(lambda: train_together(group, memory=LayerMemory("never")), warm=0)
    return taken / (a_step * n_steps)


def _scoring_share(bench: Bench, store: ActivationStore, features: int, step_ms: float | None) -> float:
    """Of the time of a training of the default length, by the time of a step that was measured."""
    if step_ms is None:
        raise RuntimeError("the time of a step was not measured")
    ongoing = _ongoing(bench, store, features, steps=4)
    train_together([ongoing])
    passing = Passing()
    folder, settings = ongoing.training.run.folder, EvaluateSettings(device=str(bench.device))
    whole = bench.seconds(lambda: evaluate(folder, settings, passing, store), warm=0)
    n_held_out = store.n_contexts - store.held_out_part(0)[0]
    a_token = passing.clock.seconds / (n_held_out * LENGTH)
    in_all = a_token * N_SCORED + whole - passing.clock.seconds
    return in_all / (step_ms / 1000 / bench.sizes.batch * N_TRAINED)


# --- decoding


def decoding(bench: Bench) -> None:
    """Chunks of the codec ``small``: decoded on the host and copied, or copied and decoded by nvCOMP."""
    store = made(_work(bench, "decoded.zarr"), bench.sizes.d_model, max(16, bench.sizes.contexts // 8))
    reader = store.array("layer_0")
    n_chunks = store.n_contexts // store.manifest.chunk_contexts
    shape = (store.manifest.chunk_contexts, store.context_length, store.d_model)
    out = torch.empty(shape, dtype=torch.bfloat16, pin_memory=bench.device.type == "cuda")
    bits = out.view(torch.int16).numpy().view(np.uint16)
    there = torch.empty(shape, dtype=torch.bfloat16, device=bench.device)
    n_bytes = n_chunks * bits.nbytes

    def on_host() -> None:
        for chunk in range(n_chunks):
            reader.read_chunk(chunk, bits)
            there.copy_(out)

    bench.attempt("host, one thread, and copy: GB/s", lambda: n_bytes / bench.seconds(on_host) / 1e9)
    chunks = [BloscChunk(data) for data in _stored_chunks(store)]
    bench.note("frames to a chunk", len(chunks[0].frames))
    bench.attempt("nvCOMP: GB/s", _by_nvcomp, bench, chunks, reader.read_chunk, bits)


def _stored_chunks(store: ActivationStore) -> Iterator[bytes]:
    """The chunks of layer 0 as they lie in their files."""
    spec = store.array("layer_0").spec
    for shard in range(spec.n_shards):
        data = b"".join(store.files.pieces(spec.shard_path(shard)))
        for start, size in parse_index(spec, shard, data[-index_bytes(spec) :], len(data)).tolist():
            yield data[start : start + size]


class BloscChunk:
    """A chunk of the codec ``small``: zstd frames, each a block of bytes transposed.

    Attributes:
        frames: a plain zstd frame to each block.
        sizes: bytes of each block.
        type_size: bytes of a number; the first of each number stand together, then the second.
    """

    def __init__(self, data: bytes) -> None:
        """Read the header of Blosc 1: https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst."""
        flags, self.type_size = data[2], data[3]
        n_bytes, block, _ = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8, 12))
        if flags >> 5 != 4 or flags & 0b10111 != 0b10001:
            raise ValueError(f"not transposed zstd frames, one to a block: flags {flags:#x}")
        n_blocks = -(-n_bytes // block)
        starts = np.frombuffer(data, "<i4", n_blocks, 16)
        lengths = [int.from_bytes(data[start : start + 4], "little") for start in starts]
        self.frames = [data[s + 4 : s + 4 + n] for s, n in zip(starts.tolist(), lengths, strict=True)]
        self.sizes = [min(block, n_bytes - number * block) for number in range(n_blocks)]

    def joined(self, blocks: list[Tensor]) -> Tensor:
        """The chunk's bytes, from those of each block, uint8, on their device."""
        return torch.cat([block.view(self.type_size, -1).T.reshape(-1) for block in blocks])


def _by_nvcomp(bench: Bench, chunks: list[BloscChunk], read: Any, bits: Any) -> float:
    from nvidia import nvcomp  # pyright: ignore

    if bench.device.type != "cuda":
        raise RuntimeError("there is no GPU")
    codec = nvcomp.Codec(algorithm="Zstd", bitstream_kind=nvcomp.BitstreamKind.RAW)

    def decoded(chunk: BloscChunk) -> Tensor:
        arrays = [nvcomp.as_array(frame).cuda() for frame in chunk.frames]
        return chunk.joined([torch.from_dlpack(one).view(torch.uint8) for one in codec.decode(arrays)])

    read(0, bits)
    if not np.array_equal(decoded(chunks[0]).cpu().numpy(), bits.reshape(-1).view(np.uint8)):
        raise RuntimeError("other bytes than the host's")
    n_bytes = len(chunks) * bits.nbytes
    return n_bytes / bench.seconds(lambda: [decoded(chunk) for chunk in chunks]) / 1e9
