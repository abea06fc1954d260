"""A language model that is loaded, to read its residual stream or to run it with activations replaced.

``LanguageModel.load`` takes 2 bytes of memory per parameter, without the head. ``activations`` costs a
forward pass that ends after the last layer wanted: layers 5 and 12 of 26 run half the model.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Self, cast

import torch
import transformers

from ...store.errors import SettingsError
from ..errors import ModelError
from .hooks import Side, capture, find_blocks, replaced
from .model_facts import ModelFacts, check_layers, model_facts
from .model_files import loading, local_folder, read_config

# Any, as few of its functions are typed. Importing transformers is quick, the first use of one of its
# classes is not: classes are therefore looked up only where they are used.
_transformers = cast(Any, transformers)

# Any other name would make transformers fetch a kernel of that name from the hub and run it.
_ATTENTIONS = ("eager", "sdpa")


class LanguageModel:
    """A language model without its head, in bfloat16.

    Attributes:
        facts: what is known from the config.
        device: of weights and activations.
        text_model: the part of the model that takes token ids.
        blocks: its layers; the output of block ``l`` is hook point ``resid_post`` of layer ``l``.
    """

    _loader = "AutoModel"

    def __init__(self, facts: ModelFacts, device: torch.device, text_model: torch.nn.Module) -> None:
        """Find the blocks of a loaded model; call ``load`` instead.

        Raises:
            ModelError: the layers are not kept in one list of blocks.
        """
        self.facts = facts
        self.device = device
        self.text_model = text_model
        blocks = find_blocks(text_model, facts.n_layers)
        if blocks is None:
            raise ModelError(
                f"{facts.id} does not keep its {facts.n_layers} layers in one list of blocks, "
                f"where posae could read them: choose another model"
            )
        self.blocks = blocks

    @classmethod
    def load(
        cls,
        model: str,
        revision: str | None = None,
        *,
        device: torch.device | str = "cpu",
        attention: str = "eager",
    ) -> Self:
        """Load a language model.

        Args:
            model: ``demo``, a local folder or a hub id.
            revision: as for ``model_facts``.
            device: where to run it.
            attention: how attention is computed, ``eager`` or ``sdpa``; the last bits of activations depend
                on it.

        Raises:
            ModelError: as ``model_facts``, or weights that are missing, incomplete or pickled.
            SettingsError: no such attention.
        """
        if attention not in _ATTENTIONS:
            raise SettingsError(f"no attention {attention}: choose from {', '.join(_ATTENTIONS)}")
        cls._check_kind(model, revision)
        facts = model_facts(model, revision)
        folder = local_folder(model)
        if folder and facts.revision is None:
            raise ModelError(
                f"{model} holds no weights in the format safetensors, and pickles "
                f"(pytorch_model.bin) are not loaded: save the model again with save_pretrained"
            )
        with loading(model, facts.revision):
            # bfloat16 whatever type the weights have: it is what a store holds.
            loaded, report = getattr(_transformers, cls._loader).from_pretrained(
                folder or model,
                revision=None if folder else facts.revision,
                dtype=torch.bfloat16,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            # transformers fills missing weights with random numbers. Only the pooler, which comes after the
            # last block, may be missing.
            missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
            if missing:
                raise ModelError(
                    f"{model} lacks {len(missing)} of its weights, the first {missing[0]}: "
                    f"fetch a complete copy"
                )
            return cls._of(facts, torch.device(device), loaded)

    @classmethod
    def _check_kind(cls, model: str, revision: str | None) -> None:
        """Refuse models that this class cannot be of; any model that posae reads has a residual stream."""

    @classmethod
    def _of(cls, facts: ModelFacts, device: torch.device, loaded: Any) -> Self:
        # Of a model of text and images, only the text part.
        text_model = loaded.get_decoder()
        text_model.config.use_cache = False
        text_model.eval().to(device)
        return cls(facts, device, text_model)

    def check_length(self, n_positions: int) -> None:
        """Refuse contexts that are longer than the model's maximum.

        Raises:
            ModelError: they are too long.
        """
        limit = getattr(self.text_model.config, "max_position_embeddings", None)
        if limit and 0 < limit < n_positions:
            raise ModelError(
                f"{self.facts.id} takes at most {limit} positions, these contexts have "
                f"{n_positions}: choose a shorter context length"
            )

    def activations(self, tokens: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Run contexts through the model and read the residual stream after some layers.

        Blocks after the last of ``layers`` do not run. Every token is attended to: contexts hold no
        padding.

        Args:
            tokens: int32 or int64 [contexts, positions], on any device.
            layers: layers to read, in any order.

        Returns:
            By layer, ascending: bfloat16 [contexts, positions, d_model] on ``device``. A layer that did not
            run, as some do not on text alone, is absent.

        Raises:
            ModelError: no such layer, contexts longer than the model takes, or a block whose output is
                not one vector per position.
        """
        check_layers(self.facts, layers)
        self.check_length(tokens.shape[1])
        shape = (*tokens.shape, self.facts.d_model)
        # Not transformers' hidden_states: the last of those comes after the final norm.
        outputs: dict[int, tuple[torch.nn.Module, Side]] = {
            layer: (self.blocks[layer], "output") for layer in set(layers)
        }
        with torch.inference_mode():
            captured = capture(outputs, lambda: self.text_model(tokens.to(self.device)))
        for layer, activations in captured.items():
            if activations.shape != shape:
                raise ModelError(
                    f"layer {layer} of {self.facts.id} gives {tuple(activations.shape)}, not "
                    f"[contexts, positions, d_model] = {shape}: choose another model"
                )
        return {layer: activations.to(torch.bfloat16) for layer, activations in captured.items()}


class CausalLanguageModel(LanguageModel):
    """A language model with the head that predicts the next token.

    ``load`` also refuses, with a ModelError, models that do not predict the next token.
    """

    _loader = "AutoModelForCausalLM"
    _whole: Any

    @classmethod
    def _check_kind(cls, model: str, revision: str | None) -> None:
        with loading(model, revision):
            config = read_config(model, local_folder(model), revision)
            is_causal = type(config) in _transformers.MODEL_FOR_CAUSAL_LM_MAPPING
            is_masked = type(config) in _transformers.MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder
            if not is_causal or is_masked:
                raise ModelError(
                    f"{model} does not predict the next token from those before it (model_type "
                    f"{config.model_type}), so it has no CE loss: leave --ce-loss out"
                )

    @classmethod
    def _of(cls, facts: ModelFacts, device: torch.device, loaded: Any) -> Self:
        model = super()._of(facts, device, loaded)
        model._whole = loaded.eval().to(device)
        return model

    def logits(
        self,
        tokens: torch.Tensor,
        layer: int,
        replace: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run contexts through the whole model, with one layer's output replaced.

        Args:
            tokens: int32 or int64 [contexts, positions], on any device.
            layer: the layer whose output (hook point ``resid_post``) is replaced.
            replace: takes that output, bfloat16 [contexts, positions, d_model], and returns what replaces it:
                the same shape, any float dtype. None: the output is kept.

        Returns:
            [contexts, positions, vocabulary].

        Raises:
            ModelError: no such layer.
        """
        check_layers(self.facts, [layer])

        with replaced(self.blocks[layer], replace) if replace else nullcontext(), torch.inference_mode():
            return self._whole(input_ids=tokens.to(self.device).long()).logits
