"""Position adapters that any architecture can have: what a range, or a position, changes in an autoencoder.

    bias        an offset to each feature's activation in each range, before the activation function
    gate        a factor on it, 1 + gate
    table       a learned mean of each position, taken off before encoding and added back after decoding
    decoder:R   feature directions that differ by range: W_dec + U_r V_r, of rank R

Several are joined by ``+``: ``bias+decoder:8``. All come in with the curriculum's alpha, and cost nothing
while it is 0. Each begins at no effect. Shared adapters are the control of a claim that position helps: the
same adapters, the same for every range (or position), which can win by their parameters alone.

Cost: bias, gate and table are a gather and an addition; the decoder's is 2 · R · (dictionary_size + d_model)
operations a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...store.errors import SettingsError
from .sparse import SparseCode, split

FORMS = ("bias", "gate", "table", "decoder")
_MISSING = "this autoencoder needs the position of each row; give it positions, int64 [rows]"


class Rows(NamedTuple):
    """Where the rows of a batch stand in their contexts; they are sorted by range."""

    lengths: list[int]
    """Rows in each range; empty where the caller does not say."""
    positions: Tensor | None = None
    """int64 [rows]; None likewise."""

    def needed_positions(self) -> Tensor:
        """The positions.

        Raises:
            SettingsError: they were not given.
        """
        if self.positions is None:
            raise SettingsError(_MISSING)
        return self.positions

    def needed_lengths(self) -> list[int]:
        """The rows in each range.

        Raises:
            SettingsError: they were not given.
        """
        if not self.lengths:
            raise SettingsError(_MISSING)
        return self.lengths


def empty_weight(*shape: int, device: torch.device) -> nn.Parameter:
    """A weight that has no values yet; float32."""
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))


class PositionAdapter(nn.Module):
    """Nothing, or some of the four above.

    Attributes:
        form: as in the settings, ``none`` or forms joined by ``+``.
        is_shared: whether all ranges have the same.
    """

    bias: nn.Parameter | None
    """[ranges, dictionary_size], as ``gate`` is; with shared adapters there is but one range."""
    gate: nn.Parameter | None
    table: nn.Parameter | None
    """[positions, d_model], in scaled units."""
    decoder_in: nn.Parameter | None
    """[ranges, dictionary_size, R]."""
    decoder_out: nn.Parameter | None
    """[ranges, R, d_model], in scaled units."""

    def __init__(
        self,
        form: str,
        *,
        is_shared: bool,
        d_model: int,
        dictionary_size: int,
        n_ranges: int,
        n_positions: int,
        device: torch.device,
    ) -> None:
        """Make the weights, without values.

        Raises:
            SettingsError: no such form, or one twice, or a rank that is no number from 1 to d_model.
        """
        super().__init__()
        ranks = _parse(form, d_model)
        self.form, self.is_shared = form, is_shared
        n_ranges, n_positions = (1, 1) if is_shared else (n_ranges, n_positions)
        rank = ranks.get("decoder", 0)
        shapes = {
            "bias": (n_ranges, dictionary_size),
            "gate": (n_ranges, dictionary_size),
            "table": (n_positions, d_model),
            "decoder_in": (n_ranges, dictionary_size, rank),
            "decoder_out": (n_ranges, rank, d_model),
        }
        for name, shape in shapes.items():
            there = name.split("_")[0] in ranks
            self.register_parameter(name, empty_weight(*shape, device=device) if there else None)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Begin at no effect; of the decoder's two factors one is random, or neither could learn."""
        for weight in (self.bias, self.gate, self.table, self.decoder_out):
            if weight is not None:
                nn.init.zeros_(weight)
        if self.decoder_in is not None:
            std = self.decoder_in.shape[1] ** -0.5
            nn.init.normal_(self.decoder_in, std=std, generator=generator)

    @property
    def decodes_by_range(self) -> bool:
        """Whether how a code is decoded depends on its range."""
        return self.decoder_in is not None and not self.is_shared

    @property
    def changes_activations(self) -> bool:
        """Whether what goes into the activation function depends on the range."""
        return self.bias is not None or self.gate is not None

    def n_numbers(self) -> int:
        """How many numbers are learned here."""
        return sum(weight.numel() for weight in self.parameters())

    def centred(self, scaled: Tensor, rows: Rows, alpha: float) -> Tensor:
        """Activations less the table's row of their position; both [rows, d_model], scaled units."""
        if self.table is None or alpha == 0.0:
            return scaled
        return torch.add(scaled, self._of_position(self.table, rows), alpha=-alpha)

    def activations(self, before: Tensor, rows: Rows, alpha: float) -> Tensor:
        """What goes into the activation function; [rows, dictionary_size]."""
        if alpha == 0.0 or not self.changes_activations:
            return before
        index = self._range_of_rows(rows, before.device)
        if self.gate is not None:
            before = before * (1 + alpha * self.gate)[index]
        if self.bias is not None:
            before = torch.add(before, self.bias[index], alpha=alpha)
        return before

    def decoded(self, decoded: Tensor, code: Tensor | SparseCode, rows: Rows, alpha: float) -> Tensor:
        """Reconstructions [rows, d_model], scaled units, with what range and position add to them."""
        if alpha == 0.0:
            return decoded
        if self.decoder_in is not None and self.decoder_out is not None:
            lengths = [len(code)] if self.is_shared else rows.needed_lengths()
            parts = zip(split(code, lengths), self.decoder_in, self.decoder_out, strict=True)
            added = torch.cat([part @ inner @ outer for part, inner, outer in parts])
            decoded = torch.add(decoded, added, alpha=alpha)
        if self.table is not None:
            decoded = torch.add(decoded, self._of_position(self.table, rows), alpha=alpha)
        return decoded

    def _of_position(self, table: Tensor, rows: Rows) -> Tensor:
        return table if self.is_shared else table[rows.needed_positions()]

    def _range_of_rows(self, rows: Rows, device: torch.device) -> Tensor:
        if self.is_shared:
            return torch.zeros((), dtype=torch.int64, device=device)
        lengths = rows.needed_lengths()
        index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        return index.to(device, non_blocking=True)


def _parse(form: str, d_model: int) -> dict[str, int]:
    """Each form that is wanted, with its rank, 0 for those that have none."""
    if form == "none":
        return {}
    found: dict[str, int] = {}
    for part in form.split("+"):
        name, _, rank_text = part.partition(":")
        rank = int(rank_text) if rank_text.isdecimal() else 0
        has_rank = name == "decoder"
        sound = 1 <= rank <= d_model if has_rank else part == name
        if name not in FORMS or name in found or not sound:
            raise SettingsError(
                f"position_adapter is {form}; it must be none, or some of bias, gate, table and decoder:R, "
                f"each once, joined by +, with a rank R from 1 to {d_model}"
            )
        found[name] = rank
    return found
