"""All quantizers of a model as three flat vectors, so that one operator serves every layer.

An entry is one (d, q_m): a layer has one, or one for each output channel or block of its inputs. Weights' quantizers
come first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from geta_hf.quantization.blocks import block_of_input, form_blocks, remaining_first
from geta_hf.quantization.functional import bit_width
from geta_hf.quantization.maths import block_count
from geta_hf.quantization.quantizer import Quantizer
from geta_hf.utils.label_sums import LabelSums
from geta_hf.utils.shards import Shard, add_up, local, shard_of

Named = Mapping[str, Tensor]
Values = tuple[Tensor, Tensor, Tensor]


class Quantizers:
    """The places of every quantizer's (d, q_m, t) in the flat vectors.

    Args:
        weights: weight name -> prefix of its quantizer's parameters; tied weights share one.
        activations: prefixes of the quantizers of layers' inputs.
        named: all trained parameters by name; their shapes give the number of entries of each quantizer.
        channel_dims: prefix -> the weight's dimension along which a quantizer of several entries runs.
        blocks: prefix -> the quantizer itself, where blocks of a channel's inputs have entries of their own.
        modules: prefix -> the quantizer of a weight itself, where it may get four levels at 2 bits. Default None: none.
        unsigned: prefixes of quantizers without negative codes, whose grids have as many steps as those of a bit more.

    Attributes:
        extra: fp32, shape (entries,): 1 for those, and 0 for all others.
        layer: int64, shape (entries,): the position in `prefixes` that an entry belongs to.
        weight_layers: how many of `prefixes` quantize weights.
        own_weights: the weight of each of these; of tied ones the first.
    """

    def __init__(
        self,
        weights: Mapping[str, str],
        activations: Sequence[str],
        named: Named,
        channel_dims: Mapping[str, int] | None = None,
        blocks: Mapping[str, Quantizer] | None = None,
        unsigned: Collection[str] = (),
        modules: Mapping[str, Quantizer] | None = None,
    ) -> None:
        self.weights = dict(weights)
        self.blocks = dict(blocks or {})
        self.modules = dict(modules or {})
        self.channel_dims = dict(channel_dims or {})
        # Tied weights share a prefix, and must not be listed, or counted, twice.
        of_weights = list(dict.fromkeys(weights.values()))
        self.prefixes = [*of_weights, *activations]
        self.weight_layers = len(of_weights)
        first = {prefix: weight for weight, prefix in reversed(self.weights.items())}
        self.own_weights = [first[prefix] for prefix in of_weights]
        sizes = [named[f"{prefix}.d"].numel() for prefix in self.prefixes]
        self._positions = {prefix: position for position, prefix in enumerate(self.prefixes)}
        self.sizes = sizes
        self.names = {leaf: [f"{prefix}.{leaf}" for prefix in self.prefixes] for leaf in ("d", "q_m", "t")}
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.spans = {p: slice(*ends[i : i + 2]) for i, p in enumerate(self.prefixes)}
        self._entries = torch.tensor(sizes, dtype=torch.int64)
        self.layer = torch.repeat_interleave(torch.arange(len(sizes)), self._entries)
        self._sums = LabelSums(self.layer)
        own = torch.tensor([float(prefix in unsigned) for prefix in self.prefixes])
        self.extra = own[self.layer]

    @property
    def input_prefixes(self) -> list[str]:
        """The prefixes of the quantizers of layers' inputs."""
        return self.prefixes[self.weight_layers :]

    def has_four_levels(self, prefix: str) -> bool:
        """Return whether the grid of all entries of a quantizer has four levels now."""
        own = self.modules.get(prefix)
        return own is not None and own.four_levels

    def may_have_four_levels(self, prefix: str) -> bool:
        """Return whether a quantizer may get four levels: one of a weight that is known."""
        own = self.modules.get(prefix)
        return own is not None and not own.unsigned

    def position(self, weight: str) -> int:
        """Return the position in `prefixes` of a weight's quantizer; -1 where it has none."""
        return self._positions.get(self.weights.get(weight, ""), -1)

    def input_positions(self) -> list[int]:
        """Return for each quantized weight the position of its layer's input among the inputs; -1 where it is float."""
        positions = {prefix: position for position, prefix in enumerate(self.input_prefixes)}
        layers = [weight.rpartition(".")[0] for weight in self.own_weights]
        return [positions.get(f"{layer}.input_quantizer", -1) for layer in layers]

    def to(self, device: torch.device) -> None:
        """Keep the index of layers, and their numbers of entries, where the parameters are."""
        if self.layer.device != device:
            self._sums = LabelSums(self.layer, device)
            self.layer = self.layer.to(device)
            self.extra = self.extra.to(device)
        self._entries = self._entries.to(device)

    def read(self, named: Named) -> Values:
        """Return (d, q_m, t) of all entries on every process, fp32, shape (entries,) each; t is 1 if not trained."""
        d = self.gather("d", named, 0.0)
        q_m = self.gather("q_m", named, 0.0)
        t = self.gather("t", named, 1.0)
        return d, q_m, t

    @torch.no_grad()
    def gather(self, leaf: str, named: Named, missing: float, gradient: bool = False) -> Tensor:
        """Return one parameter of all quantizers, or its gradient, shape (entries,); `missing` where there is none."""
        found = [named.get(name) for name in self.names[leaf]]
        device = self.layer.device
        # t is not trained by default, and then no parameter of that name is in the optimizer.
        if all(parameter is None for parameter in found):
            return torch.full(self.layer.shape, missing, device=device)
        if any(shard_of(parameter) is not None for parameter in found if parameter is not None):
            return self._gather_shards(found, missing, gradient)
        values = [p.grad if gradient and p is not None else p for p in found]
        default = torch.full((1,), missing, device=device)
        pairs = zip(values, self.sizes, strict=True)
        return torch.cat([(default if value is None else value).reshape(-1).expand(size) for value, size in pairs])

    def _gather_shards(self, found: Sequence[Tensor | None], missing: float, gradient: bool) -> Tensor:
        """Do as `gather` does where every process holds some of the entries."""
        flat = torch.zeros(self.layer.shape, device=self.layer.device)
        absent: list[slice] = []
        held: Shard | None = None
        for parameter, span in zip(found, self.spans.values(), strict=True):
            value = parameter.grad if gradient and parameter is not None else parameter
            if parameter is None or value is None:
                absent.append(span)
                continue
            shard = shard_of(parameter)
            assert shard is not None
            held = shard
            # A parameter of one entry that serves all channels is held by one process alone.
            place = flat[span] if parameter.numel() == 1 else flat[span].view(parameter.shape)[shard.start : shard.stop]
            if shard.stop > shard.start:
                place.copy_(local(value.detach()).expand(place.shape))
        # Zeros elsewhere, so the sum over processes is the value of the one that holds an entry.
        add_up(flat, held)
        for span in absent:
            flat[span] = missing
        return flat

    @torch.no_grad()
    def write_step_sizes(self, flat: Tensor, named: Named) -> None:
        """Set every d from a vector of shape (entries,)."""
        self._write("d", flat, named)

    @torch.no_grad()
    def write_clipping(self, flat: Tensor, named: Named) -> None:
        """Set every q_m from a vector of shape (entries,)."""
        self._write("q_m", flat, named)

    def _write(self, leaf: str, flat: Tensor, named: Named) -> None:
        targets = []
        values = []
        for name, part in zip(self.names[leaf], flat.split(self.sizes), strict=True):
            shard = shard_of(named[name])
            targets.append(local(named[name].detach()))
            part = part.view(named[name].shape)
            values.append(part if shard is None else part[shard.start : shard.stop])
        if targets:
            # In place, since the base optimizer's state belongs to these very tensors.
            torch._foreach_copy_(targets, values)

    def input_squares(self, named: Named) -> Tensor:
        """Return (d · ∂f/∂d)² = ⟨g, x^Q - x⟩² of every quantized input, shape (inputs,); 0 without a gradient."""
        change = self.gather("d", named, 0.0) * self.gather("d", named, 0.0, gradient=True)
        # An input has one step size, and inputs come last.
        return change[len(change) - len(self.input_prefixes) :] ** 2

    def along(self, prefix: str, flat: Tensor, dims: int) -> Tensor:
        """Return one weight's entries of a flat vector, shaped to multiply the full weight of `dims` dimensions."""
        values = flat[self.spans[prefix]]
        if values.numel() == 1:
            return values
        shape = [1] * dims
        shape[self.channel_dims[prefix]] = -1
        return values.view(shape)

    def block_table(self, prefix: str, flat: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the entries of one weight's blocks, and which inputs are in them.

        Returns:
            Values of shape (out, blocks), the block of each input, int64, shape (in,), and the weight's output dim.
        """
        own = self.blocks[prefix]
        assert own.order is not None and own.channel_dim is not None
        table = flat[self.spans[prefix]].view(-1, block_count(len(own.order)))
        return table, block_of_input(len(own.order), own.block_order, flat.device), own.channel_dim

    @torch.no_grad()
    def form_blocks(self, prefix: str, removed: Tensor, named: Named) -> None:
        """Form the blocks of one weight over the inputs that remain, and take (d, q_m) over, in place.

        Args:
            prefix: of a quantizer with blocks.
            removed: bool, shape (in,), on CPU: inputs that are zero for good.
            named: parameters by name.
        """
        own = self.blocks[prefix]
        assert own.order is not None
        order = remaining_first(removed)
        # Listed once, as formed blocks are those of every later call.
        if torch.equal(own.order.cpu(), order):
            return
        d, q_m = (local(named[f"{prefix}.{leaf}"].detach()) for leaf in ("d", "q_m"))
        if len(d):
            formed = form_blocks(d, q_m, own.block_order, order, int((~removed).sum()))
            d.copy_(formed[0])
            q_m.copy_(formed[1])
        own.set_order(order)

    def of_weights(self, values: Tensor) -> Tensor:
        """Return values of weights' layers, shape (weight_layers,), for every entry; 0 for those of activations."""
        # `layer` numbers inputs after weights, so they need an entry to point to.
        return torch.cat([values, values.new_zeros(len(self.prefixes) - self.weight_layers)])[self.layer]

    def by_layer(self, entries: Tensor) -> Tensor:
        """Return the mean over each layer's entries, shape (layers,)."""
        total = torch.zeros(len(self.prefixes), device=entries.device)
        self._sums.add_to(total, entries)
        return total / self._entries

    def bits(self, named: Named) -> Tensor:
        """Return the present width of every layer, real, shape (layers,); over channels the mean."""
        return self.by_layer(bit_width(*self.read(named)) - self.extra)
