"""Stage one: text through a language model into an activation store.

All contexts are tokenised, permuted and committed before the model runs over them, shard by shard
(filling.py). A killed harvest can therefore resume from the store alone, any number of processes may share
one store, and equal settings give equal bytes. One forward pass serves all layers and stops after the last.
Memory: the model, the tokens, and about six batches of the layers' activations, however much is harvested.
"""

import shutil
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ...store.arrays import begun_layers
from ...store.errors import StoreFormatError, StoreNotFoundError
from ...store.layout import CHUNK_CONTEXTS, shard_contexts
from ...store.manifest import Manifest
from ...store.reader import ActivationStore
from ...store.rounding import MANTISSA_BITS
from ...store.seal import CORPUS_PATH
from ...store.writer import StoreWriter, standing_store
from ..device import choose_device
from ..processes import Processes, processes_here
from ..progress import Progress, Silent
from ..settings import HarvestSettings
from .corpus import corpus_counts
from .filling import fill
from .language_model import LanguageModel
from .model_facts import (
    ModelFacts,
    check_layers,
    default_layers,
    facts_of_recorded,
    is_recorded,
    model_facts,
)
from .text.contexts import (
    Contexts,
    InOrder,
    held_out_contexts,
    order_of_contexts,
    special_tokens,
    take_contexts,
    tokenizer_hash,
)
from .text.documents import Corpus, local_path, open_corpus
from .text.recorded import names_recorded_text
from .tokenizer import load_tokenizer

EXPECTED_RATIO = {"small": 1.42, "fast": 1.27, "raw": 1.0}
"""Raw bytes per stored byte, estimated before anything is measured; measured ratios lie within 10 % of it."""

_VERSIONS_THAT_MATTER = ("posae", "torch", "transformers", "tokenizers", "numpy", "numcodecs")


class Plan(NamedTuple):
    """What a harvest would write."""

    model: str
    layers: tuple[int, ...]
    n_contexts: int
    n_tokens: int
    raw_bytes: int
    expected_bytes: int
    free_bytes: int


class Harvested(NamedTuple):
    """The result of a harvest."""

    layers: tuple[int, ...]
    """All layers of the store."""

    n_contexts: int
    n_tokens: int
    """Tokens that went through the model this time; 0 if nothing was missing."""

    identity: str


def committed_manifest(root: Path) -> Manifest | None:
    """The manifest of the store at ``root`` if its tokens are committed, i.e. if its settings are fixed.

    Raises:
        StoreError: the folder holds something else, or a damaged store.
    """
    try:
        store = ActivationStore(root)
    except (StoreNotFoundError, StoreFormatError):
        return None  # reported by ``StoreWriter.begin`` if it matters
    return store.manifest if store.files.exists(CORPUS_PATH) else None


class Harvest:
    """A harvest about to run; only configurations are loaded."""

    def __init__(self, path: Path, settings: HarvestSettings) -> None:
        """Resolve the settings that are left open.

        Raises:
            ModelError: no such model, or it lacks a layer.
            SettingsError: no such device, or variables of torchrun or SLURM that contradict each other.
        """
        self.path = path
        self.settings = settings
        # Revisions that the settings leave open are those of the committed store: resuming contacts no hub.
        self.begun: Manifest | None = committed_manifest(path)
        model, revision = settings.model, settings.model_revision
        self.facts: ModelFacts = (
            facts_of_recorded(model, self.begun, revision) if self.begun else model_facts(model, revision)
        )
        self.layers: tuple[int, ...] = tuple(
            sorted(set(settings.layers or default_layers(self.facts.n_layers)))
        )
        check_layers(self.facts, self.layers)
        self.processes: Processes = processes_here()
        self.device = choose_device(settings.device, self.processes.local_rank)

    def layers_held(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layers that the store will hold, and those begun earlier that stay incomplete."""
        store = standing_store(self.path) if self.begun else None
        if store is None or self.begun is None:
            return self.layers, ()
        writer = StoreWriter(self.path, self.begun)
        begun = begun_layers(writer.files, self.begun)
        held = {*self.layers, *(store.layers if store.is_sealed else ())}
        left = {layer for layer in begun if layer not in held and writer.missing_shards([layer])}
        return tuple(sorted({*held, *begun} - left)), tuple(sorted(left))

    def plan(self) -> Plan:
        """Sizes, without touching the dataset or the disk."""
        n_contexts, length = self.settings.n_contexts, self.settings.context_length
        raw = n_contexts * length * self.facts.d_model * 2 * len(self.layers)
        token_bytes = n_contexts * length * 3
        folder = next(f for f in [self.path.absolute(), *self.path.absolute().parents] if f.exists())
        return Plan(
            self.facts.id,
            self.layers,
            n_contexts,
            n_contexts * length,
            raw,
            int(raw / self._expected_ratio) + token_bytes,
            shutil.disk_usage(folder).free,
        )

    @property
    def _expected_ratio(self) -> float:
        # Each mantissa bit that is rounded away saves about one of a value's 16 bits.
        saved = 0 if self.settings.mantissa_bits is None else MANTISSA_BITS - self.settings.mantissa_bits
        return 16 / (16 / EXPECTED_RATIO[self.settings.codec] - saved)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.settings.model, self.facts.revision)

    @cached_property
    def corpus(self) -> Corpus:
        """The text, resolved to a revision."""
        return self._open_corpus(Silent())

    def _open_corpus(self, progress: Progress) -> Corpus:
        s = self.settings
        return open_corpus(
            s.dataset,
            split=s.split,
            column=s.column,
            config=s.dataset_config,
            revision=s.dataset_revision,
            progress=progress,
        )

    def open_text(self, progress: Progress) -> None:
        """Read local text for its digest now, with progress; else ``run`` does so without.

        Raises:
            CorpusError: text that is missing or cannot be read.
        """
        if not self._is_text_recorded:
            self.corpus = self._open_corpus(progress)

    @property
    def _is_text_recorded(self) -> bool:
        """Whether the text is taken to be the recorded one: tokens are committed, so no text is needed.

        The first process still compares local text by its digest, if it exists, and so refuses another text
        of the same name. If it was removed, its base name is enough.
        """
        s, begun = self.settings, self.begun
        if begun is None or not names_recorded_text(s.dataset, s.dataset_revision, begun):
            return False
        path = None if s.dataset == "stdlib" else local_path(s.dataset)
        return path is None or not path.exists() or not self.processes.is_first

    @property
    def _text(self) -> Corpus:
        """The corpus, under the name that committed tokens record if it is the same by its digest."""
        s, begun = self.settings, self.begun
        if begun and self._is_text_recorded:
            column = s.column if begun.dataset_column is not None else None
            split = s.split or begun.dataset_split
            return Corpus(begun.dataset, begun.dataset_revision, split, column, _no_documents)
        if begun and self.corpus.revision == begun.dataset_revision:
            return self.corpus._replace(id=begun.dataset)
        return self.corpus

    @cached_property
    def manifest(self) -> Manifest:
        """Everything that the store's bytes depend on."""
        s, text, facts, begun = self.settings, self._text, self.facts, self.begun
        model, revision = facts.id, facts.revision
        if begun and is_recorded(s.model, facts, begun):  # in whatever folder it is now
            model, revision = begun.language_model, begun.model_revision
        special = special_tokens(self.tokenizer)
        held_out = held_out_contexts(s.n_contexts, s.held_out, CHUNK_CONTEXTS)
        return Manifest(
            model=model,
            model_revision=revision,
            model_config_hash=facts.config_hash,
            model_layers=facts.n_layers,
            d_model=facts.d_model,
            attention=s.attention,
            device=self.device.type,
            batch_contexts=s.batch_contexts,
            n_contexts=s.n_contexts,
            context_length=s.context_length,
            skip_contexts=s.skip_contexts,
            held_out=(s.n_contexts - held_out, s.n_contexts),
            packing=s.packing,
            dataset=text.id,
            dataset_revision=text.revision,
            dataset_config=s.dataset_config,
            dataset_split=text.split,
            dataset_column=text.column,
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            first_token=special.first,
            separator_token=special.separator if s.packing == "pack" else None,
            special_token_ids=special.ids,
            vocabulary_size=len(self.tokenizer),
            seed=s.seed,
            codec=s.codec,
            mantissa_bits=s.mantissa_bits,
            # Stores begun before byte counts were kept are finished without them.
            byte_counts=begun is None or begun.byte_counts,
            chunk_contexts=CHUNK_CONTEXTS,
            shard_contexts=shard_contexts(s.n_contexts),
            versions={name: version(name) for name in _VERSIONS_THAT_MATTER},
        )

    def run(self, progress: Progress | None = None) -> Harvested:
        """Harvest what is missing, and seal the store.

        Raises:
            CorpusError: text that is missing, too little or not text.
            ModelError: weights that cannot be loaded, or activations that are not finite.
            StoreMismatchError: the store was begun with other settings.
            StoreWriteError: the disk refused.
        """
        progress = progress or Silent()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # else each process would also take memory on the first GPU
        manifest, model = self.manifest, None
        allow_versions = self.settings.allow_versions
        if self.begun is None:
            # A wrong folder or model must show before hours of tokenising.
            StoreWriter(self.path, manifest, allow_versions=allow_versions).check(self.layers)
            model = self._load_model()
        writer = StoreWriter.begin(self.path, manifest, self.layers, allow_versions=allow_versions)
        with writer.lock():
            if not writer.has_tokens:
                self._commit_tokens(writer, progress)
            layers = writer.begin_layers(self.layers)
        n_tokens = 0
        if layers:
            n_tokens = fill(
                writer,
                layers,
                lambda: model or self._load_model(),
                named_layers=self.layers,
                device=self.device,
                processes=self.processes,
                progress=progress,
            )
        with writer.lock():
            identity = writer.finish(self.layers)
        layers = ActivationStore(self.path).layers
        return Harvested(layers, self.manifest.n_contexts, n_tokens, identity)

    def _commit_tokens(self, writer: StoreWriter, progress: Progress) -> None:
        contexts = self._take_contexts(progress)
        held_out = self.manifest.held_out
        order = order_of_contexts(
            len(contexts.tokens), seed=self.settings.seed, held_out=held_out[1] - held_out[0]
        )
        counts = corpus_counts(
            contexts.tokens,
            self.manifest.special_token_ids,
            n_documents=contexts.n_documents,
            n_left_out=contexts.n_left_out,
        )
        tokens, documents = (InOrder(rows, order) for rows in (contexts.tokens, contexts.documents))
        writer.write_tokens(tokens, documents, counts)

    def _take_contexts(self, progress: Progress) -> Contexts:
        s = self.settings
        progress.begin("tokenising", s.n_contexts + s.skip_contexts, "contexts")
        done = 0

        def advance(n_contexts: int) -> None:
            nonlocal done
            progress.advance(n_contexts - done)
            done = n_contexts

        contexts = take_contexts(
            self.corpus.documents(),
            self.tokenizer,
            n_contexts=s.n_contexts,
            context_length=s.context_length,
            packing=s.packing,
            skip_contexts=s.skip_contexts,
            progress=advance,
            folder=self.path,
        )
        progress.end()
        return contexts

    def _load_model(self) -> LanguageModel:
        model = LanguageModel.load(
            self.settings.model,
            self.facts.revision,
            device=self.device,
            attention=self.settings.attention,
        )
        model.check_length(self.settings.context_length)
        return model


def _no_documents() -> Iterator[str]:
    return iter(())
