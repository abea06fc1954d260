"""Stage one: text through a language model into an activation store.

Tokens first: all contexts are tokenised, permuted and committed, and only then does the model run
over them, shard by shard. So a killed harvest goes on from the store alone, any number of processes
may share one store, and equal settings give equal bytes. One forward pass serves all layers and
stops after the last. While the model runs the next batch, threads encode and write the last one, and a
finished shard is made durable while the next one begins. Memory: the model, the tokens, and about six
batches of the layers' activations, however much is harvested.
"""

import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ...store.arrays import begun_layers
from ...store.errors import StoreFormatError, StoreNotFoundError
from ...store.layout import CHUNK_CONTEXTS, shard_contexts
from ...store.manifest import Manifest, token_specs
from ...store.reader import ActivationStore
from ...store.rounding import MANTISSA_BITS
from ...store.seal import CORPUS_PATH
from ...store.shards import ShardReader
from ...store.stats import ordinary_tokens
from ...store.writer import NotFiniteError, ShardOfLayers, StoreWriter, standing_store
from ..device import choose_device, n_cores
from ..errors import ModelError
from ..processes import Processes, processes_here
from ..progress import Progress, Silent
from ..settings import HarvestSettings
from .corpus import corpus_counts
from .host_copies import HostCopies, HostCopy
from .language_model import (
    LanguageModel,
    ModelFacts,
    check_layers,
    default_layers,
    facts_of_recorded,
    is_recorded,
    load_tokenizer,
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

EXPECTED_RATIO = {"small": 1.42, "fast": 1.27, "raw": 1.0}
"""Raw bytes to stored bytes, before anything is measured; what was seen lies within 10 % of it."""

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
    """What a harvest left."""

    layers: tuple[int, ...]
    """All that the store holds."""

    n_contexts: int
    n_tokens: int
    """Tokens that went through the model this time; 0 if all was there."""

    identity: str


def committed_manifest(root: Path) -> Manifest | None:
    """The manifest of the store at ``root``, if its tokens are committed and so all is fixed.

    Raises:
        StoreError: something else is there, or what is there is damaged.
    """
    try:
        store = ActivationStore(root)
    except (StoreNotFoundError, StoreFormatError):
        return None  # said again, where it matters, by ``StoreWriter.begin``
    return store.manifest if store.files.exists(CORPUS_PATH) else None


class Harvest:
    """A harvest about to run; nothing is loaded but configurations."""

    def __init__(self, path: Path, settings: HarvestSettings) -> None:
        """Resolve what ``settings`` leave open.

        Raises:
            ModelError: no such model, or it lacks a layer.
            SettingsError: no such device, or variables of torchrun or SLURM that contradict each other.
        """
        self.path = path
        self.settings = settings
        # What is committed is fixed: revisions that the settings leave open are then those of the store, so
        # that resuming asks no hub.
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
        """The layers that the store will hold, and those begun earlier that are left incomplete."""
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
        beside = n_contexts * length * 3
        folder = next(f for f in [self.path.absolute(), *self.path.absolute().parents] if f.exists())
        return Plan(
            self.facts.id,
            self.layers,
            n_contexts,
            n_contexts * length,
            raw,
            int(raw / self._expected_ratio) + beside,
            shutil.disk_usage(folder).free,
        )

    @property
    def _expected_ratio(self) -> float:
        # Each mantissa bit that is not kept saves about one of a value's 16 bits.
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
        """Read local text for its digest now, with progress; ``run`` does so too, in silence.

        Raises:
            CorpusError: text that is missing or cannot be read.
        """
        if not self._is_text_recorded:
            self.corpus = self._open_corpus(progress)

    @property
    def _is_text_recorded(self) -> bool:
        """Whether the manifest's word is taken for the text: tokens are committed, so none is needed.

        Local text that is there is compared by its digest nevertheless, by the first process for all: another
        text of the same name is refused. Where it is gone its base name is enough.
        """
        s, begun = self.settings, self.begun
        if begun is None or not names_recorded_text(s.dataset, s.dataset_revision, begun):
            return False
        path = None if s.dataset == "stdlib" else local_path(s.dataset)
        return path is None or not path.exists() or not self.processes.is_first

    @property
    def _text(self) -> Corpus:
        """The corpus, named as the manifest of committed tokens names it if it is the same by its digest."""
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
        """All that the store's bytes depend on."""
        s, text, facts, begun = self.settings, self._text, self.facts, self.begun
        model, revision = facts.id, facts.revision
        if begun and is_recorded(s.model, facts, begun):  # wherever it lies now
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
            # A store that was begun before bytes were counted is finished without.
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
            # What is wrong with the folder or the model shows before hours of tokenising.
            StoreWriter(self.path, manifest, allow_versions=allow_versions).check(self.layers)
            model = self._load_model()
        writer = StoreWriter.begin(self.path, manifest, self.layers, allow_versions=allow_versions)
        with writer.lock():
            if not writer.has_tokens:
                self._commit_tokens(writer, progress)
            layers = writer.begin_layers(self.layers)
        n_tokens = self._fill(writer, layers, model, progress) if layers else 0
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

    def _fill(
        self, writer: StoreWriter, layers: Sequence[int], model: LanguageModel | None, progress: Progress
    ) -> int:
        """Commit every shard of ``layers``: first those that are free, then what others leave.

        The model is loaded for the first of them, if it is not yet.
        """
        manifest = self.manifest
        missing = self.processes.dealt(writer.missing_shards(layers))
        tally = _Tally(writer, layers, missing, progress if self.processes.is_first else Silent())
        tokens = ShardReader(writer.files, token_specs(manifest)["tokens"])
        copies = HostCopies(self.device)
        n_tokens = 0
        with (
            ThreadPoolExecutor(self._n_encoders, "posae-encode") as encoders,
            # Making a shard durable takes a while: the model begins the next one meanwhile.
            ThreadPoolExecutor(1, "posae-commit") as committer,
        ):
            committing: Future[None] | None = None
            for shard in writer.lock_each(layers, missing):
                with ExitStack() as held:
                    held.enter_context(shard)
                    tally.begin_shard(shard.shard)
                    model = model or self._load_model()
                    rows = tokens.read_rows(np.array(shard.contexts))
                    batches = self._batches(shard, rows, model, copies)
                    with _finite(manifest, shard, self.layers):
                        for copy, ordinary in _one_behind(batches):
                            for layer, bits in copy.bits().items():
                                copy.read_by(shard.append(layer, bits, ordinary, encoders))
                            tally.advance(ordinary.size)
                    if committing:
                        committing.result()
                    held.pop_all()
                    committing = committer.submit(_commit, manifest, shard, self.layers)
                n_tokens += rows.size
            if committing:
                committing.result()
        tally.end()
        return n_tokens

    @property
    def _n_encoders(self) -> int:
        return max(2, n_cores() // self.processes.n_local)

    def _load_model(self) -> LanguageModel:
        model = LanguageModel.load(
            self.settings.model,
            self.facts.revision,
            device=self.device,
            attention=self.settings.attention,
        )
        model.check_length(self.settings.context_length)
        return model

    def _batches(
        self, shard: ShardOfLayers, tokens: NDArray[np.int32], model: LanguageModel, copies: HostCopies
    ) -> Iterator[tuple[HostCopy, NDArray[np.bool_]]]:
        """Run the model over a shard; yield each batch's activations and which tokens are ordinary."""
        size = self.manifest.batch_contexts
        on_device = torch.as_tensor(tokens).to(self.device)
        for start in range(0, len(tokens), size):
            within = slice(start, start + size)
            activations = model.activations(on_device[within], shard.layers)
            if silent := sorted(set(shard.layers) - activations.keys()):
                others = ",".join(str(layer) for layer in self.layers if layer not in silent)
                raise ModelError(
                    f"layer {silent[0]} of {self.facts.id} does not run on text alone; leave it out"
                    + (f": --layers {others}" if others else "")
                )
            yield (
                copies.start(activations),
                ordinary_tokens(self.manifest, tokens[within], shard.contexts[within]),
            )


class _Tally:
    """Tells how far all processes are: what this one does, and what others leave in the store."""

    def __init__(
        self, writer: StoreWriter, layers: Sequence[int], missing: Sequence[int], progress: Progress
    ) -> None:
        self._writer = writer
        self._layers = layers
        self._progress = progress
        # A file that stands and yet is missing is damaged, and will be made anew.
        self._others = set(missing) - writer.standing_shards(layers)
        manifest = writer.manifest
        total = manifest.n_contexts * manifest.context_length
        done = total - sum(map(self._n_tokens, missing))
        progress.begin("harvesting", total, "tokens", done, manifest.d_model * 2 * len(layers))

    def _n_tokens(self, shard: int) -> int:
        manifest = self._writer.manifest
        return len(manifest.contexts_of(shard)) * manifest.context_length

    def begin_shard(self, shard: int) -> None:
        """This process fills ``shard``; see what others have done meanwhile."""
        self._others.discard(shard)
        self._look()

    def _look(self) -> None:
        done = self._others & self._writer.standing_shards(self._layers)
        self._others -= done
        if done:
            self._progress.advance(sum(map(self._n_tokens, done)))

    def advance(self, n_tokens: int) -> None:
        """This process has run the model over so many tokens."""
        self._progress.advance(n_tokens)

    def end(self) -> None:
        """All is there."""
        self._look()
        self._progress.end()


_Item = TypeVar("_Item")


def _one_behind(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items, each once the next one has been asked for: so that one is used while one is made."""
    last: list[_Item] = []
    for item in items:
        yield from last
        last = [item]
    yield from last


def _commit(manifest: Manifest, shard: ShardOfLayers, wanted: Sequence[int]) -> None:
    with shard, _finite(manifest, shard, wanted):
        shard.commit()


@contextmanager
def _finite(manifest: Manifest, shard: ShardOfLayers, wanted: Sequence[int]) -> Generator[None]:
    try:
        yield
    except NotFiniteError as error:
        others = ",".join(str(layer) for layer in wanted if layer != error.layer)
        raise ModelError(
            f"layer {error.layer} of {manifest.model} gives activations that are not finite, in contexts "
            f"{shard.contexts.start} to {shard.contexts.stop - 1}; "
            + (f"leave that layer out (--layers {others}), or " if others else "")
            + "harvest into another folder with another --device or --attention"
        ) from None


def _no_documents() -> Iterator[str]:
    return iter(())
