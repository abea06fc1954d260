"""Scores of a run on contexts that it never saw: the held-out part of its store.

One pass over the held-out part, in order, in bounded memory; written into the run as
``evaluation.json``, which ``docs/evaluation.md`` explains. Special tokens are left out as they were in
training, and scored beside; the language model runs only where ``ce_loss`` asks for it.

Cost: encoding and decoding each row once, about as much again for what each feature did, then a few
seconds for nulls and groups. Memory: 16 bytes to each feature and position, and one batch.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...store.errors import StoreError, StoreIncompleteError, StoreMismatchError, StoreNotFoundError
from ...store.reader import ActivationStore
from ..device import choose_device, numbers_at_once
from ..errors import ModelError, RunError, RunMismatchError, RunNotFoundError
from ..harvest.language_model import (
    CausalLanguageModel,
    LanguageModel,
    ModelFacts,
    facts_of_recorded,
    is_hub_id,
    is_recorded,
    load_tokenizer,
)
from ..harvest.text.contexts import tokenizer_hash
from ..harvest.text.stdlib import stdlib_files, stdlib_revision
from ..metrics import ABOVE, ScoreKeeper
from ..processes import processes_here
from ..progress import Progress, Silent
from ..ranges import PositionRange, equal_ranges, parse_ranges
from ..runs import EVALUATION, Run
from ..sae.autoencoder import Autoencoder
from ..sae.saving import load_autoencoder
from ..sae.sparse import SparseCode
from ..settings import EvaluateSettings
from ..train.batches import Batch, ordered_batches
from .probing.hub import probe_saebench
from .probing.offline import probe_store
from .probing.results import ProbingResult
from .scoring.base_phase import base_decoder, drift, retained
from .scoring.ce_loss import CeKeeper, Replace, ce_loss
from .scoring.clusters import clusters
from .scoring.evaluation import CeLoss, Evaluation, parse_evaluation
from .scoring.features import FeatureKeeper
from .scoring.seen import n_seen
from .scoring.specificity import specificity

OUTLIER_NORM = 10
"""A norm above so many times the median is an outlier, as in ``posae inspect-store``."""

_CODE_NUMBERS = 2**23
"""Numbers of a code that are in memory at once, about: 32 MB; on a GPU more, where it has the memory."""
_LOGIT_NUMBERS = 2**26
"""The same of logits."""


@torch.no_grad()
def evaluate(
    folder: Path,
    settings: EvaluateSettings,
    progress: Progress | None = None,
    store: ActivationStore | None = None,
) -> dict[str, Any]:
    """Score a finished run, and write ``evaluation.json`` into it.

    What was measured before and is not asked for now (CE loss, probing) stays in it. Scores on another store
    that are there already are set aside, as ``evaluation-IDENTITY.json``, and found again for that store.

    Args:
        folder: of the run.
        settings: what is scored, and on which store.
        progress: told what is done.
        store: the run's own, where it is open already.

    Raises:
        RunNotFoundError: there is no finished run.
        RunError: a file of the run is damaged.
        RunMismatchError: the store is not the one that the run was trained from, and no other was named; or
            what was named has activations of another size.
        StoreIncompleteError: the store holds nothing out.
        ModelError: the language model is not the store's, or predicts no next token.
    """
    progress = progress or Silent()
    held_out = _HeldOut.of(Run(folder), settings, store)
    # First, so that a wrong model is told before anything is scored.
    model = _causal_model(held_out, settings.model, progress) if settings.ce_loss else None
    if settings.probing == "saebench":
        _model_of(held_out, settings.model, progress)
    score = _Score(held_out)
    n_tokens = (held_out.stop - held_out.start) * held_out.store.context_length
    progress.begin("scoring", n_tokens, "tokens")
    for batch in held_out.batches():
        score.add(batch)
        progress.advance(len(set(batch.contexts.tolist())) * held_out.store.context_length)
    progress.end()
    found = {
        **_about_run(held_out),
        **score.found(),
        **_kept(held_out),
        "contexts": [held_out.start, held_out.stop],
        "store": _about_store(held_out),
    }
    if model is not None:
        found["ce_loss"] = _ce_loss(held_out, model, settings.ce_contexts, progress).model_dump()
    if settings.probing != "none":
        found["probing"] = _probe(held_out, settings, progress)
    evaluation = Evaluation.model_validate(_finite(found)).model_dump(mode="json")
    _set_aside(held_out, progress)
    held_out.run.write_json(EVALUATION, evaluation)
    return evaluation


class _HeldOut(NamedTuple):
    """A run, and the contexts that it is scored on."""

    run: Run
    config: dict[str, Any]
    store: ActivationStore
    layer: int
    ranges: tuple[PositionRange, ...]
    start: int
    stop: int
    leave_out: list[int]
    autoencoder: Autoencoder
    device: torch.device

    @classmethod
    def of(cls, run: Run, settings: EvaluateSettings, store: ActivationStore | None) -> "_HeldOut":
        config = run.config
        if not run.is_finished:
            raise RunNotFoundError(
                f"{run.folder} has not finished training; run posae train again, it goes on"
            )
        if store is None:
            place = settings.store or config["store"]["path"]
            try:
                store = ActivationStore.open(place)
            except StoreNotFoundError:
                if settings.store is not None:
                    raise
                raise StoreNotFoundError(
                    f"there is no store at {place}; if it was moved, name it with --store"
                ) from None
        layer: int = config["settings"]["layer"]
        store.check_layer(layer)
        differ = run.unlike(store, layer)
        if settings.store is None:
            run.check_read(store, layer, "name the right one with --store")
        _check_fits(store, config)
        start, stop = store.held_out_part(layer)
        if "tokens" not in differ:
            start = max(start, int(config["store"]["training_contexts"]))
        if start >= stop:
            raise StoreIncompleteError(
                f"{store.root} holds no contexts out of training, so nothing can be scored; harvest at least "
                "16 contexts, with --held-out above 0"
            )
        device = choose_device(settings.device, processes_here().local_rank, with_float64=True)
        return cls(
            run,
            config,
            store,
            layer,
            parse_ranges(config["settings"]["ranges"], store.context_length),
            start,
            min(stop, start + (settings.contexts or stop - start)),
            config["store"]["left_out_ids"],
            load_autoencoder(run.folder).to(device),
            device,
        )

    def batches(self) -> Any:
        """All tokens of these contexts, special ones too, each batch sorted by position."""
        length, chunk = self.store.context_length, self.store.manifest.chunk_contexts
        on_cpu = self.device.type == "cpu"
        numbers = _CODE_NUMBERS if on_cpu else max(_CODE_NUMBERS, numbers_at_once(self.device))
        most = numbers // (self.autoencoder.dictionary_size * length)
        return ordered_batches(
            self.store,
            self.layer,
            [PositionRange(position, position + 1) for position in range(length)],
            start=self.start,
            stop=self.stop,
            batch_contexts=max(chunk, min(64, most - most % chunk)),
            device=self.device,
        )


class _Score:
    """All scores of one pass over the rows."""

    def __init__(self, held_out: _HeldOut) -> None:
        store, autoencoder = held_out.store, held_out.autoencoder
        self._held_out = held_out
        self._length = store.context_length
        # Ordinary tokens, those of them that are norm outliers, and special ones.
        self._ordinary, self._outliers, self._special = (
            ScoreKeeper(store.d_model, autoencoder.dictionary_size, self._length) for _ in range(3)
        )
        self._features = FeatureKeeper(
            autoencoder.dictionary_size,
            self._length,
            (held_out.start, held_out.stop),
            above=ABOVE,
            device=held_out.device,
        )
        self._threshold = OUTLIER_NORM * store.norms(held_out.layer).median
        self._token_counts = np.zeros(store.manifest.vocabulary_size, np.int64)
        self._n_rows = self._n_outliers = self._n_retained = 0
        self._retained = 0.0

    def add(self, batch: Batch) -> None:
        """Score the rows of a batch."""
        is_special = np.isin(batch.tokens, np.array(self._held_out.leave_out, np.int64))
        for keep in (~is_special, is_special):
            rows = np.flatnonzero(keep)
            if len(rows):
                self._add(batch, rows, is_special=bool(is_special[rows[0]]))

    def _add(self, batch: Batch, rows: NDArray[np.int64], *, is_special: bool) -> None:
        positions = batch.positions[rows]
        x = batch.on_device[torch.as_tensor(rows).to(batch.on_device.device)].float()
        at = torch.as_tensor(positions).to(x.device)
        offsets = _offsets(positions, [r.start for r in self._held_out.ranges] + [self._length])
        output = self._held_out.autoencoder(x, offsets, at)
        code, base_code = output.codes.code, output.base_code
        base = None if base_code is None else self._held_out.autoencoder.decode(base_code, at)

        def keep(keeper: ScoreKeeper, some: NDArray[np.int64] | None) -> None:
            """Add these rows, or all."""
            where = positions if some is None else positions[some]
            index = None if some is None else torch.as_tensor(some).to(x.device)
            keeper.add(
                x if index is None else x[index],
                output.reconstruction if index is None else output.reconstruction[index],
                code if index is None else _of_rows(code, index),
                _offsets(where, range(self._length + 1)),
                base if base is None or index is None else base[index],
            )

        if is_special:
            keep(self._special, None)
            return
        is_outlier = _as_numpy(x.square().sum(1).sqrt() > self._threshold)
        if is_outlier.any():
            keep(self._outliers, np.flatnonzero(is_outlier))
            keep(self._ordinary, np.flatnonzero(~is_outlier))
        else:
            keep(self._ordinary, None)
        self._n_rows += len(rows)
        self._n_outliers += int(is_outlier.sum())
        if base_code is not None:
            share, n = retained(base_code, output.code)
            self._retained += share
            self._n_retained += n
        self._features.add(code, positions, batch.contexts[rows], batch.tokens[rows])
        self._token_counts += np.bincount(batch.tokens[rows], minlength=len(self._token_counts))

    def found(self) -> dict[str, Any]:
        """Every score, by its key."""
        if not self._n_rows:
            raise StoreIncompleteError(
                f"{self._held_out.store.root} holds only special tokens out of training, so nothing can be "
                "scored; harvest more contexts"
            )
        ordinary = self._ordinary + self._outliers
        by_position = ordinary.scores()
        scores = ordinary.merged(self._held_out.ranges).scores()
        sums = self._features.sums()
        groups = clusters(sums.firings, sums.n_rows)
        has_inliers = self._n_outliers < self._n_rows
        return {
            **scores._asdict(),
            "l0_by_position": by_position.l0_by_range,
            "fvu_by_position": by_position.fvu_by_range,
            "fvu_with_special": (ordinary + self._special).scores().fvu,
            "fvu_without_outliers": self._ordinary.scores().fvu if has_inliers else None,
            "norm_outliers": {"threshold": self._threshold, "n_rows": self._n_outliers},
            "density_histogram": sums.density().model_dump(),
            "retention": self._retained / self._n_retained if self._n_retained else None,
            "position_features": sums.position_features().model_dump(),
            "specificity": specificity(
                sums, self._ranges_to_specialise_in(), self._token_counts
            ).model_dump(),
            "clusters": None if groups is None else groups.model_dump(),
        }

    def _ranges_to_specialise_in(self) -> tuple[PositionRange, ...]:
        ranges = self._held_out.ranges
        return ranges if len(ranges) > 1 else equal_ranges(self._length, min(4, self._length))


def _of_rows(code: Tensor | SparseCode, rows: Tensor) -> Tensor | SparseCode:
    return code.of_rows(rows) if isinstance(code, SparseCode) else code[rows]


def _as_numpy(mask: Tensor) -> NDArray[np.bool_]:
    return mask.cpu().numpy()


def _offsets(positions: NDArray[np.int64], edges: Any) -> Tensor:
    """Where in sorted positions each range begins, and where the last ends; int64 [edges]."""
    return torch.as_tensor(np.searchsorted(positions, np.fromiter(edges, np.int64)))


def _about_run(held_out: _HeldOut) -> dict[str, Any]:
    """What needs no rows."""
    autoencoder = held_out.autoencoder
    lines = held_out.run.metrics()
    before = base_decoder(held_out.run.folder)
    # Of a training that diverged nothing can be told.
    has_decoder = bool(torch.isfinite(autoencoder.W_dec).all())
    moved = drift(autoencoder.W_dec, before) if before is not None and has_decoder else None
    return {
        "architecture": autoencoder.architecture,
        "layer": held_out.layer,
        "dictionary_size": autoencoder.dictionary_size,
        "n_parameters": autoencoder.n_parameters(),
        "n_base_parameters": autoencoder.base_parameters(),
        "ranges": [str(r) for r in held_out.ranges],
        "drift": moved and {"cosine_mean": moved[0], "kept_share": moved[1]},
        "training_seconds": lines[-1].get("seconds") if lines else None,
        "training_cpu_seconds": lines[-1].get("cpu_seconds") if lines else None,
    }


def _about_store(held_out: _HeldOut) -> dict[str, Any]:
    """Which store is scored on; whether the run was trained from it is null where nobody can tell."""
    store, read = held_out.store, held_out.store.digests(held_out.layer)
    differ, trained = held_out.run.unlike(store, held_out.layer), held_out.config["store"]
    can_tell = bool(differ or (read and trained.get("read")))
    return {
        "path": store.address,
        "identity": store.identity,
        "read": read,
        "trained_from": not differ if can_tell else None,
        "same_model": _is_same(trained.get("model_revision"), store.manifest.model_revision),
        # Of the same tokens those that were trained on are never scored.
        "seen_contexts": (_n_seen(held_out) if differ else 0) if can_tell else None,
    }


def _is_same(one: str | None, other: str | None) -> bool | None:
    """Whether two revisions of models are the same; None of unlike kinds, digest and commit, or of none."""
    if one is None or other is None or one.startswith("sha256:") != other.startswith("sha256:"):
        return None
    return one == other


def _n_seen(held_out: _HeldOut) -> int | None:
    """How many scored contexts the run was trained on; None where its own store is not at hand."""
    trained = held_out.config["store"]
    if "://" in trained["path"]:  # not for this alone
        return None
    try:
        own = ActivationStore.open(trained["path"])
        if held_out.run.unlike(own, held_out.layer):
            return None
        scored = held_out.store.tokens(slice(held_out.start, held_out.stop))
        return n_seen(scored, own, int(trained["training_contexts"]))
    except StoreError:
        return None


def _kept(held_out: _HeldOut) -> dict[str, Any]:
    """What an earlier evaluation measured on the same store that this one may not."""
    for name in (EVALUATION, *sorted(path.name for path in held_out.run.folder.glob("evaluation-*.json"))):
        before = _before(held_out.run, name)
        if before and _is_of(before, held_out):
            return before.model_dump(include={"ce_loss", "probing"})
    return {}


def _is_of(scores: Evaluation, held_out: _HeldOut) -> bool:
    """Whether scores are of what is scored now: of a store without a seal, only its place tells."""
    read = held_out.store.digests(held_out.layer)
    is_same = bool(read) or scores.store.get("path") == held_out.store.address
    return is_same and scores.store.get("read") == read


def _set_aside(held_out: _HeldOut, progress: Progress) -> None:
    """Keep scores on another store: some take hours."""
    before = _before(held_out.run, EVALUATION)
    if before and not _is_of(before, held_out):
        name = _name_aside(before.store.get("identity"))
        held_out.run.write_json(name, before.model_dump(mode="json"))
        progress.say(f"the scores on {before.store.get('path')} are kept in {held_out.run.folder / name}")


def _before(run: Run, name: str) -> Evaluation | None:
    try:
        return parse_evaluation(run.scores(name), run.folder)
    except RunError:  # there is none, or none worth keeping
        return None


def _name_aside(identity: Any) -> str:
    # What a file says may be anything, and is to name one in the run's folder.
    digits = str(identity)[:8]
    return f"evaluation-{digits if digits.isalnum() and identity else 'unsealed'}.json"


def _ce_loss(held_out: _HeldOut, model: CausalLanguageModel, n_contexts: int, progress: Progress) -> CeLoss:
    store, length = held_out.store, held_out.store.context_length
    stats = store.stats(held_out.layer)
    mean = torch.as_tensor(stats.sums.sum(axis=0) / max(1, stats.n_tokens)).to(held_out.device)
    start, stop = held_out.start, min(held_out.stop, held_out.start + n_contexts)
    size = max(1, min(32, _LOGIT_NUMBERS // (length * store.manifest.vocabulary_size)))
    keeper = CeKeeper(length)
    progress.begin("splicing", (stop - start) * length, "tokens")
    for first in range(start, stop, size):
        ids = store.tokens(slice(first, min(first + size, stop)))
        is_ordinary = torch.as_tensor(~np.isin(ids, np.array(held_out.leave_out))).to(held_out.device)
        tokens = torch.as_tensor(ids).to(held_out.device)
        keeper.add(
            tokens,
            is_ordinary,
            lambda replace, tokens=tokens: model.logits(tokens, held_out.layer, replace),
            {
                "spliced": spliced(held_out.autoencoder, is_ordinary),
                "zero": torch.zeros_like,
                "mean": lambda x: mean.expand_as(x),
            },
        )
        progress.advance(len(ids) * length)
    progress.end()
    return ce_loss(keeper.sums(), held_out.ranges, model.facts.id, stop - start)


def spliced(autoencoder: Autoencoder, is_ordinary: Tensor) -> Replace:
    """What puts reconstructions in the place of the activations of ordinary tokens.

    Args:
        autoencoder: in ``eval()`` mode.
        is_ordinary: bool [contexts, positions]; other tokens keep their activations.
    """

    def replace(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        rebuilt = autoencoder.decode(autoencoder.encode(x, positions), positions)
        return torch.where(is_ordinary[..., None], rebuilt, x.float())

    return replace


def _causal_model(held_out: _HeldOut, model: str | None, progress: Progress) -> CausalLanguageModel:
    name, facts = _model_of(held_out, model, progress)
    attention = held_out.store.manifest.attention
    return CausalLanguageModel.load(name, facts.revision, device=held_out.device, attention=attention)


def _model_of(held_out: _HeldOut, named: str | None, progress: Progress) -> tuple[str, ModelFacts]:
    """The model that the store was made with, by digest, not name: what to load it by, and its facts."""
    store, manifest = held_out.store, held_out.store.manifest
    _refuse_planted(store)
    _refuse_imported(store)
    name, recorded = named or manifest.model, manifest.model_revision
    is_on_hub = is_hub_id(manifest.model, recorded)
    if named is None and name != "demo" and not is_on_hub:
        raise ModelError(
            f"{store.root} was made with a model in a local folder, {name}; name that folder with --model"
        )
    facts = facts_of_recorded(name, manifest)
    problem = f"{name} is not {manifest.model}, the model that {store.root} was made with"
    if facts.config_hash != manifest.model_config_hash:
        raise ModelError(f"{problem}: their configurations differ; name the right one with --model")
    if recorded is None:
        progress.say(f"{store.root} does not say which weights it was made with: those of {name} are taken")
    elif not is_recorded(name, facts, manifest):
        remedy = "name the right one with --model"
        if is_on_hub:
            fetch = f"hf download {manifest.model} --revision {recorded} --local-dir FOLDER"
            remedy = f"leave --model out, or get a copy: {fetch}"
        raise ModelError(
            f"{problem}: its weights and tokenizer are {facts.revision}, not {recorded}; {remedy}"
        )
    return name, facts


def _refuse_planted(store: ActivationStore) -> None:
    if store.manifest.planted:
        raise ModelError(
            f"no model gives the activations of {store.root}: an effect was planted into them; "
            "run a model only with what was trained on a harvest"
        )


def _refuse_imported(store: ActivationStore) -> None:
    if store.manifest.imported:
        raise ModelError(
            f"{store.root} was imported, and nobody can check which model and tokenizer its activations are "
            "of; score the run without --ce-loss and --probing"
        )


def _probe(held_out: _HeldOut, settings: EvaluateSettings, progress: Progress) -> ProbingResult:
    """Sparse probing of the activations and their codes, offline or on SAEBench's datasets."""
    store, layer, autoencoder, device = held_out.store, held_out.layer, held_out.autoencoder, held_out.device
    manifest = store.manifest
    _refuse_imported(store)
    name = settings.model or manifest.language_model
    revision = None if settings.model else manifest.model_revision
    if not settings.model and name != "demo":
        if not is_hub_id(name, revision):
            raise StoreMismatchError(
                f"{store.root} was made with a local model, {name}; name its folder with --model"
            )
        progress.say(f"tokenizer of {name}")
    tokenizer = load_tokenizer(name, revision)
    if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        raise StoreMismatchError(
            f"the tokenizer of {name} is not the one that {store.root} was made with; "
            "name the right model with --model"
        )

    def told(done: int, total: int, last: str) -> None:
        if done == 0:
            progress.begin("probing", total, "classes")
        else:
            progress.advance(1, last)
        if done == total:
            progress.end()

    if settings.probing == "saebench":
        name, facts = _model_of(held_out, settings.model, Silent())
        model = LanguageModel.load(name, facts.revision, device=device, attention=manifest.attention)
        return probe_saebench(
            lambda tokens: model.activations(tokens, [layer])[layer],
            autoencoder,
            tokenizer,
            first=manifest.first_token,
            context_length=store.context_length,
            device=device,
            told=told,
        )
    documents = None
    if manifest.dataset == "stdlib" and manifest.dataset_revision != stdlib_revision():
        progress.say(f"the text, {manifest.dataset_revision}, is not on this machine: probing tokens alone")
    elif manifest.dataset == "stdlib" and tokenizer.is_fast:
        documents = stdlib_files(manifest.dataset_split or "all")
    return probe_store(
        store,
        layer,
        autoencoder,
        tokenizer,
        documents,
        held_out=store.held_out_part(layer),
        leave_out=held_out.leave_out,
        device=device,
        told=told,
    )


def _finite(value: Any) -> Any:
    """The same with null for what cannot be told."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_fits(store: ActivationStore, config: dict[str, Any]) -> None:
    for name, now in (("d_model", store.d_model), ("context_length", store.context_length)):
        trained: int = config["store"].get(name, now)
        if trained != now:
            raise RunMismatchError(
                f"{store.root} has {name} {now}, and the run {trained}; "
                "name the store that it was trained from with --store"
            )
